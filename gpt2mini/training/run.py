"""What lies around the training loop: its log, its checkpoints, and what can go wrong."""

import hashlib
import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gpt2mini.device import best_precision
from gpt2mini.files import alone_in
from gpt2mini.model import GPT2, TiedHead
from gpt2mini.training.checkpoints import (
    Checkpoints,
    Progress,
    generator_states,
    restore_generators,
    states_of,
)
from gpt2mini.training.distributed import (
    broadcast_from_rank_zero,
    get_rank,
    get_world_size,
    reshard,
    save_whole,
    sum_over_ranks,
)
from gpt2mini.training.metrics import MetricsLog
from gpt2mini.training.signals import StopSignals, TrainingStopped

logger = logging.getLogger(__name__)

MOST_BAD_STEPS = 10  # in a row: more, and it is the weights that are spoiled
STEADY_STEPS = 20  # of which the usual loss is the mean, roughly


@dataclass(frozen=True)
class Settings:
    """How `train` is to train; see each field."""

    steps: int
    schedule: Callable[[int], float]  # step -> share of each optimizer's peak learning rate
    accumulate: int = 1  # micro-batches per step, in each process
    max_grad_norm: float = 1.0
    precision: str = "auto"  # auto | bf16 | fp16 | fp32
    log_every: int = 10
    evaluate_every: int = 0  # 0: only at the end
    save_every: int = 0  # steps between two checkpoints; 0: none, but when a signal stops the run
    keep_last: int = 2  # checkpoints
    on_bad_step: str = "stop"  # or "skip": a loss or gradient that is no number, or a spike
    spike: float = 0.0  # a loss so many times the usual one is a bad step; 0: none is
    progress: bool = True
    unit: str = "tokens"  # what the loss function counts, for the log: tokens, or texts
    recompute: bool = True  # a third less memory for a few percent of the time
    activation_checkpointing: bool = False  # far less memory for a third more time
    compile: bool = False  # each block by torch.compile: a minute's wait; gains little on CPUs

    def __post_init__(self) -> None:
        if self.on_bad_step not in ("stop", "skip"):
            raise ValueError(f"on_bad_step must be 'stop' or 'skip', not {self.on_bad_step!r}")
        if self.spike != 0 and not self.spike > 1:
            raise ValueError(f"spike must be above 1, or 0 for none, not {self.spike}")
        for name in ("steps", "accumulate", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("evaluate_every", "save_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


@dataclass
class Step:
    """What one optimizer step has seen, in all processes together."""

    loss_sum: float
    count: float  # targets
    batches: int  # micro-batches
    may_overflow: bool  # the gradient scaler leaves such steps out, and scales less
    grad_norm: float = math.nan

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count


class Run:
    """A run of `train`: where it stands, and what it leaves in its folder."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        settings: Settings,
        out: str | Path | None,
        save_model: Callable[[Any, Path], object],
        parts: dict[str, Any],
    ) -> None:
        """out: None keeps nothing. parts: batches and other objects of the run; those that have a
        `state_dict` are saved and restored with it."""
        check_can_be_trained(model, optimizers, settings)
        self.model, self.optimizers, self.settings = model, optimizers, settings
        self.out, self.save_model = None if out is None else Path(out), save_model
        self.stateful = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.checkpoints = None
        if self.out is not None:
            self.checkpoints = Checkpoints(self.out / "checkpoints", settings.keep_last)
            self.checkpoints.check_space(model, settings.save_every > 0)
        self.progress = Progress(first_batch=digest_of_first(parts["batches"]))
        self.saved_step = -1
        self.bad_steps = 0  # in a row
        self.signals = StopSignals(enabled=self.out is not None)

    @contextmanager
    def begun(self, resume: bool) -> Iterator[None]:
        """Inside, the run has begun and is the only one in its folder."""
        with nullcontext() if self.out is None else only_run_in(self.out):
            self.begin(resume)
            yield

    def begin(self, resume: bool) -> None:
        """From the start, or from the newest checkpoint."""
        if resume and self.checkpoints is None:
            raise ValueError("resume needs the folder `out` of the run that is to go on")
        if not resume and self.checkpoints is not None:
            self.checkpoints.check_there_are_none()
        if resume and self.checkpoints is not None:
            found = self.checkpoints.load_newest(self.model, self.optimizers, self.stateful)
            if found is None:
                logger.warning("%s holds no checkpoint: the run begins", self.checkpoints.folder)
            elif found.first_batch not in ("", self.progress.first_batch):
                raise ValueError(
                    f"{self.out} was begun with other data, another seed or another batch size. It "
                    "can go on with its own alone: what was held out, and which model was the "
                    "best, would be another run's. Give the new run another folder"
                )
            elif found.step >= self.settings.steps:
                logger.warning(
                    "%s stands at step %d of %d already: there is nothing left to do",
                    *(self.out, found.step, self.settings.steps),
                )
            self.progress = found or self.progress
        self.untimed = self.progress.count  # targets since the last row that another run has read
        writes = self.out is not None and get_rank() == 0
        path = self.out / "metrics.jsonl" if writes and self.out is not None else None
        self.log = MetricsLog(path, self.progress.step)

    def lacks_evaluation(self) -> bool:
        """At the beginning; if somebody has removed the log; after an evaluation that failed."""
        step, rows = self.progress.step, self.log.rows
        evaluated = any(row["step"] == step and "grad_norm" not in row for row in rows)
        lacks = not rows or (self.is_due(self.settings.evaluate_every) and not evaluated)
        device = next(self.model.parameters()).device
        return broadcast_from_rank_zero(float(lacks), device) == 1.0

    # ---- around each step

    def remember(self) -> None:
        """What a step, or an evaluation, draws and reads before it can be judged, as it stands
        now."""
        self.states_before = states_of(self.stateful) if self.checkpoints is not None else {}

    def judge(self, step: Step) -> bool:
        """Whether the step may change the weights. A bad one is skipped with a warning, or stops
        the run; too many in a row stop it in any case."""
        problem = self.problem_with(step)
        self.bad_steps = 0 if problem is None else self.bad_steps + 1
        if problem is None:
            return True
        first, last = self.progress.batches, self.progress.batches + step.batches - 1
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        where = f"step {self.progress.step}, {batches}"
        if self.settings.on_bad_step == "skip" and self.bad_steps < MOST_BAD_STEPS:
            logger.warning("skipped %s: %s", where, problem)
            return False
        saved = ""
        if self.checkpoints is not None:
            saved = f"; the state before it is in {self.save(self.states_before)}"
        before = f", as in the {self.bad_steps - 1} steps before it" if self.bad_steps > 1 else ""
        raise FloatingPointError(
            f"{where}: {problem}{before}{saved}. Lower the learning rate, look at these batches, "
            "or skip such steps"
        )

    def problem_with(self, step: Step) -> str | None:
        if not math.isfinite(step.loss):
            return f"the loss became {step.loss}"
        if not math.isfinite(step.grad_norm) and not step.may_overflow:
            return f"the gradient became {step.grad_norm}"
        usual, spike = self.progress.usual_loss, self.settings.spike
        if spike and step.loss - usual > (spike - 1) * abs(usual):
            return f"the loss leapt to {step.loss:.3f} from about {usual:.3f}"
        return None

    def advance(self, step: Step, accepted: bool) -> None:
        progress = self.progress
        progress.step += 1
        progress.batches += step.batches
        if accepted:
            progress.loss_sum, progress.count = (
                progress.loss_sum + step.loss_sum,
                progress.count + step.count,
            )
            before = step.loss if math.isnan(progress.usual_loss) else progress.usual_loss
            progress.usual_loss = before + (step.loss - before) / STEADY_STEPS

    def is_due(self, every: int) -> bool:
        """Every so many steps, and at the last; 0: at the last alone."""
        step = self.progress.step
        return step == self.settings.steps or (every > 0 and step % every == 0)

    # ---- what it leaves behind

    def log_step(self, step: Step, share: float, figures: dict[str, float]) -> str:
        """A row of averages over the steps since the last; gives them in words."""
        progress, unit = self.progress, self.settings.unit
        loss = progress.loss_sum / progress.count if progress.count else math.nan
        speed = (progress.count - self.untimed) / self.log.seconds()
        progress.loss_sum = progress.count = self.untimed = 0.0
        self.log.write(
            {
                "step": progress.step,
                "loss": loss,
                f"{unit}_per_second": speed,
                "lr_multiplier": share,
                "grad_norm": step.grad_norm,
                **figures,
            }
        )
        return f"loss {loss:.3f}, {speed:.0f} {unit}/s"

    def evaluate(self, evaluate: Callable[[], float | dict[str, float]] | None) -> None:
        """Log what it finds; keep the model if its validation loss is the lowest so far."""
        if evaluate is None:
            return
        self.remember()
        with self.log.clock_stopped():
            try:
                row = figures_of(evaluate())
            except Exception:
                self.save_before_failing()
                raise
            self.log.write({"step": self.progress.step, **row})
            reshard(self.model)
            loss = broadcast_from_rank_zero(
                row["validation_loss"], next(self.model.parameters()).device
            )
            if loss < self.progress.best and self.out is not None:
                save_whole(self.save_model, self.model, self.out / "best")
            self.progress.best = min(self.progress.best, loss)

    def evaluate_if_lacking(self, evaluate: Callable[[], float | dict[str, float]] | None) -> None:
        """Before the first step to do; of a resumed run, the checkpoint then has to know of it."""
        if evaluate is not None and self.lacks_evaluation():
            self.evaluate(evaluate)
            if self.checkpoints is not None and self.progress.step > 0:
                self.save()

    def save_before_failing(self) -> None:
        """The steps before an evaluation that fails are not lost: resumed, the run evaluates again
        and goes on. (Not so in several processes, where it may have failed in one alone.)"""
        reshard(self.model)
        if self.checkpoints is None or get_world_size() > 1 or self.progress.step == 0:
            return
        try:
            saved = self.save(self.states_before)
            logger.warning("the evaluation failed; saved in %s, to be resumed", saved)
        except OSError as problem:  # what the evaluation raised matters more
            logger.warning("the evaluation failed, and %s", problem)

    def save(self, states: dict[str, Any] | None = None) -> Path:
        """A checkpoint, unless this step has one. states: what `remember` noted; default: now."""
        assert self.checkpoints is not None  # asked before
        if self.saved_step == self.progress.step:
            return self.checkpoints.path(self.progress.step)
        self.saved_step = self.progress.step
        states = states_of(self.stateful) if states is None else states
        with self.log.clock_stopped():
            return self.checkpoints.save(self.model, self.optimizers, self.progress, states)

    def stop_if_asked(self) -> None:
        """If a signal has come, to any of the processes: save, and say how to go on."""
        device = next(self.model.parameters()).device
        if sum_over_ranks([float(self.signals.received)], device) == [0.0]:
            return
        raise TrainingStopped(
            f"stopped after step {self.progress.step} of {self.settings.steps}; saved in "
            f"{self.save()}",
            self.signals.received or signal.SIGTERM,  # or another process's
        )


def figures_of(found: float | dict[str, float]) -> dict[str, float]:
    """What an evaluation gives, by name."""
    row = found if isinstance(found, dict) else {"validation_loss": found}
    if "validation_loss" not in row:
        raise ValueError(f"evaluate must give a 'validation_loss'; it gave {', '.join(row)}")
    return row


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Inside, no other run can be at work in the folder. Raises BlockingIOError, in all processes
    of this run, if one is."""
    with ExitStack() as stack:
        problem = None
        if get_rank() == 0:
            try:
                stack.enter_context(alone_in(folder))
            except BlockingIOError as error:
                problem = error
        if broadcast_from_rank_zero(float(problem is not None), torch.device("cpu")):
            raise problem or BlockingIOError(f"another run is at work in {folder}")
        yield


def digest_of_first(batches: Iterable[Any]) -> str:
    """Of the whole numbers in the first batch: token ids, labels. (What a model has computed may
    differ in its last bit the next time.) Or what the batches say of themselves, if they depend on
    the run; empty where they cannot, or can be read only once."""
    if hasattr(batches, "fingerprint"):
        return batches.fingerprint()
    if hasattr(batches, "load_state_dict") or iter(batches) is batches:
        return ""
    states, digest = generator_states(), hashlib.sha256()
    first = next_batch(iter(batches))
    restore_generators(states)  # somebody's batches may draw from them
    for tensor in (first, *getattr(first, "__dict__", {}).values()):
        if isinstance(tensor, Tensor) and not tensor.is_floating_point():
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_can_be_trained(model: nn.Module, optimizers: list[Optimizer], settings: Settings) -> None:
    """Raise ValueError for what would be trained in vain, or could not be saved."""
    of_model = set(model.parameters())
    learning = {p for o in optimizers for group in o.param_groups for p in group["params"]}
    if learning - of_model:
        raise ValueError(
            f"an optimizer has {len(learning - of_model)} tensors to train that are not parameters "
            "of the model: they would not be saved with it. Make them part of it, or train it with "
            "an optimizer made after its last change"
        )
    for part in model.modules():
        if isinstance(part, GPT2) and has_lost_its_tie(part):
            raise ValueError(
                "the output head is tied to an embedding that the model has no longer, which "
                "nothing would train: model.out_head = TiedHead(model.tok_emb) ties it again"
            )
    device = next(model.parameters()).device
    in_half = any(p.dtype == torch.float16 for p in learning)
    if in_half and best_precision(device, settings.precision) == "fp16":
        raise ValueError(
            "weights in float16 lose small steps, and their gradients cannot be scaled: "
            "model.float(); precision fp16 computes in float16 where that is enough"
        )


def has_lost_its_tie(model: GPT2) -> bool:
    head = model.out_head
    return type(head) is TiedHead and head.weight is not model.tok_emb.weight


def next_batch(batches: Iterator[Any]) -> Any:
    for batch in batches:
        return batch
    raise ValueError(
        "the batches have come to an end: training asks for as many as its steps need, so let them "
        "begin again (itertools.cycle), epoch after epoch"
    )


def remaining_batches(batches: Iterable[Any], first: int) -> Iterator[Any]:
    """The batches of this process from number `first` on; the processes take turns.

    Batches with a state have found their place themselves; those that know a short way to it
    (`part`) are asked; of all others, those before it are read and dropped.
    """
    first, every = first + get_rank(), get_world_size()
    if hasattr(batches, "load_state_dict"):
        return iter(batches)
    if hasattr(batches, "part"):
        return iter(batches.part(first, every))
    return islice(batches, first, None, every)
