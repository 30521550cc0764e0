"""The batches of a run: epoch after epoch, from where the run stands, in shares for the ranks."""

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from gpt2mini.training.checkpoints import generator_states, restore_generators
from gpt2mini.training.distributed import get_rank, get_world_size


def remaining_batches(batches: Iterable[Any], first: int) -> Iterator[Any]:
    """This rank's batches from number `first` on, epoch after epoch; the ranks take turns.

    Batches with a state are already in place. Those with a method `part(first, every)` can start
    anywhere. Of all others, the batches before the first are read and dropped.
    """
    rank, every = get_rank(), get_world_size()
    if hasattr(batches, "load_state_dict"):
        return repeated(batches)
    if every > 1 and isinstance(getattr(batches, "sampler", None), DistributedSampler):
        raise ValueError(
            "the batches of this DataLoader are one rank's share already, and train would share "
            "them out again: leave out the DistributedSampler"
        )
    if hasattr(batches, "part"):
        return iter(batches.part(first + rank, every))
    return islice(without_the_first(first, repeated(batches)), rank, None, every)


def without_the_first(n: int, batches: Iterator[Any]) -> Iterator[Any]:
    """The batches after the first n. These are read again, and leave no trace in the generators
    that all share: a checkpoint has the states after they were read."""
    states = generator_states()
    for _ in islice(batches, n):
        pass
    restore_generators(states)
    yield from batches


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


# ---- generators of their own


def own_generators(batches: Iterable[Any]) -> list[torch.Generator]:
    """The torch generators of the batches, and of the samplers of a DataLoader."""
    batch_sampler = getattr(batches, "batch_sampler", None)
    samplers = (getattr(batches, "sampler", None), batch_sampler)
    owners = (batches, *samplers, getattr(batch_sampler, "sampler", None))
    found = (getattr(owner, "generator", None) for owner in owners)
    return [one for one in found if isinstance(one, torch.Generator)]


class GeneratorsAtStart:
    """The states of the batches' own generators before the first step of a run. A resumed run reads
    its batches from the first again, so it puts the generators back into these states; but not one
    with another seed, whose first batch then tells that the data are others."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.generators = own_generators(batches)
        self.states = [one.get_state() for one in self.generators]

    def state_dict(self) -> dict[str, list[Tensor]]:
        return {"states": self.states}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        stored = state["states"]  # of other data there may be more or fewer
        self.states = [
            then if seed_of(then, generator.device) == generator.initial_seed() else now
            for generator, now, then in zip(self.generators, self.states, stored, strict=False)
        ]
        self.restore()

    def restore(self) -> None:
        for generator, state in zip(self.generators, self.states, strict=False):
            generator.set_state(state)


def seed_of(state: Tensor, device: torch.device) -> int:
    """The seed with which a generator began that has this state now."""
    generator = torch.Generator(device)
    generator.set_state(state)
    return generator.initial_seed()
