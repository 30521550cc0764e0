"""Speed of greedy generation: gpt2mini beside transformers, CTranslate2 and llama.cpp, in one run.

    python tests/benchmarks/generation.py                  # GPT-2 124M, 128 tokens, 1 and 8 rows
    python tests/benchmarks/generation.py --rows gpt2mini:int8 ctranslate2:int8 --batch-sizes 1
    python tests/benchmarks/generation.py --size gpt2-nano --tokens 32 --repeats 1     # a quick try
    python tests/benchmarks/generation.py --device cuda

All continue the same prompt with the same weights (random ones, or gpt2-nano's) by the same number
of tokens, with their key/value caches; nothing ends early. Each has a process of its own, with
pinned threads, warms up, and the median of its runs counts.

To write a token, every weight is read once. The ceiling is how often a second this machine gets
through one matrix as large as all of them together, times a row for each text, in the same format,
with the same kernel, in the same process; the share of it that is reached stands beside each speed.
Needs transformers; CTranslate2 (`pip install ctranslate2`) and llama.cpp (`pip install
llama-cpp-python gguf`) are left out where they are missing.
"""

import argparse
import importlib
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from measuring import (
    add_machine_flags,
    machine,
    measure_in_own_process,
    model_of_size,
    seconds_of,
)
from torch import Tensor
from torch.nn import functional as F

from gpt2mini import GPT2

ROWS = ["transformers:fp32", "transformers:bf16", "ctranslate2:int8"]
ROWS += ["llama.cpp:fp16", "llama.cpp:int8", "llama.cpp:int4"]
ROWS += ["gpt2mini:fp32", "gpt2mini:bf16", "gpt2mini:fp16", "gpt2mini:int8", "gpt2mini:int4"]
OPTIONAL = {  # peers that may be missing: their packages' names on PyPI and in Python
    "ctranslate2": {"ctranslate2": "ctranslate2"},
    "llama.cpp": {"llama-cpp-python": "llama_cpp", "gguf": "gguf"},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT_TOKENS = 16

# Writes so many tokens after each row of the prompt; the ids of all, or of the new ones alone.
Write = Callable[[Tensor, int], Tensor]


def main() -> None:
    args = parse_arguments()
    if args.worker:
        print(json.dumps(measure(args)))
        return
    rows = [row for row in ROWS if row in args.rows]
    for peer, packages in OPTIONAL.items():
        of_peer = [row for row in rows if row.startswith(peer)]
        if of_peer and not all(map(importlib.util.find_spec, packages.values())):
            print(f"{peer} is left out: pip install {' '.join(packages)}")
            rows = [row for row in rows if row not in of_peer]
    print(f"{args.size}, greedy, {args.tokens} tokens, {machine(args)}")
    print(
        f"{'tokens/s (share of the ceiling)':32}" + "".join(f"{b:>14} x" for b in args.batch_sizes)
    )
    speeds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(args.size, Path(folder))
        flags = ["--folder", folder, "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
        flags += ["--threads", str(args.threads), "--device", str(args.device)]
        flags += ["--batch-sizes", *map(str, args.batch_sizes)]
        for row in rows:
            found = measure_in_own_process(__file__, flags, row, "-W", "ignore")
            speeds[row] = found["speeds"]
            shares = [f"({s / c:.0%})" if c else "" for s, c in zip(*found.values(), strict=True)]
            cells = zip(speeds[row], shares, strict=True)
            print(f"{row:32}" + "".join(f"{s:9.1f} {share:>6}" for s, share in cells), flush=True)
    for number, batch_size in enumerate(args.batch_sizes):
        print_ratios({row: found[number] for row, found in speeds.items()}, batch_size)


def print_ratios(speeds: dict[str, float], batch_size: int) -> None:
    """The best of ours in floating point, in int8 and in int4, beside the best of each peer."""
    ours = {row: speed for row, speed in speeds.items() if row.startswith("gpt2mini")}
    int8, int4 = ({r: s for r, s in ours.items() if r.endswith(bits)} for bits in ("int8", "int4"))
    in_floats = {row: speed for row, speed in ours.items() if row not in int8 | int4}
    for peer in ("transformers", *OPTIONAL):
        theirs = {row: speed for row, speed in speeds.items() if row.startswith(peer)}
        for mine in (in_floats, int8, int4):
            if theirs and mine:
                best, rival = max(mine, key=mine.__getitem__), max(theirs, key=theirs.__getitem__)
                ratio = mine[best] / theirs[rival]
                print(f"batch {batch_size}: {best} / {rival}: {ratio:.2f} x")


# ---- one contestant, in a process of its own


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    library, precision = args.worker.split(":")
    torch.set_num_threads(args.threads)
    build = {"transformers": theirs, "ctranslate2": ctranslate2s, "gpt2mini": ours}
    build["llama.cpp"] = llama_cpps
    write = build[library](Path(args.folder), precision, args)
    vocab = GPT2.from_pretrained(args.folder).config.vocab_size
    prompt = torch.randint(
        vocab - 1, (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0)
    )
    speeds, ceilings = [], []
    for batch_size in args.batch_sizes:
        rows = prompt.expand(batch_size, -1).contiguous().to(args.device)
        write(rows, 4)
        seconds = median_seconds(partial(write, rows, args.tokens), args.repeats, args.device)
        speeds.append(batch_size * args.tokens / seconds)
    if library == "gpt2mini":
        ceilings = ceilings_of(Path(args.folder), precision, args)
    return {"speeds": speeds, "ceilings": ceilings or [0.0] * len(speeds)}


def median_seconds(run: Callable[[], object], repeats: int, device: torch.device) -> float:
    return statistics.median(seconds_of(run, device) for _ in range(repeats))


def ours(folder: Path, precision: str, args: argparse.Namespace) -> Write:
    from gpt2mini import generate

    if in_few_bits(precision, args.device):
        model = GPT2.from_pretrained(folder, device=args.device).quantize(precision)
    else:
        model = GPT2.from_pretrained(folder, DTYPES[precision], args.device)
    return lambda rows, tokens: generate(model, rows, tokens, temperature=0).token_ids


def in_few_bits(precision: str, device: torch.device) -> bool:
    """Whether `quantize` is to give the format. A GPU computes in two bytes as fast as it reads
    them, so there it is the dtype of the whole model."""
    return precision in ("int8", "int4") or (precision != "fp32" and device.type == "cpu")


def theirs(folder: Path, precision: str, args: argparse.Namespace) -> Write:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = DTYPES[precision]
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=dtype).to(args.device)
    model.eval()
    model.generation_config.eos_token_id = None  # nothing ends early
    model.generation_config.pad_token_id = 0

    def write(rows: Tensor, tokens: int) -> Tensor:
        mask = torch.ones_like(rows)
        return model.generate(rows, attention_mask=mask, max_new_tokens=tokens, do_sample=False)

    return write


def ctranslate2s(folder: Path, precision: str, args: argparse.Namespace) -> Write:
    ctranslate2 = importlib.import_module("ctranslate2")
    converters = importlib.import_module("ctranslate2.converters")
    converted = str(folder / "ctranslate2")
    converters.TransformersConverter(str(folder)).convert(
        converted, quantization=precision, force=True
    )
    generator = ctranslate2.Generator(
        converted,
        device=args.device.type,
        compute_type=precision,
        inter_threads=1,
        intra_threads=args.threads,
    )

    def write(rows: Tensor, tokens: int) -> Tensor:
        results = generator.generate_batch(
            [[f"t{i}" for i in row] for row in rows.tolist()],
            min_length=tokens,
            max_length=tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        ids = [result.sequences_ids[0] for result in results]
        assert all(len(row) == tokens for row in ids)
        return torch.tensor(ids)

    return write


def llama_cpps(folder: Path, precision: str, args: argparse.Namespace) -> Write:
    import llama_cpp_model

    path = folder / f"{precision}.gguf"
    model = GPT2.from_pretrained(folder)
    llama_cpp_model.write_gguf(model, path, precision)
    return llama_cpp_model.load(path, args.threads, PROMPT_TOKENS + args.tokens)


@torch.no_grad()
def ceilings_of(folder: Path, precision: str, args: argparse.Namespace) -> list[float]:
    """Tokens a second, if generation were nothing but one matrix product over all the weights."""
    from gpt2mini.kernels import FewRowsLinear
    from gpt2mini.quantize import quantized_linear

    model = GPT2.from_pretrained(folder)
    into = model.config.emb_dim
    weights = [p for p in model.parameters() if p.ndim == 2 and p is not model.pos_emb.weight]
    matrix = torch.randn(sum(w.numel() for w in weights) // into, into, device=args.device)
    dtype = torch.float32
    product: Callable[[Tensor], Tensor]
    if in_few_bits(precision, args.device):
        product = quantized_linear(matrix, None, precision).eval()
    else:
        dtype = DTYPES[precision]
        product = partial(F.linear, weight=matrix.to(dtype))
    ceilings = []
    for batch_size in args.batch_sizes:
        rows = torch.randn(batch_size, into, device=args.device, dtype=dtype)
        few = 2 <= batch_size <= 32 and dtype == torch.float32 and args.device.type == "cpu"
        with FewRowsLinear() if few else nullcontext():
            product(rows)
            seconds = median_seconds(partial(product, rows), repeats=7, device=args.device)
        ceilings.append(batch_size / seconds)
    return ceilings


# ---- the model that all of them load


def save_model(size: str, folder: Path) -> None:
    """A model folder, with a vocabulary of made-up words for converters that ask for one."""
    model = model_of_size(size)
    model.save_pretrained(folder)
    last = model.config.vocab_size - 1
    words = {f"t{i}": i for i in range(last)} | {"<|endoftext|>": last}
    tokenizer = {"tokenizer_class": "GPT2Tokenizer"}
    for name, text in (
        ("vocab.json", json.dumps(words)),
        ("merges.txt", "#version: 0.2\n"),
        ("tokenizer_config.json", json.dumps(tokenizer)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... or gpt2-nano")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="which to measure")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=128, help="written in each run")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each")
    add_machine_flags(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
