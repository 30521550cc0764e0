"""Rollouts: responses sampled from the policy, and the log-probability of each token.

PPO and GRPO learn from these. Responses are sampled from the full distribution at temperature 1:
top-k or a lower temperature would sample from a policy other than the one whose gradient is taken.
(Only ids of a padded vocabulary for which there is no token are left out.)
Generation knows the log-probability of each token that it samples. In float32 these serve as the
policy's: with cached keys they round otherwise than a forward pass over whole rows, by about 1e-6,
and such is the distance of the first ratio of new to old probability from 1. In half precision it
would be about 1e-2, a policy of its own (Yao et al. 2025, "Your Efficient RL Framework Secretly
Brings You Off-Policy RL Training"), so there the policy reads its responses again, by
`token_logprobs` on minibatches of the same rows as in training: the first ratio is exactly 1, the
first KL exactly 0. The reference always reads them so.

    rollout = roll_out(policy, prompts, ...)      sample, score with policy and reference
    rewards = call_reward(reward, ...)            one number per response
    experience = ...                              rewards -> advantages: PPO, GRPO, or your own
    loss_sum, count = step(policy, minibatch)     a few epochs over the minibatches

`on_policy.OnPolicyBatches` is this loop as an iterable of minibatches, for `training.train`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.data.batching import encode_texts
from gpt2mini.device import autocast, best_precision
from gpt2mini.generation import Generated, generate
from gpt2mini.losses.policy_gradient import kl_from_samples
from gpt2mini.losses.sequence_logprobs import token_logprobs
from gpt2mini.masking import pad_left
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.preferences.reference import using_reference
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.distributed import reshard, unsharded


@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled responses, one pair per row. Log-probabilities are 0 outside responses.

    Prompts are padded on the left, so that all responses start in the same column.
    """

    token_ids: Int[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    response_mask: Bool[Tensor, "batch tokens"]  # up to and including <|endoftext|>
    logprobs: Float[Tensor, "batch tokens"]  # under the policy that sampled the response
    reference_logprobs: Float[Tensor, "batch tokens"]  # under the reference model

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens in each response."""
        return self.response_mask.sum(dim=1)

    @property
    def kl(self) -> Float[Tensor, " batch"]:
        """KL(policy, reference) of each response in nats, estimated with k3."""
        kl = kl_from_samples(self.logprobs, self.reference_logprobs).sum(dim=1)
        return kl.clamp(min=0)  # the rounding of equal log-probabilities may fall below


@dataclass(frozen=True)
class Experience(Rollout):
    """A rollout with the advantages to train on, and for PPO the targets of the critic."""

    advantages: Float[Tensor, "batch tokens"]
    values: Float[Tensor, "batch tokens"] | None = None  # the critic's, when sampled
    returns: Float[Tensor, "batch tokens"] | None = None

    def rows(self, start: int, stop: int) -> "Experience":
        return self.map(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "Experience":
        return self.map(lambda tensor: tensor.to(device))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Experience":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: function(t) for n, t in tensors.items() if t is not None})


@dataclass(frozen=True)
class RolloutSettings:
    """Sizes of rollouts and minibatches."""

    rows: int = 32  # responses in a rollout
    minibatch_rows: int = 16  # responses in an optimizer step
    epochs: int = 2  # passes over each rollout
    max_new_tokens: int = 24
    num_samples: int = 1  # responses to each prompt
    precision: str = "auto"  # as in training, so that the first ratio is 1
    read_again: bool | None = None  # by the policy, after sampling; None: in half precision

    def __post_init__(self) -> None:
        if min(self.rows, self.minibatch_rows, self.epochs, self.num_samples) < 1:
            raise ValueError(f"all counts must be at least 1; got {self}")
        if self.rows % self.minibatch_rows or self.rows % self.num_samples:
            raise ValueError(
                f"rows ({self.rows}) must be a multiple of minibatch_rows ({self.minibatch_rows}) "
                f"and of num_samples ({self.num_samples})"
            )

    @property
    def updates(self) -> int:
        """Optimizer steps for each rollout."""
        return self.epochs * self.rows // self.minibatch_rows

    def reads_again(self, device: torch.device) -> bool:
        """Whether the policy reads its responses again for their log-probabilities."""
        in_half_precision = best_precision(device, self.precision) != "fp32"
        return in_half_precision if self.read_again is None else self.read_again


# ---- sampling


def encode_prompts(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[Int[Tensor, "_"]]:
    """Token ids of each prompt; a long one keeps the tail that leaves room for a response."""
    context = model.config.context_length
    if max_new_tokens >= context:
        raise ValueError(
            f"a response of max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the "
            f"context of {context} tokens: max_new_tokens must be below {context}"
        )
    return encode_texts(prompts, tokenizer, context - max_new_tokens, keep="tail")


def sample_responses(
    model: GPT2, prompts: Sequence[Int[Tensor, "_"]], max_new_tokens: int, **sampling
) -> Generated:
    """`generate` for encoded prompts of any lengths, side by side on the model's device. A sharded
    model is gathered on every rank for the while (`unsharded`)."""
    device = model.tok_emb.weight.device
    token_ids, is_real = (tensor.to(device) for tensor in pad_left(prompts))  # (batch, tokens)
    with unsharded(model):
        return generate(model, token_ids, max_new_tokens, is_real, **sampling)


def response_texts(rollout: Rollout | Generated, tokenizer: Tokenizer) -> list[str]:
    """The text of each response, without <|endoftext|>."""
    rows = zip(rollout.token_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ids = (row[is_response].tolist() for row, is_response in rows)
    return [tokenizer.decode(i for i in row if i != tokenizer.eos_id) for row in ids]


def roll_out(
    policy: GPT2,
    prompts: Sequence[Int[Tensor, "_"]],
    eos_id: int,
    settings: RolloutSettings,
    reference: GPT2 | None = None,
    generator: torch.Generator | None = None,
    forbidden_ids: Sequence[int] = (),
) -> Rollout:
    """Sample `num_samples` responses to each prompt, in neighboring rows, and compute their
    log-probabilities under the policy and the reference (default: the policy without adapters).
    forbidden_ids: never sampled, as in `generate`."""
    with autocast(policy.tok_emb.weight.device, settings.precision):
        sampled = sample_responses(
            policy,
            prompts,
            settings.max_new_tokens,
            stop_ids=[eos_id],
            num_samples=settings.num_samples,
            generator=generator,
            forbidden_ids=forbidden_ids,
        )
        rows = (sampled.token_ids, sampled.attention_mask, sampled.response_mask)
        logprobs = sampled.logprobs
        if settings.reads_again(logprobs.device):
            with evaluating(policy):
                logprobs = in_minibatches(token_logprobs, policy, rows, settings)
        with using_reference(policy, reference) as model:
            reference_logprobs = in_minibatches(token_logprobs, model, rows, settings)
    return Rollout(*rows, logprobs, reference_logprobs)


def in_minibatches(
    function: Callable[..., Tensor],
    model: torch.nn.Module,
    rows: Sequence[Tensor],
    settings: RolloutSettings,
) -> Float[Tensor, "batch tokens"]:
    """`function(model, *rows)` on a minibatch at a time: it fits in memory if training does, and
    rounds as training does, which sums of other sizes may not."""
    parts = zip(*(tensor.split(settings.minibatch_rows) for tensor in rows), strict=True)
    found = torch.cat([function(model, *part) for part in parts])
    reshard(model)
    return found


def clip_fraction(
    logprobs: Float[Tensor, "batch tokens"], batch: Experience, clip: float
) -> Bool[Tensor, " n"]:
    """For each response token, whether its ratio is outside [1 - clip, 1 + clip]."""
    ratio = (logprobs - batch.logprobs).exp()[batch.response_mask]
    return (ratio - 1).abs() > clip
