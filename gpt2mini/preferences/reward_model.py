"""The reward model: a scalar score of a response, learned from pairs.

Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022
("InstructGPT"), equation 1. A GPT-2 whose output head has one output, read at the <|endoftext|>
of the response:

    loss = -log sigmoid(reward(prompt, chosen) - reward(prompt, rejected))

Only differences of rewards have a meaning. In every other respect it is a classifier with the one
class "reward", and is saved and loaded as one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.checks import check_reward_head
from gpt2mini.classification.last_token import class_logits
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length
from gpt2mini.data.instructions import Exchange, encode_exchanges
from gpt2mini.device import autocast
from gpt2mini.evaluation.intervals import wilson_interval
from gpt2mini.lora.layers import linear_layer
from gpt2mini.losses.preference import pairwise_reward_loss
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.preferences.pairs import EncodedPreference, PreferenceBatch, pad_pairs
from gpt2mini.reader import last_token_logits
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.metrics import Figures

CLASS_NAMES = ["reward"]  # for `save_pretrained(folder, class_names=CLASS_NAMES)`


def give_reward_head(model: GPT2, generator: torch.Generator | None = None) -> None:
    """Replace the output head, in place, by one with one output. Weights are Normal with variance
    1 / (emb + 1), as in Stiennon et al., so that initial rewards have a variance of about 1."""
    like = model.tok_emb.weight
    weight = torch.randn(1, model.config.emb_dim, generator=generator)  # (1, emb)
    weight = weight / math.sqrt(model.config.emb_dim + 1)
    model.out_head = linear_layer(nn.Parameter(weight.to(like.device, like.dtype)), None)


def reward_step(
    model: GPT2, batch: PreferenceBatch, figures: Figures | None = None
) -> tuple[Tensor, int]:
    """(sum of the pairwise loss, number of pairs) of a batch, for `training.train`."""
    logits = last_token_logits(model, batch.token_ids, batch.attention_mask)  # (rows, 1)
    rewards = logits[:, 0].float()
    chosen, rejected = rewards.chunk(2)  # (pairs) each
    if figures is not None:
        figures.add(margin=chosen - rejected, accuracy=correct(chosen - rejected))
    return pairwise_reward_loss(chosen, rejected)


def correct(margins: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """1 where the chosen response has the higher reward, 0 where the lower, 1/2 for a tie."""
    return (margins.sign() + 1) / 2


# ---- evaluation


@dataclass(frozen=True)
class RewardReport:
    """Rewards of the chosen and the rejected responses of held-out pairs."""

    chosen: Float[Tensor, " pairs"]
    rejected: Float[Tensor, " pairs"]

    @property
    def margins(self) -> Float[Tensor, " pairs"]:
        return self.chosen - self.rejected

    @property
    def loss(self) -> float:
        return float(F.softplus(-self.margins).mean())

    @property
    def accuracy(self) -> float:
        """The share of pairs whose chosen response has the higher reward; a tie counts half."""
        return float(correct(self.margins).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(self.accuracy, len(self.chosen))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}) on {len(self.chosen)} pairs,\n"
            f"loss {self.loss:.3f}, mean margin {float(self.margins.mean()):.3f}"
        )

    def summary(self) -> dict[str, Any]:
        return {
            "held_out_pairs": len(self.chosen),
            "held_out_accuracy": self.accuracy,
            "held_out_accuracy_interval": self.interval,
            "held_out_loss": self.loss,
            "held_out_margin": float(self.margins.mean()),
        }


def evaluate_rewards(model: GPT2, pairs: Sequence[EncodedPreference]) -> RewardReport:
    """Score both responses of every pair, in eval mode and in batches of similar length."""
    check_reward_head(model)

    def rewards(batch: PreferenceBatch) -> Float[Tensor, " rows"]:
        return last_token_logits(model, batch.token_ids, batch.attention_mask)[:, 0]

    chosen, rejected = of_both_responses(model, pairs, rewards, "fp32").unbind(dim=1)
    return RewardReport(chosen, rejected)


def of_both_responses(
    model: GPT2,
    pairs: Sequence[EncodedPreference],
    measure: Callable[[PreferenceBatch], Float[Tensor, " rows"]],
    precision: str,
) -> Float[Tensor, "pairs 2"]:
    """`measure` of the chosen and of the rejected response of each pair, without gradients; on the
    CPU, in float32."""
    device = model.tok_emb.weight.device
    found = torch.empty(len(pairs), 2)
    with evaluating(model), autocast(device, precision):
        for indices in batches_by_length([2 * pair.length for pair in pairs], BATCH_TOKENS):
            batch = pad_pairs([pairs[i] for i in indices]).to(device)
            found[indices] = measure(batch).float().view(2, -1).T.cpu()
    return found


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs whose predicted probabilities lie in one interval."""

    confidence: float  # mean probability of the response with the higher reward
    correct: float  # how often that was the chosen response
    pairs: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `correct` (Wilson 1927, "Probable inference, the law of succession,
        and statistical inference"): of one pair, 0.21 to 1 at best."""
        return wilson_interval(self.correct, self.pairs)

    def summary(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "interval": self.interval}


def calibration_table(bins: Sequence[CalibrationBin]) -> str:
    """A line for each bin."""
    lines = ["confidence  pairs  correct  95 % interval"]
    for one in bins:
        low, high = one.interval
        share = f"{one.correct:7.3f}  {low:.3f} to {high:.3f}"
        lines.append(f"{one.confidence:10.3f}  {one.pairs:5d}  {share}")
    return "\n".join(lines)


def calibration(margins: Float[Tensor, " pairs"], bins: int = 10) -> list[CalibrationBin]:
    """sigmoid(margin) is a probability: of the pairs for which it is 0.8, 80 % should be correct.

    Bins have equal widths between 0.5 and 1; bins without pairs are left out.
    """
    margins = margins.cpu()  # Apple's GPUs have no float64
    confidence = margins.abs().double().sigmoid()  # (pairs)
    number = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)  # (pairs)
    return [
        CalibrationBin(
            float(confidence[inside].mean()),
            float(correct(margins[inside]).mean()),
            int(inside.sum()),
        )
        for inside in (number == i for i in range(bins))
        if inside.any()
    ]


# ---- scoring


def score_with_reward(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], responses: Sequence[str]
) -> Float[Tensor, " responses"]:
    """The reward of each response to its prompt, read at <|endoftext|> as in training.

    Both are taken as they are, white space included: prompts in the template that the reward model
    was trained with, responses as they were sampled (" Yes.", after a prompt that ends in
    "Answer:").
    """
    check_reward_head(model)
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
    exchanges = [Exchange(p, r) for p, r in zip(prompts, responses, strict=True)]
    encoded = encode_exchanges(exchanges, tokenizer, model.config.context_length)
    return class_logits(model, [one.token_ids for one in encoded])[:, 0]
