"""Whether tiktoken merges bytes as the merges file says, which `transformers` does."""


def check_merges_agree(merges: list[tuple[str, str]]) -> None:
    """Raise ValueError for merges under which tiktoken would give other ids than `transformers`.

    `transformers` merges two neighbors if the merges list that pair; tiktoken if the vocabulary has
    the merged token, whatever the pair. Both agree if the bytes of every token, merged in order,
    reach the pair that is listed for it. They do in a vocabulary that was trained in one run, as
    GPT-2's. Where merges learned on another text were appended, some pairs are never reached:
    earlier merges have crossed the boundary between the two.
    """
    order = {left + right: number for number, (left, right) in enumerate(merges)}
    pairs = {left + right: (left, right) for left, right in merges}
    for left, right in merges:
        if merged_across_boundary(left, right, order, pairs):
            raise ValueError(
                f"the merge of {left!r} with {right!r} never takes effect: earlier ones merge "
                "their bytes differently, as where merges of another text were appended to a "
                "vocabulary. tiktoken, which encodes here, would give other ids than transformers: "
                "learn the vocabulary in one go, or take transformers' ids"
            )


def merged_across_boundary(
    left: str, right: str, order: dict[str, int], pairs: dict[str, tuple[str, str]]
) -> bool:
    """Whether a merge crosses the boundary between `left` and `right` before the two are complete.

    The merges are undone, the last one first, down to single bytes; of each, the half at the
    boundary stays. The tokens on both sides of it were not merged with each other if their
    concatenation is no token, or that of a later merge. Of two equal tokens the left one is merged
    first.
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
