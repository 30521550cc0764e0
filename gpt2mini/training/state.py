"""Checkpoints: all that a run needs to go on as if it had never stopped.

A folder for each, `step-00000120`, of which the last few are kept:

    progress.json           how far the run was, the model's config, the other files' lengths
    .metadata, *.distcp     weights and optimizer states (torch.distributed.checkpoint), which any
                            number of processes can read
    process-0.pt, ...       random number generators and the like, of each process

It is written under another name and renamed when it is whole, so that a run killed at any instant
leaves whole checkpoints only. What does not learn is not saved: the run gets it where it got it.
"""

import logging
import math
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json, write_json
from gpt2mini.model import GPT2
from gpt2mini.training.processes import process_number, wait_for_all
from gpt2mini.training.random_states import generator_states, restore_generators

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
PARTIAL = ".partial"


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # micro-batches read, by all processes together
    best: float = math.inf  # the lowest validation loss so far
    loss_sum: float = 0.0  # over the steps since the last logged row
    count: float = 0.0  # targets in them
    usual_loss: float = math.nan  # a moving average, by which a spike is known


class Checkpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        self.folder, self.keep_last = folder, keep_last

    def all(self) -> list[Path]:
        """The folders of whole checkpoints, newest first."""
        found = (path for path in self.folder.glob("step-*") if path.suffix != PARTIAL)
        return sorted(found, reverse=True)

    def check_space(self, model: nn.Module) -> None:
        """Raise OSError if the disk has no room for the checkpoints of this model."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        weights = sum(p.numel() * p.element_size() for p in parameters)
        needed = 3 * weights * (self.keep_last + 1)  # AdamW's two averages; one is being written
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} has {free / 1e9:.1f} GB of free disk; {self.keep_last} checkpoints "
                f"and the one being written need {needed / 1e9:.1f} GB: make room, keep fewer, or "
                "save none"
            )

    def save(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        progress: Progress,
        stateful: dict[str, Any],
    ) -> Path:
        """Write a checkpoint, drop the oldest; raise OSError, with nothing half-written, if it
        cannot be. stateful: objects whose `state_dict` belongs to the run, by name."""
        from gpt2mini.training.state_tensors import save_tensors, tensors_of

        whole = self.folder / f"step-{progress.step:08}"
        aside = whole.with_suffix(PARTIAL)
        try:
            if process_number() == 0:
                self.remove_leftovers()
                aside.mkdir(parents=True)
            wait_for_all()
            save_tensors(aside, tensors_of(model, optimizers))
            own = {"generators": generator_states(), **states_of(stateful)}
            torch.save(own, aside / f"process-{process_number()}.pt")
            wait_for_all()
            if process_number() == 0:
                sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
                config = vars(model.config) if isinstance(model, GPT2) else None
                facts = {"progress": asdict(progress), "config": config, "files": sizes}
                write_json(aside / PROGRESS, facts)
                self.rename(aside, whole)
                for old in self.all()[self.keep_last :]:
                    self.remove(old)
        except Exception as error:  # of a full disk, torch says in many ways
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"cannot save the run in {whole}: {error}") from error
        wait_for_all()
        return whole

    def load_newest(
        self, model: nn.Module, optimizers: list[Optimizer], stateful: dict[str, Any]
    ) -> Progress | None:
        """Fill everything in place from the newest whole checkpoint; None if there is none at all.

        Raises ValueError if there are some and none of them can be read.
        """
        candidates = self.all()
        for folder in candidates:
            try:
                return load(folder, model, optimizers, stateful)
            except Exception as error:  # whatever a broken file makes the readers raise
                logger.warning("skipped %s, which cannot be read: %s", folder, error)
        if candidates:
            raise ValueError(
                f"none of the {len(candidates)} checkpoints in {self.folder} can be read, or they "
                "belong to another model: give the run another folder, or start it without resume"
            )
        return None

    def rename(self, aside: Path, whole: Path) -> None:
        if whole.exists():  # of the same step, and broken, or this step would not be done again
            self.remove(whole)
        aside.replace(whole)

    def remove(self, folder: Path) -> None:
        doomed = folder.with_suffix(".old" + PARTIAL)  # never half a folder under a good name
        folder.replace(doomed)
        shutil.rmtree(doomed)

    def remove_leftovers(self) -> None:
        for folder in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(folder)


def load(
    folder: Path, model: nn.Module, optimizers: list[Optimizer], stateful: dict[str, Any]
) -> Progress:
    """Fill model, optimizers and the rest in place from one checkpoint."""
    from gpt2mini.training.state_tensors import load_tensors

    progress = Progress(**read_facts(folder)["progress"])
    load_tensors(folder, model, optimizers)
    own = folder / f"process-{process_number()}.pt"
    if own.is_file():
        states = torch.load(own, map_location="cpu", weights_only=True)
        restore_generators(states.pop("generators"))
        for name, one in stateful.items():
            if name in states:
                one.load_state_dict(states[name])
    else:
        logger.warning("the run had fewer processes: number %d starts anew", process_number())
    return progress


def read_facts(folder: Path) -> dict[str, Any]:
    """What progress.json says; ValueError if another file is not as long as it says."""
    facts = read_json(folder / PROGRESS)
    for name, size in facts["files"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes; {size} were written")
    return facts


def is_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / PROGRESS).is_file()


def model_of_checkpoint(folder: str | Path) -> GPT2:
    """The model as it was then, from a run in which all of its parameters learned.

    Raises ValueError for any other: a classifier or an adapter is had by resuming its run.
    """
    from gpt2mini.training.state_tensors import load_tensors

    config = read_facts(Path(folder))["config"]
    if config is None:
        raise ValueError(f"{folder} is of a run whose model is more than a GPT-2: resume the run")
    model = GPT2(GPT2Config(**config))
    try:
        load_tensors(Path(folder), model, [])
    except ValueError as error:
        raise ValueError(f"{folder} holds no whole GPT-2 ({error}): resume its run") from error
    return model.eval()


def states_of(stateful: dict[str, Any]) -> dict[str, Any]:
    return {name: one.state_dict() for name, one in stateful.items()}


def saved_step(out: str | Path) -> int:
    """How many steps the newest checkpoint of the run in `out` has done; 0 if there is none."""
    found = Checkpoints(Path(out) / "checkpoints").all()
    return int(read_json(found[0] / PROGRESS)["progress"]["step"]) if found else 0
