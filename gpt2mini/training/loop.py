"""The training loop, written out: any model, any loss that returns (sum, count), any batches."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from gpt2mini.device import autocast, gains_from_bfloat16, gradient_scaler
from gpt2mini.losses.steps import LossFunction, next_token_step
from gpt2mini.model import GPT2
from gpt2mini.modes import mode
from gpt2mini.training.attention import Bfloat16CPUAttention
from gpt2mini.training.distributed import (
    get_rank,
    get_world_size,
    gradient_sync,
    sum_over_ranks,
    whole_tensor,
    with_averaged_gradients,
)
from gpt2mini.training.memory import (
    activation_checkpointing,
    compiled_blocks,
    recompute_activations,
)
from gpt2mini.training.run import Run, Settings, Step, next_batch, remaining_batches

SMALLEST_SCALE = 2.0**-10  # of gradients in fp16


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
    """Train in place; return the logged rows, which also stand in `out`/metrics.jsonl.

    model: a GPT2, or a module that holds one (then `save` has to be given too).
    batches: an endless iterable, the same from its start each time that it is asked. Several
        processes take turns with its batches.
    evaluate: gives the validation loss, alone or as the `validation_loss` among other figures to
        log; whenever it is the lowest so far, `save` writes the model to `out`/best.
    resume: go on from the newest checkpoint in `out`, or begin if there is none. The result is
        that of a run that never stopped, on a CPU bit for bit.
    figures: more to log in each row, such as a `Figures` that the loss function fills.
    Raises FloatingPointError at a bad step (see `settings.on_bad_step`) before it has changed a
    weight, and TrainingStopped after Ctrl-C or SIGTERM; given `out`, the run is saved first.
    """
    optimizers = list(optimizers)
    scaler = gradient_scaler(next(model.parameters()).device, settings.precision)
    parts = {"batches": batches, "figures": figures, "scaler": scaler}
    loss_of = with_averaged_gradients(model, loss_function)
    run = Run(model, optimizers, settings, out, save, parts)
    with (
        run.begun(resume),
        mode(model, training=True),
        prepared(model, settings),
        run.signals,
        progress_bar(settings, run.progress.step) as bar,
    ):
        progress = run.progress
        supply = remaining_batches(batches, progress.batches)
        model.zero_grad()
        run.evaluate_if_lacking(evaluate)
        run.stop_if_asked()
        while progress.step < settings.steps:
            run.remember()
            share = settings.schedule(progress.step)
            set_learning_rates(optimizers, share)
            step = accumulate_gradients(loss_of, supply, settings, scaler)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            own_count = step.count / get_world_size()  # gradients are means over the processes
            step.grad_norm = divide_and_clip(model.parameters(), own_count, settings.max_grad_norm)
            try:
                accepted = run.judge(step)
            except FloatingPointError:
                model.zero_grad()  # no NaN stays behind
                raise
            # where one optimizer's gradients overflow (fp16), the step is left out for all
            if accepted and math.isfinite(step.grad_norm):
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            model.zero_grad()

            run.advance(step, accepted)
            bar.update()
            if run.is_due(settings.log_every):
                bar.set_postfix_str(run.log_step(step, share, figures() if figures else {}))
            if run.is_due(settings.evaluate_every):
                run.evaluate(evaluate)
            if settings.save_every and run.is_due(settings.save_every):
                run.save()
            run.stop_if_asked()
    return run.log.rows


def progress_bar(settings: Settings, step: int) -> tqdm:
    shown = settings.progress and get_rank() == 0
    return tqdm(desc="training", total=settings.steps, initial=step, disable=not shown)


def set_learning_rates(optimizers: list[Optimizer], share: float) -> None:
    """Each group's peak rate, the one that it was made with, times `share`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * share


def accumulate_gradients(
    loss_of: nn.Module,
    supply: Iterator[Any],
    settings: Settings,
    scaler: GradScaler,
) -> Step:
    """Backward through the micro-batches of one step, in all processes.

    The gradients that pile up are those of the *sum*: `divide_and_clip` divides them once, by all
    targets of all micro-batches, so that k micro-batches equal one large batch.
    """
    device = next(loss_of.parameters()).device
    loss_sum, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for left in reversed(range(settings.accumulate)):
        batch = next_batch(supply).to(device)
        with gradient_sync(loss_of, now=left == 0):
            with autocast(device, settings.precision):
                batch_sum, batch_count = loss_of(batch)
            scaler.scale(batch_sum).backward()
        loss_sum, count = loss_sum + batch_sum.detach(), count + batch_count
    total, targets = sum_over_ranks([float(loss_sum), float(count)], device)
    if targets == 0:
        raise ValueError("a step has nothing to learn from: its batches hold no target")
    # a scale that small has not overflowed: the gradient is no number whatever the scale
    may_overflow = scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE
    return Step(total, targets, settings.accumulate * get_world_size(), may_overflow)


def divide_and_clip(parameters: Iterable[nn.Parameter], count: float, max_norm: float) -> float:
    """Divide all gradients by `count` and scale them down to `max_norm`, in one pass; return the
    norm before."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(whole_tensor(torch.nn.utils.get_total_norm(gradients))) / count
    torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)) / count)
    return norm


@contextmanager
def prepared(model: nn.Module, settings: Settings) -> Iterator[None]:
    """The model with its blocks in the form that training is to use; inside only."""
    with ExitStack() as inside:
        if settings.compile:
            inside.enter_context(compiled_blocks(model))  # it chooses what to compute again
        elif settings.activation_checkpointing:
            inside.enter_context(activation_checkpointing(model))
        elif settings.recompute:
            inside.enter_context(recompute_activations())
        device = next(model.parameters()).device
        if device.type == "cpu" and gains_from_bfloat16(device) and not settings.compile:
            inside.enter_context(Bfloat16CPUAttention())
        yield
