"""Hold data out in groups: what belongs together (a text that stands twice, answers to a prompt) is
either learned from or held out, never both."""

import logging
from collections.abc import Hashable, Sequence

import numpy as np

logger = logging.getLogger(__name__)


def split_groups(
    groups: Sequence[Sequence[int]], shares: Sequence[float], generator: np.random.Generator
) -> list[list[int]]:
    """Divide groups of indices at random into parts, whose sizes are near these shares of all.

    No part is empty. The largest groups are placed first, each where most is missing. Raises
    ValueError if there are fewer groups than parts.
    """
    if len(groups) < len(shares):
        raise ValueError(f"{len(groups)} groups cannot be divided into {len(shares)} parts")
    total = sum(map(len, groups))
    missing = [share * total for share in shares]
    parts: list[list[int]] = [[] for _ in shares]
    order = sorted(generator.permutation(len(groups)).tolist(), key=lambda i: -len(groups[i]))
    for place, i in enumerate(order):
        empty = [part for part in range(len(parts)) if not parts[part]]
        must_fill = len(empty) == len(order) - place  # the groups left, one for each empty part
        part = max(empty if must_fill else range(len(parts)), key=missing.__getitem__)
        parts[part].extend(groups[i])
        missing[part] -= len(groups[i])
    return parts


def hold_out_groups(
    keys: Sequence[Hashable], share: float, seed: int, apart: Sequence[Hashable]
) -> tuple[list[int], list[int]]:
    """(to learn from, held out): indices of items, in a seeded order; items of one key stay
    together.

    apart: narrower keys, such as prompt and answer instead of the prompt. They are used, with a
    warning, where whole groups would hold out less than half or more than twice the share: with one
    prompt for all items, for instance.
    Raises ValueError if either part would be empty.
    """
    generator = np.random.default_rng(seed)
    for number, chosen in enumerate((keys, apart)):
        groups: dict[Hashable, list[int]] = {}
        for i, key in enumerate(chosen):
            groups.setdefault(key, []).append(i)
        if len(groups) < 2:
            continue
        training, held_out = split_groups(list(groups.values()), (1 - share, share), generator)
        wanted = max(1.0, share * len(keys))
        if number == 1:
            message = "%d prompts are too few to hold out whole ones: answers are held out instead"
            logger.warning(message, len(set(keys)))
        if number == 1 or 0.5 * wanted <= len(held_out) <= 2 * wanted:
            return shuffled(training, generator), shuffled(held_out, generator)
    raise ValueError(f"all {len(keys)} items are the same: none can be held out")


def shuffled(items: Sequence[int], generator: np.random.Generator) -> list[int]:
    return [items[i] for i in generator.permutation(len(items))]
