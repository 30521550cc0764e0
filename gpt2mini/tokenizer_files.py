"""A tokenizer's folder: its files read, checked, and kept as they are to be written back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2mini.added_tokens import AddedToken
from gpt2mini.files import as_json, refuse_placeholder
from gpt2mini.special_tokens import END_OF_TEXT, read_special_tokens
from gpt2mini.tokenizer_fields import (
    GENERAL_CLASSES,
    MODEL,
    SPECIAL_TOKENS_MAP,
    TOKENIZER_CONFIG,
    TOKENIZER_JSON,
    check_fields,
)

TOKENIZER_FILES = (  # all that is read, under the names of `transformers`
    *("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
)
CHAT_TEMPLATES = "additional_chat_templates/*.jinja"
OPENAI_NAMES = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}
FOREIGN_FILES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class TokenizerSettings:
    """What a tokenizer's folder says besides vocabulary and merges; and the files themselves."""

    added_tokens: list[AddedToken]
    names: dict[str, str]  # "eos_token" and so on -> token
    add_prefix_space: bool
    files: dict[str, str]  # name -> text


def default_settings(vocab: dict[str, int], merges: Merges) -> TokenizerSettings:
    """GPT-2's own: <|endoftext|> is the only added token."""
    if END_OF_TEXT not in vocab:
        raise ValueError(f"the vocabulary has no {END_OF_TEXT}: this is not a GPT-2 tokenizer")
    added = [AddedToken(END_OF_TEXT, vocab[END_OF_TEXT], special=True)]
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
    lines = "".join(f"{left} {right}\n" for left, right in merges)
    files = {
        "vocab.json": as_json(vocab),
        "merges.txt": "#version: 0.2\n" + lines,
        "tokenizer_config.json": as_json({"tokenizer_class": "GPT2Tokenizer", **names}),
    }
    return TokenizerSettings(added, names, add_prefix_space=False, files=files)


def read_tokenizer_files(folder: Path) -> tuple[dict[str, int], Merges, TokenizerSettings]:
    """(vocabulary, merges, settings) of a folder.

    Raises FileNotFoundError if files are missing. Raises ValueError, naming the file, if one is
    damaged, if two contradict each other, or for a field that is refused (`tokenizer_fields`).
    """
    files = read_files(folder)
    contents = {
        name: parse_json(folder / name, text)
        for name, text in files.items()
        if name.endswith(".json")
    }
    check_all_fields(folder, contents)
    vocab, merges = read_vocabulary(folder, files, contents)
    config = contents.get("tokenizer_config.json", {})
    is_general = config.get("tokenizer_class") in GENERAL_CLASSES
    try:
        added, names = read_special_tokens(contents, vocab, is_general)
        prefix_space = read_prefix_space(contents, is_general)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if not config:
        config = {"tokenizer_class": "GPT2Tokenizer", **names}
        files["tokenizer_config.json"] = as_json(config)
    return vocab, merges, TokenizerSettings(added, names, prefix_space, files)


def read_files(folder: Path) -> dict[str, str]:
    """Name -> text of all files of a tokenizer. OpenAI's names become those of `transformers`."""
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    names += [path.relative_to(folder).as_posix() for path in sorted(folder.glob(CHAT_TEMPLATES))]
    files = {name: read_text(folder / name) for name in names}
    if not {"vocab.json", "merges.txt"} <= files.keys():
        if all((folder / name).is_file() for name in OPENAI_NAMES.values()):
            files |= {ours: read_text(folder / name) for ours, name in OPENAI_NAMES.items()}
        elif "tokenizer.json" not in files:
            foreign = [name for name in FOREIGN_FILES if (folder / name).is_file()]
            raise FileNotFoundError(
                f"{folder} has no tokenizer files: expected vocab.json and merges.txt, or OpenAI's "
                "encoder.json and vocab.bpe, or tokenizer.json"
                + (f"; its {foreign[0]} is of another kind of tokenizer" if foreign else "")
            )
    return files


def read_text(path: Path) -> str:
    """A file of UTF-8, without a byte order mark, its lines ended by newlines alone."""
    refuse_placeholder(path)
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None


def check_all_fields(folder: Path, contents: dict[str, Any]) -> None:
    """The kind of tokenizer first, so that a foreign one is refused as such."""
    if "tokenizer_config.json" in contents:
        path = folder / "tokenizer_config.json"
        check_fields(path, contents["tokenizer_config.json"], TOKENIZER_CONFIG)
    if "tokenizer.json" in contents:
        path, fields = folder / "tokenizer.json", contents["tokenizer.json"]
        if isinstance(fields, dict):
            check_fields(path, fields.get("model"), MODEL)
            fields = {"pre_tokenizer": None, **fields}
        check_fields(path, fields, TOKENIZER_JSON)
    if "special_tokens_map.json" in contents:
        path = folder / "special_tokens_map.json"
        check_fields(path, contents["special_tokens_map.json"], SPECIAL_TOKENS_MAP)
    if not isinstance(contents.get("added_tokens.json", {}), dict):
        raise ValueError(f"{folder / 'added_tokens.json'} holds no list of tokens: expected ids")


def read_vocabulary(
    folder: Path, files: dict[str, str], contents: dict[str, Any]
) -> tuple[dict[str, int], Merges]:
    """From vocab.json and merges.txt, or from tokenizer.json, or from all, if they are the same."""
    found = {}
    if "vocab.json" in files and "merges.txt" in files:
        lines = files["merges.txt"].split("\n")
        pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        found["vocab.json"] = checked_vocabulary(
            folder / "vocab.json", contents["vocab.json"], folder / "merges.txt", pairs
        )
    if "tokenizer.json" in files:
        model = contents["tokenizer.json"]["model"]
        pairs = [p.split(" ") if isinstance(p, str) else p for p in model.get("merges", [])]
        path = folder / "tokenizer.json"
        found["tokenizer.json"] = checked_vocabulary(path, model.get("vocab"), path, pairs)
    first, *others = found.values()
    if any(other != first for other in others):
        raise ValueError(
            f"{folder}: vocab.json and merges.txt are of another vocabulary than tokenizer.json: "
            "remove those with which the model was not trained"
        )
    return first


def checked_vocabulary(
    vocab_path: Path, vocab: Any, merges_path: Path, pairs: list[Any]
) -> tuple[dict[str, int], Merges]:
    is_vocabulary = isinstance(vocab, dict) and all(
        type(i) is int and i >= 0 for i in vocab.values()
    )
    if not is_vocabulary:
        raise ValueError(f"{vocab_path} is damaged: expected an object of token -> id")
    wrong = [pair for pair in pairs if not isinstance(pair, list) or len(pair) != 2]
    if wrong:
        raise ValueError(f"{merges_path} is damaged: expected two pieces a merge, found {wrong[0]}")
    return vocab, [(left, right) for left, right in pairs]


def read_prefix_space(contents: dict[str, Any], is_general: bool) -> bool:
    """Whether text begins with a space that is put there where it has none. The class GPT2Tokenizer
    does as the config says, the general classes as tokenizer.json."""
    config, tokenizer = contents.get("tokenizer_config.json", {}), contents.get("tokenizer.json")
    in_config = config.get("add_prefix_space")
    if tokenizer is None:
        return bool(in_config)
    in_json = tokenizer["pre_tokenizer"].get("add_prefix_space", True)
    if in_config is None:
        in_config = in_json if is_general else False
    if in_config != in_json:
        raise ValueError(
            f"add_prefix_space is {in_config} for tokenizer_config.json and {in_json} for "
            "tokenizer.json: make both say what the model was trained with"
        )
    return in_json
