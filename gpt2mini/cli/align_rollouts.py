"""`align` from rewards of sampled answers: PPO and GRPO."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpt2mini import GPT2
from gpt2mini.cli import common
from gpt2mini.cli.align_job import FIGURES, Flags, Job, different_prompts, is_learned
from gpt2mini.cli.tables import print_rows
from gpt2mini.preferences.grpo import grpo_batches, grpo_step
from gpt2mini.preferences.ppo import ActorCritic, KLController, ppo_batches, ppo_step
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.preferences.reward_scale import RewardScale, measure_reward_scale
from gpt2mini.preferences.rollouts import RolloutSettings
from gpt2mini.training import adamw
from gpt2mini.training.distributed import get_rank

# With rewards of variance 1 and a coefficient of 0.3 the best policy is some 1 / (2 * 0.3**2) = 6
# nats from the reference (if its rewards are normally distributed).
LEARNED_KL, LEARNED_TARGET_KL = 0.3, 6.0  # with a reward model


def tune_on_policy(job: Job, reward: RewardFunction) -> tuple[GPT2, dict[str, Any]]:
    flags, model = job.flags, job.model
    reference = None if flags.lora else deepcopy(model).requires_grad_(False)
    job.choose_what_learns()
    rollouts = RolloutSettings(
        rows=flags.on_policy.rollout_rows,
        minibatch_rows=flags.batch_size or min(16, flags.on_policy.rollout_rows),
        epochs=flags.on_policy.rollout_epochs,
        max_new_tokens=flags.comparison.max_new_tokens,
        num_samples=flags.grpo.num_samples if flags.method == "grpo" else 1,
        precision=job.precision,
    )
    prepare = prepare_ppo if flags.method == "ppo" else prepare_grpo
    learner, batches, step = prepare(job, reward, rollouts, reference)
    for one in filter(None, (learner, reference)):
        flags.parallel.apply(one, job.precision)
    steps = flags.steps or flags.on_policy.rollouts * rollouts.updates
    rows = job.train(
        learner,
        batches,
        [adamw(learner, job.peak_rate(), weight_decay=0.0)],
        *(steps, step),
        save=common.how_to_save(model),
        figures=job.figures,
        last=model,
        log_every=rollouts.updates,
    )
    names = FIGURES[flags.method]
    print_rows(rows, names)
    job.report_best()
    return job.load_best(), {name: rows[-1].get(name) for name in names}


Prepared = tuple[torch.nn.Module, Any, Callable]  # (what learns, batches, loss function)


def prepare_ppo(
    job: Job, reward: RewardFunction, rollouts: RolloutSettings, reference: GPT2 | None
) -> Prepared:
    flags, settings = job.flags, replace(job.flags.ppo, clip=job.flags.on_policy.clip)
    value_model = None
    if settings.value_model:
        value_model = GPT2.from_pretrained(settings.value_model, device=job.device)
    critic = ActorCritic(job.model, value_model)
    batches = ppo_batches(
        critic,
        job.tokenizer,
        different_prompts(job.training),
        reward,
        rollouts,
        settings,
        kl_controller(flags),
        job.generator(get_rank()),
        reference,
        job.figures,
        reward_scale(job, reward),
    )
    return critic, batches, partial(ppo_step, settings=settings, figures=job.figures)


def kl_controller(flags: Flags) -> KLController:
    """A reward model is trusted near the texts that it was trained on: by default with a limit."""
    learned = is_learned(flags.comparison.reward)
    usual_kl, usual_target = (LEARNED_KL, LEARNED_TARGET_KL) if learned else (0.03, 0.0)
    kl = usual_kl if flags.on_policy.kl is None else flags.on_policy.kl
    usual_target = usual_target if kl else 0.0  # without a coefficient there is none to raise
    target = usual_target if flags.ppo.target_kl is None else flags.ppo.target_kl
    return KLController(kl, target or None, gain=1.0, floor=kl)


def reward_scale(job: Job, reward: RewardFunction) -> RewardScale | None:
    """Of the untuned policy, if rewards are to be normalized."""
    asked, name = job.flags.ppo.normalize_rewards, job.flags.comparison.reward
    if asked == "never" or (asked == "learned" and not is_learned(name)):
        return None
    prompts, tokens = different_prompts(job.training), job.flags.comparison.max_new_tokens
    found = measure_reward_scale(reward, job.model, job.tokenizer, prompts, tokens, job.generator())
    print(
        f"rewards are normalized: before training their mean is {found.mean:.3f}, their standard "
        f"deviation {found.deviation:.3f}"
    )
    return found


def prepare_grpo(
    job: Job, reward: RewardFunction, rollouts: RolloutSettings, reference: GPT2 | None
) -> Prepared:
    batches = grpo_batches(
        job.model,
        job.tokenizer,
        different_prompts(job.training),
        reward,
        rollouts,
        job.generator(get_rank()),
        reference,
        job.figures,
    )
    asked = job.flags.on_policy
    usual = LEARNED_KL if is_learned(job.flags.comparison.reward) else 0.1
    kl = usual if asked.kl is None else asked.kl  # beside advantages of unit size
    step = partial(grpo_step, kl_coefficient=kl, clip=asked.clip, figures=job.figures)
    return job.model, batches, step
