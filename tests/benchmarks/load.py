"""Loading beside `transformers`: time of a fresh process, of the load alone and its parts, memory.

    python tests/benchmarks/load.py                          # a random gpt2, made for the purpose
    python tests/benchmarks/load.py --dtype bfloat16         # both have to convert, so both copy
    python tests/benchmarks/load.py --folder models/gpt2     # genuine weights

Processes alternate, each loads three times; the first load counts, since that is what a user waits
for. `transformers` maps the file where it has the dtype asked for, and reads a weight when it is
first used; so one row is the load and a pass over all weights. gpt2mini copies: most matrices lie
the other way round in the file, and a mapped model changes, or crashes, when somebody writes into
its file. Memory is what the process grew by at its peak, beside the size of the weights.
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
dtype = getattr(torch, sys.argv[3])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
loads, cpu, reads = [], [], []
for _ in range(3):
    start, start_cpu = time.perf_counter(), time.process_time()
    model = Model.from_pretrained(sys.argv[2], dtype=dtype)
    loads.append(time.perf_counter() - start)
    cpu.append(time.process_time() - start_cpu)
    if len(loads) == 1:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
        weights = sum(p.nbytes for p in model.parameters())
    with torch.no_grad():
        start = time.perf_counter()
        for parameter in model.parameters():
            parameter.amax()
        reads.append(time.perf_counter() - start)
    if len(loads) < 3:
        del model
found = {
    "process": imported - began + loads[0], "first": loads[0], "best": min(loads),
    "cpu": min(cpu), "read": min(a + b for a, b in zip(loads, reads)),
    "memory": grown * 1024 / weights,
}
if sys.argv[1] == "gpt2mini":
    from pathlib import Path
    from gpt2mini.checkpoints.build import Unfilled, weight_samples
    from gpt2mini.checkpoints.huggingface import read_folder

    def seconds_of(run):
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result

    found["header"], checkpoint = seconds_of(lambda: read_folder(Path(sys.argv[2])))
    with Unfilled(dtype):
        found["modules"], _ = seconds_of(lambda: Model(checkpoint.config))
    found["samples"], _ = seconds_of(lambda: weight_samples(model))
    found["copy"] = found["best"] - found["header"] - found["modules"] - found["samples"]
    found["clone"], _ = seconds_of(lambda: [p.detach().clone() for p in model.parameters()])
print(json.dumps(found))
"""
PACKAGES = ("gpt2mini", "transformers")
ROWS = [  # (key, name, unit)
    ("process", "import and load", "s"),
    ("first", "load, the first", "s"),
    ("best", "load, the best of three", "s"),
    ("cpu", "its processor time, all threads", "s"),
    ("read", "load and read every weight once", "s"),
    ("memory", "peak memory / weights", "x"),
]
PARTS = [
    ("header", "names and shapes from the file", "s"),
    ("modules", "make the modules, without numbers", "s"),
    ("copy", "copy, transpose, convert", "s"),
    ("samples", "three values of each weight", "s"),
    ("clone", "(for comparison: clone all weights)", "s"),
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", help="a Hugging Face folder")
    parser.add_argument("--dtype", default="float32", help="to load as")
    parser.add_argument("--file-dtype", default="float32", help="of the random gpt2's file")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or random_gpt2(Path(temporary), args.file_dtype)
        runs: dict[str, list[dict[str, float]]] = {package: [] for package in PACKAGES}
        for _ in range(args.runs):
            for package in PACKAGES:
                runs[package].append(load(package, folder, args.dtype))
    print(f"{'':34} gpt2mini  transformers  ratio")
    for key, name, unit in ROWS:
        ours, theirs = (statistics.median(run[key] for run in runs[p]) for p in PACKAGES)
        print(f"{name:34} {ours:6.2f} {unit} {theirs:11.2f} {unit} {ours / theirs:6.2f}")
    print("parts of our best load")
    for key, name, unit in PARTS:
        print(f"  {name:36} {statistics.median(run[key] for run in runs['gpt2mini']):6.3f} {unit}")


def load(package: str, folder: str | Path, dtype: str) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-c", LOAD, package, str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def random_gpt2(folder: Path, dtype: str) -> Path:
    from gpt2mini import GPT2, GPT2Config

    GPT2(GPT2Config()).save_pretrained(folder, dtype=dtype)
    return folder


if __name__ == "__main__":
    main()
