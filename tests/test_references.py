"""What a policy is measured against: the reference of its KL, and rewards before and after."""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from torch import Tensor, nn
from torch.testing import assert_close

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli.align_job import is_learned
from gpt2mini.lora import add_lora
from gpt2mini.losses import token_logprobs
from gpt2mini.preferences.comparison import SideBySide, compare_answers
from gpt2mini.preferences.grpo import grpo_batches, grpo_step
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.on_policy import OnPolicyBatches
from gpt2mini.preferences.ppo import (
    ActorCritic,
    KLController,
    PPOSettings,
    ppo_batches,
    ppo_step,
)
from gpt2mini.preferences.reference import using_reference
from gpt2mini.preferences.reward_model import give_reward_head
from gpt2mini.preferences.reward_scale import measure_reward_scale
from gpt2mini.preferences.rollouts import RolloutSettings
from gpt2mini.tokenizer import END_OF_TEXT, byte_characters
from gpt2mini.training import LossFunction, Settings, adamw, train

ROLLOUTS = RolloutSettings(
    rows=4, minibatch_rows=4, epochs=1, max_new_tokens=5, num_samples=2, precision="fp32"
)
WOULD_LEARN = "the reference is the policy without its adapters, and would learn too"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """One token for each byte, and <|endoftext|>."""
    vocab = byte_characters()
    return Tokenizer({**vocab, END_OF_TEXT: len(vocab)}, [])


@pytest.fixture
def policy(tokenizer: Tokenizer) -> GPT2:
    """A tiny random model with that vocabulary."""
    torch.manual_seed(0)
    config = replace(TINY, vocab_size=tokenizer.vocab_size, emb_dim=24, n_heads=3, n_layers=2)
    return GPT2(config).eval()


def lengths(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [float(len(response)) for response in responses]


# From a policy and its reference: what learns, its batches and its loss.
Method = Callable[[GPT2, Tokenizer, GPT2 | None], tuple[nn.Module, OnPolicyBatches, LossFunction]]


def ppo(
    policy: GPT2, tokenizer: Tokenizer, reference: GPT2 | None
) -> tuple[nn.Module, OnPolicyBatches, LossFunction]:
    critic, rollouts = ActorCritic(policy), replace(ROLLOUTS, num_samples=1)
    rewards = (tokenizer, ["a", "b c"], lengths, rollouts, PPOSettings(), KLController(0.1))
    batches = ppo_batches(critic, *rewards, torch.Generator().manual_seed(0), reference)
    return critic, batches, partial(ppo_step, settings=PPOSettings())


def grpo(
    policy: GPT2, tokenizer: Tokenizer, reference: GPT2 | None
) -> tuple[nn.Module, OnPolicyBatches, LossFunction]:
    rewards = (tokenizer, ["a", "b c"], lengths, ROLLOUTS, torch.Generator().manual_seed(0))
    return policy, grpo_batches(policy, *rewards, reference), grpo_step


methods = pytest.mark.parametrize("method", [ppo, grpo])
unfrozen = pytest.mark.parametrize(
    "name",
    ["final_norm.weight", "tok_emb.weight", "trf_blocks.0.attn.query.bias", "out_head.weight"],
)


def learn(method: Method, policy: GPT2, tokenizer: Tokenizer, reference: GPT2 | None) -> Tensor:
    """Train three rollouts; return the log-probabilities that the last took for the reference's,
    minus the starting model's: (batch, tokens)."""
    start = deepcopy(policy)
    learner, batches, step = method(policy, tokenizer, reference)
    constant = Settings(steps=3, schedule=lambda step: 1.0, precision="fp32", progress=False)
    train(learner, batches, [adamw(learner, 1e-2)], constant, step)
    last = batches.experience
    assert last is not None
    with torch.no_grad():
        rows = (last.token_ids, last.attention_mask, last.response_mask)
        return last.reference_logprobs - token_logprobs(start, *rows)


def unfreeze(policy: GPT2, name: str) -> None:
    if name == "out_head.weight":
        policy.out_head = nn.Linear(policy.config.emb_dim, policy.config.vocab_size, bias=False)
    policy.get_parameter(name).requires_grad_(True)


@methods
@unfrozen
def test_a_reference_that_would_learn_is_refused(
    method: Method, name: str, policy: GPT2, tokenizer: Tokenizer
) -> None:
    add_lora(policy, rank=2, targets=("query", "mlp_out"))
    unfreeze(policy, name)
    with pytest.raises(ValueError, match=rf"{WOULD_LEARN}: {name} can be trained; pass ref"):
        method(policy, tokenizer, None)


def test_a_reference_that_would_learn_is_also_refused_later(
    policy: GPT2, tokenizer: Tokenizer
) -> None:
    add_lora(policy, rank=2)
    _, batches, _ = grpo(policy, tokenizer, None)
    policy.requires_grad_(True)
    with pytest.raises(ValueError, match=rf"{WOULD_LEARN}: .*, .* \.\.\. can be trained"):
        next(iter(batches))


@methods
@unfrozen
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen copy", "copy"])
def test_a_copy_stays_the_reference_whatever_learns_beside_the_adapters(
    method: Method, name: str, frozen: bool, policy: GPT2, tokenizer: Tokenizer
) -> None:
    add_lora(policy, rank=2, targets=("query", "mlp_out"))
    unfreeze(policy, name)
    reference = deepcopy(policy).requires_grad_(not frozen)
    before = policy.get_parameter(name).detach().clone()
    difference = learn(method, policy, tokenizer, reference)
    assert_close(difference, torch.zeros_like(difference))
    assert not torch.equal(policy.get_parameter(name), before)


@methods
def test_adapters_and_a_critic_learn_beside_a_reference_that_does_not(
    method: Method, policy: GPT2, tokenizer: Tokenizer
) -> None:
    add_lora(policy, rank=2)
    assert not learn(method, policy, tokenizer, None).any()


def test_a_reference_with_other_frozen_parameters_is_refused_while_others_learn(
    policy: GPT2,
) -> None:
    add_lora(policy, rank=2)
    unfreeze(policy, "final_norm.weight")
    other = deepcopy(policy)
    with torch.no_grad():
        other.pos_emb.weight += 1.0
    with (
        pytest.raises(ValueError, match="not the base of the adapter"),
        using_reference(policy, other),
    ):
        pass


# ---- rewards


def test_a_reward_model_may_lie_in_the_home_folder(
    policy: GPT2, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    give_reward_head(policy)
    policy.save_pretrained(tmp_path / "rewards")
    tokenizer.save_pretrained(tmp_path / "rewards")
    assert is_learned("~/rewards") and not is_learned("~/others")
    found, expected = find_reward("~/rewards"), find_reward(str(tmp_path / "rewards"))
    assert_close(found(["a"], ["b"]), expected(["a"], ["b"]))


@pytest.mark.parametrize(("n", "prompts"), [(1, 3), (3, 3), (7, 3), (6, 1)])
def test_each_prompt_gets_as_many_responses_and_all_together_at_least_n(
    n: int, prompts: int, policy: GPT2, tokenizer: Tokenizer
) -> None:
    asked: list[str] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        asked.extend(prompts)
        return lengths(prompts, responses)

    names = [str(i) for i in range(prompts)]
    generator = torch.Generator().manual_seed(0)
    measure_reward_scale(reward, policy, tokenizer, names, 2, generator, n)
    counts = [asked.count(name) for name in names[:n]]
    assert len(set(counts)) == 1 and n <= sum(counts) == len(asked) < n + prompts


def test_one_prompt_has_no_interval() -> None:
    one = compare_answers(["p"], ["x"], ["xyz"], lengths)
    assert all(map(math.isnan, one.difference_interval + one.win_rate_interval))
    said = str(one)
    assert "difference: +2.0000 (one prompt has no interval); not significant" in said
    assert "100.0% of 1 prompts" in said and "interval +" not in said
    two = compare_answers(["p", "q"], ["x", "x"], ["xyz", "xyz"], lengths)
    assert isinstance(two, SideBySide) and two.difference_interval == (2.0, 2.0)
