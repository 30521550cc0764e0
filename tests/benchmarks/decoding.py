"""How near decoding comes to the limit that memory sets, for each format of the weights.

    python tests/benchmarks/decoding.py                          # GPT-2 124M, 1, 8 and 16 texts
    python tests/benchmarks/decoding.py --formats fp32 int8 --batch-sizes 1
    python tests/benchmarks/decoding.py --profile --formats int8   # where the time of a step goes
    python tests/benchmarks/decoding.py --size gpt2-nano --tokens 16 --repeats 1     # a quick try

A decoding step reads every weight once, whatever the number of texts, and the cached keys and
values of each text. The table has these bytes, how many a second were read, and which share that is
of the bandwidth: the best of several kernels that do nothing but read a buffer of 256 MB, in the
same run with the same threads. With many texts arithmetic is the limit, not memory.

Steps are greedy, with the weights of gpt2-nano or random ones. The prompt is read before: its time
is that of a run that writes one token, and is taken off. Each format has a process of its own, with
pinned threads, and warms up; the median of its runs counts. The profile adds up the operations that
torch.profiler has seen; what they leave of the time of a step without it is Python's.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
from measuring import (
    add_machine_flags,
    machine,
    measure_in_own_process,
    model_of_size,
    seconds_of,
)
from torch import Tensor, nn

from gpt2mini import GPT2, generate

FORMATS = ["fp32", "bf16", "fp16", "int8", "int4"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PROMPT_TOKENS = 16
# The first part of which a name is found in that of an operation has its time.
PARTS = {
    "matrix products": ("mm", "linear", "matmul", "mv"),
    "attention": ("scaled_dot_product",),
    "LayerNorm, GELU, sums": ("layer_norm", "gelu", "aten::add", "aten::mul"),
    "copies, other dtypes": ("copy", "clone", "cat", "empty", "fill", "pad", "stack"),
    "the choice of a token": ("softmax", "max", "gather", "where", "isin", "all", "any", "eq"),
    "other operations": ("",),
}


def main() -> None:
    args = parse_arguments()
    if args.worker:
        torch.set_num_threads(args.threads)
        work = {"bandwidth": measure_bandwidth, "profile": profile_step}.get(args.part, measure)
        print(json.dumps(work(args)))
        return
    if args.profile:
        print_profiles(args)
    else:
        print_table(args)


def in_own_process(args: argparse.Namespace, part: str, weights: str) -> dict:
    flags = ["--part", part, "--size", args.size, "--tokens", str(args.tokens)]
    flags += ["--repeats", str(args.repeats), "--threads", str(args.threads)]
    flags += ["--device", str(args.device), "--batch-sizes", *map(str, args.batch_sizes)]
    return measure_in_own_process(__file__, flags, weights, "-W", "ignore")


def print_table(args: argparse.Namespace) -> None:
    found = in_own_process(args, "bandwidth", "fp32")
    kernel = max(found, key=found.__getitem__)
    print(f"{args.size}, {args.tokens} steps, {machine(args)}")
    print(f"bandwidth: {found[kernel]:.1f} GB/s, by {kernel}, the best of {', '.join(found)}")
    print("format   texts   tokens/s   weights MB   cache MB    GB/s   share of the bandwidth")
    for weights in args.formats:
        for row in in_own_process(args, "speeds", weights)["rows"]:
            read = (row["weights"] + row["cache"]) / row["seconds"] / 1e9
            print(
                f"{weights:6} {row['texts']:7} {row['texts'] / row['seconds']:10.1f} "
                f"{row['weights'] / 1e6:12.1f} {row['cache'] / 1e6:10.1f} {read:7.2f} "
                f"{read / found[kernel]:12.0%}",
                flush=True,
            )


def print_profiles(args: argparse.Namespace) -> None:
    print(f"{args.size}, milliseconds of a step, {machine(args)}")
    for weights in args.formats:
        for texts, parts in in_own_process(args, "profile", weights).items():
            whole = sum(parts.values())
            print(f"{weights}, {texts} texts: {1000 * whole:.2f}")
            for part, seconds in parts.items():
                print(f"    {part:24}{1000 * seconds:8.2f} {seconds / whole:6.0%}", flush=True)


# ---- one format, in a process of its own


def measure(args: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    model = model_of(args)
    weights = sum(tensor.nbytes for tensor in weights_read(model))
    return {
        "rows": [
            {
                "texts": texts,
                "seconds": seconds_of_step(model, texts, args),
                "weights": weights,
                "cache": cache_bytes(model, texts, args.tokens),
            }
            for texts in args.batch_sizes
        ]
    }


def seconds_of_step(model: GPT2, texts: int, args: argparse.Namespace) -> float:
    write = partial(write_texts, model, texts, args)
    write(4)
    times = [
        seconds_of(partial(write, args.tokens + 1), args.device)
        - seconds_of(partial(write, 1), args.device)
        for _ in range(args.repeats)
    ]
    return statistics.median(times) / args.tokens


def write_texts(model: GPT2, texts: int, args: argparse.Namespace, tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    prompt = torch.randint(model.config.vocab_size - 1, (texts, PROMPT_TOKENS), generator=draw)
    generate(model, prompt.to(args.device), tokens, temperature=0)


def model_of(args: argparse.Namespace) -> GPT2:
    weights, model = args.worker, model_of_size(args.size).to(args.device)
    if weights == "fp32":
        return model
    # A GPU computes in two bytes as fast as it reads them: there it is the model's dtype.
    if weights in DTYPES and args.device.type != "cpu":
        return model.to(DTYPES[weights])
    return model.quantize(weights)


def weights_read(model: GPT2) -> Iterator[Tensor]:
    """The tensors that a step reads as a whole; of the embeddings it reads a row for each text."""
    yield from stored_tensors(model.trf_blocks)
    yield from stored_tensors(model.final_norm)
    if model.out_head.state_dict():
        yield from stored_tensors(model.out_head)
    else:  # a tied head reads the embedding
        yield model.tok_emb.weight


def stored_tensors(module: nn.Module) -> Iterator[Tensor]:
    for value in module.state_dict().values():  # packed layers give a dict of theirs
        values = value.values() if isinstance(value, dict) else [value]
        yield from (tensor for tensor in values if tensor is not None)


def cache_bytes(model: GPT2, texts: int, steps: int) -> float:
    """Keys and values of a step, on average: the text grows by a token with each."""
    config, bytes_each = model.config, model.tok_emb.weight.element_size()
    length = PROMPT_TOKENS + (steps + 1) / 2
    return 2 * config.n_layers * config.emb_dim * bytes_each * texts * length


def measure_bandwidth(args: argparse.Namespace) -> dict[str, float]:
    """GB/s of kernels that read a buffer much larger than any cache."""
    buffer = torch.randn(64 * 2**20, device=args.device)  # 256 MB
    matrix, vector = buffer.view(-1, 1024), torch.randn(1024, device=args.device)
    kernels: dict[str, Callable[[], object]] = {
        "sum": buffer.sum,
        "maximum": buffer.max,
        "matrix times vector": lambda: matrix @ vector,
    }
    for read in kernels.values():
        read()
    return {
        name: buffer.nbytes / 1e9 / min(seconds_of(read, args.device) for _ in range(10))
        for name, read in kernels.items()
    }


def profile_step(args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Seconds of a step that each of `PARTS` takes, for each number of texts."""
    model = model_of(args)
    return {texts: profile_texts(model, texts, args) for texts in args.batch_sizes}


def profile_texts(model: GPT2, texts: int, args: argparse.Namespace) -> dict[str, float]:
    whole = seconds_of_step(model, texts, args)
    parts = dict.fromkeys(PARTS, 0.0)
    for tokens, sign in ((args.tokens + 1, 1), (1, -1)):
        with torch.profiler.profile() as profiler:
            write_texts(model, texts, args, tokens)
        for event in profiler.key_averages():
            seconds = event.self_cpu_time_total / 1e6 / args.tokens
            parts[part_of(event.key)] += sign * seconds
    return parts | {"Python": whole - sum(parts.values())}


def part_of(operation: str) -> str:
    return next(part for part, names in PARTS.items() if any(n in operation for n in names))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2", help="gpt2, gpt2-medium, ... or gpt2-nano")
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--tokens", type=int, default=64, help="steps in each run")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each")
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    add_machine_flags(parser)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
