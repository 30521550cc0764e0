"""Losses: pure functions of tensors. Each returns (sum, count), so that the caller divides once.

Why not the mean: with several micro-batches or several machines, the mean of means is not the mean.
Sum the sums, sum the counts, divide at the end, and k micro-batches equal one big batch exactly.
"""

from gpt2mini.checks import check_labels_not_shifted
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.losses.last_token import last_token_loss
from gpt2mini.losses.next_token import chunked_next_token_loss, next_token_loss, next_tokens
from gpt2mini.losses.policy_gradient import kl_from_samples, ppo_loss, value_loss
from gpt2mini.losses.preference import dpo_loss, pairwise_reward_loss
from gpt2mini.losses.sequence_logprobs import sequence_logprobs, token_logprobs
from gpt2mini.masking import IGNORED

__all__ = [
    "IGNORED",
    "check_labels_not_shifted",
    "chunked_next_token_loss",
    "dpo_loss",
    "hidden_states_and_head",
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
