"""How much `import gpt2mini` adds to `import torch`, in fresh processes, taken in turns.

python tests/benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys

PROGRAM = """
import time, torch
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""


def seconds(module: str) -> float:
    command = [sys.executable, "-c", PROGRAM.format(module=module)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5, help="measured imports (default 5)")
    runs = parser.parse_args().runs
    modules = ("gpt2mini", "transformers.models.gpt2.modeling_gpt2")
    times: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(1 + runs):
        for module in modules:
            times[module].append(seconds(module))
    for module in modules:
        middle = statistics.median(times[module][1:])  # the first run warms the disk cache
        print(f"import {module}: {middle:.3f} s after import torch (median of {runs})")


if __name__ == "__main__":
    main()
