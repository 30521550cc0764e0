"""Losses of on-policy reinforcement learning: clipped objective, value loss, KL divergence."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def ppo_loss(
    logprobs: Float[Tensor, "batch tokens"],
    old_logprobs: Float[Tensor, "batch tokens"],
    advantages: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    clip: float = 0.2,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """The clipped objective (Schulman et al. 2017, equation 7), to be minimized, summed over the
    response's tokens: (sum, number of tokens).

    A token that has become more likely by more than `clip` earns nothing for becoming more likely
    yet; one that has become less likely, nothing for becoming less likely yet.
    """
    ratio = (logprobs - old_logprobs).exp()  # (batch, tokens)
    objective = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -objective[response_mask].sum(), response_mask.sum()


def value_loss(
    values: Float[Tensor, "batch tokens"],
    old_values: Float[Tensor, "batch tokens"],
    returns: Float[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
    clip: float = 0.2,
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Half the squared error of the value estimates, the worse of plain and clipped to `clip` about
    the old ones (Ziegler et al. 2019's code): (sum, number of tokens)."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)  # (batch, tokens)
    errors = torch.maximum((values - returns) ** 2, (clipped - returns) ** 2) / 2
    return errors[response_mask].sum(), response_mask.sum()


def kl_from_samples(
    logprobs: Float[Tensor, "*axes"], reference_logprobs: Float[Tensor, "*axes"]
) -> Float[Tensor, "*axes"]:
    """An estimate of KL(policy, reference) at each token that the policy drew: r - 1 - log r, with
    r = reference / policy. Unbiased, never negative, of low variance (Schulman 2020, "k3")."""
    log_ratio = reference_logprobs - logprobs
    return log_ratio.expm1() - log_ratio
