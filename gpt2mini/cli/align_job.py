"""The flags of `align`, and what its methods share."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from tyro.conf import Suppress

from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import common, options
from gpt2mini.cli.data import RecordFlags, read_split
from gpt2mini.data.samples import sample
from gpt2mini.files import local_path
from gpt2mini.preferences.pairs import Preference, read_preferences
from gpt2mini.preferences.ppo import PPOSettings
from gpt2mini.training import Figures

# of gpt2-nano; larger models take a tenth of these rates, adapters, which begin at zero, ten times
PEAK_RATES = {"reward": 2e-4, "dpo": 2e-5, "ppo": 1e-3, "grpo": 1e-3}
FIGURES = {
    "reward": ["margin", "accuracy"],
    "dpo": ["chosen_reward", "rejected_reward", "margin", "accuracy"],
    "ppo": ["reward", "kl", "entropy", "clip_fraction", "value_loss", "response_length"],
    "grpo": ["reward", "kl", "entropy", "clip_fraction", "response_length"],
}
REWARD, DPO, PPO, GRPO = (f"--method {method}" for method in FIGURES)
# the run's flags about validation: only methods that learn from pairs have one
VALIDATION = dict.fromkeys(["evaluate_every", "patience"], (REWARD, DPO))


@dataclass(frozen=True)
class PairFlags:
    """With --method reward and dpo."""

    epochs: options.Positive = 3.0  # times through the pairs
    longest: options.Count = 512  # tokens per prompt and answer


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
    data: str = str(sample("preferences.jsonl"))  # records of prompt, chosen and rejected
    out: str = "runs/align"  # folder for results
    method: Literal["reward", "dpo", "ppo", "grpo"] = "ppo"
    fraction: float = 1.0  # seeded share of the data to use
    validation_share: float = options.share_held_out(0.2)  # share that is held out
    held_out: str | None = None  # a file to hold out, instead of a share of the prompts
    held_out_pairs: options.OptionalCount = None  # at most so many pairs held out
    steps: options.OptionalCount = None  # optimizer steps; overrides --epochs and --rollouts
    batch_size: options.OptionalCount = None  # pairs (None: 8) or responses (16) per step
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
    run: options.Run = options.group(options.Run, only=VALIDATION)
    parallel: options.Sharding = options.group(options.Sharding)
    machine: options.Machine = options.group(options.Machine)

    @property
    def conditions(self) -> set[str]:
        found = {f"--method {self.method}"} | ({"--lora"} if self.lora else set())
        return found if self.held_out else found | {options.WITHOUT_HELD_OUT}


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


def is_learned(reward: str) -> bool:
    """Whether a reward is a reward model's, by its name."""
    return local_path(reward).is_dir()


def different_prompts(preferences: list[Preference]) -> list[str]:
    return list(dict.fromkeys(one.prompt for one in preferences))
