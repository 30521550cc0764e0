"""One run in several processes, started by torchrun: who am I, and what do we have together?

In a single process all of this does nothing, so nobody else has to ask how many there are.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch import distributed


@contextmanager
def joined_processes() -> Iterator[None]:
    """Inside, this is one of the processes that torchrun has started, if it has. Each has a GPU of
    its own, which is what the device "cuda" means to it, or they share the processor."""
    if "LOCAL_RANK" not in os.environ:
        yield
        return
    # before there is a group, or its functions' default arguments would hold it to the end
    import torch.distributed.nn

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # gradients on GPUs travel over NCCL, checkpoints and small sums over gloo
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        timeout=timedelta(hours=12),  # as long as the first may take to prepare a corpus
    )
    try:
        yield
    finally:
        distributed.destroy_process_group()
        # This ends gloo's threads, unless a cache of FSDP2's holds the group. A thread that lets go
        # of its last tensor while the interpreter is ending aborts the process (pytorch issue
        # 190489), and torchrun then calls a run that has saved everything failed.
        time.sleep(0.5)


def is_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def process_count() -> int:
    return distributed.get_world_size() if is_joined() else 1


def process_number() -> int:
    return distributed.get_rank() if is_joined() else 0


def wait_for_all() -> None:
    """Go on when every process has come this far."""
    if process_count() > 1:
        sum_over_processes([0.0], torch.device("cpu"))


def sum_over_processes(values: list[float], device: torch.device) -> list[float]:
    """Each value, summed over all processes."""
    if process_count() == 1:
        return values
    # float64, or counts above 2**24 would be rounded; which Apple's GPUs do not have
    together = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(together)
    return together.tolist()


def of_the_first(value: float, device: torch.device) -> float:
    """The first process's value: what all decide by has to be one number, to the last bit."""
    return sum_over_processes([value if process_number() == 0 else 0.0], device)[0]


@contextmanager
def main_process_first() -> Iterator[None]:
    """For what all need and one can prepare, such as tokenising a corpus: the others wait, and find
    it done."""
    if process_number() != 0:
        wait_for_all()
    yield
    if process_number() == 0:
        wait_for_all()
