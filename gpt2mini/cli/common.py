"""The course of a training job: its folder, what learns, its best model, its answers, its files."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli import options
from gpt2mini.cli.tables import rows_in_terminal
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch
from gpt2mini.device import pick_device
from gpt2mini.evaluation import forgetting
from gpt2mini.evaluation.forgetting import Change, change_beyond
from gpt2mini.files import local_path, writable_folder, write_json
from gpt2mini.inspection import plot_losses
from gpt2mini.lora import load_adapter, lora_layers, save_adapter
from gpt2mini.model import TiedHead
from gpt2mini.preferences.comparison import answer_prompts, end_of
from gpt2mini.training import LossFunction, next_token_step, train
from gpt2mini.training.distributed import get_rank, save_whole
from gpt2mini.training.folder import check_free, only_run_in

SMALL = 50_000_000  # parameters; larger models want smaller learning rates
Save = Callable[[GPT2, Path], object]


class Job:
    """One training job: its flags, its folder, its device, and what it leaves behind.

    flags: with `out`, and the groups `run` and `machine`. start: the model to start from.
    """

    def __init__(self, flags: Any, start: str | None) -> None:
        self.flags, self.start = flags, start
        self.seed, self.precision = flags.machine.seed, flags.machine.dtype
        self.out = run_folder(flags.out, flags.run.resume, flags.run.overwrite, start)
        torch.manual_seed(self.seed)
        self.device = pick_device(flags.machine.device)

    def load(self) -> tuple[GPT2, Tokenizer]:
        assert self.start is not None
        model = GPT2.from_pretrained(self.start, device=self.device)
        return model, Tokenizer.from_pretrained(self.start)

    def generator(self, offset: int = 0) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(self.seed + offset)

    def train(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        optimizers: Iterable[Optimizer],
        steps: int,
        loss_function: LossFunction = next_token_step,
        evaluate: Callable[[], float | dict[str, float]] | None = None,
        save: Save = GPT2.save_pretrained,
        figures: Callable[[], dict[str, float]] | None = None,
        last: GPT2 | None = None,
        training: Callable[..., list[dict[str, Any]]] = train,
        **settings: Any,
    ) -> list[dict[str, Any]]:
        """`training.train` as the flags say. It returns in rank 0 alone: after training, one
        process is enough to look at the result.

        last: where no validation chooses the best model, the one to save when training is over.
        training: another function that trains, with the arguments of `train`.
        """
        run, began, optimizers = self.flags.run, time.perf_counter(), list(optimizers)
        peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        given = run.settings(steps, self.precision, **settings)
        with rows_in_terminal():
            rows = training(
                *(model, batches, optimizers, given),
                loss_function=loss_function,
                evaluate=evaluate,
                out=self.out,
                resume=run.resume,
                overwrite=run.overwrite,
                save=save,
                figures=figures,
            )
        if last is not None:
            save_whole(save, last, self.out / "best")
        if get_rank() > 0:
            sys.exit()
        if evaluate is not None and not (self.out / "best").exists():
            raise FloatingPointError(
                f"no validation loss was a finite number, so there is no best model; the last one "
                f"is in {self.out / 'checkpoints'}. Look at the data held out, or lower --lr"
            )
        if rows[-1]["step"] < steps:
            print(f"stopped after step {rows[-1]['step']} of {steps}, as --patience asks")
        seconds = time.perf_counter() - began
        self.summary = {"steps": rows[-1]["step"], "seconds": seconds, "peak_learning_rates": peaks}
        return rows

    def load_best(self, classifier: bool = False) -> GPT2:
        """The model with the lowest validation loss, as it was saved. classifier: whether an
        adapter brings a head of its own."""
        if not holds_adapter(self.out / "best"):
            return GPT2.from_pretrained(self.out / "best", device=self.device)
        model, _ = self.load()
        if classifier:
            model.out_head = TiedHead(model.tok_emb)  # a base's own would expect its classes
        load_adapter(model, self.out / "best")
        return model

    def report_forgetting(
        self,
        tuned: GPT2,
        tokenizer: Tokenizer,
        new: str | Iterable[Batch],
        trained_length: int | None = None,
        held_out_text: str | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Print what tuning has changed on general prose and on what was learned; for the summary.

        new: held-out text, of which the beginning is read (a glance, not a test); or batches, of
        which the labels count. trained_length: how many tokens the model read at once in training,
        at most: windows are as long, and what comes after as many, which was not trained, is
        measured by itself, also on held_out_text.
        """
        general = sample("general.txt").read_text(encoding="utf-8")
        models = (None if lora_layers(tuned) else self.load()[0], tuned, tokenizer)
        new = new[:20_000] if isinstance(new, str) else new
        found = forgetting(*models, general, new, trained_length)
        print(f"\nwhat has it forgotten? (general text: general.txt)\n{found}")
        summary = found.as_dict()
        if trained_length:
            changes = {
                name: change_beyond(*models, text[:20_000], trained_length)
                for name, text in (("general", general), ("new", held_out_text or ""))
            }
            summary |= report_beyond(changes, trained_length)
        print()
        return {"forgetting": summary}

    def finish(
        self, summary: dict[str, Any], title: str, unit: str, **pictures: Callable[[Path], object]
    ) -> None:
        """Write summary.json, loss.png, and each of the pictures as NAME.png."""
        write_summary(self.out, self.flags, self.summary | summary)

        def losses(path: Path) -> None:
            plot_losses(self.out / "metrics.jsonl", path, title, unit)

        draw(self.out, loss=losses, **pictures)


def run_folder(out: str, resume: bool, overwrite: bool, start: str | None) -> Path:
    """The folder `out`, writable, and free: no run is at work in it, and none has left results
    unless it is to be resumed or overwritten. To be asked before anything is written into it.

    start: the model that the run starts from, which must not lie where the tuned one goes.
    """
    folder = writable_folder(out)
    source = local_path(start) if start else None
    if source and source.exists() and source.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"the model {start} lies in --out {out}, where the tuned model would take its place: "
            "choose another --out"
        )
    with only_run_in(folder):
        if not overwrite:
            check_free(folder, resume)
    return folder


def choose_what_learns(
    model: GPT2, method: str, last: options.LastBlocks, lora: options.LoRA
) -> None:
    """Everything, or the last blocks with the final norm, or adapters."""
    layers, blocks = model.config.n_layers, last.train_blocks
    if method == "lora":
        lora.add(model)
    elif method == "last-blocks":
        if blocks > layers:
            raise ValueError(f"--train-blocks must lie in 0 to {layers}, not {blocks}")
        model.requires_grad_(False)
        for module in (*model.trf_blocks[layers - blocks :], model.final_norm):
            module.requires_grad_(True)


def how_many_learn(model: GPT2) -> tuple[int, int]:
    """(parameters that learn, all)"""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes)


def is_small(model: GPT2) -> bool:
    return how_many_learn(model)[1] < SMALL


def how_to_save(model: GPT2, whole: Save = GPT2.save_pretrained) -> Save:
    """What has learned: the adapters, or the whole model."""
    return partial(save_adapter, replace=True) if lora_layers(model) else whole


def answer(
    model: GPT2, tokenizer: Tokenizer, prompts: Sequence[str], tokens: int, seed: int
) -> list[str]:
    """Seeded answers of at most so many tokens, and of at most half the context."""
    most = min(tokens, model.config.context_length // 2)
    generator = torch.Generator(model.tok_emb.weight.device).manual_seed(seed)
    return answer_prompts(
        model, tokenizer, prompts, most, generator=generator, temperature=0.7, top_k=50
    )


def print_answers(prompts: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
    for prompt, first, second in zip(prompts, before, after, strict=True):
        print(f"\n--- {end_of(prompt)}\n[before] {first.strip()}\n[after]  {second.strip()}")
    print()


def lowest_loss(rows: Sequence[dict[str, Any]]) -> float:
    """The lowest validation loss that is a finite number; `Job.train` makes sure that one is."""
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    return min(loss for loss in losses if math.isfinite(loss))


def report_beyond(changes: dict[str, Change | None], trained_length: int) -> dict[str, Any]:
    """Print the changes where the texts were long enough for any; for the summary."""
    found = {name: change for name, change in changes.items() if change}
    if found:
        print(f"the same beyond {trained_length} tokens, where it was not trained")
    for name, change in found.items():
        print(f"{name + ' text':12}  {change}")
    return {f"{name}_beyond_trained_length": change.as_dict() for name, change in found.items()}


def write_summary(out: Path, flags: Any, summary: dict[str, Any]) -> None:
    """summary.json: the job's own flags, those of its groups under "settings", and the figures."""
    own = {name: value for name, value in vars(flags).items() if not is_dataclass(value)}
    groups = {name: vars(value) for name, value in vars(flags).items() if is_dataclass(value)}
    write_json(out / "summary.json", own | {"settings": groups} | summary)
    print(f"summary: {out / 'summary.json'}")


def draw(out: Path, **pictures: Callable[[Path], object]) -> None:
    """Draw each as `out`/NAME.png if matplotlib is installed; otherwise say how to get it."""
    for name, plot in pictures.items():
        try:
            plot(out / f"{name}.png")
        except ImportError as error:
            print(f"(no pictures: {error})")
            return
        print(f"picture: {out / name}.png")
