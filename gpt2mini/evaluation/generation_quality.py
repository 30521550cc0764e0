"""Automatic metrics of generated texts: diversity, repetition, scripts, self-perplexity.

None of them tells whether a text is good: random tokens are diverse too. Read them together with
the perplexity.
"""

import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gpt2mini.evaluation.perplexity import perplexity
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

# The beginnings of the Unicode names of each script's letters.
SCRIPTS = {
    "CJK": ("CJK ", "IDEOGRAPHIC "),  # shared by Chinese, Japanese and Korean
    "Kana": ("HIRAGANA ", "KATAKANA"),
    "Hangul": ("HANGUL ",),
    "Latin": ("LATIN ", "FEMININE ORDINAL", "MASCULINE ORDINAL"),
    "Cyrillic": ("CYRILLIC ",),
    "Greek": ("GREEK ",),
    "Arabic": ("ARABIC ",),
}
MARKS = "digits, signs"  # numbers, punctuation, symbols: of no script
OTHER = "other"


@dataclass(frozen=True)
class GenerationQuality:
    """Metrics of generated texts."""

    texts: int
    distinct: dict[int, float]  # n -> distinct-n, over tokens
    repetition: float  # seq-rep-4, over tokens
    scripts: dict[str, float]
    self_perplexity: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        distinct = ", ".join(f"distinct-{n} {share:.3f}" for n, share in self.distinct.items())
        scripts = ", ".join(f"{name} {share:.1%}" for name, share in self.scripts.items() if share)
        return (
            f"{self.texts} texts: {distinct}, repetition {self.repetition:.3f},\n"
            f"self-perplexity {self.self_perplexity:.2f}\ncharacters: {scripts}"
        )


def generation_quality(
    model: GPT2, tokenizer: Tokenizer, texts: Sequence[str], precision: str = "fp32"
) -> GenerationQuality:
    """All metrics of a list of texts. N-grams are of token ids, so that scripts without spaces
    between words are treated like others. self_perplexity: the perplexity of the texts under
    `model`; far below that of human text it indicates dull text.

    Raises ValueError for an empty list, or a text of fewer than two tokens.
    """
    self_perplexity = perplexity(model, tokenizer, texts, precision=precision).per_token
    tokens = [tokenizer.encode(text) for text in texts]
    return GenerationQuality(
        texts=len(texts),
        distinct={n: distinct_n(tokens, n) for n in (1, 2, 3)},
        repetition=repetition_rate(tokens),
        scripts=script_shares("".join(texts)),
        self_perplexity=self_perplexity,
    )


def distinct_n(texts: Sequence[Sequence[Hashable]], n: int) -> float:
    """Different n-grams / all n-grams, of all texts together (Li et al. 2016, "distinct-1" and
    "distinct-2"). A text is a sequence of token ids, words or characters. The value falls with the
    amount of text, so compare equal amounts. 0 if there is no n-gram."""
    found = [gram for text in texts for gram in n_grams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition_rate(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """1 - different n-grams / all n-grams *within* a text, averaged over the texts (Welleck et al.
    2020, "seq-rep-n", with n = 4). 0: no repetition. Texts without an n-gram are left out."""
    rates = [1 - len(set(grams)) / len(grams) for text in texts if (grams := n_grams(text, n))]
    return sum(rates) / len(rates) if rates else 0.0


def n_grams(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def script_shares(text: str) -> dict[str, float]:
    """The share of each script among the characters that are not white space; the sum is 1."""
    counts = Counter(script_of(character) for character in text if not character.isspace())
    total = max(1, counts.total())
    return {name: counts[name] / total for name in (*SCRIPTS, MARKS, OTHER)}


def script_of(character: str) -> str:
    """The script of a letter, by its Unicode name; other characters have none."""
    if unicodedata.category(character)[0] in "NPS":
        return MARKS
    name = unicodedata.name(character, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return next((script for script, starts in SCRIPTS.items() if name.startswith(starts)), OTHER)
