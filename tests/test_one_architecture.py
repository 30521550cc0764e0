"""A change of the model is in force everywhere: there is one architecture, and no copy of it.

Each change of `forks.py` is made in the text of a copy of the package, or in a live model. Then
every path of `fork_paths.py` has to agree with `model(token_ids)`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fork_paths import failures, logits_of, relative_difference, texts
from forks import EDITS, LIVE, edited, plain_model

PACKAGE = Path(__file__).parents[1] / "gpt2mini"
COMPILED = ("a sliding window", "squared ReLU")  # by torch.compile too, which takes longer than all
PARTS = [list(EDITS)[::2], list(EDITS)[1::2]]  # each tried in a process of its own


@pytest.mark.parametrize("names", PARTS, ids=["one half", "the other half"])
def test_an_edited_model_is_in_force_everywhere(tmp_path: Path, names: list[str]) -> None:
    results = try_copies({name: edited_copy(tmp_path, name) for name in names}, tmp_path)
    wrong = [f"{name}: {failure}" for name in names for failure in results[name]["failures"]]
    assert not wrong, "\n".join(wrong)
    assert not [name for name in names if results[name]["moved"] < 0.1], "without effect"


def edited_copy(folder: Path, name: str) -> Path:
    """A folder that holds a gpt2mini with one change."""
    copy = folder / name / "gpt2mini"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "sample_data"))
    source = (copy / "model.py").read_text(encoding="utf-8")
    (copy / "model.py").write_text(edited(source, EDITS[name]), encoding="utf-8")
    return folder / name


def try_copies(copies: dict[str, Path], folder: Path) -> dict[str, dict]:
    """What `fork_worker.py` finds out about each."""
    model, ids = plain_model(), texts()[2]
    start = {"state_dict": model.state_dict(), "token_ids": ids, "logits": logits_of(model, ids)}
    torch.save(start, folder / "start")
    worker = Path(__file__).with_name("fork_worker.py")
    jobs = [[name, str(copy), name in COMPILED] for name, copy in copies.items()]
    command = [sys.executable, str(worker), str(folder / "start"), json.dumps(jobs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", LIVE)
def test_a_changed_live_model_is_in_force_everywhere(name: str, no_shape_checks: None) -> None:
    model, ids = plain_model(), texts()[2]
    before = logits_of(model, ids)
    torch.manual_seed(0)  # of the layers that a change adds
    model = LIVE[name](model).eval()
    assert relative_difference(logits_of(model, ids), before) > 0.1, "the change has no effect"
    wrong = failures(model)
    assert not wrong, "\n".join(wrong)


def test_the_plain_model_agrees_with_itself(no_shape_checks: None) -> None:
    """Or the failures of a changed one would say nothing."""
    assert failures(plain_model()) == []
