"""The command as tests run it: in this process, which spares each the start of another, or as a
user does, in a process of its own."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from gpt2mini.cli import main

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "gpt2mini"]
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

HANGS = 7200  # seconds after which a process counts as one that never ends; no measure of speed

Done = subprocess.CompletedProcess[str]


def run(job: str, *arguments: object, stdin: str = "") -> Done:
    """`gpt2mini JOB arguments` in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    command = [job, *map(str, arguments)]
    with redirect_stdout(out), redirect_stderr(err), patch("sys.stdin", io.StringIO(stdin)):
        try:
            main(command)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):  # which the interpreter would print
                err.write(end.code + "\n")
    said = " ".join(err.getvalue().replace("│", " ").split())  # tyro's errors stand in a box
    return Done(command, code, out.getvalue(), said)


def run_apart(*command: object, launch: list[str] = COMMAND) -> Done:
    """`gpt2mini command` in a process of its own, warnings shown, offline by environment."""
    return subprocess.run(
        [*launch, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        env=OFFLINE,
        timeout=HANGS,
    )
