"""A tokenizer as the page holds it: gzipped JSON, which tokenizer.js reads.

{"pieces": ["!", ...],          # bytes and merged pieces, a character for each byte
 "ids": [0, ...] or null,       # their ids; null: 0, 1, 2, ...
 "other_tokens": [["<|endoftext|>", 8191], ...],   # text and id of tokens that no merge gives
 "added_tokens": [{...}, ...],  # those that are looked for in a text, with their flags
 "add_prefix_space": false, "eos_id": 8191}
"""

import gzip
import json
from dataclasses import asdict
from typing import Any

from gpt2mini.tokenizer import WORD_PATTERN, Tokenizer, mergeable_ranks

METHODS = ("encode", "parts", "token_bytes")  # that tokenizer.js computes again


def pack_tokenizer(tokenizer: Tokenizer) -> bytes:
    """The tokenizer as gzipped JSON (the same bytes at any time).

    Raises ValueError for a tokenizer that the page cannot follow: one with methods or a word
    pattern of its own, or with an empty added token.
    """
    check_is_plain(tokenizer)
    text = json.dumps(tokenizer_data(tokenizer), ensure_ascii=False, separators=(",", ":"))
    return gzip.compress(text.encode(), compresslevel=9, mtime=0)


def tokenizer_data(tokenizer: Tokenizer) -> dict[str, Any]:
    pieces, others = mergeable_ranks(tokenizer.vocab, tokenizer.merges)
    in_order = sorted(pieces, key=pieces.__getitem__)
    ids = [pieces[piece] for piece in in_order]
    return {
        "pieces": [piece.decode("latin-1") for piece in in_order],
        "ids": None if ids == list(range(len(ids))) else ids,
        "other_tokens": [[text, token_id] for text, token_id in others.items()],
        "added_tokens": [asdict(token) for token in tokenizer.settings.added_tokens],
        "add_prefix_space": tokenizer.settings.add_prefix_space,
        "eos_id": tokenizer.eos_id,
    }


def check_is_plain(tokenizer: Tokenizer) -> None:
    """Raise ValueError if the tokenizer does something that tokenizer.js does not."""
    own = [
        name
        for name in METHODS
        if getattr(type(tokenizer), name) is not getattr(Tokenizer, name) or name in vars(tokenizer)
    ]
    if own:
        raise ValueError(
            f"the page cannot follow this tokenizer: its {own[0]} is not that of gpt2mini.Tokenizer"
        )
    if tokenizer.encoding._pat_str != WORD_PATTERN:
        raise ValueError(
            "the page cannot follow this tokenizer: it does not split words by GPT-2's pattern"
        )
    if any(token.content == "" for token in tokenizer.settings.added_tokens):
        raise ValueError("the page cannot follow this tokenizer: one of its added tokens is empty")
