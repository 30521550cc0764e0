"""A training run: where it stands, what it logs and saves, and what can go wrong."""

import logging
import math
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from gpt2mini.files import local_path
from gpt2mini.modes import mode, uncompiled
from gpt2mini.training.batches import GeneratorsAtStart, next_batch, remaining_batches
from gpt2mini.training.checkpoints import (
    Progress,
    RunCheckpoints,
    check_can_be_read_back,
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
from gpt2mini.training.fingerprint import fingerprint, samples_of_frozen
from gpt2mini.training.folder import check_free, only_run_in, remove_results
from gpt2mini.training.metrics import MetricsLog
from gpt2mini.training.optimizers import ChangesInGroups
from gpt2mini.training.refusals import check_can_be_trained
from gpt2mini.training.resuming import (
    check_same_base,
    check_same_data,
    settings_at,
    warn_of_other_settings,
)
from gpt2mini.training.settings import Settings
from gpt2mini.training.signals import StopSignals, TrainingStopped

logger = logging.getLogger(__name__)

MAX_BAD_STEPS = 10  # in a row: after more, the weights themselves are spoiled
LOSS_AVERAGE_STEPS = 20  # window of the moving average that a spike is compared with


@dataclass
class StepResult:
    """What one optimizer step has computed, over all ranks."""

    loss_sum: float
    count: float  # targets
    batches: int  # micro-batches
    may_overflow: bool  # fp16: the gradient scaler skips a step that overflows, and scales down
    grad_norm: float = math.nan
    is_bad: bool = False  # not finite, or a spike, and to be skipped

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count


class Run:
    """A run of `train`: where it stands, and what it leaves in its folder."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        optimizers: list[Optimizer],
        scaler: GradScaler,
        settings: Settings,
        evaluate: Callable[[], float | dict[str, float]] | None,
        figures: Callable[[], dict[str, float]] | None,
        out: str | Path | None,
        save_model: Callable[[Any, Path], object],
    ) -> None:
        """Arguments as for `train`; without `out` nothing is saved. Batches, figures and scaler are
        saved and restored with the run if they have a `state_dict`."""
        check_can_be_trained(model, optimizers)
        if settings.patience and evaluate is None:
            raise ValueError("patience counts evaluations, and this run has none: pass evaluate")
        self.model = uncompiled(model)  # its names are those of the files
        self.batches, self.optimizers = batches, optimizers
        self.settings, self.evaluate, self.figures = settings, evaluate, figures
        self.out, self.save_model = None if out is None else local_path(out), save_model
        parts: dict[str, Any] = {"batches": batches, "figures": figures, "scaler": scaler}
        parts["changes_in_groups"] = ChangesInGroups(optimizers)
        if not hasattr(batches, "load_state_dict"):  # they are read from the first again
            parts["generators_at_start"] = GeneratorsAtStart(batches)
        self.stateful = {name: part for name, part in parts.items() if hasattr(part, "state_dict")}
        self.checkpoints = None
        if self.out is not None:
            self.checkpoints = RunCheckpoints(self.out / "checkpoints", settings.keep_last)
            self.checkpoints.check_space(model, settings.save_every > 0)
            check_can_be_read_back(self.stateful)
        self.progress = Progress()
        self.saved_step = -1
        self.bad_steps = 0  # in a row
        self.signals = StopSignals(enabled=self.out is not None)

    @contextmanager
    def begun(self, resume: bool, overwrite: bool) -> Iterator[None]:
        """Inside, the run has begun or resumed, is the only one in its folder, catches signals and
        shows its progress."""
        with nullcontext() if self.out is None else only_run_in(self.out):
            self.begin(resume, overwrite)
            with self.signals, progress_bar(self.settings, self.progress.step) as self.bar:
                yield

    def begin(self, resume: bool, overwrite: bool) -> None:
        """From the start, or from the newest checkpoint."""
        if resume and self.out is None:
            raise ValueError("resume needs the folder `out` of the run to continue")
        if resume and overwrite:
            raise ValueError(
                "resume continues an earlier run and overwrite removes it: ask for one"
            )
        if self.out is not None:
            if not overwrite:
                check_free(self.out, resume)
            found = self.load_newest() if resume else None
            # of batches that a resume has put back
            self.fingerprint = fingerprint(self.batches)
            self.frozen = samples_of_frozen(self.model)
            if found is not None:
                self.continue_from(found)
            elif resume or overwrite:
                remove_results(self.out)
        self.untimed = self.progress.count  # targets since the last row, read before the resume
        writes = self.out is not None and get_rank() == 0
        path = self.out / "metrics.jsonl" if writes and self.out is not None else None
        self.log = MetricsLog(path, self.progress.step)

    def load_newest(self) -> Progress | None:
        """How far the run was, if there is a checkpoint to continue from."""
        assert self.checkpoints is not None
        found = self.checkpoints.load_newest(self.model, self.optimizers, self.stateful)
        if found is None:
            logger.warning("%s holds no checkpoint: starting", self.checkpoints.folder)
        return found

    def continue_from(self, found: Progress) -> None:
        assert self.out is not None
        check_same_data(self.out, self.fingerprint, found)
        check_same_base(self.out, self.frozen, found)
        warn_of_other_settings(self.out, self.settings_at(found.step), found)
        self.progress = found
        if self.is_over():
            logger.warning(
                "%s is at step %d of %d already: there is nothing left to do",
                *(self.out, found.step, self.settings.steps),
            )

    def settings_at(self, step: int) -> dict[str, Any]:
        device = next(self.model.parameters()).device
        return settings_at(step, self.settings, self.optimizers, device)

    # ---- around each step

    def steps(self) -> Iterator[Iterator[Any]]:
        """For each step still to do, an iterator over its micro-batches."""
        batches = remaining_batches(self.batches, self.progress.batches)
        self.validate_if_missing()
        self.stop_if_asked()
        while not self.is_over():
            self.remember_states()
            yield (next_batch(batches) for _ in range(self.settings.accumulate))
        self.warn_if_there_is_no_best()

    def accepts(self, result: StepResult) -> bool:
        """Whether the optimizers may take this step.

        A bad step is skipped with a warning, or raises FloatingPointError; too many in a row always
        raise. In fp16 a step whose gradients overflow in one optimizer is left out in all.
        """
        problem = self.problem_with(result)
        result.is_bad = problem is not None
        self.bad_steps = self.bad_steps + 1 if result.is_bad else 0
        if problem is None:
            return math.isfinite(result.grad_norm)
        first, last = self.progress.batches, self.progress.batches + result.batches - 1
        batches = f"batch {first}" if first == last else f"batches {first} to {last}"
        where = f"step {self.progress.step}, {batches}"
        if self.settings.on_bad_step == "skip" and self.bad_steps < MAX_BAD_STEPS:
            logger.warning("skipped %s: %s", where, problem)
            if "figures" in self.stateful:  # it does not count in what is logged either
                self.stateful["figures"].load_state_dict(self.figures_before)
            return False
        self.model.zero_grad()  # leave no NaN behind
        before = f", as in the {self.bad_steps - 1} steps before it" if self.bad_steps > 1 else ""
        saved = ""
        if self.checkpoints is not None:
            saved = f"; the state before it is in {self.save(self.states_before)}"
        raise FloatingPointError(
            f"{where}: {problem}{before}{saved}. Lower the learning rate, look at these batches, "
            "or skip such steps"
        )

    def problem_with(self, result: StepResult) -> str | None:
        if not math.isfinite(result.loss):
            return f"the loss became {result.loss}"
        if not math.isfinite(result.grad_norm) and not result.may_overflow:
            return f"the gradient became {result.grad_norm}"
        usual, spike = self.progress.usual_loss, self.settings.spike
        if spike and result.loss - usual > (spike - 1) * abs(usual):
            return f"the loss jumped to {result.loss:.3f} from about {usual:.3f}"
        return None

    def after_step(self, result: StepResult, lr_multiplier: float) -> None:
        """Count the step; then log, evaluate, save and stop, whichever is due."""
        self.count(result)
        self.bar.update()
        if self.is_due(self.settings.log_every):
            self.log_step(result, lr_multiplier)
        if self.is_due(self.settings.evaluate_every):
            self.validate()
        if self.is_over() and self.progress.count:  # stopped early, between two rows
            self.log_step(result, lr_multiplier)
        if self.settings.save_every and (self.is_due(self.settings.save_every) or self.is_over()):
            self.save()
        self.stop_if_asked()

    def is_over(self) -> bool:
        """After the last step, or after as many evaluations without a lower loss as are allowed."""
        patience, stale = self.settings.patience, self.progress.evaluations_since_best
        return self.progress.step >= self.settings.steps or 0 < patience <= stale

    def count(self, result: StepResult) -> None:
        progress = self.progress
        progress.step += 1
        progress.batches += result.batches
        if not result.is_bad:
            progress.loss_sum += result.loss_sum
            progress.count += result.count
            before = result.loss if math.isnan(progress.usual_loss) else progress.usual_loss
            progress.usual_loss = before + (result.loss - before) / LOSS_AVERAGE_STEPS

    def is_due(self, every: int) -> bool:
        """Every so many steps, and at the last; 0: at the last alone."""
        step = self.progress.step
        return step == self.settings.steps or (every > 0 and step % every == 0)

    def stop_if_asked(self) -> None:
        """If any rank has received a signal: save, and raise TrainingStopped."""
        device = next(self.model.parameters()).device
        if sum_over_ranks([float(self.signals.received)], device) == [0.0]:
            return
        raise TrainingStopped(
            f"stopped after step {self.progress.step} of {self.settings.steps}; saved in "
            f"{self.save()}",
            self.signals.received or signal.SIGTERM,  # or another rank's
        )

    # ---- log and evaluation

    def log_step(self, result: StepResult, lr_multiplier: float) -> None:
        """Write a row of means over the steps since the last one."""
        progress, unit = self.progress, self.settings.unit
        loss = progress.loss_sum / progress.count if progress.count else math.nan
        speed = (progress.count - self.untimed) / self.log.seconds()
        progress.loss_sum = progress.count = self.untimed = 0.0
        row = {
            "step": progress.step,
            "loss": loss,
            f"{unit}_per_second": speed,
            "lr_multiplier": lr_multiplier,
            **learning_rates(self.optimizers),
            "grad_norm": result.grad_norm,
            **(self.figures() if self.figures else {}),
        }
        self.log.write(row)
        self.bar.set_postfix_str(f"loss {loss:.4g}")

    def validate(self) -> None:
        """Evaluate and log the result; save the model if its validation loss is the lowest so far.
        A loss that is no finite number never is. The mode is restored: `evaluate` may call
        `model.eval()`."""
        if self.evaluate is None:
            return
        self.remember_states()
        with self.log.clock_stopped():
            as_it_was = mode(self.model, training=self.model.training)
            with self.saved_if_it_fails("evaluation"), as_it_was:
                row = validation_row(self.evaluate())
            self.log.write({"step": self.progress.step, **row})
            reshard(self.model)
            loss = broadcast_from_rank_zero(
                row["validation_loss"], next(self.model.parameters()).device
            )
            self.progress.evaluations_since_best += 1
            if not math.isfinite(loss):
                logger.warning("step %d: the validation loss is %s", self.progress.step, loss)
            elif loss < self.progress.best:
                if self.out is not None:
                    save_whole(self.save_model, self.model, self.out / "best")
                self.progress.best, self.progress.evaluations_since_best = loss, 0

    def validate_if_missing(self) -> None:
        """Before the first step to do; a resumed run's checkpoint then has to include it."""
        if self.evaluate is not None and self.validation_is_missing():
            self.validate()
            if self.checkpoints is not None and self.progress.step > 0:
                self.save()

    def validation_is_missing(self) -> bool:
        """At the start, if the log was removed, and after an evaluation that failed."""
        step, rows = self.progress.step, self.log.rows
        evaluated = any(row["step"] == step and "grad_norm" not in row for row in rows)
        missing = not rows or (self.is_due(self.settings.evaluate_every) and not evaluated)
        device = next(self.model.parameters()).device
        return broadcast_from_rank_zero(float(missing), device) == 1.0

    def warn_if_there_is_no_best(self) -> None:
        """At the end, if no validation loss was finite: keep the last model in a checkpoint."""
        if self.evaluate is None or math.isfinite(self.progress.best):
            return
        where = "" if self.checkpoints is None else f"; the last one is saved in {self.save()}"
        logger.warning("no validation loss was finite, so no model is the best%s", where)

    # ---- checkpoints

    def remember_states(self) -> None:
        """Of random generators, batches and the like, before a step or an evaluation that may
        fail."""
        self.states_before = states_of(self.stateful) if self.checkpoints is not None else {}
        if "figures" in self.stateful:
            self.figures_before = self.stateful["figures"].state_dict()

    def save(self, states: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint, unless this step has one. states: those of `remember_states`; by
        default the present ones."""
        assert self.checkpoints is not None  # callers check
        if self.saved_step == self.progress.step:
            return self.checkpoints.path(self.progress.step)
        self.saved_step = self.progress.step
        self.progress.data, self.progress.frozen = self.fingerprint, self.frozen
        self.progress.settings = self.settings_at(self.progress.step)
        states = states_of(self.stateful) if states is None else states
        with self.log.clock_stopped():
            return self.checkpoints.save(self.model, self.optimizers, self.progress, states)

    @contextmanager
    def saved_if_it_fails(self, what: str) -> Iterator[None]:
        """Keep the steps before a step or an evaluation inside which something raises, such as a
        reward function or a batch: resumed, the run does it again and continues."""
        try:
            yield
        except Exception:
            self.save_before_failing(what)
            raise

    def save_before_failing(self, what: str) -> None:
        """Not in a distributed run, where it may have failed on one rank alone."""
        self.model.zero_grad()  # of micro-batches before the one that failed
        reshard(self.model)
        if self.checkpoints is None or get_world_size() > 1 or self.progress.step == 0:
            return
        try:
            saved = self.save(self.states_before)
            logger.warning("the %s failed; the run is saved in %s", what, saved)
        except OSError as problem:  # what was raised inside matters more
            logger.warning("the %s failed, and %s", what, problem)


# ---- what it shows


def progress_bar(settings: Settings, step: int) -> tqdm:
    shown = settings.progress and get_rank() == 0
    return tqdm(desc="training", total=settings.steps, initial=step, disable=not shown)


def validation_row(found: float | dict[str, float]) -> dict[str, float]:
    """The result of an evaluation, by name, in numbers for JSON: it may be tensors or NumPy's."""
    row = found if isinstance(found, dict) else {"validation_loss": found}
    if "validation_loss" not in row:
        raise ValueError(f"evaluate must return a 'validation_loss'; it returned {', '.join(row)}")
    return {name: float(value) for name, value in row.items()}


def learning_rates(optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """Of the first group of each optimizer; the first optimizer's is called learning_rate."""
    rates = [float(optimizer.param_groups[0]["lr"]) for optimizer in optimizers]
    names = [f"learning_rate_{type(one).__name__.lower()}" for one in optimizers]
    return dict(zip(["learning_rate", *names[1:]], rates, strict=True))
