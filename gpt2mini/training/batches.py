"""The batches of a run: epoch after epoch, from where the run stands, in shares for the ranks."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from torch import Tensor

from gpt2mini.training.checkpoints import generator_states, restore_generators
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


def digest_of_first(batches: Iterable[Any]) -> str:
    """A hash of the integers in the first batch: token ids, labels. (What a model has computed may
    differ in its last bit the next time.) Batches with a `fingerprint` give their own; batches that
    have a state, or can be read only once, have none ("")."""
    if hasattr(batches, "fingerprint"):
        return batches.fingerprint()
    if hasattr(batches, "load_state_dict") or isinstance(batches, Iterator):
        return ""
    states, digest = generator_states(), hashlib.sha256()
    first = next_batch(iter(batches.part(0, 1)) if hasattr(batches, "part") else repeated(batches))
    restore_generators(states)  # shuffled batches may have drawn from them
    for tensor in tensors_of(first):
        if not tensor.is_floating_point():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch: itself, or the members of a tuple, a list, a dict or an object."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, dict):
        yield from tensors_of(list(batch.values()))
    elif isinstance(batch, list | tuple):
        for member in batch:
            yield from tensors_of(member)
    elif hasattr(batch, "__dict__"):
        yield from (value for value in vars(batch).values() if isinstance(value, Tensor))
