"""Learn from preferences and from rewards: reward model, DPO, PPO, GRPO.

Examples:
  gpt2mini align                                  # PPO: more cheerful words, two minutes
  gpt2mini align --method dpo                     # from pairs of answers, no sampling
  gpt2mini align --method reward --out runs/reward
  gpt2mini align --method grpo --reward runs/reward/best --lora
  gpt2mini align --reward runs/reward/adapter --lora     # one base in memory
  gpt2mini align --reward my_rewards:politeness          # any Python function

The data are records with prompt, chosen and rejected, or HH's pairs of dialogues; PPO and GRPO take
the prompts alone. Prompts that were held out are answered before and after, and both answers rated.
Writes metrics.jsonl, summary.json, pictures and best/, the tuned model or its adapter, to --out.
"""

import math
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tyro.conf import Suppress

from gpt2mini import GPT2
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import common, options
from gpt2mini.cli.data import RecordFlags, read_split
from gpt2mini.cli.tables import print_rows
from gpt2mini.data.samples import sample
from gpt2mini.inspection import plot_calibration, plot_figures
from gpt2mini.lora import lora_layers, merge_lora, save_adapter
from gpt2mini.preferences.comparison import answer_prompts, best_of_n, compare_answers, end_of
from gpt2mini.preferences.dpo import dpo_step, evaluate_dpo, with_reference
from gpt2mini.preferences.grpo import grpo_batches, grpo_step
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.pairs import (
    EncodedPreference,
    Preference,
    PreferenceBatches,
    encode_preferences,
    read_preferences,
)
from gpt2mini.preferences.ppo import ActorCritic, KLController, PPOSettings, ppo_batches, ppo_step
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.preferences.reward_model import (
    CLASS_NAMES,
    CalibrationBin,
    RewardReport,
    calibration,
    evaluate_rewards,
    give_reward_head,
    reward_step,
)
from gpt2mini.preferences.reward_scale import RewardScale, measure_reward_scale
from gpt2mini.preferences.rollouts import RolloutSettings
from gpt2mini.training import Figures, adamw
from gpt2mini.training.distributed import get_rank, get_world_size

# of gpt2-nano; larger models take a tenth of these rates, adapters, which begin at zero, ten times
PEAK_RATES = {"reward": 2e-4, "dpo": 2e-5, "ppo": 1e-3, "grpo": 1e-3}
FIGURES = {
    "reward": ["margin", "accuracy"],
    "dpo": ["chosen_reward", "rejected_reward", "margin", "accuracy"],
    "ppo": ["reward", "kl", "entropy", "clip_fraction", "value_loss", "response_length"],
    "grpo": ["reward", "kl", "entropy", "clip_fraction", "response_length"],
}
# With rewards of variance 1 and a coefficient of 0.3 the best policy is some 1 / (2 * 0.3**2) = 6
# nats from the reference (if its rewards are normally distributed).
LOST = 2.0  # times the perplexity of general text: more is warned of
LEARNED_KL, LEARNED_TARGET_KL = 0.3, 6.0  # with a reward model
REWARD, DPO, PPO, GRPO = (f"--method {method}" for method in FIGURES)


@dataclass(frozen=True)
class PairFlags:
    """With --method reward and dpo."""

    epochs: options.Positive = 3.0  # times through the pairs
    longest: options.Count = 512  # tokens per prompt and answer
    shard: bool = False  # spread the model over torchrun's processes (FSDP2)


@dataclass(frozen=True)
class DPOFlags:
    """With --method dpo."""

    beta: options.Positive = 0.1  # how near the reference the policy stays
    # share of pairs whose labels are wrong
    label_smoothing: Annotated[
        float, options.number(float, lambda x: 0 <= x < 0.5, "a number from 0 to below 0.5")
    ] = 0.0
    variant: Literal["dpo", "ipo"] = "dpo"  # the loss
    length_normalized: bool = False  # mean log-probability of a token, as trl's ipo; else the sum
    reference_free: bool = False  # compare with a reference that finds all answers equally likely


@dataclass(frozen=True)
class ComparisonFlags:
    """With --method dpo, ppo and grpo: answers before and after, and their reward."""

    reward: str = "toy"  # toy, a reward model's folder, or package.module:function
    max_new_tokens: options.Count = 16  # per answer
    compare: options.Count = 50  # held-out prompts to answer
    best_of: options.CountOrZero = (
        4  # untuned answers per prompt, of which the best counts; 0: none
    )


@dataclass(frozen=True)
class RolloutFlags:
    """With --method ppo and grpo."""

    rollouts: options.Count = 20  # times that answers are sampled, rated and learned from
    rollout_rows: options.Count = 32  # responses in a rollout
    rollout_epochs: options.Count = 2  # times that each is learned from
    kl: options.OptionalNotNegative = (
        None  # coefficient of the KL to the reference; None: 0.03, grpo 0.1, reward models 0.3
    )
    clip: options.Positive = PPOSettings.clip  # of the ratio of new to old probability


@dataclass(frozen=True)
class PPOFlags(PPOSettings):
    """With --method ppo."""

    clip: Suppress[float] = PPOSettings.clip  # a flag of GRPO too, hence of `RolloutFlags`
    # nats per answer, above which --kl is raised; None: 6 with a reward model, else 0; 0: never
    target_kl: options.OptionalNotNegative = None
    # whose rewards get mean 0 and variance 1, measured before training
    normalize_rewards: Literal["learned", "always", "never"] = "learned"
    value_model: str | None = None  # a critic of its own, from a reward model's folder


@dataclass(frozen=True)
class GRPOFlags:
    """With --method grpo."""

    num_samples: options.Count = 4  # responses to each prompt


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    data: str = str(sample("preferences.jsonl"))  # .jsonl, .json, .csv or hf:owner/name:split
    out: str = "runs/align"  # folder for results
    method: Literal["reward", "dpo", "ppo", "grpo"] = "ppo"
    fraction: float = 1.0  # seeded share of the data to use
    validation_share: float = 0.2  # share that is held out
    held_out: str | None = None  # a file to hold out, instead of a share of the prompts
    held_out_pairs: options.OptionalCount = None  # at most so many pairs held out
    steps: options.OptionalCount = None  # optimizer steps; overrides --epochs and --rollouts
    batch_size: options.OptionalCount = None  # pairs (None: 8) or responses (None: 16) per step
    lr: options.OptionalPositive = None  # peak learning rate; None: by method and size
    answers: options.CountOrZero = 3  # answers that are printed
    lora: bool = False  # train adapters; no second copy as the reference
    # train only so many blocks, from the top, with the final norm; None: all
    train_blocks: options.OptionalCountOrZero = None
    records: RecordFlags = options.group(RecordFlags)
    pairs: PairFlags = options.group(PairFlags, REWARD, DPO)
    dpo: DPOFlags = options.group(DPOFlags, DPO)
    comparison: ComparisonFlags = options.group(ComparisonFlags, DPO, PPO, GRPO)
    on_policy: RolloutFlags = options.group(RolloutFlags, PPO, GRPO)
    ppo: PPOFlags = options.group(PPOFlags, PPO)
    grpo: GRPOFlags = options.group(GRPOFlags, GRPO)
    adapters: options.LoRA = options.group(options.LoRA, "--lora")
    run: options.Run = options.group(options.Run)
    machine: options.Machine = options.group(options.Machine)

    @property
    def conditions(self) -> set[str]:
        return {f"--method {self.method}", *(["--lora"] if self.lora else [])}


class Job(common.Job):
    """One run of `align`, and what the methods share."""

    def __init__(self, flags: Flags) -> None:
        super().__init__(flags, flags.model)
        self.training, held_out, where = read_split(
            partial(flags.records.read, read=read_preferences),
            *(flags.data, flags.held_out, lambda pair: pair.prompt),
            *(flags.fraction, flags.validation_share, self.seed),
        )
        self.held_out = held_out[: flags.held_out_pairs]
        print(
            f"{len(self.training)} pairs to learn from, {len(self.held_out)} held out ({where}), "
            f"on {self.device}"
        )
        self.model, self.tokenizer = self.load()
        self.figures = Figures()

    def choose_what_learns(self) -> None:
        """Everything, or the last blocks, or adapters."""
        flags = self.flags
        if flags.lora and flags.train_blocks is not None:
            raise ValueError("--lora trains adapters, --train-blocks the last blocks: give one")
        if flags.lora:
            flags.adapters.add(self.model)
        elif flags.train_blocks is not None:
            last = options.LastBlocks(flags.train_blocks)
            common.choose_what_learns(self.model, "last-blocks", last, flags.adapters)

    def peak_rate(self) -> float:
        flags = self.flags
        usual = PEAK_RATES[flags.method] * (10 if flags.lora else 1)
        if flags.method in ("ppo", "grpo") and is_learned(flags.comparison.reward):
            usual /= 10  # larger steps leave the reference within one rollout, before --kl can act
        return flags.lr or usual / (1 if common.is_small(self.model) else 10)

    def report_best(self) -> None:
        self.tokenizer.save_pretrained(self.out / "best")
        what = "adapter" if holds_adapter(self.out / "best") else "model"
        print(f"tuned {what}: {self.out / 'best'}")


def run(flags: Flags) -> None:
    job, pictures = Job(flags), {}
    if flags.method == "reward":
        summary, bins = train_reward_model(job)
        pictures["calibration"] = partial(plot_calibration, bins)
    else:
        summary = tune_policy(job)

    def figures(path: Path) -> None:
        plot_figures(job.out / "metrics.jsonl", FIGURES[flags.method], path, title)

    title = f"{flags.method} on {Path(flags.data).name}"
    unit = "nats per pair" if flags.method in ("reward", "dpo") else "per token"
    job.finish(summary, title, unit, figures=figures, **pictures)


def tune_policy(job: Job) -> dict[str, Any]:
    """DPO, PPO or GRPO, between two rounds of answers to prompts held out."""
    flags, model = job.flags, job.model
    asked = flags.comparison
    sys.path.append(str(Path.cwd()))  # where --reward my_rewards:politeness is looked for
    # an adapter's base must stay as it is: with --lora the policy's own does
    base = model if flags.lora else deepcopy(model)
    reward = find_reward(asked.reward, job.device, base=base)
    prompts = different_prompts(job.held_out)[: asked.compare]

    def answers(model: GPT2) -> list[str]:
        generator = job.generator()
        return answer_prompts(
            model, job.tokenizer, prompts, asked.max_new_tokens, generator=generator
        )

    before, best = answers(model), best_of(job, prompts, reward)
    tuned, summary = tune_dpo(job) if flags.method == "dpo" else tune_on_policy(job, reward)
    found = compare_answers(prompts, before, answers(tuned), reward)
    print(f"\n{found.show(flags.answers)}\n{asked.reward}: {found}")
    if best is not None:
        print(f"without any tuning, the best of {asked.best_of} answers: {best:.4f}")
    held_out_text = "\n\n".join(one.prompt + one.chosen for one in job.held_out)
    forgotten = job.report_forgetting(tuned, job.tokenizer, held_out_text)
    warn_of_lost_language(forgotten["forgetting"]["general"], flags.method)
    return {
        "reward_function": asked.reward,
        "best_of_n": best,
        **(summary | found.summary() | forgotten),
    }


def warn_of_lost_language(general: dict[str, float], method: str) -> None:
    """If general prose has become much less likely: a reward that rises is then no success."""
    before, after = general["perplexity_base"], general["perplexity_tuned"]
    if after > LOST * before:
        remedy = "a larger --beta" if method == "dpo" else "a larger --kl or fewer --rollouts"
        print(
            f"warning: the perplexity of general text has risen from {before:.0f} to {after:.0f}: "
            f"the model has left the language for the reward. Try {remedy}, or a lower --lr\n"
        )


def best_of(job: Job, prompts: list[str], reward: RewardFunction) -> float | None:
    """The mean reward that the untuned model gets with the best of several answers."""
    n, tokens = job.flags.comparison.best_of, job.flags.comparison.max_new_tokens
    if n < 2:
        return None
    generator = job.generator()
    return float(
        best_of_n(job.model, job.tokenizer, prompts, reward, n, tokens, generator)[1].mean()
    )


def is_learned(reward: str) -> bool:
    """Whether a reward is a reward model's, by its name."""
    return Path(reward).is_dir()


def different_prompts(preferences: list[Preference]) -> list[str]:
    return list(dict.fromkeys(one.prompt for one in preferences))


# ---- from pairs


def train_reward_model(job: Job) -> tuple[dict[str, Any], list[CalibrationBin]]:
    flags, out = job.flags, job.out
    longest = min(flags.pairs.longest, job.model.config.context_length)
    pairs, validation = (
        encode_preferences(part, job.tokenizer, longest) for part in (job.training, job.held_out)
    )
    job.choose_what_learns()
    give_reward_head(job.model, torch.Generator().manual_seed(job.seed))
    save_reward_model = partial(GPT2.save_pretrained, class_names=CLASS_NAMES)
    step = partial(reward_step, figures=job.figures)
    evaluate = partial(evaluate_rewards, job.model, validation)
    train_on_pairs(job, pairs, step, evaluate, common.how_to_save(job.model, save_reward_model))
    model = job.load_best()
    if lora_layers(model):  # a whole model rates answers, or an adapter on the policy's base
        save_adapter(model, out / "adapter", replace=True)
        job.tokenizer.save_pretrained(out / "adapter")
        merge_lora(model)
        save_reward_model(model, out / "best")
        print(f"adapter, for a policy on the same base: --reward {out / 'adapter'} --lora")
    job.report_best()
    report = evaluate_rewards(model, validation)
    for pair, better, worse in zip(
        job.held_out[: flags.answers], report.chosen, report.rejected, strict=False
    ):
        print(f"--- {end_of(pair.prompt)}\n[chosen   {float(better):+.3f}] {pair.chosen.strip()}")
        print(f"[rejected {float(worse):+.3f}] {pair.rejected.strip()}\n")
    print(f"held out: {report}")
    print(f"as a reward: gpt2mini align --reward {out / 'best'}")
    bins = calibration(report.margins)
    return {**report.summary(), "calibration": [vars(one) for one in bins]}, bins


def tune_dpo(job: Job) -> tuple[GPT2, dict[str, Any]]:
    flags, model, asked = job.flags, job.model, vars(job.flags.dpo)
    longest = min(flags.pairs.longest, model.config.context_length)
    pairs, validation = (
        with_reference(
            encode_preferences(part, job.tokenizer, longest), model, precision=job.precision
        )
        for part in (job.training, job.held_out)
    )
    job.choose_what_learns()
    step = partial(dpo_step, **asked, figures=job.figures)
    evaluate = partial(evaluate_dpo, model, validation, **asked, precision=job.precision)
    train_on_pairs(job, pairs, step, evaluate, common.how_to_save(model))
    tuned = job.load_best()
    job.report_best()
    report = evaluate_dpo(tuned, validation, **asked, precision=job.precision)
    print(f"held out: {report}")
    return tuned, report.summary()


def train_on_pairs(
    job: Job,
    pairs: list[EncodedPreference],
    step: Callable,
    evaluate: Callable[[], RewardReport],
    save: common.Save,
) -> None:
    """The training loop, for the reward model and for DPO; the best model lands in best/."""
    flags, model = job.flags, job.model
    batches = PreferenceBatches(pairs, flags.batch_size or 8, job.seed)
    steps = flags.steps or math.ceil(flags.pairs.epochs * len(batches) / get_world_size())

    def validate() -> dict[str, float]:
        report = evaluate()
        return {"validation_loss": report.loss, "validation_accuracy": report.accuracy}

    options.Sharding(flags.pairs.shard).apply(model, job.precision)
    rows = job.train(
        model,
        batches,
        [adamw(model, job.peak_rate())],
        *(steps, step, validate, save, job.figures),
        unit="pairs",
    )
    print_rows(rows, ["validation_loss", "validation_accuracy"], where="validation_loss")


# ---- from rewards


def tune_on_policy(job: Job, reward: RewardFunction) -> tuple[GPT2, dict[str, Any]]:
    flags, model = job.flags, job.model
    reference = None if flags.lora else deepcopy(model).requires_grad_(False)
    job.choose_what_learns()
    rollouts = RolloutSettings(
        rows=flags.on_policy.rollout_rows,
        minibatch_rows=flags.batch_size or 16,
        epochs=flags.on_policy.rollout_epochs,
        max_new_tokens=flags.comparison.max_new_tokens,
        num_samples=flags.grpo.num_samples if flags.method == "grpo" else 1,
        precision=job.precision,
    )
    prepare = prepare_ppo if flags.method == "ppo" else prepare_grpo
    learner, batches, step = prepare(job, reward, rollouts, reference)
    steps = flags.steps or flags.on_policy.rollouts * rollouts.updates
    rows = job.train(
        learner,
        batches,
        [adamw(learner, job.peak_rate(), weight_decay=0.0)],
        *(steps, step),
        figures=job.figures,
        log_every=rollouts.updates,
    )
    names = FIGURES[flags.method]
    print_rows(rows, names)
    common.how_to_save(model)(model, job.out / "best")
    job.report_best()
    return model, {name: rows[-1].get(name) for name in names}


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
