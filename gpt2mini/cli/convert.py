"""Read a model in any form, or a checkpoint of a run, and write a Hugging Face folder.

Examples:
  gpt2mini convert models/124M models/gpt2 --dtype float16
  gpt2mini convert runs/novel/checkpoints/step-00000120 models/novel
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tyro.conf import Positional

from gpt2mini import Tokenizer
from gpt2mini.checkpoints import (
    CheckpointError,
    find_model,
    load_model,
    read_class_names,
    save_model,
)
from gpt2mini.checkpoints.huggingface import head_rules, is_classifier
from gpt2mini.training.checkpoints import is_checkpoint, model_of_checkpoint


@dataclass(frozen=True)
class Flags:
    source: Positional[str]  # a model's folder of any kind, a checkpoint, or a name
    target: Positional[str]  # the folder to write
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"  # of the weights


def run(flags: Flags) -> None:
    source, target = find_model(flags.source), Path(flags.target)
    dtype = getattr(torch, flags.dtype)
    if is_checkpoint(source):
        model = model_of_checkpoint(source).to(dtype)
    else:
        model = load_model(source, dtype)
    class_names = None
    if is_classifier(head_rules(model)):  # configs of language models may name classes too
        with suppress(CheckpointError):
            class_names = read_class_names(source)
    save_model(model, target, class_names=class_names)
    try:
        Tokenizer.from_pretrained(source).save_pretrained(target)
    except FileNotFoundError:
        print(f"{source} has no tokenizer files, so {target} has none either")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {parameters:,} parameters in {flags.dtype}")
