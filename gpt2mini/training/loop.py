"""The training loop: any model, any loss that returns (sum, count), any batches.

What concerns a run rather than a step is in `gpt2mini.training.run`: resuming, the log, evaluation,
checkpoints, bad steps, signals.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gpt2mini.device import autocast, best_precision, gains_from_bfloat16, gradient_scaler
from gpt2mini.losses.steps import LossFunction, next_token_step, to_device
from gpt2mini.model import GPT2
from gpt2mini.modes import mode
from gpt2mini.training.attention import Bfloat16CPUAttention
from gpt2mini.training.distributed import (
    get_world_size,
    gradient_sync,
    sum_over_ranks,
    whole_tensor,
    with_averaged_gradients,
)
from gpt2mini.training.frozen_weights import frozen_weights_cast_once
from gpt2mini.training.memory import (
    activation_checkpointing,
    compiled_blocks,
    recompute_activations,
)
from gpt2mini.training.optimizers import optimized_parameters, parameter_groups
from gpt2mini.training.run import Run, StepResult
from gpt2mini.training.settings import Settings

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
    overwrite: bool = False,
    save: Callable[[Any, Path], object] = GPT2.save_pretrained,
    figures: Callable[[], dict[str, float]] | None = None,
) -> list[dict[str, Any]]:
    """Train the model in place; return the logged rows, which are also in `out`/metrics.jsonl.

    model: a GPT2, or a module that contains one (then give `save` too).
    batches: a list, a DataLoader, `TokenBatches` or any other iterable of batches. It is iterated
        over again and again until the last step. The ranks of a distributed run take its batches in
        turns, and a resumed run goes on after those it has read: for this, batches that shuffle
        need a seed of their own (a DataLoader: `generator=torch.Generator().manual_seed(0)`).
        Batches with `state_dict` and `load_state_dict` are saved with the run, each rank's own;
        such batches must themselves give each rank its share.
        A batch is what the loss function takes: an object with `.to(device)`, a tensor, or a
        tuple, list or dict of tensors.
    evaluate: returns the validation loss, or a dict with a `validation_loss` and other figures to
        log. Whenever the loss is the lowest so far, `save` writes the model to `out`/best. With
        `settings.patience` training stops after so many evaluations without a lower loss.
    resume: continue from the newest checkpoint in `out`, or start if there is none. The result is
        that of an uninterrupted run, on a CPU bit for bit. Other settings of the same run, such as
        another learning rate, are taken with a warning.
    overwrite: remove what an earlier run has left in `out`.
    figures: returns more to log in each row, for example a `Figures` that the loss function fills.
    Raises FileExistsError if `out` holds the best model or checkpoints of an earlier run that is
    neither resumed nor overwritten, ValueError for trainable parameters in fewer bits than float32,
    FloatingPointError at a bad step (see `Settings.on_bad_step`) before it has changed a
    weight, and TrainingStopped after Ctrl-C or SIGTERM; if `out` is given, the run is saved first.
    """
    optimizers = list(optimizers)
    scaler = gradient_scaler(next(model.parameters()).device, settings.precision)
    loss_of = with_averaged_gradients(model, loss_function)
    run = Run(model, batches, optimizers, scaler, settings, evaluate, figures, out, save)
    # Not all of the model's: in fp16, gradients that no optimizer holds are never unscaled.
    held = optimized_parameters(optimizers)
    optimized = [parameter for parameter in model.parameters() if parameter in held]
    with run.begun(resume, overwrite), mode(model, training=True), prepared(model, settings):
        model.zero_grad()
        for micro_batches in run.steps():
            lr_multiplier = settings.schedule(run.progress.step)
            set_learning_rates(optimizers, lr_multiplier)

            with run.saved_if_it_fails("step"):
                result = accumulate_gradients(loss_of, micro_batches, settings, scaler)
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            count = result.count / get_world_size()  # gradients are already means over the ranks
            result.grad_norm = divide_and_clip(optimized, count, settings.max_grad_norm)

            if run.accepts(result):
                for optimizer in optimizers:
                    scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            run.after_step(result, lr_multiplier)
    return run.log.rows


def set_learning_rates(optimizers: Iterable[Optimizer], lr_multiplier: float) -> None:
    """Set each parameter group's learning rate to its peak, the one it was made with, times
    `lr_multiplier`."""
    for group in parameter_groups(optimizers):
        group["lr"] = group.setdefault("peak_lr", group["lr"]) * lr_multiplier


def accumulate_gradients(
    loss_of: nn.Module, micro_batches: Iterator[Any], settings: Settings, scaler: GradScaler
) -> StepResult:
    """Forward and backward over the micro-batches of one step, on every rank.

    The gradients accumulated are those of the *sum*: `divide_and_clip` divides them once, by the
    number of targets in all micro-batches, so k micro-batches equal one large batch.
    """
    device = next(loss_of.parameters()).device
    loss_sum, count = torch.zeros((), device=device), torch.zeros((), device=device)
    for number, batch in enumerate(micro_batches, start=1):
        with gradient_sync(loss_of, now=number == settings.accumulate):
            with autocast(device, settings.precision):
                batch_sum, batch_count = loss_of(to_device(batch, device))
            scaler.scale(batch_sum).backward()
        loss_sum, count = loss_sum + batch_sum.detach(), count + batch_count
    total, targets = sum_over_ranks([float(loss_sum), float(count)], device)
    if targets == 0:
        raise ValueError("the batches of a step contain no target: there is nothing to learn")
    # at a scale that small it is no overflow: the gradient is not finite at any scale
    may_overflow = scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE
    return StepResult(total, targets, settings.accumulate * get_world_size(), may_overflow)


def divide_and_clip(parameters: Iterable[nn.Parameter], count: float, max_norm: float) -> float:
    """Divide all gradients by `count` and clip their total norm to `max_norm`, in one pass. Returns
    the norm before clipping."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = float(whole_tensor(torch.nn.utils.get_total_norm(gradients))) / count
    torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)) / count)
    return norm


@contextmanager
def prepared(model: nn.Module, settings: Settings) -> Iterator[None]:
    """Inside, the settings' memory options and this device's kernels are in force."""
    device = next(model.parameters()).device
    with ExitStack() as stack:
        if settings.compile:
            stack.enter_context(compiled_blocks(model))  # the compiler decides what to recompute
        elif settings.activation_checkpointing:  # memory counts, also that of casts that are kept
            stack.enter_context(activation_checkpointing(model))
        else:
            if best_precision(device, settings.precision) != "fp32":
                stack.enter_context(frozen_weights_cast_once(model))
            if settings.recompute:
                stack.enter_context(recompute_activations())
        if device.type == "cpu" and gains_from_bfloat16(device) and not settings.compile:
            stack.enter_context(Bfloat16CPUAttention())
        yield
