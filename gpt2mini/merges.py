"""Whether tiktoken joins bytes by the listed merges, as `transformers` does."""


def check_joined_alike(merges: list[tuple[str, str]]) -> None:
    """Raise ValueError for merges under which tiktoken would give other ids than `transformers`.

    `transformers` joins two neighbors if the merges list that pair; tiktoken if the vocabulary has
    what they make together, of whichever pair. It is the same if the bytes of every piece, joined
    in the order of the merges, end up as the pair that is listed for it. So they do in a vocabulary
    that was learned in one go, as GPT-2's. Where merges learned on another text were appended, some
    pairs never come about: their bytes have been joined across the border before.
    """
    order = {left + right: number for number, (left, right) in enumerate(merges)}
    pairs = {left + right: (left, right) for left, right in merges}
    lost: set[str] = set()
    for left, right in merges:
        if left in lost or right in lost or joined_across(left, right, order, pairs):
            lost.add(left + right)
    if lost:
        left, right = next(pair for pair in merges if "".join(pair) in lost)
        raise ValueError(
            f"{len(lost)} of {len(merges)} merges never take effect, the first is {left!r} with "
            f"{right!r}: earlier ones join their letters otherwise, as where merges of another "
            "text were appended to a vocabulary. tiktoken, which encodes here, would give other "
            "ids than transformers: learn the vocabulary in one go, or take transformers' ids"
        )


def joined_across(
    left: str, right: str, order: dict[str, int], pairs: dict[str, tuple[str, str]]
) -> bool:
    """Whether a merge joins letters of `left` with letters of `right` before the two are whole.

    Back in time: the one that was joined last is taken apart, and its half at the border stays,
    down to single letters. What stood at the border then was left alone if what it would make is in
    no merge, or in one that comes later. Of two equal pieces the left one is joined first.
    """
    while len(left) > 1 or len(right) > 1:
        if order.get(right, -1) >= order.get(left, -1):
            undone = order[right]
            right = pairs[right][0]
            if order.get(left + right, len(order)) <= undone:
                return True
        else:
            undone = order[left]
            left = pairs[left][1]
            if order.get(left + right, len(order)) < undone:
                return True
    return False
