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
def process_group() -> Iterator[None]:
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


def is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def get_world_size() -> int:
    return distributed.get_world_size() if is_distributed() else 1


def get_rank() -> int:
    return distributed.get_rank() if is_distributed() else 0


def barrier() -> None:
    """Go on when every process has come this far."""
    if get_world_size() > 1:
        sum_over_ranks([0.0], torch.device("cpu"))


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Each value, summed over all processes."""
    if get_world_size() == 1:
        return values
    # float64, or counts above 2**24 would be rounded; which Apple's GPUs do not have
    together = torch.tensor(values, dtype=torch.float64, device=device)
    distributed.all_reduce(together)
    return together.tolist()


def broadcast_from_rank_zero(value: float, device: torch.device) -> float:
    """The first process's value: what all decide by has to be one number, to the last bit."""
    return sum_over_ranks([value if get_rank() == 0 else 0.0], device)[0]


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """For what all need and one can prepare, such as tokenizing a corpus: the others wait, and find
    it done."""
    if get_rank() != 0:
        barrier()
    yield
    if get_rank() == 0:
        barrier()
