"""Checkpoints of a run: everything needed to resume it as if it had never stopped.

Each is a folder, `step-00000120`; the last few are kept:

    progress.json           how far the run was, the model's config and what else its files said,
                            the other files' lengths
    .metadata, *.distcp     weights and optimizer states (torch.distributed.checkpoint), which any
                            number of ranks can read
    process-0.pt, ...       random generators, gradient scaler and the like, of each rank

It is written under another name and renamed when complete, so a run killed at any instant leaves
complete checkpoints only. Frozen parameters are not saved: the program that resumes loads them as
it did at first.
"""

import logging
import math
import random
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from gpt2mini.checkpoints.origin import Origin, Samples, origin_of, remember_origin
from gpt2mini.config import GPT2Config
from gpt2mini.files import local_path, read_json, write_json
from gpt2mini.model import GPT2
from gpt2mini.training.distributed import barrier, get_rank, sum_over_ranks

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"
PARTIAL = ".partial"
NAME = re.compile(r"step-\d{8,}")


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0  # optimizer steps done
    batches: int = 0  # micro-batches read, by all ranks together
    best: float = math.inf  # the lowest validation loss so far
    loss_sum: float = 0.0  # over the steps since the last logged row
    count: float = 0.0  # targets in them
    usual_loss: float = math.nan  # a moving average, with which a spike is compared
    evaluations_since_best: int = 0
    data: dict[str, str] = field(default_factory=dict)  # its fingerprint
    settings: dict[str, Any] = field(default_factory=dict)  # at this step, to notice others
    frozen: Samples = field(default_factory=dict)  # of the parameters that are not saved


class RunCheckpoints:
    """The checkpoints of one run, in a folder of their own."""

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, not {keep_last}")
        self.folder, self.keep_last = folder, keep_last

    def all(self) -> list[Path]:
        """The folders of complete checkpoints, newest first. Other files are not touched."""
        found = (p for p in self.folder.glob("step-*") if NAME.fullmatch(p.name) and p.is_dir())
        return sorted(found, reverse=True)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def check_space(self, model: nn.Module, regularly: bool) -> None:
        """Raise OSError if the disk has no room for the best model and the checkpoints. Where they
        are not saved regularly, that is one, for a signal."""
        trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        more = (
            max(1, self.keep_last + 1 - len(self.all())) if regularly else 1
        )  # and the one being written
        needed = whole + more * 3 * trainable  # with AdamW's two averages
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder.parent).free
        if free < needed:
            raise OSError(
                f"{self.folder.parent} has {free / 1e6:,.0f} MB of free disk; the best model and "
                f"{more} checkpoints need {needed / 1e6:,.0f} MB: make room, or keep fewer"
            )

    def save(
        self,
        model: nn.Module,
        optimizers: Iterable[Optimizer],
        progress: Progress,
        states: dict[str, Any],
    ) -> Path:
        """Write a checkpoint, drop the oldest; raise OSError, with nothing half-written, if it
        cannot be. states: see `states_of`."""
        from gpt2mini.training.state_tensors import save_tensors, tensors_of

        whole = self.path(progress.step)
        aside = whole.with_suffix(PARTIAL)
        try:
            if get_rank() == 0:
                self.remove_leftovers()
                aside.mkdir(parents=True)
            barrier()
            save_tensors(aside, tensors_of(model, optimizers))
            torch.save(states, aside / f"process-{get_rank()}.pt")
            barrier()
            if get_rank() == 0:
                sizes = {file.name: file.stat().st_size for file in sorted(aside.iterdir())}
                facts = {"progress": asdict(progress), "config": None, "files": sizes}
                write_json(aside / PROGRESS, facts | describe(model))
                self.put_in_place(aside, whole)
        except Exception as error:  # torch reports a full disk in many ways
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"cannot save the run in {whole}: {error}") from error
        if get_rank() == 0:
            self.drop_all_but_the_last(whole)
        barrier()
        return whole

    def load_newest(
        self, model: nn.Module, optimizers: list[Optimizer], stateful: dict[str, Any]
    ) -> Progress | None:
        """Fill everything in place from the newest whole checkpoint; None if there is none at all.

        Raises ValueError if there are some and none of them can be read.
        """
        candidates = self.all()
        for folder in candidates:
            found = read_on_all_ranks(folder, model)
            if found is None:
                continue
            progress, states = found
            try:
                load(folder, model, optimizers, stateful, states)
                return progress
            except Exception as error:  # whatever a broken file makes the readers raise
                logger.warning("skipped %s, which cannot be read: %s", folder, error)
        if candidates:
            raise ValueError(
                f"none of the {len(candidates)} checkpoints in {self.folder} can be read, or they "
                "belong to another model: give the run another folder, or remove them"
            )
        return None

    def put_in_place(self, aside: Path, whole: Path) -> None:
        """Rename, in place of a broken checkpoint of the same step if there is one."""
        doomed = rename_aside(whole) if whole.exists() else None
        aside.replace(whole)
        if doomed is not None:
            shutil.rmtree(doomed, ignore_errors=True)

    def drop_all_but_the_last(self, newest: Path) -> None:
        """Those of later steps, which could not be read when the run was resumed, go first."""
        later = [folder for folder in self.all() if folder.name > newest.name]
        earlier = [folder for folder in self.all() if folder.name <= newest.name]
        for folder in later + earlier[self.keep_last :]:
            shutil.rmtree(rename_aside(folder), ignore_errors=True)

    def remove_leftovers(self) -> None:
        for folder in self.folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(folder)


def rename_aside(folder: Path) -> Path:
    """Rename a folder before it is removed, so that half of it is never taken for a checkpoint."""
    return folder.replace(folder.with_suffix(".old" + PARTIAL))


def read_on_all_ranks(folder: Path, model: nn.Module) -> tuple[Progress, dict[str, Any]] | None:
    """(progress, states): what a rank can read without the others; None on all ranks, and a
    warning, if any of them cannot."""
    found, problem = None, None
    try:
        facts = read_facts(folder)
        check_config(facts["config"], model)
        found = read_progress(facts), read_states(folder)
    except Exception as error:  # whatever a broken file makes the readers raise
        problem = error
    if sum_over_ranks([float(problem is not None)], torch.device("cpu")) == [0.0]:
        return found
    logger.warning("skipped %s, which cannot be read: %s", folder, problem or "by another rank")
    return None


def read_states(folder: Path) -> dict[str, Any]:
    """This rank's states. A rank that the run did not have keeps its own random generators, and
    takes from rank 0 what all have in common: the gradient scale."""
    own = folder / f"process-{get_rank()}.pt"
    if own.is_file():
        return torch.load(own, map_location="cpu", weights_only=True)
    logger.warning(
        "the checkpoint is of a smaller world size: rank %d starts with its own random generators",
        get_rank(),
    )
    first = torch.load(folder / "process-0.pt", map_location="cpu", weights_only=True)
    return {"scaler": first.get("scaler")}


def check_config(stored: dict[str, Any] | None, model: nn.Module) -> None:
    """Raise ValueError for another config: shapes alone do not tell the number of heads."""
    if stored is not None and isinstance(model, GPT2):
        own, theirs = vars(model.config), vars(GPT2Config(**stored))
        differing = sorted(name for name in own if own[name] != theirs[name])
        if differing:
            raise ValueError(f"it belongs to a model with another {' and '.join(differing)}")


def load(
    folder: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    stateful: dict[str, Any],
    states: dict[str, Any],
) -> None:
    """Fill model, optimizers and the rest in place from one checkpoint."""
    from gpt2mini.training.state_tensors import load_tensors

    load_tensors(folder, model, optimizers)
    if "generators" in states:
        restore_generators(states["generators"])
    for name, one in stateful.items():
        if states.get(name):  # a disabled scaler has none
            one.load_state_dict(states[name])


def read_facts(folder: Path) -> dict[str, Any]:
    """The contents of progress.json. Raises ValueError if a file has another size than it says."""
    facts = read_json(folder / PROGRESS)
    for name, size in facts["files"].items():
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes; {size} were written")
    return facts


def read_progress(facts: dict[str, Any]) -> Progress:
    """JSON has neither infinity nor NaN: a null there is still the default. What an earlier version
    has stored besides is left out."""
    known = Progress.__dataclass_fields__
    stored = facts["progress"].items()
    return Progress(**{k: v for k, v in stored if v is not None and k in known})


def layers_of(checkpoints: RunCheckpoints) -> int | None:
    """How many blocks the model of the newest checkpoint has that can be read."""
    for folder in checkpoints.all():
        try:
            return (read_facts(folder)["config"] or {}).get("n_layers")
        except (OSError, ValueError, KeyError):  # broken: `load_newest` skips it with a warning
            continue
    return None


def is_checkpoint(folder: str | Path) -> bool:
    return (local_path(folder) / PROGRESS).is_file()


def describe(model: nn.Module) -> dict[str, Any]:
    """What a GPT-2 is, besides its tensors: its config, and what its files said of it."""
    if not isinstance(model, GPT2):
        return {}
    origin = origin_of(model)
    return {
        "config": vars(model.config),
        "settings": origin.settings,
        "generation": origin.generation,
    }


def model_of_checkpoint(folder: str | Path) -> GPT2:
    """The model of a checkpoint, of a run that trained all of its parameters.

    Raises ValueError for any other: resume the run of a classifier or an adapter.
    """
    from gpt2mini.training.state_tensors import load_tensors

    folder = local_path(folder)
    try:
        facts = read_facts(folder)
        model = GPT2(GPT2Config(**(facts["config"] or {})))
        load_tensors(folder, model, [])
        settings, generation = facts.get("settings", {}), facts.get("generation", {})
        remember_origin(model, Origin(settings=settings, generation=generation))
    except Exception as error:  # whatever a broken file makes the readers raise
        raise ValueError(f"{folder} holds no whole GPT-2 ({error}): resume its run") from error
    return model.eval()


def states_of(stateful: dict[str, Any]) -> dict[str, Any]:
    """The states of the random generators, and the `state_dict` of each object, by name."""
    states = {name: one.state_dict() for name, one in stateful.items()}
    return {"generators": generator_states(), **states}


def check_can_be_read_back(stateful: dict[str, Any]) -> None:
    """Raise TypeError for a state that `torch.load(weights_only=True)` will not read: the run could
    be saved and not be resumed."""
    for name, one in stateful.items():
        file = BytesIO()
        torch.save(one.state_dict(), file)
        file.seek(0)
        try:
            torch.load(file, weights_only=True)
        except UnpicklingError as error:
            reason = str(error).partition("WeightsUnpickler error: ")[2].splitlines()[:1]
            raise TypeError(
                f"the state_dict of the {name} cannot be read back ({''.join(reason)}): make it of "
                "tensors, numbers, texts, lists and dicts, for example int(n) of a NumPy number"
            ) from None


def generator_states() -> dict[str, Any]:
    """The states of Python's, NumPy's, torch's and the device's random generators, in types that
    `torch.load(weights_only=True)` reads."""
    name, keys, *rest = np.random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    elif torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_generators(states: dict[str, Any]) -> None:
    version, numbers, rest = states["python"]
    random.setstate((version, tuple(numbers), rest))
    name, keys, *others = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *others))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(states["mps"])
