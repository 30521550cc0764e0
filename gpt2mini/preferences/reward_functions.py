"""Anything that rates answers: a trained reward model, any Python function, or the toy."""

import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.lora import load_adapter, with_shared_weights
from gpt2mini.model import GPT2
from gpt2mini.preferences.rewards import check_reward_head, score_with_reward
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
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"there is no reward function {name!r}: {error} (a module in the current folder is "
            "found with PYTHONPATH=.)"
        ) from None


def reward_model(folder: Path, device: torch.device | str | None, base: GPT2 | None) -> GPT2:
    """A whole model, or an adapter with its head on the base given."""
    if not (folder / "adapter_config.json").is_file():
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
    but one finite number for each response.
    """
    try:
        values = list(reward(prompts, responses))
    except Exception as error:
        raise ValueError(blame(reward, prompts, responses, error)) from error
    expected = f"expected {len(responses)} numbers, one for each response"
    if len(values) != len(responses):
        raise ValueError(f"the reward function gave {len(values)} values; {expected}")
    for prompt, response, value in zip(prompts, responses, values, strict=True):
        if not is_finite(value):
            raise ValueError(
                f"the reward function gave {value!r} for {show(prompt, response)}; {expected}"
            )
    return torch.tensor([float(value) for value in values])


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


def is_finite(value: object) -> bool:
    try:
        return math.isfinite(float(value))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def show(prompt: str, response: str) -> str:
    return f"the response {response[:80]!r} to the prompt {prompt[-80:]!r}"
