"""How much of a text is copied in another one: tokens held out that are learned from too."""

from collections.abc import Iterator, Sequence

import numpy as np

BLOCK = 16  # tokens; so many in a row are rarely the same by chance
BASE = 6364136223846793005  # of the hashes: a large odd number
AT_ONCE = 2**22  # tokens hashed at a time


def count_copied_blocks(
    tokens: np.ndarray, training: Sequence[range], other: np.ndarray, held_out: Sequence[range]
) -> tuple[int, int]:
    """(blocks of 16 tokens that stand in the training text too, all blocks) of the text held out.

    tokens and other: ids of either text; training and held_out: the parts that count. Blocks are
    taken one after another, and looked for at every position of a part. They are compared by a hash
    of 64 bits: a wrong match is less likely than one in a million.
    """
    blocks = [hash_blocks(other[part.start : part.stop])[::BLOCK] for part in held_out]
    wanted = np.sort(np.concatenate(blocks or [np.empty(0, np.uint64)]))  # (blocks)
    found = np.zeros(len(wanted), bool)
    if len(wanted):
        for part in pieces(training):
            hashes = hash_blocks(tokens[part.start : part.stop])
            near = np.searchsorted(wanted, hashes).clip(max=len(wanted) - 1)
            found[near[wanted[near] == hashes]] = True  # the first of equal blocks
    return int(found[np.searchsorted(wanted, wanted)].sum()), len(wanted)


def count_copies(tokens: np.ndarray, training: Sequence[range], held_out: Sequence[range]) -> int:
    """How many of the documents held out stand in the training text as documents too.

    Only those as long as one held out are compared, so long ones cost nothing.
    """
    lengths = {len(part) for part in held_out}
    texts = [tokens[part.start : part.stop].tobytes() for part in held_out]
    is_learned = dict.fromkeys(texts, False)
    for part in training:
        if len(part) in lengths:
            text = tokens[part.start : part.stop].tobytes()
            if text in is_learned:
                is_learned[text] = True
    return sum(is_learned[text] for text in texts)


def pieces(parts: Sequence[range]) -> Iterator[range]:
    """Pieces of bounded length, that overlap by a block less one token."""
    for part in parts:
        for start in range(part.start, part.stop, AT_ONCE):
            yield range(start, min(start + AT_ONCE + BLOCK - 1, part.stop))


def hash_blocks(tokens: np.ndarray) -> np.ndarray:
    """The hash of the block that begins at each position: (tokens - 15), uint64.

    A polynomial in BASE modulo 2**64, of two halves that have been hashed before.
    """
    hashes, length = tokens.astype(np.uint64) + np.uint64(1), 1
    factor = np.array([BASE], np.uint64)  # an array: its products overflow without a warning
    while length < BLOCK:
        hashes = hashes[:-length] * factor + hashes[length:]  # modulo 2**64
        length, factor = 2 * length, factor * factor
    return hashes
