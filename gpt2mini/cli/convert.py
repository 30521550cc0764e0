"""Read a model in any form, or a checkpoint of a run, and write a Hugging Face folder. An adapter
is merged into the model.

Examples:
  gpt2mini convert models/124M models/gpt2 --dtype float16
  gpt2mini convert runs/novel/checkpoints/step-00000120 models/novel
  gpt2mini convert gpt2 models/keeper --adapter runs/finetune/best
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from gpt2mini import Tokenizer
from gpt2mini.checkpoints import (
    CheckpointError,
    find_model,
    load_model,
    read_class_names,
    save_model,
)
from gpt2mini.checkpoints.hub import has_tokenizer
from gpt2mini.checkpoints.huggingface import head_rules, is_classifier
from gpt2mini.files import local_path
from gpt2mini.lora import load_adapter, merge_lora
from gpt2mini.training.checkpoints import is_checkpoint, model_of_checkpoint


@dataclass(frozen=True)
class Flags:
    source: Positional[str]  # a model's folder of any kind, a checkpoint, or a name
    target: Positional[str]  # the folder to write
    adapter: str | None = None  # folder of an adapter that was trained on the model, to be merged
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights


def run(flags: Flags) -> None:
    source, target = find_model(flags.source), local_path(flags.target)
    tokenizer = read_tokenizer(source)
    if tokenizer is None and target.is_dir() and has_tokenizer(target):
        raise ValueError(
            f"{target} has a tokenizer, which need not be this model's, and {source} has none to "
            "replace it: take its files out, or choose another folder to write"
        )
    if is_checkpoint(source):
        model = model_of_checkpoint(source)
    else:  # with an adapter in float32, to be rounded once, when it is saved
        model = load_model(flags.source, None if flags.adapter else flags.dtype)
    if flags.adapter:
        if target.resolve() == source.resolve():
            raise ValueError(f"{target} is the base of the adapter: choose another folder to write")
        load_adapter(model, flags.adapter)
        merge_lora(model)
    class_names = None
    if is_classifier(head_rules(model)):  # configs of language models may name classes too
        with suppress(CheckpointError):
            class_names = read_class_names(source)
    save_model(model, target, flags.dtype, class_names)
    if tokenizer is None:
        print(f"{source} has no tokenizer files, so {target} has none either")
    else:
        tokenizer.save_pretrained(target)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {parameters:,} parameters in {flags.dtype}")


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a model's folder, if it has one."""
    try:
        return Tokenizer.from_pretrained(folder)
    except FileNotFoundError:
        return None
