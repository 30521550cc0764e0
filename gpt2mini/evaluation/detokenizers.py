"""Published test texts come cut into words; GPT-2 reads plain prose. This puts them back together.

Radford et al. 2019, section 3.1: the data sets of language modeling are "far from" what GPT-2 was
trained on, "due to tokenization artifacts such as disconnected punctuation and contractions"; so
they undo those with "invertible de-tokenizers", which lose nothing, and divide the text's nats by
the number of its original tokens. The authors did not publish theirs. These follow the rules of the
tokenizers that the data sets were made with: Moses for WikiText, Penn Treebank for the children's
books.
"""

import re
from collections.abc import Iterable

# ---- WikiText (Merity et al. 2016)

# Each rule of the one list is undone by those of the other. Lines have a space at either end.
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
TITLES_AND_SUCH = (  # after which Moses' tokenizer leaves the full stop where it is
    "Adm Ave Bros Brig Capt Cmdr Co Col Corp Dr Fr Gen Gov Hon Inc Jr Lt Ltd Maj Messrs Mr Mrs Ms "
    "Mt No Nos Prof Rep Rev Sen Sgt Sr St cf etc pp var vs"
)
ABBREVIATIONS = frozenset(TITLES_AND_SUCH.split())


def is_abbreviation(word: str) -> bool:
    """Whether a full stop behind a word belongs to it: Mr, an initial, U.S, two more dots."""
    if word.endswith(".") and len(word.strip(".")):
        return False  # it has its own already: the end of a sentence
    return "." in word or word in ABBREVIATIONS or bool(re.fullmatch("[A-Z]", word))


def detokenize_wikitext(text: str) -> str:
    """Plain prose of a WikiText file; <unk> stays <unk>."""
    return "\n".join(apply(JOINS, line).strip() for line in text.split("\n"))


def tokenize_wikitext(text: str) -> str:
    """What `detokenize_wikitext` was given, white space at the ends of lines aside, as far as prose
    lets it be known: behind "Jr" nobody can say whether a full stop was a token of its own. In the
    published test files 99 % of the lines come back the same, with <unk> and without."""
    return "\n".join(apply(SPLITS, line).strip() for line in text.split("\n"))


def count_wikitext_tokens(text: str) -> int:
    """Words as WikiText counts them: an <eos> ends each line. 245,569 in the test file."""
    lines = text.removesuffix("\n").split("\n")
    return sum(len(line.split()) + 1 for line in lines)


def apply(rules: Iterable[tuple], line: str) -> str:
    """The line after all substitutions, with one space between words and at either end."""
    line = f" {' '.join(line.split())} "
    for pattern, replacement in rules:
        line = re.sub(pattern, replacement, line)
    return f" {' '.join(line.split())} "


# ---- Penn Treebank style (the Children's Book Test)

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
    """Prose of a line of Penn Treebank tokens: quotes, brackets, punctuation, contractions."""
    words = (BRACKETS.get(word, word) for word in text.split())
    return apply(PENN_JOINS, " ".join(words)).strip()
