"""The engine of the explorer page in node: plain JavaScript beside its WebAssembly kernel.

    python tests/benchmarks/explorer_speed.py                 # gpt2-nano, int8
    python tests/benchmarks/explorer_speed.py --model FOLDER --precision float16

Each row is what a reader of the page waits for, without drawing: the fastest of some runs in one
process, in milliseconds of CPU time and of waiting.
"""

import argparse
import base64
import json
import subprocess
import tempfile
from pathlib import Path

import gpt2mini
from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.inspection.explorer.weights import pack_weights

EXPLORER = Path(gpt2mini.__file__).parent / "inspection" / "explorer"
SCRIPT = Path(__file__).with_suffix(".mjs")
CONFIG = ("n_layers", "n_heads", "emb_dim", "vocab_size", "context_length", "gelu")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2-nano")
    parser.add_argument("--precision", default="int8", choices=("int8", "float16"))
    parser.add_argument("--runs", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.json"
        page.write_text(json.dumps(page_of(args.model, args.precision)), encoding="utf-8")
        command = ["node", str(SCRIPT), EXPLORER.as_uri(), str(page), str(args.runs)]
        subprocess.run(command, check=True)


def page_of(name: str, precision: str) -> dict[str, object]:
    """What the script reads: what a page holds, without the page."""
    model, tokenizer = GPT2.from_pretrained(name), Tokenizer.from_pretrained(name)
    index, blob = pack_weights(model, precision)
    config = {field: getattr(model.config, field) for field in CONFIG}
    return {
        "models": [{"config": config, "tensors": index}],
        "blobs": [base64.b64encode(blob).decode()],
        "kernel": base64.b64encode((EXPLORER / "model" / "kernel.wasm").read_bytes()).decode(),
        "tokenizer": base64.b64encode(pack_tokenizer(tokenizer)).decode(),
    }


if __name__ == "__main__":
    main()
