"""Anything that rates answers: a trained reward model, any Python function, or the toy."""

import importlib
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.checkpoints import holds_adapter
from gpt2mini.lora.adapt import with_shared_weights
from gpt2mini.lora.loading import load_adapter
from gpt2mini.model import GPT2
from gpt2mini.preferences.reward_model import check_reward_head, score_with_reward
from gpt2mini.preferences.toy import positive_share
from gpt2mini.tokenizer import Tokenizer

# (prompts, responses) -> one number for each response, the higher the better
RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float] | Tensor]


def find_reward(
    name: str, device: torch.device | str | None = None, base: GPT2 | None = None
) -> RewardFunction:
    """The reward called "toy", the reward model in a folder, or the function `package.module:name`.

    base: for a folder with an adapter only, the model that it was trained on; its weights are
    shared, not copied. A function runs: name only one that you trust. Raises ValueError if it is
    none of these.
    """
    if name == "toy":
        return positive_share
    if Path(name).is_dir():
        model = reward_model(Path(name), device, base)
        check_reward_head(model)
        return partial(score_with_reward, model, Tokenizer.from_pretrained(name))
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"the reward {name!r} is neither 'toy' nor a folder with a reward model, nor a "
            "function, written as package.module:function"
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # a module runs when it is imported, and may fail in any way
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


def reward_model(folder: Path, device: torch.device | str | None, base: GPT2 | None) -> GPT2:
    """A whole model, or an adapter with its head on the base given."""
    if not holds_adapter(folder):
        return GPT2.from_pretrained(folder, device=device)
    if base is None:
        raise ValueError(f"{folder} holds an adapter: give the base that it was trained on")
    model = with_shared_weights(base)
    load_adapter(model, folder)
    return model.eval()


def call_reward(
    reward: RewardFunction, prompts: Sequence[str], responses: Sequence[str]
) -> Float[Tensor, " responses"]:
    """The reward of each response, on the CPU.

    Raises ValueError, with the prompt and the response, if the function raises or gives anything
    but one number, finite in float32, for each response.
    """
    expected = f"expected {len(responses)} numbers, one for each response"
    try:
        given = reward(prompts, responses)
        several = isinstance(given, Iterable) and getattr(given, "ndim", 1) > 0
        values = list(given) if several else None
    except Exception as error:
        raise ValueError(blame(reward, prompts, responses, error)) from error
    if values is None:
        raise ValueError(f"the reward function gave {reprlib.repr(given)}; {expected}")
    if len(values) != len(responses):
        raise ValueError(f"the reward function gave {len(values)} values; {expected}")
    rewards = torch.tensor([number(value) for value in values], dtype=torch.float32)
    if not rewards.isfinite().all():
        i = rewards.isfinite().tolist().index(False)
        raise ValueError(
            f"the reward function gave {reprlib.repr(values[i])} for "
            f"{show(prompts[i], responses[i])}; {expected}, finite in float32"
        )
    return rewards


def blame(
    reward: RewardFunction, prompts: Sequence[str], responses: Sequence[str], error: Exception
) -> str:
    """What went wrong, and for which response: they are tried again, one at a time."""
    what = f"{type(error).__name__}: {error}"
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            reward([prompt], [response])
        except Exception:
            return f"the reward function raised {what}, for {show(prompt, response)}"
    return f"the reward function raised {what}, for {len(responses)} responses together"


def number(value: object) -> float:
    """NaN for what is no number, or too large a one."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a longer tensor
        return math.nan


def show(prompt: str, response: str) -> str:
    return f"the response {response[:80]!r} to the prompt {prompt[-80:]!r}"
