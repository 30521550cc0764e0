"""Losses: pure functions that return (sum, count), so that the caller divides once."""

from gpt2mini.checks import check_labels_not_shifted
from gpt2mini.losses.objectives import (
    chunked_next_token_loss,
    dpo_loss,
    kl_from_samples,
    last_token_loss,
    next_token_loss,
    next_tokens,
    pairwise_reward_loss,
    ppo_loss,
    value_loss,
)
from gpt2mini.losses.sequence_logprobs import sequence_logprobs, token_logprobs
from gpt2mini.masking import IGNORED

__all__ = [
    "IGNORED",
    "check_labels_not_shifted",
    "chunked_next_token_loss",
    "dpo_loss",
    "kl_from_samples",
    "last_token_loss",
    "next_token_loss",
    "next_tokens",
    "pairwise_reward_loss",
    "ppo_loss",
    "sequence_logprobs",
    "token_logprobs",
    "value_loss",
]
