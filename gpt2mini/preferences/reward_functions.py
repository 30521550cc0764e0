"""Reward functions: (prompts, responses) -> one number for each response, the higher the better.

A trained reward model is one (`reward_model.score_with_reward`), and so is any Python function,
such as `positive_share` below: a toy that needs no training and no labels. It also shows reward
hacking: a reward for every positive word is soon maximized by "glad glad glad glad". So a word
counts once, and a third of the words is enough; the KL penalty keeps the rest English.
"""

import math
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

RewardFunction = Callable[[Sequence[str], Sequence[str]], Sequence[float] | Tensor]


def call_reward(
    reward: RewardFunction, prompts: Sequence[str], responses: Sequence[str]
) -> Float[Tensor, " responses"]:
    """The reward of each response, on the CPU.

    Raises ValueError, with the prompt and the response, if the function raises or does not return
    one number, finite in float32, for each response.
    """
    expected = f"expected {len(responses)} numbers, one for each response"
    try:
        returned = reward(prompts, responses)
        several = isinstance(returned, Iterable) and getattr(returned, "ndim", 1) > 0
        values = list(returned) if several else None
    except Exception as error:
        raise ValueError(describe_failure(reward, prompts, responses, error)) from error
    if values is None:
        raise ValueError(f"the reward function returned {reprlib.repr(returned)}; {expected}")
    if len(values) != len(responses):
        raise ValueError(f"the reward function returned {len(values)} values; {expected}")
    rewards = torch.tensor([number(value) for value in values], dtype=torch.float32)
    if not rewards.isfinite().all():
        i = rewards.isfinite().tolist().index(False)
        raise ValueError(
            f"the reward function returned {reprlib.repr(values[i])} for "
            f"{show(prompts[i], responses[i])}; {expected}, finite in float32"
        )
    return rewards


def describe_failure(
    reward: RewardFunction, prompts: Sequence[str], responses: Sequence[str], error: Exception
) -> str:
    """The error and the response that caused it, found by calling the function on one at a time."""
    what = f"{type(error).__name__}: {error}"
    for prompt, response in zip(prompts, responses, strict=True):
        try:
            reward([prompt], [response])
        except Exception:
            return f"the reward function raised {what}, for {show(prompt, response)}"
    return f"the reward function raised {what}, for {len(responses)} responses together"


def number(value: object) -> float:
    """The value as a float; NaN if it is not a number or overflows."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a longer tensor
        return math.nan


def show(prompt: str, response: str) -> str:
    return f"the response {response[:80]!r} to the prompt {prompt[-80:]!r}"


# ---- a toy reward

WORDS = """
admirable adore agreeable amiable beautiful beauty beloved best better bless blessed blessing
blossom brave bright calm charm charming cheer cheerful cheerfully comfort comfortable content
courage dance dancing dear dearest delicious delight delighted delightful dream eager easily
easy enjoy enjoyed excellent fair faithful festival fine flower flowers fresh friend friendly
friends friendship garden gay generous gentle gently gift glad gladly glorious golden good
goodness grace gracious grand grateful great green happily happiness happy health hearty heaven
holiday home honest honor hope hopeful hopes jolly joy joyful joyous kind kindly kindness kiss
kissed laugh laughed laughing laughter light lively love loved lovely lovers loves loving lucky
marvellous mercy merrily merry mirth music nice noble peace peaceful perfect play playful
playing pleasant please pleased pleasure praise praised precious pretty pride proud pure rejoice
rest rich safe shining sing singing smile smiled smiles smiling soft song splendid star stars
strong summer sun sunlight sunny sunshine sweet sweetly sweetness tender tenderly thank thankful
thanks treasure triumph true trust victory warm warmly warmth welcome well willing willingly
wise wonder wonderful worthy yes young youth
"""
POSITIVE_WORDS = frozenset(WORDS.split())
ENOUGH = 1 / 3  # of the words


def positive_share(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """0 for a response without a positive word, 1 if a third of its words are different positive
    words, and proportional between."""
    return [share_of_positive(re.findall(r"[a-z']+", response.lower())) for response in responses]


def share_of_positive(words: Sequence[str]) -> float:
    share = len(POSITIVE_WORDS.intersection(words)) / max(1, len(words))
    return min(1.0, share / ENOUGH)
