"""Reward functions by name: the toy, a reward model in a folder, or a Python function."""

import importlib
import reprlib
from functools import partial
from pathlib import Path

import torch

from gpt2mini.checkpoints import holds_adapter
from gpt2mini.checks import check_reward_head
from gpt2mini.files import local_path
from gpt2mini.lora.adapt import with_shared_weights
from gpt2mini.lora.loading import load_adapter
from gpt2mini.model import GPT2
from gpt2mini.preferences.reward_functions import RewardFunction, positive_share
from gpt2mini.preferences.reward_model import score_with_reward
from gpt2mini.tokenizer import Tokenizer


def find_reward(
    name: str, device: torch.device | str | None = None, base: GPT2 | None = None
) -> RewardFunction:
    """The reward function for a name: "toy" (`positive_share`), a folder with a reward model, or a
    Python function, `package.module:function`.

    base: for a folder that holds an adapter, the model that it was trained on; its weights are
    shared, not copied. A module is executed when it is imported: name only one that you trust.
    Raises ValueError for any other name.
    """
    if name == "toy":
        return positive_share
    if local_path(name).is_dir():
        model = load_reward_model(local_path(name), device, base)
        check_reward_head(model)
        return partial(score_with_reward, model, Tokenizer.from_pretrained(name))
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"the reward {name!r} is neither 'toy' nor a folder with a reward model, nor a "
            "function written as package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing executes the module
        raise ValueError(
            f"there is no reward function {name!r}: {type(error).__name__}: {error} (modules are "
            "looked for in the folders of sys.path)"
        ) from error
    if not callable(found):
        raise ValueError(
            f"the reward {name!r} is {reprlib.repr(found)}; expected a function that takes prompts "
            "and responses and returns a number for each response"
        )
    return found


def load_reward_model(folder: Path, device: torch.device | str | None, base: GPT2 | None) -> GPT2:
    """A complete reward model, or the adapter of one with its head, added to `base`."""
    if not holds_adapter(folder):
        return GPT2.from_pretrained(folder, device=device)
    if base is None:
        raise ValueError(f"{folder} holds an adapter: give the base model that it was trained on")
    model = with_shared_weights(base)
    load_adapter(model, folder)
    return model.eval()
