"""The batches of a run: epoch after epoch, from where the run stands, in shares for the ranks."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from gpt2mini.training.distributed import get_rank, get_world_size


def remaining_batches(batches: Iterable[Any], first: int) -> Iterator[Any]:
    """This rank's batches from number `first` on, epoch after epoch; the ranks take turns.

    Batches with a state are already in place. Those with a method `part(first, every)` can start
    anywhere. Of all others, the batches before the first are read and dropped.
    """
    first, every = first + get_rank(), get_world_size()
    if hasattr(batches, "load_state_dict"):
        return repeated(batches)
    if hasattr(batches, "part"):
        return iter(batches.part(first, every))
    return islice(repeated(batches), first, None, every)


def repeated(batches: Iterable[Any]) -> Iterator[Any]:
    """Iterate over the batches again and again, as over a list or a DataLoader.

    Raises ValueError if an iteration gives none: there are none, or they can be read only once.
    """
    total, is_empty = 0, False
    while not is_empty:
        is_empty = True
        for batch in batches:
            yield batch
            total, is_empty = total + 1, False
    raise ValueError(
        f"the batches have come to an end after {total}, and cannot be read again: pass a list, a "
        "DataLoader or another iterable that begins anew each time, not a generator"
        if total
        else "there are no batches to train on"
    )


def next_batch(batches: Iterator[Any]) -> Any:
    """The next of `remaining_batches`, which end only if an endless `part` does."""
    for batch in batches:
        return batch
    raise ValueError("the batches of `part` have come to an end: it must go on without end")
