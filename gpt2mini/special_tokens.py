"""Which tokens a folder adds to its vocabulary, and which of them are called eos_token and so on.

`transformers` has kept them in four files; folders whose files contradict each other are refused.
Ids are those that `tokenizers` gives: that of the vocabulary, else the next one.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from gpt2mini.added_tokens import AddedToken

END_OF_TEXT = "<|endoftext|>"
CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
TOKENIZER, ADDED = "tokenizer.json", "added_tokens.json"
DECODER = "added_tokens_decoder"  # in the config; where it stands, transformers reads no map
LISTS = ("additional_special_tokens", "extra_special_tokens")  # of transformers 4, of 5
NO_ID = -1  # of a token that is named without its id

Tokens = dict[str, AddedToken]  # by their text


def read_special_tokens(
    contents: dict[str, Any], vocab: dict[str, int], is_general: bool
) -> tuple[list[AddedToken], dict[str, str]]:
    """(the added tokens, names such as "eos_token" -> token).

    contents: of the folder's JSON files, by name. is_general: the folder's class gives no names to
    GPT-2's tokens. Raises ValueError for files that contradict each other.
    """
    listed = listed_tokens(contents)
    plain = contents.get(ADDED, {})
    named = named_tokens(contents)
    if not is_general and END_OF_TEXT in {**vocab, **(listed or {}), **plain}:
        named = gpt2_names(contents) | named
    special = by_text([*named.values(), *further_tokens(contents)])
    if listed is None:
        listed = by_text(plain_token(text, i, text in special) for text, i in plain.items())
    for text, i in plain.items():
        if text not in listed or listed[text].id != i:
            raise contradiction(ADDED, "the other list of added tokens", text)
    tokens = dict(sorted(listed.items(), key=lambda item: item[1].id))
    for text, token in special.items():
        if not tokens.setdefault(text, token).special:
            raise ValueError(f"{text!r} is named as a special token, and listed as one that is not")
    return with_ids(tokens, vocab), {name: token.content for name, token in named.items()}


def listed_tokens(contents: dict[str, Any]) -> Tokens | None:
    """The tokens of the lists that tell ids and flags; None: there is no such list."""
    lists: dict[str, Tokens] = {}
    if DECODER in contents.get(CONFIG, {}):
        decoder = contents[CONFIG][DECODER]
        lists[CONFIG] = by_text(token_of(CONFIG, token, id=int(i)) for i, token in decoder.items())
    if TOKENIZER in contents:
        added = contents[TOKENIZER].get("added_tokens", [])
        lists[TOKENIZER] = by_text(token_of(TOKENIZER, token) for token in added)
    if len(lists) == 2:
        first, second = lists.values()
        for text in {**first, **second}:
            if first.get(text) != second.get(text):
                raise contradiction(CONFIG, TOKENIZER, text)
    return next(iter(lists.values()), None)


def named_tokens(contents: dict[str, Any]) -> Tokens:
    """Names that end in _token, and those of a dict of further tokens -> tokens without ids."""
    config, in_map = (
        {
            name: token_of(file, value, special=True)
            for name, value in names_in(contents.get(file, {}))
        }
        for file in (CONFIG, MAP)
    )
    for name, token in in_map.items():
        same = name in config and config[name].content == token.content
        if not same and (name in config or DECODER in contents.get(CONFIG, {})):
            raise contradiction(CONFIG, MAP, name)
    return config | in_map


def names_in(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if name.endswith("_token") and isinstance(value, str | dict):
            yield name, value
        elif name in LISTS and isinstance(value, dict):
            yield from value.items()


def gpt2_names(contents: dict[str, Any]) -> Tokens:
    """What the class GPT2Tokenizer calls its tokens where the config has no other name for them."""
    names = {"bos_token", "eos_token", "unk_token"} - contents.get(CONFIG, {}).keys()
    return {name: AddedToken(END_OF_TEXT, NO_ID, special=True) for name in sorted(names)}


def further_tokens(contents: dict[str, Any]) -> list[AddedToken]:
    """Special tokens without a name."""
    lists = [
        (file, contents[file][key])
        for file in (CONFIG, MAP)
        for key in LISTS
        if file in contents and contents[file].get(key) and isinstance(contents[file][key], list)
    ]
    found = [[token_of(file, value, special=True) for value in values] for file, values in lists]
    files = {file for file, _ in lists}
    texts = [sorted(token.content for token in tokens) for tokens in found]
    unread = files == {MAP} and DECODER in contents.get(CONFIG, {})
    if unread or any(other != texts[0] for other in texts):
        raise contradiction(CONFIG, MAP, LISTS[0])
    return found[0] if found else []


def by_text(tokens: Iterable[AddedToken]) -> Tokens:
    return {token.content: token for token in tokens}


def token_of(file: str, value: Any, **known: Any) -> AddedToken:
    """A token from JSON: its text, or an object with its flags."""
    try:
        fields: dict[str, Any] = {"content": value} if isinstance(value, str) else {**value}
        fields.pop("__type", None)
        fields = {"id": NO_ID, **fields, **known}
        token = AddedToken(**{"normalized": not fields.get("special", False), **fields})
    except TypeError:
        token = None
    if token is None or not (isinstance(token.content, str) and type(token.id) is int):
        raise ValueError(f"{file} holds no list of tokens: {value!r} is none")
    return token


def plain_token(text: str, token_id: Any, special: bool) -> AddedToken:
    return token_of(ADDED, text, id=token_id, special=special)


def with_ids(tokens: Tokens, vocab: dict[str, int]) -> list[AddedToken]:
    """The tokens with the ids that `tokenizers` gives them in this order: that of the vocabulary,
    or the next one. Raises ValueError where a file gives another."""
    found, free = [], len(vocab)
    for text, token in tokens.items():
        token_id = vocab.get(text, free)
        if token.id not in (NO_ID, token_id):
            raise ValueError(
                f"the added token {text!r} has the id {token.id}, but transformers gives it "
                f"{token_id}: the one of the vocabulary, or the next that is free"
            )
        found.append(replace(token, id=token_id))
        free = max(free, token_id + 1)
    return found


def contradiction(first: str, second: str, about: str) -> ValueError:
    return ValueError(
        f"{first} and {second} contradict each other about {about!r}: make them say the same as "
        "when the model was trained"
    )
