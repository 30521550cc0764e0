"""Group relative policy optimization (GRPO): PPO without a critic.

Shao et al. 2024, "DeepSeekMath", section 4.1. Several responses are sampled for each prompt, and
the mean reward of the group is the baseline:

    advantage = (reward - mean of the group) / standard deviation of the group

the same for all tokens of a response. The KL penalty is part of the loss, not of the reward, as the
estimate "k3" of equation 4. Unlike equation 3, which averages over each response first, the loss is
a mean over all tokens, as in Yu et al. 2025 ("DAPO").
"""

from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.losses.policy_gradient import kl_from_samples, ppo_loss
from gpt2mini.losses.sequence_logprobs import token_logprobs
from gpt2mini.model import GPT2
from gpt2mini.preferences.on_policy import OnPolicyBatches
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.preferences.rollouts import (
    Experience,
    Rollout,
    RolloutSettings,
    clip_fraction,
)
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.metrics import Figures


def group_advantages(rewards: Float[Tensor, " batch"], num_samples: int) -> Float[Tensor, " batch"]:
    """Rewards normalized within each group of `num_samples` neighboring rows (section 4.1.2). A
    group of equal rewards has advantages of exactly 0: there is nothing to be learned from it.

    1e-4 is added to the standard deviation, as in trl, so that differences as small as rounding do
    not become large: rewards should differ by more than that.
    """
    check_num_samples(num_samples)
    groups = rewards.cpu().double().view(-1, num_samples)  # (prompts, samples)
    groups = groups - groups[:, :1]  # equal rewards are 0; their own mean would be rounded
    centered = groups - groups.mean(dim=1, keepdim=True)
    advantages = centered / (groups.std(dim=1, keepdim=True) + 1e-4)
    return advantages.flatten().to(rewards)


def check_num_samples(num_samples: int) -> None:
    if num_samples < 2:
        raise ValueError("GRPO compares responses to one prompt: num_samples must be at least 2")


def grpo_experience(
    rollout: Rollout, rewards: Float[Tensor, " batch"], num_samples: int
) -> Experience:
    """Every token of a response has the advantage of the response."""
    advantages = group_advantages(rewards, num_samples)[:, None]  # (batch, 1)
    return Experience(**vars(rollout), advantages=advantages * rollout.response_mask)


def grpo_step(
    model: GPT2,
    batch: Experience,
    kl_coefficient: float = 0.04,
    clip: float = 0.2,
    figures: Figures | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss of a minibatch: (clipped objective + KL penalty, summed; number of response tokens).

    Raises ValueError for a negative kl_coefficient.
    """
    if kl_coefficient < 0:
        raise ValueError(f"kl_coefficient must be at least 0, not {kl_coefficient}")
    mask = batch.response_mask
    logprobs = token_logprobs(model, batch.token_ids, batch.attention_mask, mask)
    policy_sum, count = ppo_loss(logprobs, batch.logprobs, batch.advantages, mask, clip)
    kl = kl_from_samples(logprobs, batch.reference_logprobs)[mask]  # (response tokens)
    if figures is not None:
        fraction = clip_fraction(logprobs, batch, clip)
        figures.add(policy_loss=policy_sum / count, clip_fraction=fraction)
    return policy_sum + kl_coefficient * kl.sum(), count


def grpo_batches(
    policy: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward: RewardFunction,
    rollouts: RolloutSettings,
    generator: torch.Generator,
    reference: GPT2 | None = None,
    figures: Figures | None = None,
) -> OnPolicyBatches:
    """Minibatches for `training.train(policy, batches, ..., partial(grpo_step, ...))`."""
    check_num_samples(rollouts.num_samples)
    experience = partial(grpo_experience, num_samples=rollouts.num_samples)
    return OnPolicyBatches(
        policy, tokenizer, prompts, reward, experience, rollouts, generator, reference, figures
    )
