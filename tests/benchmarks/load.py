"""Loading beside `transformers`: time of a fresh process, time of the load alone, peak memory.

    python tests/benchmarks/load.py                          # a random gpt2, made for the purpose
    python tests/benchmarks/load.py --folder models/gpt2     # genuine weights

Processes alternate, each loads three times; the first load counts, since that is what a user waits
for. Memory is what the process grew by at its peak, beside the size of the weights.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LOAD = """
import json, resource, sys, time
began = time.perf_counter()
import torch
if sys.argv[1] == "gpt2mini":
    from gpt2mini import GPT2 as Model
else:
    from transformers import GPT2LMHeadModel as Model
    from transformers.utils import logging
    logging.disable_progress_bar()
imported = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loads = []
for _ in range(3):
    start = time.perf_counter()
    model = Model.from_pretrained(sys.argv[2], dtype=getattr(torch, sys.argv[3]))
    loads.append(time.perf_counter() - start)
    if len(loads) == 1:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        weights = sum(p.nbytes for p in model.parameters())
    del model
print(json.dumps({
    "process": imported - began + loads[0], "first": loads[0], "best": min(loads),
    "memory": grown * 1024 / weights,
}))
"""
PACKAGES = ("gpt2mini", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="a Hugging Face folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or random_gpt2(Path(temporary))
        runs: dict[str, list[dict[str, float]]] = {package: [] for package in PACKAGES}
        for _ in range(args.runs):
            for package in PACKAGES:
                runs[package].append(load(package, folder, args.dtype))
    print("                               gpt2mini  transformers  ratio")
    for key, name, unit in (
        ("process", "import and load", "s"),
        ("first", "load, the first", "s"),
        ("best", "load, the best of three", "s"),
        ("memory", "peak memory / weights", "x"),
    ):
        ours, theirs = (statistics.median(run[key] for run in runs[p]) for p in PACKAGES)
        print(f"{name:30} {ours:6.2f} {unit} {theirs:11.2f} {unit} {ours / theirs:6.2f}")


def load(package: str, folder: str | Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", LOAD, package, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def random_gpt2(folder: Path) -> Path:
    from gpt2mini import GPT2, GPT2Config

    GPT2(GPT2Config()).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
