"""Flags as fields of dataclasses: types that refuse numbers without meaning, groups that jobs
share, and the refusal of flags that a job would ignore."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

from torch import nn
from tyro.conf import Suppress, UseAppendAction
from tyro.constructors import PrimitiveConstructorSpec

from gpt2mini import GPT2
from gpt2mini.lora import add_lora
from gpt2mini.training import Settings, cosine
from gpt2mini.training.distributed import shard

Group = TypeVar("Group")

# ---- types of flags


def number(
    kind: type, accepts: Callable[[float], bool], words: str
) -> PrimitiveConstructorSpec[Any]:
    """How tyro reads a number of which only some are accepted. words: which."""

    def parse(texts: list[str]) -> Any:
        try:
            value = kind(texts[0])
        except ValueError:
            value = math.nan  # which no comparison accepts
        if not accepts(value):
            raise ValueError(f"must be {words}, not {texts[0]!r}")
        return value

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=parse,
        is_instance=lambda value: value is None or isinstance(value, kind),
        str_from_instance=lambda value: [str(value)],
    )


AT_LEAST_1 = number(int, lambda n: n >= 1, "a whole number of at least 1")
NOT_BELOW_0 = number(int, lambda n: n >= 0, "a whole number of at least 0")
ABOVE_0 = number(float, lambda x: 0 < x < math.inf, "a number above 0")
AT_LEAST_0 = number(float, lambda x: 0 <= x < math.inf, "a number of at least 0")

Count = Annotated[int, AT_LEAST_1]
OptionalCount = Annotated[int | None, AT_LEAST_1]
CountOrZero = Annotated[int, NOT_BELOW_0]
OptionalCountOrZero = Annotated[int | None, NOT_BELOW_0]
Seed = Annotated[int, number(int, lambda n: 0 <= n < 2**64, "a whole number from 0 to 2**64 - 1")]
Positive = Annotated[float, ABOVE_0]
OptionalPositive = Annotated[float | None, ABOVE_0]
NotNegative = Annotated[float, AT_LEAST_0]
OptionalNotNegative = Annotated[float | None, AT_LEAST_0]
Share = Annotated[float, number(float, lambda x: 0 <= x <= 1, "a number from 0 to 1")]
BelowOne = Annotated[float, number(float, lambda x: 0 <= x < 1, "a number from 0 to below 1")]
Multiple = Annotated[float, number(float, lambda x: x == 0 or x > 1, "0 or a number above 1")]

# --text A B and --text A --text B alike
Several = UseAppendAction[tuple[tuple[str, ...], ...]]


def flat(several: Several) -> list[str]:
    return [one for group in several for one in group]


# ---- groups of flags


@dataclass(frozen=True)
class Computing:
    """Where it computes."""

    seed: Seed = 0  # same seed, same result
    device: str = "auto"  # auto, cpu, cuda, cuda:1 ... or mps


@dataclass(frozen=True)
class Machine(Computing):
    """Where and how precisely it computes."""

    # of matrix products; auto: the fastest that the device supports
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


@dataclass(frozen=True)
class Run:
    """What keeps a long run from being lost, and what it costs in memory."""

    resume: bool = False  # go on from the last checkpoint in --out, if any
    overwrite: bool = False  # remove what an earlier run has left in --out
    save_every: CountOrZero = 0  # steps between checkpoints; 0: none, but when it is stopped
    keep_last: Count = 2  # checkpoints to keep
    log_every: OptionalCount = None  # steps per row of metrics.jsonl; None: a twentieth of all
    evaluate_every: OptionalCount = None  # steps between validations; None: a fifth of all
    patience: CountOrZero = 0  # stop after so many validations without a lower loss; 0: never
    on_bad_step: Literal["stop", "skip"] = "stop"  # if the loss is not finite, or leaps
    spike: Multiple = 0.0  # a leap: so many times the usual loss; 0: none is
    activation_checkpointing: bool = False  # far less memory for a third more time
    compile: bool = False  # compile the blocks first; needs a C++ compiler

    def settings(self, steps: int, precision: str, **others: Any) -> Settings:
        """How `training.train` is to train: a cosine schedule, unless `others` has another."""
        own = {name: value for name, value in vars(self).items() if value is not None}
        del own["resume"], own["overwrite"]
        usual = {
            "schedule": partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
            "log_every": max(1, steps // 20),
            "evaluate_every": max(1, steps // 5),
        }
        return Settings(steps=steps, precision=precision, **{**usual, **others, **own})


@dataclass(frozen=True)
class Sharding:
    """For models that do not fit in one process."""

    shard: bool = False  # spread the model over torchrun's processes (FSDP2)

    def apply(self, model: nn.Module, precision: str) -> None:
        """Make optimizers afterwards, for they hold parameters."""
        if self.shard:
            shard(model, precision)


@dataclass(frozen=True)
class LastBlocks:
    """With --method last-blocks."""

    train_blocks: CountOrZero = 1  # blocks that learn, from the top, with the final norm


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: with --method lora (align: with --lora)."""

    rank: Count = 8  # of each adapter
    alpha: OptionalPositive = None  # adapters are scaled by alpha / rank; None: twice the rank
    dropout: BelowOne = 0.0  # on the adapters' input
    # linear layers that get an adapter
    targets: tuple[Literal["query", "key", "value", "attn_out", "mlp_in", "mlp_out"], ...] = (
        *("query", "key", "value"),
        *("attn_out", "mlp_in", "mlp_out"),
    )

    def add(self, model: GPT2) -> None:
        add_lora(model, self.rank, self.alpha or 2 * self.rank, self.dropout, self.targets)


WITHOUT_HELD_OUT = "a run without --held-out"


def share_held_out(default: float) -> float:
    """The field for the share of the data that is held out, where no other data are."""
    return field(default=default, metadata={"only_for": (WITHOUT_HELD_OUT,)})


def group(
    kind: Callable[..., Group],
    *conditions: str,
    but: Sequence[str] = (),
    only: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Group:
    """A field that is a group of flags. conditions: refuse these flags, but for some fields, unless
    the job meets one of the conditions. only: fields with conditions of their own."""
    own = dict.fromkeys(but, ()) | dict(only)
    return field(default_factory=kind, metadata={"only_for": conditions, "own": own})


def refuse_misplaced(flags: Any, arguments: Sequence[str]) -> None:
    """Raise ValueError for a flag among the arguments that the job would ignore: one with
    conditions, of which none is in `flags.conditions`."""
    given = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for name, conditions in conditional_flags(flags):
        if {f"--{name}", f"--no-{name}"} & given and not flags.conditions & set(conditions):
            raise ValueError(f"--{name} is for {' or '.join(conditions)}")


def conditional_flags(flags: Any) -> Iterator[tuple[str, Sequence[str]]]:
    """(name of a flag, conditions of which one must hold) of all that have any."""
    for one in fields(flags):
        value, conditions = getattr(flags, one.name), one.metadata.get("only_for", ())
        own = one.metadata.get("own", {})
        for flag in fields(value) if is_dataclass(value) else [one]:
            required = own.get(flag.name, conditions)
            if required and not is_suppressed(flag):
                yield flag.name.rstrip("_").replace("_", "-"), required  # as_: a keyword


def is_suppressed(flag: Field) -> bool:
    """Whether it is no flag of its group: another group has the flag of this name."""
    return Suppress in getattr(flag.type, "__metadata__", ())
