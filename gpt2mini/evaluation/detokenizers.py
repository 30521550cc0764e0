"""Published test texts are tokenized into words; GPT-2 reads plain prose. These undo that.

Radford et al. 2019, section 3.1: the data sets of language modeling are "far from" what GPT-2 was
trained on, "due to tokenization artifacts such as disconnected punctuation and contractions"; so
they undo those with "invertible de-tokenizers" and divide the nats by the number of original
tokens. The authors did not publish theirs. These follow the rules of the tokenizers that the data
sets were made with: Moses for WikiText, Penn Treebank for the Children's Book Test.
"""

import re
from collections.abc import Iterable

# ---- WikiText (Merity et al. 2016)

# SPLITS undoes JOINS. Lines have a space at either end.
JOINS = [
    (r"(?<= )=(?: =)+(?= )", lambda found: found[0].replace(" ", "")),  # = = Title = =
    (r" @([-,.])@ ", r"\1"),  # 2 @.@ 5, and hyphens in words
    (r" ([,;:.!?%)\]}])(?= )", r"\1"),
    (r" ('\w)", r"\1"),  # 's 't O 'Neil
    (r"(?<=s) '(?= )", "'"),  # the girls ' school
    (r"(?<= )([(\[{$£€¥#]) ", r"\1"),
    (r" ([/°]) ", r"\1"),
    (r"(?<=\d) – (?=\d)", "–"),
    (r"(?<=\d): (?=\d)", ":"),
    (r'" ([^"]*) "', r'"\1"'),
]
SPLITS = [
    (r"(?<= )==+(?= )", lambda found: " ".join(found[0])),
    (r'(["()\[\]{}$£€¥#;:!?%/°])', r" \1 "),
    (r"(?<=\S)-(?=\S)", " @-@ "),
    (r"(?<!\d),|,(?!\d|<unk>)", " , "),
    (r"(?<=\d)([,.])(?=\d|<unk>)", r" @\1@ "),
    (r"(?<=\d)–(?=\d)", " – "),
    (r"(?<=[\w>])'(?=\w)", " '"),
    (r"(?<=s)'(?= )", " '"),
    (r"(\S+)\.(?= )", lambda found: found[0] if is_abbreviation(found[1]) else f"{found[1]} ."),
]
ABBREVIATION_LIST = (  # Moses' tokenizer leaves the full stop attached to these
    "Adm Ave Bros Brig Capt Cmdr Co Col Corp Dr Fr Gen Gov Hon Inc Jr Lt Ltd Maj Messrs Mr Mrs Ms "
    "Mt No Nos Prof Rep Rev Sen Sgt Sr St cf etc pp var vs"
)
ABBREVIATIONS = frozenset(ABBREVIATION_LIST.split())


def is_abbreviation(word: str) -> bool:
    """Whether the full stop after a word belongs to it: Mr, an initial, U.S, an ellipsis."""
    if word.endswith(".") and len(word.strip(".")):
        return False  # it has its own already: this one ends the sentence
    return "." in word or word in ABBREVIATIONS or bool(re.fullmatch("[A-Z]", word))


def detokenize_wikitext(text: str) -> str:
    """Plain prose of a WikiText file; <unk> stays <unk>."""
    return "\n".join(apply(JOINS, line).strip() for line in text.split("\n"))


def tokenize_wikitext(text: str) -> str:
    """The inverse of `detokenize_wikitext`, up to white space at the ends of lines and to cases
    that prose leaves open, such as a full stop after "Jr". It restores 99 % of the lines of the
    published test files."""
    return "\n".join(apply(SPLITS, line).strip() for line in text.split("\n"))


def count_wikitext_tokens(text: str) -> int:
    """The number of tokens as WikiText counts them, with an <eos> for each line: 245,569 in the
    test file of WikiText-2 and of WikiText-103."""
    lines = text.removesuffix("\n").split("\n")
    return sum(len(line.split()) + 1 for line in lines)


def apply(rules: Iterable[tuple], line: str) -> str:
    """The line after all substitutions, with single spaces, also at either end."""
    line = f" {' '.join(line.split())} "
    for pattern, replacement in rules:
        line = re.sub(pattern, replacement, line)
    return f" {' '.join(line.split())} "


# ---- Penn Treebank (the Children's Book Test)

BRACKETS = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}"}
PENN_JOINS = [
    (r" (n't|'(?:s|m|d|ll|re|ve))(?= )", r"\1"),
    (r" ([,;:.!?%)\]}]|\.\.\.)(?= )", r"\1"),
    (r"(?<= )([(\[{$£]) ", r"\1"),
    (r"(?<= )(``|`) ", r"\1"),
    (r" (''|')(?= )", r"\1"),
    (r"``|''", '"'),
    (r"`", "'"),
]


def detokenize_penn(text: str) -> str:
    """Plain prose of a line of Penn Treebank tokens."""
    words = (BRACKETS.get(word, word) for word in text.split())
    return apply(PENN_JOINS, " ".join(words)).strip()
