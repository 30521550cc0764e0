"""The reward model: one number for how good an answer is, learned from pairs.

Stiennon et al. 2020, "Learning to summarize from human feedback", section 3.4; Ouyang et al. 2022
("InstructGPT"), equation 1. A GPT-2 whose output head gives one number, read at the answer's
<|endoftext|>, which has seen all of it:

    loss = -log sigmoid(reward(prompt, chosen) - reward(prompt, rejected))

Only differences of rewards mean something. Everything else is a classifier's: it is saved and
loaded as one, with the one class "reward".
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gpt2mini.classification.last_token import class_logits
from gpt2mini.data.batching import BATCH_TOKENS, batches_by_length
from gpt2mini.data.instructions import Exchange, encode_exchanges, join
from gpt2mini.device import autocast
from gpt2mini.generation import last_token_logits
from gpt2mini.lora.layers import linear_layer
from gpt2mini.losses.preference import pairwise_reward_loss
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.preferences.intervals import wilson_interval
from gpt2mini.preferences.pairs import EncodedPreference, PreferenceBatch, pad_pairs
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.metrics import Figures

CLASS_NAMES = ["reward"]  # for `save_pretrained(folder, class_names=CLASS_NAMES)`


def give_reward_head(model: GPT2, generator: torch.Generator | None = None) -> None:
    """Replace the output head, in place, by one output: Normal(0, 1 / (emb + 1)), as Stiennon et
    al. begin, so that first rewards are of the size of 1."""
    like = model.tok_emb.weight
    weight = torch.randn(1, model.config.emb_dim, generator=generator)  # (1, emb)
    weight = weight / math.sqrt(model.config.emb_dim + 1)
    model.out_head = linear_layer(nn.Parameter(weight.to(like.device, like.dtype)), None)


def check_reward_head(model: GPT2) -> None:
    if getattr(model.out_head, "out_features", None) != 1:
        raise ValueError(
            "this is no reward model: its output head must give one number "
            "(give_reward_head(model), or load one that was trained)"
        )


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
    """1 where the better answer has the higher reward, 0 where the other has, 1/2 for a tie."""
    return (margins.sign() + 1) / 2


# ---- how good it is


@dataclass(frozen=True)
class RewardReport:
    """Rewards of pairs that were held out: of the better answers, and of the others."""

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
        """The share of pairs whose better answer has the higher reward; a tie is half a pair."""
        return float(correct(self.margins).mean())

    @property
    def interval(self) -> tuple[float, float]:
        """Of the accuracy, 95 % (Wilson)."""
        return wilson_interval(self.accuracy, len(self.chosen))

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"accuracy {self.accuracy:.3f} ({low:.3f} to {high:.3f}) on {len(self.chosen)} pairs, "
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
    """Score both answers of every pair, in eval mode and in batches of similar length."""
    check_reward_head(model)

    def rewards(batch: PreferenceBatch) -> Float[Tensor, " rows"]:
        return last_token_logits(model, batch.token_ids, batch.attention_mask)[:, 0]

    chosen, rejected = of_both_answers(model, pairs, rewards, "fp32").unbind(dim=1)
    return RewardReport(chosen, rejected)


def of_both_answers(
    model: GPT2,
    pairs: Sequence[EncodedPreference],
    measure: Callable[[PreferenceBatch], Float[Tensor, " rows"]],
    precision: str,
) -> Float[Tensor, "pairs 2"]:
    """What `measure` finds of the chosen and the rejected answers of many pairs, without gradients;
    on the CPU, in float32."""
    device = model.tok_emb.weight.device
    found = torch.empty(len(pairs), 2)
    with evaluating(model), autocast(device, precision):
        for indices in batches_by_length([2 * pair.length for pair in pairs], BATCH_TOKENS):
            batch = pad_pairs([pairs[i] for i in indices]).to(device)
            found[indices] = measure(batch).float().view(2, -1).T.cpu()
    return found


@dataclass(frozen=True)
class CalibrationBin:
    """Pairs about which the model was about equally sure."""

    confidence: float  # mean probability that it gave to the answer with the higher reward
    correct: float  # how often that was the better one
    pairs: int


def calibration(margins: Float[Tensor, " pairs"], bins: int = 10) -> list[CalibrationBin]:
    """sigmoid(margin) is a probability: of the pairs about which it says 0.8, 80 % should be right.

    Bins of equal width between 0.5 (no idea) and 1 (certain), those without pairs left out.
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
    """The reward of each response to the prompt beside it, read at <|endoftext|>, as in training.

    Prompts as the model reads them, in the template that the reward model was trained with.
    """
    check_reward_head(model)
    if len(prompts) != len(responses):
        raise ValueError(f"{len(prompts)} prompts for {len(responses)} responses")
    exchanges = [Exchange(p, join(p, r)) for p, r in zip(prompts, responses, strict=True)]
    encoded = encode_exchanges(exchanges, tokenizer, model.config.context_length)
    return class_logits(model, [one.token_ids for one in encoded])[:, 0]
