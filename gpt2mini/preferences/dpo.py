"""Direct preference optimization (DPO): learn from pairs without a reward model or sampling.

Rafailov et al. 2023, "Direct Preference Optimization: Your Language Model is Secretly a Reward
Model". The policy implies a reward (equation 5, up to a term that depends on the prompt alone):

    reward(prompt, response) = beta * log(p_policy(response | prompt) / p_ref(response | prompt))

and the loss is the pairwise loss of a reward model (equation 7, `losses.dpo_loss`). At the first
step the policy is the reference, all rewards are 0 and the loss is ln 2; its gradient is
beta / 2 * (grad log p(rejected) - grad log p(chosen)).
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from gpt2mini.lora.adapt import lora_layers
from gpt2mini.losses.preference import dpo_loss
from gpt2mini.losses.sequence_logprobs import sequence_logprobs
from gpt2mini.model import GPT2
from gpt2mini.preferences.pairs import EncodedPreference, PreferenceBatch
from gpt2mini.preferences.reference import using_reference, warn_if_adapters_are_trained
from gpt2mini.preferences.reward_model import RewardReport, correct, of_both_responses
from gpt2mini.training.metrics import Figures

NO_REFERENCE = (
    "the pairs have no log-probabilities of a reference: pairs = with_reference(pairs, model) "
    "before training, or reference_free=True"
)


def dpo_step(
    model: GPT2,
    batch: PreferenceBatch,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "dpo",
    reference_free: bool = False,
    length_normalized: bool = False,
    figures: Figures | None = None,
) -> tuple[Tensor, int]:
    """(sum of the loss, number of pairs) of a batch, for `training.train`.

    reference_free: as if the reference gave all responses the same probability. Otherwise the pairs
    need the log-probabilities of the reference (`with_reference`). length_normalized: take the mean
    log-probability of a response's tokens instead of their sum, as trl does with variant "ipo".
    """
    logprobs = batch_logprobs(model, batch)  # (rows)
    reference = None if reference_free else batch.reference_logprobs  # (rows)
    if reference is None and not reference_free:
        raise ValueError(NO_REFERENCE)
    if length_normalized:
        lengths = batch.response_mask.sum(dim=1)  # (rows)
        logprobs = logprobs / lengths
        reference = None if reference is None else reference / lengths
    chosen, rejected = logprobs.chunk(2)  # (pairs) each
    reference_chosen, reference_rejected = (None, None) if reference is None else reference.chunk(2)
    if figures is not None:
        rewards = beta * (logprobs if reference is None else logprobs - reference)
        figures.add(**reward_figures(*rewards.chunk(2)))
    return dpo_loss(
        chosen,
        rejected,
        reference_chosen,
        reference_rejected,
        beta,
        label_smoothing,
        variant,
    )


def reward_figures(chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "accuracy": correct(chosen - rejected),
    }


def batch_logprobs(model: GPT2, batch: PreferenceBatch) -> Float[Tensor, " rows"]:
    """log p(response | prompt) of each row."""
    return sequence_logprobs(model, batch.token_ids, batch.attention_mask, batch.response_mask)[0]


def pair_logprobs(
    model: GPT2, pairs: Sequence[EncodedPreference], precision: str = "auto"
) -> Float[Tensor, "pairs 2"]:
    """log p of the chosen and the rejected response of each pair, without gradients; on the CPU."""
    return of_both_responses(model, pairs, partial(batch_logprobs, model), precision)


def with_reference(
    pairs: Sequence[EncodedPreference],
    policy: GPT2,
    reference: GPT2 | None = None,
    precision: str = "auto",
) -> list[EncodedPreference]:
    """The pairs with the log-probabilities of their responses under the reference.

    They do not change in training, so they are computed once. reference: the default is the policy
    without its adapters or, where it has none, the policy as it is now. A policy whose adapters
    were trained before needs `reference=deepcopy(policy)`; without it a warning says so.
    """
    warn_if_adapters_are_trained(policy, reference)
    untrained = reference is None and not lora_layers(policy)
    with nullcontext(policy) if untrained else using_reference(policy, reference) as model:
        logprobs = pair_logprobs(model, pairs, precision)  # (pairs, 2)
    return [
        replace(pair, reference=(row[0], row[1]))
        for pair, row in zip(pairs, logprobs.tolist(), strict=True)
    ]


@dataclass(frozen=True)
class DPOReport(RewardReport):
    """The rewards that a policy implies, and the mean training loss."""

    mean_loss: float

    @property
    def loss(self) -> float:
        return self.mean_loss


def evaluate_dpo(
    model: GPT2,
    pairs: Sequence[EncodedPreference],
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    variant: str = "dpo",
    reference_free: bool = False,
    length_normalized: bool = False,
    precision: str = "auto",
) -> DPOReport:
    """Rewards and loss of pairs with reference log-probabilities. With the options of `dpo_step`
    the loss is the training loss."""
    if not pairs:
        raise ValueError("there are no pairs to evaluate on")
    logprobs = pair_logprobs(model, pairs, precision)  # (pairs, 2)
    if not reference_free:
        known = [pair.reference for pair in pairs if pair.reference is not None]
        if len(known) < len(pairs):
            raise ValueError(NO_REFERENCE)
        logprobs = logprobs - torch.tensor(known)
    if length_normalized:
        logprobs = logprobs / torch.tensor([pair.response_lengths for pair in pairs])
    chosen, rejected = logprobs.unbind(dim=1)  # (pairs) each
    loss_sum, count = dpo_loss(chosen, rejected, None, None, beta, label_smoothing, variant)
    return DPOReport(beta * chosen, beta * rejected, float(loss_sum) / count)
