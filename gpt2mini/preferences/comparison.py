"""Rewards of responses to held-out prompts before and after training, with confidence intervals.

The mean reward of some dozens of sampled responses varies from sample to sample, and a difference
of two such means varies more. Both responses have the same prompt, so differences are taken prompt
by prompt ("paired"), which removes the variance between prompts.

An example: means of -0.6233 before and -0.5658 after on 50 prompts differ by +0.0575. That is
significant at 95 % only if the standard deviation of the 50 differences is below
0.0575 * sqrt(50) / 1.96 = 0.207, which two means alone do not tell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.evaluation.intervals import bootstrap_interval
from gpt2mini.model import GPT2
from gpt2mini.preferences.reward_functions import RewardFunction, call_reward
from gpt2mini.preferences.rollouts import encode_prompts, response_texts, sample_responses
from gpt2mini.tokenizer import Tokenizer

BATCH_ROWS = 32  # responses generated at once


def answer_prompts(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 64,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
    stop_ids: Sequence[int] = (),
    **sampling,
) -> list[str]:
    """`num_samples` responses to each prompt, in neighboring entries.

    prompts: in the model's template. stop_ids: tokens that end a response, besides <|endoftext|>.
    sampling: temperature, top_k and so on, as for `generate`; the default is temperature 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    missing = tokenizer.missing_ids(model.config.vocab_size)
    responses: list[str] = []
    size = max(1, BATCH_ROWS // num_samples)
    for start in range(0, len(encoded), size):
        generated = sample_responses(
            model,
            encoded[start : start + size],
            max_new_tokens,
            stop_ids=[tokenizer.eos_id, *stop_ids],
            num_samples=num_samples,
            generator=generator,
            forbidden_ids=missing,
            **sampling,
        )
        responses += response_texts(generated, tokenizer)
    return responses


@dataclass(frozen=True)
class SideBySide:
    """Two responses to each prompt, and their rewards."""

    prompts: list[str]
    before: list[str]
    after: list[str]
    rewards_before: Float[Tensor, " prompts"]
    rewards_after: Float[Tensor, " prompts"]

    @property
    def mean_before(self) -> float:
        return float(self.rewards_before.mean())

    @property
    def mean_after(self) -> float:
        return float(self.rewards_after.mean())

    @property
    def difference_interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the mean difference, over prompts; NaN for one prompt."""
        return bootstrap_interval((self.rewards_after - self.rewards_before).numpy())

    @property
    def wins(self) -> np.ndarray:
        """1 where the response after has the higher reward, 0 where the lower, 1/2 for a tie."""
        return (np.sign((self.rewards_after - self.rewards_before).numpy()) + 1) / 2

    @property
    def win_rate(self) -> float:
        return float(self.wins.mean())

    @property
    def win_rate_interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of the win rate, over prompts; NaN for one prompt."""
        return bootstrap_interval(self.wins)

    def __str__(self) -> str:
        (low, high), (least, most) = self.difference_interval, self.win_rate_interval
        difference = self.mean_after - self.mean_before
        note = "" if low > 0 or high < 0 else "; not significant"
        interval = f"95 % interval {low:+.4f} to {high:+.4f}"
        rates = f" ({least:.1%} to {most:.1%})"
        if len(self.prompts) == 1:
            interval, rates = "one prompt has no interval", ""
        return (
            f"mean reward {self.mean_before:.4f} before, {self.mean_after:.4f} after\n"
            f"difference: {difference:+.4f} ({interval}){note}\n"
            f"better after than before: {self.win_rate:.1%}{rates} of {len(self.prompts)} prompts"
        )

    def show(self, n: int) -> str:
        """The first n prompts with both responses and their rewards."""
        return "\n".join(
            f"--- {end_of(self.prompts[i])}\n"
            f"[before {float(self.rewards_before[i]):+.3f}] {self.before[i].strip()}\n"
            f"[after  {float(self.rewards_after[i]):+.3f}] {self.after[i].strip()}\n"
            for i in range(min(n, len(self.prompts)))
        )

    def summary(self) -> dict[str, Any]:
        return {
            "mean_before": self.mean_before,
            "mean_after": self.mean_after,
            "difference_interval": self.difference_interval,
            "win_rate": self.win_rate,
            "win_rate_interval": self.win_rate_interval,
            "prompts": self.prompts,
            "answers_before": self.before,
            "answers_after": self.after,
        }


def end_of(prompt: str, most: int = 300) -> str:
    """What a prompt asks at last, for display: a long one without its beginning."""
    return prompt if len(prompt) <= most else f"... {prompt[-most:]}"


def compare_answers(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str], reward: RewardFunction
) -> SideBySide:
    """Compute the rewards of two responses to each prompt."""
    if not len(prompts) == len(before) == len(after) > 0:
        raise ValueError(
            f"expected two responses to each prompt: {len(prompts)} prompts, {len(before)} "
            f"responses before, {len(after)} after"
        )
    return SideBySide(
        list(prompts),
        list(before),
        list(after),
        call_reward(reward, prompts, before),
        call_reward(reward, prompts, after),
    )


def best_of_n(
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward: RewardFunction,
    n: int,
    max_new_tokens: int = 64,
    generator: torch.Generator | None = None,
) -> tuple[list[str], Float[Tensor, " prompts"]]:
    """Sample n responses to each prompt and keep the one with the highest reward: (responses,
    rewards).

    A strong baseline without training (Stiennon et al. 2020, section 4.3), at n times the cost of
    each response.
    """
    responses = answer_prompts(model, tokenizer, prompts, max_new_tokens, n, generator)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    rewards, best = (
        call_reward(reward, repeated, responses).view(-1, n).max(dim=1)
    )  # (prompts) each
    return [responses[i * n + int(best[i])] for i in range(len(prompts))], rewards
