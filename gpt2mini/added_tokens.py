"""Tokens added to a vocabulary, such as chat tokens and [PAD]: found in a text before it is split
into words.

The rules are those of the `tokenizers` package (tokenizers/src/tokenizer/added_vocabulary.rs): the
leftmost token wins, and of several there the longest. Tokens with `normalized` are looked for last,
in the text between the others.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import regex

# What Rust's regular expressions call \s and \w; Python's `re` has other ideas of both.
SPACES_AFTER = regex.compile(r"\p{White_Space}*")
SPACES_BEFORE = regex.compile(r"(?r)\p{White_Space}*")  # read from right to left
WORD = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for in a text as it stands."""

    content: str
    id: int
    special: bool = False  # a mark such as <|endoftext|>, found only where marks are allowed
    lstrip: bool = False  # takes the white space before it along
    rstrip: bool = False  # takes the white space after it along
    single_word: bool = False  # not found as a part of a word
    normalized: bool = False  # looked for after those that are not


class AddedTokens:
    """Splits texts at added tokens."""

    def __init__(self, tokens: Iterable[AddedToken]) -> None:
        self.tokens = {token.content: token for token in tokens}
        first = [content for content, token in self.tokens.items() if not token.normalized]
        last = [content for content, token in self.tokens.items() if token.normalized]
        self.patterns = [any_of(contents) for contents in (first, last) if contents]

    def split(self, text: str, allow_special: bool) -> list[str | int]:
        """The ids of added tokens and the pieces of text between them, in order."""
        parts: list[str | int] = [text]
        for pattern in self.patterns:
            found: list[str | int] = []
            for part in parts:
                if isinstance(part, str):
                    found += self.split_at(pattern, part, allow_special)
                else:
                    found.append(part)
            parts = found
        return parts

    def split_at(
        self, pattern: regex.Pattern, text: str, allow_special: bool
    ) -> Iterator[str | int]:
        """As `split`, by the tokens of one pattern."""
        done = 0  # characters of the text that are given out
        for match in pattern.finditer(text):
            token = self.tokens[match[0]]
            start, stop = match.span()
            if token.special and not allow_special:
                continue
            if token.single_word and touches_a_word(text, start, stop):
                continue
            if token.lstrip:
                start = SPACES_BEFORE.match(text, done, max(done, start)).start()
            if token.rstrip:
                stop = SPACES_AFTER.match(text, stop).end()
            if done < start:
                yield text[done:start]
            yield token.id
            done = stop
        if done < len(text):
            yield text[done:]


def any_of(contents: list[str]) -> regex.Pattern:
    """Finds the leftmost of the strings, and of several there the longest."""
    return regex.compile("|".join(map(regex.escape, sorted(contents, key=len, reverse=True))))


def touches_a_word(text: str, start: int, stop: int) -> bool:
    """Whether a letter or the like stands right before or after text[start:stop]."""
    before, after = text[start - 1 : start] if start else "", text[stop : stop + 1]
    return bool(WORD.match(before) or WORD.match(after))
