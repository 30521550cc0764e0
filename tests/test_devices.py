"""Nothing here needs a GPU: `on_pretended_device.py` runs the library and the jobs on a device that
refuses what GPUs refuse. It gets processes of its own, since torch keeps the device."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import HANGS
from torch.utils import backend_registration

# together they select every test of the file
PARTS = [
    "not test_jobs",
    "test_jobs and (finetune or classify)",
    "test_jobs and not (finetune or classify)",
]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"torch {torch.__version__} has no devices that are written in Python",
)
def test_everything_runs_on_a_gpu(part: str) -> None:
    tests = Path(__file__).with_name("on_pretended_device.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-q", "-k", part, str(tests)]
    command += ["--jaxtyping-packages", ""]  # the other tests check shapes, on the CPU
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=HANGS)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
