"""Which fields of a tokenizer's files are obeyed, which are kept, and which are refused by name.

Kept are fields that change no token id. Refused is what GPT-2's tokenizer does not do, and what
`transformers` 4 and 5 read differently, such as a normalizer in tokenizer.json.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rule = Callable[[Any], bool]  # whether a field's value is accepted


def anything(value: Any) -> bool:
    return True


def nothing(value: Any) -> bool:
    """Null, false or empty: the rule for unknown fields too."""
    return not value


def is_object(value: Any) -> bool:
    return isinstance(value, dict)


def is_list(value: Any) -> bool:
    return isinstance(value, list)


def have_ids(added_tokens: Any) -> bool:
    return is_list(added_tokens) and all("id" in {**token} for token in added_tokens)


def keeps_text(normalizer: Any) -> bool:
    return not normalizer or normalizer == {"type": "Sequence", "normalizers": []}


def splits_as_gpt2(pre_tokenizer: Any) -> bool:
    return pre_tokenizer["type"] == "ByteLevel" and pre_tokenizer.get("use_regex", True)


def adds_nothing(post_processor: Any) -> bool:
    """Whether one text keeps its token ids, with nothing before or after them."""
    if not post_processor or post_processor["type"] == "ByteLevel":
        return True
    if post_processor["type"] == "Sequence":
        return all(map(adds_nothing, post_processor["processors"]))
    is_template = post_processor["type"] == "TemplateProcessing"
    return is_template and [list(part) for part in post_processor["single"]] == [["Sequence"]]


def decodes_bytes(decoder: Any) -> bool:
    return not decoder or decoder["type"] == "ByteLevel"


TOKENIZER_JSON: dict[str, Rule] = {
    "version": anything,
    "model": anything,  # see MODEL
    "added_tokens": have_ids,  # obeyed
    "truncation": anything,  # kept: in `transformers` every call has its own,
    "padding": anything,  # and its own padding
    "normalizer": keeps_text,
    "pre_tokenizer": splits_as_gpt2,  # its add_prefix_space is obeyed
    "post_processor": adds_nothing,
    "decoder": decodes_bytes,
}
MODEL: dict[str, Rule] = {  # tokenizer.json: model
    "type": lambda value: value in (None, "BPE"),
    "vocab": anything,  # obeyed, and checked where it is read
    "merges": is_list,  # obeyed
    "unk_token": anything,  # kept: no byte is unknown
    "fuse_unk": anything,
    "dropout": nothing,
    "continuing_subword_prefix": nothing,
    "end_of_word_suffix": nothing,
    "byte_fallback": nothing,
    "ignore_merges": nothing,
}
GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # do what tokenizer.json says
CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", *GENERAL_CLASSES)
TOKENIZER_CONFIG: dict[str, Rule] = {  # all names that end in _token are obeyed
    "tokenizer_class": lambda value: value is None or value in CLASSES,
    "added_tokens_decoder": is_object,  # obeyed
    "additional_special_tokens": anything,  # obeyed
    "extra_special_tokens": anything,  # obeyed
    "add_prefix_space": anything,  # obeyed
    "add_bos_token": nothing,
    "add_eos_token": nothing,
    "split_special_tokens": nothing,
    "auto_map": nothing,  # code that comes with a model is never run
    **dict.fromkeys(  # kept: lengths, padding and chats
        (
            *("model_max_length", "max_len", "max_length", "stride", "truncation_strategy"),
            *("padding_side", "truncation_side", "pad_to_multiple_of", "pad_token_type_id"),
            *("model_input_names", "processor_class", "chat_template", "chat_control_tokens"),
            *("response_template", "response_schema", "padding", "truncation"),
        ),
        anything,
    ),
    **dict.fromkeys(  # kept: decoding, which gives back every byte here
        (
            *("errors", "clean_up_tokenization_spaces", "trim_offsets", "verbose"),
            "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
        ),
        anything,
    ),
    **dict.fromkeys(  # kept: where the files once were, and what has read them
        (
            *("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file"),
            *("merges_file", "files_loaded", "backend", "is_local", "local_files_only"),
            *("use_fast", "from_slow", "slow_tokenizer_class", "device_map", "trust_remote_code"),
        ),
        anything,
    ),
}
SPECIAL_TOKENS_MAP: dict[str, Rule] = {
    "additional_special_tokens": anything,  # obeyed
    "extra_special_tokens": anything,  # obeyed
}

WRITE_IT = "write the token into the texts and encode them with allow_special=True"
REMEDIES = {
    "tokenizer_class": f"expected one of {', '.join(CLASSES)}",
    "type": "expected BPE",
    "normalizer": "set it to null, and normalize the texts before you encode them",
    "post_processor": f"set it to null; {WRITE_IT}",
    "add_bos_token": f"set it to false; {WRITE_IT}",
    "add_eos_token": f"set it to false; {WRITE_IT}",
    "split_special_tokens": "set it to false: encode(text) takes special tokens for text anyway",
}


def check_fields(path: Path, fields: Any, rules: dict[str, Rule]) -> None:
    """Raise ValueError, naming the field, for the first one whose value is not accepted."""
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is damaged: expected an object of fields")
    for name, value in fields.items():
        is_token = name.endswith("_token") and isinstance(value, str | dict)
        try:
            accepted = is_token or rules.get(name, nothing)(value)
        except (KeyError, TypeError, AttributeError):  # not of the form that the rule reads
            accepted = False
        if not accepted:
            text = json.dumps(value, ensure_ascii=False)
            remedy = REMEDIES.get(name, "remove it if it changes no token id for this model")
            raise ValueError(
                f"{path}: {name} is {text if len(text) < 100 else text[:97] + '...'}, which may "
                f"change the token ids and is not what GPT-2's tokenizer does: {remedy}"
            )
