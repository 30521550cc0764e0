"""Rollouts: answers that the policy itself has sampled, and how likely it found each token.

What PPO and GRPO learn from. Answers are drawn from the whole distribution at temperature 1: any
other choice (top-k, a lower temperature) would draw from another policy than the one whose
gradient is taken. All log-probabilities come from one code path, `token_logprobs`, over the same
rows side by side as later in training, and not from generation, whose cached steps round
differently: so the first ratio of new to old probability is 1 and the first KL 0, bit for bit.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gpt2mini.data.batching import encode_texts
from gpt2mini.device import autocast
from gpt2mini.generation import Generated, generate
from gpt2mini.losses.policy_gradient import kl_from_samples
from gpt2mini.losses.sequence_logprobs import token_logprobs
from gpt2mini.masking import pad_right
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.preferences.reference import using_reference
from gpt2mini.preferences.reward_functions import RewardFunction, call_reward
from gpt2mini.tokenizer import Tokenizer
from gpt2mini.training.metrics import Figures


@runtime_checkable
class Stateful(Protocol):
    """What a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled responses, column for column. Log-probabilities are 0 elsewhere.

    Prompts are padded on the left, so that all responses begin in one column.
    """

    token_ids: Int[Tensor, "batch tokens"]
    attention_mask: Bool[Tensor, "batch tokens"]
    response_mask: Bool[Tensor, "batch tokens"]  # up to and including <|endoftext|>
    logprobs: Float[Tensor, "batch tokens"]  # of response tokens, under the policy that drew them
    reference_logprobs: Float[Tensor, "batch tokens"]  # the same, under the reference

    @property
    def lengths(self) -> Int[Tensor, " batch"]:
        """Tokens of each response."""
        return self.response_mask.sum(dim=1)

    @property
    def kl(self) -> Float[Tensor, " batch"]:
        """How far each response has strayed from the reference, in nats (an estimate, "k3")."""
        return kl_from_samples(self.logprobs, self.reference_logprobs).sum(dim=1)


@dataclass(frozen=True)
class Experience(Rollout):
    """A rollout and what is to be learned from it."""

    advantages: Float[Tensor, "batch tokens"]  # how much better than expected each token was
    values: Float[Tensor, "batch tokens"] | None = None  # what was expected (PPO)
    returns: Float[Tensor, "batch tokens"] | None = None  # what came (PPO)

    def rows(self, start: int, stop: int) -> "Experience":
        return self.each(lambda tensor: tensor[start:stop])

    def to(self, device: torch.device) -> "Experience":
        return self.each(lambda tensor: tensor.to(device))

    def each(self, change) -> "Experience":
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{n: change(t) for n, t in tensors.items() if t is not None})


@dataclass(frozen=True)
class RolloutSettings:
    """How much is sampled, and how often it is learned from."""

    rows: int = 32  # responses in a rollout
    minibatch_rows: int = 16  # responses in one optimizer step
    epochs: int = 2  # times that a rollout is learned from
    max_new_tokens: int = 24
    num_samples: int = 1  # responses to each prompt
    precision: str = "auto"  # that of the training loop, so that the first ratio is 1

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


def encode_prompts(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> list[Int[Tensor, "_"]]:
    """Token ids of each prompt: of a long one, the tail that leaves room for an answer."""
    context = model.config.context_length
    if max_new_tokens >= context:
        raise ValueError(
            f"an answer of max_new_tokens ({max_new_tokens}) leaves no room for a prompt in the "
            f"context of {context} tokens: max_new_tokens must be below {context}"
        )
    return encode_texts(prompts, tokenizer, context - max_new_tokens, keep="tail")


def roll_out(
    policy: GPT2,
    prompts: Sequence[Int[Tensor, "_"]],
    eos_id: int,
    settings: RolloutSettings,
    reference: GPT2 | None = None,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Answer each prompt `num_samples` times, in neighboring rows; then read the answers again,
    with the policy and with the reference (the default is the policy without its adapters)."""
    device = policy.tok_emb.weight.device
    token_ids, is_real = (tensor.to(device) for tensor in pad_left(prompts))
    with autocast(device, settings.precision):
        found = generate(
            policy,
            token_ids,
            settings.max_new_tokens,
            is_real,
            stop_ids=[eos_id],
            num_samples=settings.num_samples,
            generator=generator,
        )
        rows = (found.token_ids, found.attention_mask, found.response_mask)
        with evaluating(policy):
            logprobs = logprobs_in_parts(policy, *rows, settings.minibatch_rows)
        with using_reference(policy, reference) as model:
            of_reference = logprobs_in_parts(model, *rows, settings.minibatch_rows)
    return Rollout(*rows, logprobs, of_reference)


def logprobs_in_parts(
    model: GPT2, token_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, rows: int
) -> Float[Tensor, "batch tokens"]:
    """`token_logprobs`, a minibatch at a time: it fits in memory if training does, and gives the
    very numbers that training will, since sums of other sizes may round otherwise."""
    parts = (tensor.split(rows) for tensor in (token_ids, attention_mask, response_mask))
    return torch.cat([token_logprobs(model, *part) for part in zip(*parts, strict=True)])


def pad_left(
    rows: Sequence[Int[Tensor, "_"]],
) -> tuple[Int[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Rows side by side that end in one column, and which places are real."""
    padded, is_real = pad_right([row.flip(0) for row in rows])
    return padded.flip(1), is_real.flip(1)


def response_texts(rollout: Rollout | Generated, tokenizer: Tokenizer) -> list[str]:
    """What the responses say, without their <|endoftext|>."""
    rows = zip(rollout.token_ids.cpu(), rollout.response_mask.cpu(), strict=True)
    ids = (row[is_response].tolist() for row, is_response in rows)
    return [tokenizer.decode(i for i in row if i != tokenizer.eos_id) for row in ids]


class OnPolicyBatches:
    """Endless minibatches for `training.train`, made as they are asked for: answer some prompts,
    rate the answers, learn from them a few times, answer the next prompts.

    learn_from: makes an Experience of a rollout and its rewards; PPO's or GRPO's. The prompts are
    texts as the model reads them; of those too long for the context, the tail is kept. controller:
    of the KL coefficient, if it moves. The answers depend on what was learned before, so a run
    resumes by `state_dict`, not by asking again.
    """

    def __init__(
        self,
        policy: GPT2,
        tokenizer: Tokenizer,
        prompts: Sequence[str],
        reward: RewardFunction,
        learn_from,
        settings: RolloutSettings,
        generator: torch.Generator,
        reference: GPT2 | None = None,
        figures: Figures | None = None,
        controller: Stateful | None = None,
    ) -> None:
        check_no_dropout(policy)
        self.policy, self.tokenizer, self.reward = policy, tokenizer, reward
        self.learn_from, self.settings, self.reference = learn_from, settings, reference
        self.generator, self.figures = generator, figures or Figures()
        self.controller = controller
        self.prompts = list(prompts)
        if not self.prompts:
            raise ValueError("no prompts to answer")
        self.encoded = encode_prompts(policy, tokenizer, self.prompts, settings.max_new_tokens)
        self.waiting: list[int] = []  # prompts of this round that have not been answered
        self.learned: Experience | None = None  # the rollout that is being learned from
        self.parts: list[int] = []  # minibatches of it that are left

    def __iter__(self) -> Iterator[Experience]:
        size, settings = self.settings.minibatch_rows, self.settings
        while True:
            if self.learned is None or not self.parts:
                self.learned = self.experience(self.next_prompts())
                epochs = range(settings.epochs)
                self.parts = [i for _ in epochs for i in self.shuffled(settings.rows // size)]
            part = self.parts.pop(0)
            yield self.learned.rows(part * size, (part + 1) * size)

    def fingerprint(self) -> str:
        """By which a run that is resumed knows its data again."""
        sizes = vars(self.settings) | {"precision": None}
        return hashlib.sha256(repr((self.prompts, sizes)).encode()).hexdigest()

    def next_prompts(self) -> list[int]:
        """Every prompt comes once, in random order, then all again in another."""
        n_prompts = self.settings.rows // self.settings.num_samples
        while len(self.waiting) < n_prompts:
            self.waiting += self.shuffled(len(self.prompts))
        chosen, self.waiting = self.waiting[:n_prompts], self.waiting[n_prompts:]
        return chosen

    def experience(self, indices: Sequence[int]) -> Experience:
        rollout = roll_out(
            self.policy,
            [self.encoded[i] for i in indices],
            self.tokenizer.eos_id,
            self.settings,
            self.reference,
            self.generator,
        )
        responses = response_texts(rollout, self.tokenizer)
        prompts = [self.prompts[i] for i in indices for _ in range(self.settings.num_samples)]
        rewards = call_reward(self.reward, prompts, responses).to(rollout.logprobs.device)
        self.figures.add(
            reward=rewards,
            kl=rollout.kl,
            entropy=-rollout.logprobs[rollout.response_mask],  # its samples' mean surprise
            response_length=rollout.lengths,
        )
        return self.learn_from(rollout, rewards)

    def shuffled(self, n: int) -> list[int]:
        device = self.generator.device
        return torch.randperm(n, generator=self.generator, device=device).tolist()

    def state_dict(self) -> dict[str, Any]:
        learned = None if self.learned is None else vars(self.learned)
        state = {"waiting": list(self.waiting), "parts": list(self.parts), "learned": learned}
        controller = {} if self.controller is None else self.controller.state_dict()
        return {**state, "generator": self.generator.get_state(), "controller": controller}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        learned, device = state["learned"], self.generator.device
        self.learned = None if learned is None else Experience(**learned).to(device)
        self.waiting, self.parts = list(state["waiting"]), list(state["parts"])
        self.generator.set_state(state["generator"])
        if self.controller is not None:
            self.controller.load_state_dict(state["controller"])


def check_no_dropout(model: torch.nn.Module) -> None:
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    if any(rates):
        raise ValueError(
            f"with dropout ({max(rates)}) the policy that learns is not the one that answered, and "
            "the first ratio not 1: load the model with drop_rate 0 and adapters without dropout"
        )
