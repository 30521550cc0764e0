"""The scale of a reward: a reward model's outputs have any mean and any size.

PPO weighs the reward against the KL penalty, so a coefficient says something only about rewards of
a known size. Ziegler et al. 2019 (section 2.1) therefore give the rewards of the untuned policy's
responses a mean of 0 and a variance of 1. GRPO does so within each group of responses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.model import GPT2
from gpt2mini.preferences.comparison import answer_prompts
from gpt2mini.preferences.reward_functions import RewardFunction, call_reward
from gpt2mini.tokenizer import Tokenizer


@dataclass(frozen=True)
class RewardScale:
    """Mean and standard deviation of the rewards of an untuned policy's responses."""

    mean: float
    deviation: float

    def normalized(self, rewards: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        return (rewards - self.mean) / self.deviation


def measure_reward_scale(
    reward: RewardFunction,
    policy: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    generator: torch.Generator,
    n: int = 64,
) -> RewardScale:
    """Of the policy's responses to the first n prompts; to be measured before training. Of fewer
    prompts each gets several responses, as many as the others, which makes n in all or a few more.
    Where all rewards are equal, the deviation is taken as 1. Raises ValueError without prompts."""
    if n < 1 or not prompts:
        raise ValueError(
            f"a reward scale needs prompts and n of at least 1, not {len(prompts)} prompts, n={n}"
        )
    asked = list(prompts)[:n]
    samples = -(-n // len(asked))  # to each prompt
    responses = answer_prompts(policy, tokenizer, asked, max_new_tokens, samples, generator)
    repeated = [prompt for prompt in asked for _ in range(samples)]
    rewards = call_reward(reward, repeated, responses).double()
    are_equal = bool((rewards == rewards[0]).all())
    return RewardScale(float(rewards.mean()), 1.0 if are_equal else float(rewards.std()))
