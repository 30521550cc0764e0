"""What `transformers` looks up in tokenizer_config.json and only the model knows."""

from pathlib import Path

from gpt2mini.checkpoints.config_json import CONFIG, EOS_OF_TRANSFORMERS, NUMBERS
from gpt2mini.files import read_json, write_json

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"


def complete_tokenizer_config(folder: Path) -> None:
    """Give the tokenizer of a model's folder the context length, which their pipeline cuts to, and
    for a classifier a padding token, without which it takes one text at a time. To be called when
    either of the two has been saved; nothing is done before both are there."""
    if not all((folder / name).is_file() for name in (CONFIG, TOKENIZER_CONFIG)):
        return
    model, tokenizer = read_json(folder / CONFIG), read_json(folder / TOKENIZER_CONFIG)
    complete = dict(tokenizer)
    named = [model[name] for name in NUMBERS["context_length"] if isinstance(model.get(name), int)]
    context_length = next(iter(named), None)
    longest = tokenizer.get("model_max_length")
    if context_length and not (isinstance(longest, int) and longest <= context_length):
        complete["model_max_length"] = context_length
    is_classifier = model.get("architectures") == ["GPT2ForSequenceClassification"]
    pads_with_eos = model.get("pad_token_id") == model.get("eos_token_id", EOS_OF_TRANSFORMERS)
    names_padding = "pad_token" in tokenizer or has_padding_token(folder / SPECIAL_TOKENS_MAP)
    if is_classifier and pads_with_eos and not names_padding and tokenizer.get("eos_token"):
        complete["pad_token"] = tokenizer["eos_token"]
    if complete != tokenizer:
        write_json(folder / TOKENIZER_CONFIG, complete)


def has_padding_token(special_tokens_map: Path) -> bool:
    """Whether the file of earlier versions of `transformers` is there and names a padding token."""
    return special_tokens_map.is_file() and "pad_token" in read_json(special_tokens_map)


def write_truncation(folder: str | Path, longest: int, keep: str) -> None:
    """Note how texts are cut for a classifier: to `longest` tokens, of which they keep the "head"
    or the "tail". `transformers` cuts alike, if asked to."""
    path = Path(folder) / TOKENIZER_CONFIG
    side = {"head": "right", "tail": "left"}[keep]  # which is cut off
    write_json(path, {**read_json(path), "model_max_length": longest, "truncation_side": side})


def read_truncation(folder: str | Path) -> tuple[int | None, str]:
    """(longest, keep) of `write_truncation`; None if there is no limit."""
    path = Path(folder) / TOKENIZER_CONFIG
    config = read_json(path) if path.is_file() else {}
    longest = config.get("model_max_length")
    keep = "tail" if config.get("truncation_side") == "left" else "head"
    return longest if isinstance(longest, int) and longest > 0 else None, keep
