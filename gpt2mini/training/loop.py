"""The training loop, written out: any model, any loss that returns (sum, count), any batches."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from gpt2mini.data.text import Batch
from gpt2mini.losses import check_labels_not_shifted, chunked_next_token_loss
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating, mode
from gpt2mini.training.memory import recompute_activations
from gpt2mini.training.precision import autocast
from gpt2mini.training.state import load_state, save_state

logger = logging.getLogger(__name__)

# A batch is anything with `.to(device)` that the loss function understands.
LossFunction = Callable[[Any, Any], tuple[Tensor, Tensor | int]]


def next_token_step(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    """(sum of the next-token loss, number of targets) of a batch; the full logits never exist."""
    check_labels_not_shifted(batch.token_ids, batch.labels)
    hidden = model.hidden_states(batch.token_ids, batch.attention_mask)
    return chunked_next_token_loss(hidden, model.out_head, batch.labels)


@dataclass(frozen=True)
class Settings:
    """What the loop needs to know beyond model, loss, batches and optimizers."""

    steps: int
    schedule: Callable[[int], float]  # step -> share of each optimizer's peak learning rate
    accumulate: int = 1  # micro-batches per step
    max_grad_norm: float = 1.0
    precision: str = "auto"  # auto | bf16 | fp32
    log_every: int = 10
    evaluate_every: int = 0  # 0: only at the end
    save_every: int = 0  # 0: never
    progress: bool = True
    unit: str = "tokens"  # what the loss function counts, for the log: tokens, or texts
    recompute: bool = True  # a third less memory for a few percent of the time


def train(
    model: nn.Module,
    batches: Iterable[Any],
    optimizers: Iterable[Optimizer],
    settings: Settings,
    loss_function: LossFunction = next_token_step,
    evaluate: Callable[[], float | dict[str, float]] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save: Callable[[Any, Path], object] = GPT2.save_pretrained,
    figures: Callable[[], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Train in place; return the logged rows, which also go to `out`/metrics.jsonl.

    model: a GPT2, or a module that holds one (then `save` has to be given too).
    batches: an endless iterable; with `resume`, one that starts where the saved state stopped
        (see `saved_step`). evaluate: gives the validation loss, alone or as the `validation_loss`
        among other figures to log; whenever it is the lowest so far, `save` writes the model to
        `out`/best. figures: more to log in each row, such as a `Figures` that the loss function
        fills. Raises FloatingPointError if the loss is no longer a number.
    """
    optimizers = list(optimizers)
    out = None if out is None else Path(out)
    log = MetricsLog(out, append=resume)
    first_step, best = 0, math.inf
    if resume:
        if out is None:
            raise ValueError("resume needs the folder `out` of the run that is to go on")
        first_step, best = load_state(out / "state.pt", model, optimizers)

    def evaluate_and_keep_best(step: int) -> None:
        nonlocal best
        if evaluate is None:
            return
        with log.clock_stopped():
            found = evaluate()
            figures = found if isinstance(found, dict) else {"validation_loss": found}
            log.write({"step": step, **figures})
            if figures["validation_loss"] < best and out is not None:
                save(model, out / "best")
            best = min(best, figures["validation_loss"])

    model.zero_grad()
    supply = iter(batches)
    bar = tqdm(
        desc="training", total=settings.steps, initial=first_step, disable=not settings.progress
    )
    kept = recompute_activations(model) if settings.recompute else nullcontext()
    with mode(model, training=True), kept, bar:
        if first_step == 0:
            evaluate_and_keep_best(0)
        for step in range(first_step, settings.steps):
            share = settings.schedule(step)
            set_learning_rates(optimizers, share)
            loss_sum, count = accumulate_gradients(model, supply, loss_function, settings)
            if not math.isfinite(loss_sum):
                raise FloatingPointError(
                    f"the loss became {loss_sum} at step {step}: lower the learning rate"
                )
            grad_norm = divide_and_clip(model.parameters(), count, settings.max_grad_norm)
            if not math.isfinite(grad_norm):
                raise FloatingPointError(
                    f"the gradient became {grad_norm} at step {step}: lower the learning rate"
                )
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad()

            done = step + 1
            last = done == settings.steps
            bar.update()
            log.add(loss_sum, count)
            if done % settings.log_every == 0 or last:
                loss, speed = log.averages()
                log.write(
                    {
                        "step": done,
                        "loss": loss,
                        f"{settings.unit}_per_second": speed,
                        "learning_rate_share": share,
                        "grad_norm": grad_norm,
                        **({} if figures is None else figures()),
                    }
                )
                bar.set_postfix_str(f"loss {loss:.3f}, {speed:.0f} {settings.unit}/s")
            if last or is_due(done, settings.evaluate_every):
                evaluate_and_keep_best(done)
            if (
                out is not None
                and settings.save_every
                and (last or is_due(done, settings.save_every))
            ):
                save_state(out / "state.pt", model, optimizers, done, best)
    return log.rows


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def set_learning_rates(optimizers: list[Optimizer], share: float) -> None:
    """Each group's peak rate, the one that it was made with, times `share`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share


def accumulate_gradients(
    model: nn.Module, supply: Iterator[Any], loss_function: LossFunction, settings: Settings
) -> tuple[float, float]:
    """Backward through the micro-batches of one step; (sum of the losses, number of targets).

    The gradients that pile up are those of the *sum*: `divide_and_clip` divides them once, by all
    targets of all micro-batches, so that k micro-batches equal one large batch.
    """
    device = next(model.parameters()).device
    loss_sum, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for _ in range(settings.accumulate):
        batch = next(supply).to(device)
        with autocast(device, settings.precision):
            batch_sum, batch_count = loss_function(model, batch)
        batch_sum.backward()
        loss_sum, count = loss_sum + batch_sum.detach(), count + batch_count
    return float(loss_sum), float(count)


def divide_and_clip(parameters: Iterator[nn.Parameter], count: float, max_norm: float) -> float:
    """Divide all gradients by `count` and scale them down to `max_norm`, in one pass; return the
    norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients)) / count
    torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)) / count)
    return norm


def evaluate_loss(
    model: GPT2,
    batches: Iterable[Any],
    loss_function: LossFunction = next_token_step,
    precision: str = "auto",
) -> float:
    """Mean loss over all targets of all batches, in eval mode; the mode found is restored."""
    device = next(model.parameters()).device
    loss_sum, count = 0.0, 0
    with evaluating(model), autocast(device, precision):
        for batch in batches:
            batch_sum, batch_count = loss_function(model, batch.to(device))
            loss_sum, count = loss_sum + float(batch_sum), count + int(batch_count)
    if count == 0:
        raise ValueError("there is nothing to evaluate on: the batches hold no target")
    return loss_sum / count


class MetricsLog:
    """Rows in memory and, given a folder, in its metrics.jsonl: one JSON object a line."""

    def __init__(self, folder: Path | None, append: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.path = None if folder is None else folder / "metrics.jsonl"
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not append:
                self.path.write_text("", encoding="utf-8")
        self.began = time.perf_counter()
        self.loss_sum, self.count = 0.0, 0.0

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        entered = time.perf_counter()
        yield
        self.began += time.perf_counter() - entered

    def add(self, loss_sum: float, count: float) -> None:
        self.loss_sum, self.count = self.loss_sum + loss_sum, self.count + count

    def averages(self) -> tuple[float, float]:
        """Loss and speed (targets per second) since the last call."""
        now = time.perf_counter()
        averages = self.loss_sum / self.count, self.count / (now - self.began)
        self.began, self.loss_sum, self.count = now, 0.0, 0.0
        return averages

    def write(self, row: dict[str, Any]) -> dict[str, Any]:
        self.rows.append(row)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row
