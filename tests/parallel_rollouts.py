"""PPO and GRPO in each of torchrun's processes, for `parallel_worker` and `test_parallel`.

Each process samples its own responses, which end at their own lengths: where the model is sharded,
the processes must not wait for each other in generation.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from gpt2mini import GPT2, GPT2Config, Tokenizer, generate
from gpt2mini.lora import add_lora
from gpt2mini.preferences.grpo import grpo_batches, grpo_step
from gpt2mini.preferences.on_policy import OnPolicyBatches
from gpt2mini.preferences.ppo import ActorCritic, KLController, PPOSettings, ppo_batches, ppo_step
from gpt2mini.preferences.reward_model import give_reward_head
from gpt2mini.preferences.rollouts import RolloutSettings, sample_responses
from gpt2mini.tokenizer import END_OF_TEXT, byte_characters
from gpt2mini.training import Settings, train
from gpt2mini.training.distributed import get_rank, save_whole, shard

METHODS = ("ppo", "ppo-value-model", "grpo-lora")
STEPS, STOP = 8, 6  # a rollout is learned from in four steps: it stops within the second
PROMPTS = ["Question: Why?\nAnswer:", "Hm.", "Once upon a time there was a"]
ROLLOUTS = RolloutSettings(
    rows=8, minibatch_rows=4, epochs=2, max_new_tokens=20, num_samples=2, precision="fp32"
)


def byte_tokenizer() -> Tokenizer:
    vocab = byte_characters()
    return Tokenizer({**vocab, END_OF_TEXT: len(vocab)}, [])


@torch.no_grad()
def policy_that_stops(lora: bool) -> GPT2:
    """A tiny policy for which the end of the text is the likeliest of all tokens."""
    torch.manual_seed(0)
    model = GPT2(GPT2Config(vocab_size=257, context_length=64, emb_dim=24, n_heads=3, n_layers=2))
    end = model.tok_emb.weight[byte_tokenizer().eos_id]
    model.final_norm.bias.copy_(3.5 * end / end.norm() ** 2)
    if lora:
        add_lora(model, rank=2, alpha=4, targets=("query", "mlp_in"))
    return model


def length(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    return [len(response) / 20 for response in responses]


def method_of(
    name: str, spread: bool
) -> tuple[nn.Module, GPT2, OnPolicyBatches, Callable[..., Any]]:
    """(what learns, its policy, the batches, the loss function)"""
    policy = policy_that_stops("lora" in name)
    reference = None if "lora" in name else deepcopy(policy).requires_grad_(False)
    generator = torch.Generator().manual_seed(get_rank())
    rest = (byte_tokenizer(), PROMPTS, length, ROLLOUTS)
    learner: nn.Module = policy
    if name.startswith("grpo"):
        batches = grpo_batches(policy, *rest, generator, reference)
        step: Callable = partial(grpo_step, kl_coefficient=0.1)
    else:
        value_model = None
        if "value" in name:
            value_model = policy_that_stops(lora=False)
            give_reward_head(value_model, torch.Generator().manual_seed(0))
        learner = critic = ActorCritic(policy, value_model)
        controller = KLController(0.1, target=1.0)
        batches = ppo_batches(critic, *rest, PPOSettings(), controller, generator, reference)
        step = partial(ppo_step, settings=PPOSettings())
    if spread:
        shard(learner, "fp32")
        if reference is not None:
            shard(reference, "fp32")
    return learner, policy, batches, step


def learn(name: str, spread: bool, folder: Path | None = None, **changes: Any) -> dict[str, Any]:
    """Train; the weights of all that learns and what this process has sampled at last."""
    learner, policy, batches, step = method_of(name, spread)
    resume = changes.pop("resume", False)
    given: dict[str, Any] = {"steps": STEPS, "precision": "fp32", "progress": False, **changes}
    settings = Settings(schedule=lambda step: 1.0, **given)
    learning = [p for p in learner.parameters() if p.requires_grad]
    train(learner, batches, [SGD(learning, lr=0.05)], settings, step, out=folder, resume=resume)
    assert batches.experience is not None
    return {"learner": learner, "policy": policy, "sampled": vars(batches.experience)}


def learn_from_rewards(folder: Path, how: str, spread: bool) -> None:
    """Of each method what `test_parallel` compares; and a run of PPO, stopped and resumed."""
    answer_at_own_length(folder, how, spread)
    for name in METHODS:
        write(learn(name, spread), folder / f"{name}-{how}")
    out = folder / f"ppo-{how}-run"
    learn("ppo", spread, out, steps=STOP, save_every=STOP)
    write(learn("ppo", spread, out, save_every=STOP, resume=True), folder / f"ppo-{how}-resumed")


def answer_at_own_length(folder: Path, how: str, spread: bool) -> None:
    """The first process stops long before the second."""
    policy = policy_that_stops(lora=False)
    if spread:
        shard(policy, "fp32")
        with pytest.raises(ValueError, match="unsharded"):
            generate(policy, [1, 2, 3], max_new_tokens=2)
    prompts = [torch.tensor(byte_tokenizer().encode(prompt)) for prompt in PROMPTS]
    generated = sample_responses(policy, prompts, 2 + 9 * get_rank(), generator=torch.Generator())
    torch.save(generated.token_ids, folder / f"answers-{how}-rank-{get_rank()}.pt")


def write(found: dict[str, Any], file: Path) -> None:
    torch.save(found["sampled"], file.with_name(f"{file.name}-rank-{get_rank()}.pt"))
    save_whole(
        lambda model, path: torch.save(dict(model.named_parameters()), path),
        found["learner"],
        file.with_name(f"{file.name}.pt"),
    )
    if "lora" not in file.name:
        save_whole(GPT2.save_pretrained, found["policy"], file.with_name(f"{file.name}-best"))
