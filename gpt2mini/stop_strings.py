"""Text that arrives in pieces, up to the first of some strings."""

from collections.abc import Iterator, Sequence


def until_stop(pieces: Iterator[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """Pass text on up to the stop string that is complete first, whatever the pieces; hold back an
    ending that may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        starts = [(held.find(stop), len(stop)) for stop in stop_strings if stop in held]
        if starts:
            _, start = min((start + length, start) for start, length in starts)
            if before := held[:start]:
                yield before
            return
        keep = max((overlap(held, stop) for stop in stop_strings), default=0)
        if ready := held[: len(held) - keep]:
            yield ready
        held = held[len(held) - keep :]
    if held:
        yield held


def overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0
    )
