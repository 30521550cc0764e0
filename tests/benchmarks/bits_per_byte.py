"""Bits per byte of a model on whole texts, each token with at least half a context before it.

python tests/benchmarks/bits_per_byte.py BOOK.txt ...
python tests/benchmarks/bits_per_byte.py --model gpt2 BOOK.txt ...
python tests/benchmarks/bits_per_byte.py --quantize int4 BOOK.txt ...    # what rounding costs
"""

import argparse
import math
from pathlib import Path

from gpt2mini import GPT2, Tokenizer
from gpt2mini.evaluation import perplexity
from gpt2mini.quantized_layers import FORMATS


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--model", default="gpt2-nano")
    parser.add_argument("--characters", type=int, help="only the first so many of each file")
    parser.add_argument("--quantize", choices=FORMATS, help="round the weights to fewer bits")
    args = parser.parse_args()
    model, tokenizer = GPT2.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    if args.quantize:
        model.quantize(args.quantize)
    nats = length = 0.0
    for file in args.files:
        text = file.read_text(encoding="utf-8")[: args.characters]
        found = perplexity(model, tokenizer, text)
        print(f"{found.bits_per_byte:.3f} bits a byte, {found.bytes:>9,} bytes  {file.name}")
        nats, length = nats + found.nats, length + found.bytes
    print(f"{nats / math.log(2) / length:.3f} bits a byte over all")


if __name__ == "__main__":
    main()
