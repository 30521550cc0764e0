"""All claims of speed in one table: each beside its peer, beside what was aimed at.

    python tests/benchmarks/speed_table.py --data english/ chinese/      # hours on two cores
    python tests/benchmarks/speed_table.py --rows training --precisions fp32
    python tests/benchmarks/speed_table.py --quick                       # small sizes: does it run?
    python tests/benchmarks/speed_table.py --rows training memory lora generation --device cuda

It runs the benchmarks beside it and prints what they print, then the ratios. Ours counts at its
faster precision, and so does the peer where the row says "its best". Training is also measured
against the machine: the share of the speed of one large matrix product, timed in the same run, that
a step reaches with the work it cannot do without: 6 operations per weight and token, the head's
weights included (2 forward, 4 backward), and those of attention, 6 * layers * emb * tokens, of
which causality has taken half. What is computed twice to save memory does not count.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lora
import tokenizing
import torch
import training_step
from measuring import add_step_flags, measure_in_own_process, seconds_of

from gpt2mini import GPT2, GPT2Config

BATCH_SIZE, TOKENS, LONG = 4, 512, 1024


@dataclass(frozen=True)
class Row:
    what: str
    peer: str
    aim: str
    measured: str


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.worker:
        print(json.dumps(matrix_product(args)))
        return
    table: list[Row] = []
    for name in args.rows:
        print(f"\n---- {name}", flush=True)
        table += MEASUREMENTS[name](args)
    print("\n| what | peer | aim | measured |\n|---|---|---|---|")
    for row in table:
        print(f"| {row.what} | {row.peer} | {row.aim} | {row.measured} |")


# ---- training


def training(args: argparse.Namespace) -> list[Row]:
    tokens = 64 if args.quick else TOKENS
    libraries = ["--libraries", *training_step.FAST]
    found = training_step.compare([*step_flags(args, tokens), *libraries])
    what = f"training step, {BATCH_SIZE} x {tokens}, speed"
    rows = speed_rows(what, found, "transformers", {"bf16": "4 x"})
    rows += speed_rows(what, found, "transformers-compiled", {"bf16": "2.5 x", "fp32": "2.5 x"})
    for precision in args.precisions:
        worker = measure_in_own_process(__file__, sys.argv[1:], precision)
        ours = max(found[name, precision]["speed"] for name in ("gpt2mini", "gpt2mini-compiled"))
        speed = ours * operations_per_token(args, tokens)
        peer = f"a matrix product in {precision}, {worker['speed'] / 1e9:.0f} GFLOP/s"
        rows.append(Row(f"{what}, operations", peer, "-", f"{speed / worker['speed']:.0%} of it"))
    return rows


def speed_rows(
    what: str, found: training_step.Results, library: str, aims: dict[str, str]
) -> list[Row]:
    """Ours at its best, compiled or not, beside each precision of the peer's."""
    ours = max(figures["speed"] for key, figures in found.items() if key[0].startswith("gpt2mini"))
    theirs = {key[1]: figures["speed"] for key, figures in found.items() if key[0] == library}
    return [
        Row(
            what,
            f"{library} {precision}" + (", its best" if speed == max(theirs.values()) else ""),
            aims.get(precision, "-"),
            f"{ours / speed:.2f} x",
        )
        for precision, speed in theirs.items()
    ]


def memory(args: argparse.Namespace) -> list[Row]:
    tokens = 128 if args.quick else LONG
    libraries = ["--libraries", "transformers", "gpt2mini", "gpt2mini-recomputed"]
    found = training_step.compare([*step_flags(args, tokens), "--steps", "1", *libraries])
    return [
        Row(
            f"{name}: training step, {BATCH_SIZE} x {tokens}, peak memory, {precision}",
            "transformers",
            "at most 0.4 x",
            f"{found[name, precision]['peak'] / found['transformers', precision]['peak']:.2f} x",
        )
        for precision in args.precisions
        for name in ("gpt2mini", "gpt2mini-recomputed")
    ]


def lora_step(args: argparse.Namespace) -> list[Row]:
    tokens = 64 if args.quick else TOKENS
    found = lora.compare(step_flags(args, tokens))
    return speed_rows(
        f"LoRA step, {BATCH_SIZE} x {tokens}, speed", found, "peft", {"bf16": "2.5 x"}
    )


def step_flags(args: argparse.Namespace, tokens: int) -> list[str]:
    sizes = {"--batch-size": BATCH_SIZE, "--tokens": tokens, "--threads": args.threads}
    sizes |= {"--device": args.device}
    sizes |= {"--steps": 1 if args.quick else args.steps}
    sizes |= {"--layers": 2} if args.quick else {}
    flags = [str(part) for flag_and_value in sizes.items() for part in flag_and_value]
    return [*flags, "--precisions", *args.precisions]


def operations_per_token(args: argparse.Namespace, tokens: int) -> float:
    config = GPT2Config(n_layers=2) if args.quick else GPT2Config()
    with torch.device("meta"):
        model = GPT2(config)
    weights = sum(parameter.numel() for parameter in model.trf_blocks.parameters())
    weights += config.vocab_size * config.emb_dim  # the head
    return 6 * weights + 6 * config.n_layers * config.emb_dim * tokens


def matrix_product(args: argparse.Namespace) -> dict[str, float]:
    """Operations per second of one large product, the fastest of a few seconds' worth; --worker is
    the precision."""
    torch.set_num_threads(args.threads)
    side = 512 if args.quick else 2048 if args.device.type == "cpu" else 8192
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.worker]
    a, b = torch.randn(2, side, side).to(args.device, dtype).unbind()
    seconds: list[float] = []
    while sum(seconds) < (0.1 if args.quick else 10) or len(seconds) < 3:
        seconds.append(seconds_of(lambda: a @ b, args.device))
    return {"speed": 2 * side**3 / min(seconds)}


# ---- the others


def generation(args: argparse.Namespace) -> list[Row]:
    """Another script's table, as it prints it."""
    script = Path(__file__).with_name("generation.py")
    flags = ["--threads", str(args.threads), "--device", str(args.device)]
    if args.quick:
        flags += ["--size", "gpt2-nano", "--tokens", "16", "--repeats", "1"]
    subprocess.run([sys.executable, script, *flags], check=True)
    return [Row("generation, speed", "transformers, CTranslate2", "-", "see above")]


def tokenizing_rows(args: argparse.Namespace) -> list[Row]:
    if not args.data:
        return [Row("tokenizing", "one-process tiktoken", "number of cores", "needs --data")]
    size = ["--megabytes", "5"] if args.quick else []
    flags = ["--tokenizer", args.tokenizer, "--no-training", *size]
    found = tokenizing.compare(["--data", *args.data, *flags])
    ratio = found["gpt2mini"]["speed"] / found["tiktoken"]["speed"]
    cores = f"{tokenizing.core_count()} cores"
    return [Row("tokenizing, speed", "one-process tiktoken", cores, f"{ratio:.2f} x")]


MEASUREMENTS: dict[str, Callable[[argparse.Namespace], list[Row]]] = {
    "training": training,
    "memory": memory,
    "lora": lora_step,
    "generation": generation,
    "tokenizing": tokenizing_rows,
}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(MEASUREMENTS)
    parser.add_argument("--rows", nargs="+", default=names, choices=names, help="default: all")
    parser.add_argument("--quick", action="store_true", help="small sizes, which say nothing")
    parser.add_argument("--data", nargs="+", default=[], help="of tokenizing.py: .txt files")
    parser.add_argument("--tokenizer", default="gpt2-nano", help="of tokenizing.py")
    add_step_flags(parser)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
