"""Did the answers get better? Prompts that were held out, answered before and after, side by side.

The numbers come with intervals: a mean over some dozens of sampled answers moves by itself, and the
difference of two such means more so. Both answers belong to one prompt, so their difference is
taken prompt by prompt ("paired"), which leaves out how hard the prompts are.

How sure is a published difference, say of -0.6233 before and -0.5658 after on 50 questions? It is
+0.0575, and with 95 % confidence above chance only if the 50 differences had a standard deviation
below 0.0575 * sqrt(50) / 1.96 = 0.207. Two means without that spread do not let anyone judge.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.generation import generate
from gpt2mini.model import GPT2
from gpt2mini.preferences.intervals import bootstrap_interval
from gpt2mini.preferences.reward_functions import RewardFunction, call_reward
from gpt2mini.preferences.rollouts import encode_prompts, pad_left, response_texts
from gpt2mini.tokenizer import Tokenizer

BATCH_ROWS = 32  # answers that are generated side by side


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
    """Responses to prompts as the model reads them; `num_samples` in a row for each.

    stop_ids: tokens that end a response, beside <|endoftext|>.
    sampling: temperature, top_k and so on, as for `generate`; the default is temperature 1.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, not {num_samples}")
    device = model.tok_emb.weight.device
    encoded = encode_prompts(model, tokenizer, prompts, max_new_tokens)
    found: list[str] = []
    size = max(1, BATCH_ROWS // num_samples)
    for start in range(0, len(encoded), size):
        token_ids, is_real = pad_left(encoded[start : start + size])  # (batch, tokens), both
        generated = generate(
            model,
            token_ids.to(device),
            max_new_tokens,
            is_real.to(device),
            stop_ids=[tokenizer.eos_id, *stop_ids],
            num_samples=num_samples,
            generator=generator,
            **sampling,
        )
        found += response_texts(generated, tokenizer)
    return found


@dataclass(frozen=True)
class SideBySide:
    """Two responses to each prompt and what a reward says of them."""

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
        """Of the mean difference, 95 % (bootstrap over prompts)."""
        return bootstrap_interval((self.rewards_after - self.rewards_before).numpy())

    @property
    def wins(self) -> np.ndarray:
        """1 where the answer after is better, 0 where it is worse, 1/2 where they are even."""
        return (np.sign((self.rewards_after - self.rewards_before).numpy()) + 1) / 2

    @property
    def win_rate(self) -> float:
        return float(self.wins.mean())

    @property
    def win_rate_interval(self) -> tuple[float, float]:
        """95 % (bootstrap over prompts)."""
        return bootstrap_interval(self.wins)

    def __str__(self) -> str:
        (low, high), (least, most) = self.difference_interval, self.win_rate_interval
        difference = self.mean_after - self.mean_before
        sure = "" if low > 0 or high < 0 else "; it may be chance"
        return (
            f"mean reward {self.mean_before:.4f} before, {self.mean_after:.4f} after: "
            f"{difference:+.4f} ({low:+.4f} to {high:+.4f}){sure}\n"
            f"better after than before: {self.win_rate:.1%} ({least:.1%} to {most:.1%}) "
            f"of {len(self.prompts)} prompts"
        )

    def show(self, n: int) -> str:
        """The first n prompts with both answers and their rewards."""
        return "\n".join(
            f"--- {self.prompts[i]}\n"
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


def compare_answers(
    prompts: Sequence[str], before: Sequence[str], after: Sequence[str], reward: RewardFunction
) -> SideBySide:
    """Rate two responses to each prompt."""
    if not len(prompts) == len(before) == len(after) > 0:
        raise ValueError(
            f"expected two answers to each prompt: {len(prompts)} prompts, {len(before)} answers "
            f"before, {len(after)} after"
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
    """Answer each prompt n times and keep the answer with the highest reward: (answers, rewards).

    No training at all, and hard to beat (Stiennon et al. 2020, section 4.3); but n times the work
    for each answer.
    """
    answers = answer_prompts(model, tokenizer, prompts, max_new_tokens, n, generator)
    repeated = [prompt for prompt in prompts for _ in range(n)]
    rewards, best = call_reward(reward, repeated, answers).view(-1, n).max(dim=1)  # (prompts) each
    return [answers[i * n + int(best[i])] for i in range(len(prompts))], rewards
