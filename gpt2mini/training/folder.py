"""The folder of a run: one run at a time, and none in the place of an earlier one unless asked."""

import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from gpt2mini.files import alone_in
from gpt2mini.training.checkpoints import RunCheckpoints
from gpt2mini.training.distributed import barrier, broadcast_from_rank_zero, get_rank
from gpt2mini.training.metrics import rows_until

SUMMARY = "summary.json"  # the command writes it when a job is done
LOG = "metrics.jsonl"
RESULTS = ("checkpoints", "best", "adapter", LOG, SUMMARY)


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside, no other run can work in the folder. Raises BlockingIOError, on all ranks, if one
    does."""
    with ExitStack() as stack:
        problem = None
        if get_rank() == 0:
            try:
                stack.enter_context(alone_in(folder))
            except BlockingIOError as error:
                problem = error
        if broadcast_from_rank_zero(float(problem is not None), torch.device("cpu")):
            raise problem or BlockingIOError(f"another run is at work in {folder}")
        yield


def check_free(folder: Path, resume: bool) -> None:
    """Raise FileExistsError if a run here would take the place of an earlier one's results; or, to
    be resumed, has ended and left no checkpoint."""
    checkpoints = RunCheckpoints(folder / "checkpoints").all()
    if resume:
        has_ended = (folder / SUMMARY).exists()
        if not checkpoints and (has_ended or ((folder / "best").exists() and has_trained(folder))):
            raise FileExistsError(
                f"{folder} holds what a run has left, but no checkpoint to resume it from: choose "
                "another folder, or overwrite it"
            )
        return
    left = [name for name in ("best", SUMMARY) if (folder / name).exists()]
    if checkpoints:
        left.insert(0, "checkpoints")
    if left:
        raise FileExistsError(
            f"{folder} holds {' and '.join(left)} of an earlier run: resume it (--resume), choose "
            "another folder (--out), or overwrite it (--overwrite)"
        )


def has_trained(folder: Path) -> bool:
    """Whether a run has got beyond its first evaluation, by its log."""
    return any(row["step"] > 0 for row in rows_until(sys.maxsize, folder / LOG))


def remove_results(folder: Path) -> None:
    """Remove what an earlier run has left, on rank 0 for all; other files stay."""
    if get_rank() == 0:
        for path in (folder / name for name in RESULTS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    barrier()
