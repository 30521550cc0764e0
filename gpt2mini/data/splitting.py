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
    keys: Sequence[Sequence[Sequence[Hashable]]], share: float, seed: int
) -> tuple[list[int], list[int]]:
    """(to learn from, held out): indices of items, in a seeded order. Items that have a key in
    common stay together.

    keys: one list or several. The first has for each item its widest keys, its prompt and its
    dialogue for instance; the others, for data of which those make too few groups, have narrower
    ones, the last the whole item. Used are the first with which the part held out has at least half
    and at most twice its share, or else the last. A warning tells if they are not the widest.
    Raises ValueError if all items are the same.
    """
    generator, wanted = np.random.default_rng(seed), max(1.0, share * len(keys[0]))
    if len(connected(keys[-1])) < 2:
        raise ValueError(f"all {len(keys[0])} items are the same: none can be held out")
    for its_keys in keys:
        groups = connected(its_keys)
        if len(groups) > 1:
            training, held_out = split_groups(groups, (1 - share, share), generator)
            if 0.5 * wanted <= len(held_out) <= 2 * wanted:
                break
    if its_keys is not keys[0]:
        message = "records with prompts in common form %d groups, too few to hold out whole ones"
        logger.warning(f"{message}: records are held out instead", len(connected(keys[0])))
    return shuffled(training, generator), shuffled(held_out, generator)


def connected(keys: Sequence[Sequence[Hashable]]) -> list[list[int]]:
    """Indices in groups that have no key in common."""
    groups: list[list[int]] = []
    group_of: dict[Hashable, int] = {}
    for i, its_keys in enumerate(keys):
        known = {group_of[key] for key in its_keys if key in group_of}
        first = min(known, default=len(groups))
        if not known:
            groups.append([])
        groups[first].append(i)
        for other in known - {first}:  # this item joins them
            groups[first] += groups[other]
            groups[other] = []
            group_of |= {key: first for key, group in group_of.items() if group == other}
        group_of |= dict.fromkeys(its_keys, first)
    return [sorted(group) for group in groups if group]


def shuffled(items: Sequence[int], generator: np.random.Generator) -> list[int]:
    return [items[i] for i in generator.permutation(len(items))]
