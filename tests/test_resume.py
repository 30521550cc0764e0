"""Never losing work: a run that was stopped, killed or broken goes on as if nothing had been."""

import io
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import HANGS
from conftest import TINY, random_ids
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.testing import assert_close
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler

from gpt2mini import GPT2, Tokenizer
from gpt2mini.data.instructions import Exchange, ExchangeBatches, encode_exchanges
from gpt2mini.data.text import Batch, TokenBatches
from gpt2mini.lora import add_lora, save_adapter
from gpt2mini.training import Settings, adamw, cosine, muon_and_adamw, next_token_step, train
from gpt2mini.training.batches import remaining_batches
from gpt2mini.training.checkpoints import PROGRESS, RunCheckpoints
from gpt2mini.training.fingerprint import fingerprint
from gpt2mini.training.metrics import Figures, MetricsLog, rows_until
from gpt2mini.training.signals import TrainingStopped
from gpt2mini.training.state_tensors import IndexUnpickler

STEPS = 20


class Run:
    """What a process has that starts or resumes a run: nothing but its arguments. Dropout and
    micro-batches are always on."""

    def __init__(self, kind: str = "adamw", seed: int = 0) -> None:
        torch.manual_seed(0)
        self.model = GPT2(replace(TINY, n_layers=1, drop_rate=0.2))
        if kind == "lora":
            add_lora(self.model, rank=2, alpha=4, dropout=0.1, targets=("query", "mlp_out"))
        two = partial(muon_and_adamw, self.model, lr=0.01, adamw_lr=0.01)
        self.optimizers = two() if kind == "muon" else [adamw(self.model, lr=0.01)]
        self.save: Callable = save_adapter if kind == "lora" else GPT2.save_pretrained
        self.seed = seed

    def train(self, out: Path | None = None, **changes: Any) -> list[dict[str, Any]]:
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(self.seed)
        tokens = random_ids(500).numpy()
        arguments: dict[str, Any] = {
            "batches": TokenBatches(tokens, [range(500)], 2, 16, seed=0),
            "loss_function": next_token_step,
            "resume": False,
            "evaluate": None,
            **{k: changes.pop(k) for k in list(changes) if k not in Settings.__annotations__},
        }
        settings = Settings(
            **{
                "steps": STEPS,
                "schedule": partial(cosine, steps=STEPS, warmup_steps=2),
                "accumulate": 2,
                "precision": "fp32",
                "log_every": 3,
                "progress": False,
                "save_every": 5 if out else 0,
                **changes,
            }
        )
        arguments |= {"optimizers": self.optimizers, "settings": settings, "save": self.save}
        return train(self.model, out=out, **arguments)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@cache
def left_alone(kind: str = "adamw", **changes: Any) -> dict[str, Tensor]:
    """The weights with which a run ends that nobody disturbs."""
    run = Run(kind)
    run.train(**changes)
    return run.weights()


def assert_ends_with(run: Run, expected: dict[str, Tensor]) -> None:
    for name, weight in run.weights().items():
        assert torch.equal(weight, expected[name]), f"{name} differs"


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.endswith("_per_second")} for row in rows]


def saved_step(out: Path) -> int:
    """How many steps the newest checkpoint of a run has done."""
    newest = RunCheckpoints(out / "checkpoints").all()[0]
    return json.loads((newest / PROGRESS).read_text(encoding="utf-8"))["progress"]["step"]


def signal_at(step: int, number: int) -> Callable[[GPT2, Batch], tuple[Tensor, Tensor]]:
    """A loss function in whose `step`-th call (two make a step) the process gets a signal."""
    calls = iter(range(1000))

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == 2 * step + 1:
            os.kill(os.getpid(), number)
        return next_token_step(model, batch)

    return loss_function


def noisy_loss(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    """A loss to which all three generators contribute."""
    loss, count = next_token_step(model, batch)
    return loss * (1 + 0.1 * (random.random() + np.random.rand() + float(torch.rand(())))), count


# ---- the same bits


@pytest.mark.parametrize("kind", ["adamw", "muon", "lora"])
@pytest.mark.usefixtures("no_shape_checks")  # beartype's checks draw from Python's generator
def test_a_stopped_run_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    straight = Run(kind)
    rows = straight.train(loss_function=noisy_loss)
    Run(kind).train(tmp_path, steps=10, loss_function=noisy_loss)
    assert saved_step(tmp_path) == 10
    resumed = Run(kind, seed=1)  # other random numbers: they come from the checkpoint
    more = resumed.train(tmp_path, resume=True, loss_function=noisy_loss)
    assert_ends_with(resumed, straight.weights())
    # its first half ended at step 10, and logged a row there
    assert [row["step"] for row in more] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert without_speed(more)[-3:] == without_speed(rows)[-3:]


def test_the_speed_after_a_resume_is_of_what_was_read_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MetricsLog, "seconds", lambda log: 1.0)
    with pytest.raises(TrainingStopped):  # after step 5, two steps after a logged row
        Run().train(tmp_path, loss_function=signal_at(4, signal.SIGTERM))
    assert saved_step(tmp_path) == 5
    rows = Run().train(tmp_path, resume=True)
    speeds = {row["step"]: row["tokens_per_second"] for row in rows}
    assert speeds[6] == speeds[3] / 3  # one step of three
    assert speeds[9] == speeds[3]


def test_the_log_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    rows = Run().train(evaluate_every=4, evaluate=lambda: 2.0)
    with pytest.raises(Killed):
        Run().train(tmp_path, evaluate_every=4, evaluate=lambda: 2.0, loss_function=killed_at(13))
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 13, "lo')  # what a kill may leave
    found = Run(seed=1).train(tmp_path, resume=True, evaluate_every=4, evaluate=lambda: 2.0)
    assert without_speed(found) == without_speed(rows)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == found


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def killed_at(
    step: int, by: type[BaseException] = Killed
) -> Callable[[GPT2, Batch], tuple[Tensor, Tensor]]:
    """A loss function that raises in the second micro-batch of a step."""
    calls = iter(range(1000))

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == 2 * step + 1:
            raise by
        return next_token_step(model, batch)

    return loss_function


@pytest.mark.parametrize("save_every", [0, 5])
def test_an_error_in_a_step_loses_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, save_every: int
) -> None:
    """Of a reward function or of a batch, for example."""
    with pytest.raises(ConnectionError):
        Run().train(tmp_path, save_every=save_every, loss_function=killed_at(13, ConnectionError))
    assert "the step failed; the run is saved in" in caplog.text and saved_step(tmp_path) == 13
    resumed = Run(seed=1)
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())


def test_an_error_in_the_first_step_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(ConnectionError):
        Run().train(tmp_path, loss_function=killed_at(0, ConnectionError))
    assert not RunCheckpoints(tmp_path / "checkpoints").all()


def test_the_best_model_is_remembered(tmp_path: Path) -> None:
    first, losses = Run(), iter([5.0, 1.0])
    first.train(tmp_path, steps=5, evaluate=lambda: next(losses))
    Run().train(tmp_path, resume=True, evaluate=lambda: 2.0)
    best = GPT2.from_pretrained(tmp_path / "best").state_dict()
    assert_close(best, first.model.state_dict(), rtol=0, atol=0)


def test_what_does_not_learn_is_not_saved(tmp_path: Path) -> None:
    Run("lora").train(tmp_path, steps=5)
    (folder,) = RunCheckpoints(tmp_path / "checkpoints").all()
    learning = sum(p.numel() for p in Run("lora").model.parameters() if p.requires_grad)
    assert (folder / "__0_0.distcp").stat().st_size < 3 * 4 * learning + 100_000


def test_resume_without_a_checkpoint_begins(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = Run()
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())
    assert "holds no checkpoint" in caplog.text
    with pytest.raises(ValueError, match="resume needs the folder"):
        Run().train(resume=True)


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    first, again = Run(), Run(seed=1)
    rows = first.train(tmp_path)
    assert again.train(tmp_path, resume=True) == rows
    assert_ends_with(again, first.weights())


def test_a_finished_run_without_its_log_has_a_row(tmp_path: Path) -> None:
    Run().train(tmp_path, evaluate=lambda: 2.0)
    (tmp_path / "metrics.jsonl").unlink()
    rows = Run().train(tmp_path, resume=True, evaluate=lambda: 2.0)
    assert rows == [{"step": STEPS, "validation_loss": 2.0}]


def losses(*found: float | None) -> Callable[[], float]:
    """An evaluation that finds these one after another, and draws a random number each time; None
    raises."""
    calls = iter(found)

    def evaluate() -> float:
        torch.rand(())
        loss = next(calls)
        if loss is None:
            raise RuntimeError("no memory left")
        return loss

    return evaluate


@pytest.mark.parametrize("failures", [1, 2])
@pytest.mark.parametrize("fails", [2, 4])
def test_an_evaluation_that_fails_loses_nothing(fails: int, failures: int, tmp_path: Path) -> None:
    """Not even where a checkpoint was due just after it, or in the last one."""
    found = [9.0, 8.0, 7.0, 6.0, 5.0]
    keep: dict[str, Any] = {"evaluate_every": 5}
    straight, resumed = Run(), Run(seed=1)
    rows = straight.train(evaluate=losses(*found), **keep)
    with pytest.raises(RuntimeError, match="no memory left"):
        Run().train(tmp_path, evaluate=losses(*found[:fails], None), save_every=10, **keep)
    assert saved_step(tmp_path) == 5 * fails
    if failures == 2:
        with pytest.raises(RuntimeError, match="no memory left"):
            Run(seed=2).train(tmp_path, evaluate=losses(None), resume=True, **keep)
    again = resumed.train(tmp_path, evaluate=losses(*found[fails:]), resume=True, **keep)
    assert without_speed(again) == without_speed(rows)
    assert_ends_with(resumed, straight.weights())


def test_the_best_is_known_after_an_evaluation_that_failed_at_first(tmp_path: Path) -> None:
    keep: dict[str, Any] = {"evaluate_every": 5, "save_every": 10}
    with pytest.raises(RuntimeError, match="no memory left"):
        Run().train(tmp_path, evaluate=losses(5.0, None), **keep)
    with pytest.raises(Killed):  # after it has found 1.0
        Run().train(tmp_path, evaluate=losses(1.0), resume=True, loss_function=killed_at(2), **keep)
    best = (tmp_path / "best" / "model.safetensors").read_bytes()
    Run().train(tmp_path, evaluate=losses(3.0, 3.0, 3.0, 3.0), resume=True, **keep)
    assert (tmp_path / "best" / "model.safetensors").read_bytes() == best


def test_what_an_evaluation_raised_is_not_hidden_by_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("gpt2mini.training.state_tensors.save_tensors", full)
    with pytest.raises(RuntimeError, match="no memory left"):
        Run().train(tmp_path, evaluate=losses(2.0, None), evaluate_every=5, save_every=10)
    assert "the evaluation failed, and cannot save the run" in caplog.text


def test_an_evaluation_must_give_a_validation_loss(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="must return a 'validation_loss'; it returned loss, accuracy"
    ):
        Run().train(tmp_path, evaluate=lambda: {"loss": 1.0, "accuracy": 0.5})


def test_a_first_evaluation_that_fails_leaves_no_run_behind(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory left"):
        Run().train(tmp_path, evaluate=losses(None))
    assert not Run().train(tmp_path, steps=1)[0].get("validation_loss")


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    first = Run()

    def evaluate() -> float:
        with pytest.raises(BlockingIOError, match=r"another run is at work in .*another folder"):
            Run().train(tmp_path, resume=True)
        return 2.0

    first.train(tmp_path, evaluate=evaluate)
    assert_ends_with(first, left_alone())
    Run().train(tmp_path, resume=True)  # the first has ended


def test_a_run_does_not_go_on_with_other_batches(tmp_path: Path) -> None:
    """Its best loss would stay that of the old ones, whatever is learned from the new."""
    tokens = random_ids(500).numpy()
    Run().train(tmp_path, steps=5)
    other = TokenBatches(tokens, [range(500)], 2, 16, seed=1)
    with pytest.raises(ValueError, match="started with other data, another seed or another batch"):
        Run().train(tmp_path, resume=True, batches=other)
    Run().train(tmp_path, steps=10, resume=True)


def exchange_batches(*answers: str) -> ExchangeBatches:
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    exchanges = [Exchange("Question: Why?\nAnswer:", answer) for answer in answers]
    encoded = encode_exchanges(exchanges, tokenizer, 32)
    for one in encoded:
        one.token_ids.remainder_(TINY.vocab_size)
    return ExchangeBatches(encoded, batch_size=1, seed=0)


def test_batches_of_another_class_are_other_batches(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5)
    rows = list(TokenBatches(random_ids(500).numpy(), [range(500)], 2, 16, seed=0))
    with pytest.raises(ValueError, match="was started with other data"):
        Run().train(tmp_path, resume=True, batches=rows)


def test_adapters_do_not_go_on_with_another_base(tmp_path: Path) -> None:
    Run("lora").train(tmp_path, steps=5)
    other = Run("lora")
    frozen = dict(other.model.named_parameters())["trf_blocks.0.mlp.mlp_in.weight"]
    with torch.no_grad():
        frozen[0, 0] += 0.5
    with pytest.raises(ValueError, match=r"was started from another model: .*mlp_in"):
        other.train(tmp_path, resume=True)


def test_a_record_edited_in_the_middle_is_noticed(tmp_path: Path) -> None:
    """Although the first batch is the same."""
    answers = [f" Because of {i}." for i in range(6)]
    tokens = random_ids(500).numpy()
    changed = tokens.copy()
    changed[250] += 1
    for number, (before, after, name) in enumerate(
        [
            (
                TokenBatches(tokens, [range(500)], 2, 16, seed=0),
                TokenBatches(changed, [range(500)], 2, 16, seed=0),
                "tokens",
            ),
            *(
                (
                    exchange_batches(*answers),
                    exchange_batches(*answers[:i], " So.", *answers[i + 1 :]),
                    "encoded",
                )
                for i in range(6)
            ),
        ]
    ):
        out = tmp_path / str(number)
        Run().train(out, steps=2, save_every=2, batches=before)
        with pytest.raises(ValueError, match=rf"with other data.*\(different: .*{name}"):
            Run().train(out, steps=4, resume=True, batches=after)
        Run().train(out, steps=4, resume=True, batches=before)


def test_a_longer_run_says_that_its_learning_rate_is_another(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run().train(tmp_path, steps=10, schedule=partial(cosine, steps=10, warmup_steps=2))
    Run().train(tmp_path, steps=10, resume=True, schedule=partial(cosine, steps=10, warmup_steps=2))
    assert "other settings" not in caplog.text
    Run().train(tmp_path, resume=True, schedule=partial(cosine, steps=20, warmup_steps=2))
    before, now = (0.01 * cosine(9, steps, 2) for steps in (10, 20))
    assert f"at step 10 the learning rate was {before:.3g} and is {now:.3g}" in caplog.text
    Run().train(tmp_path, steps=30, resume=True, accumulate=1)
    assert "accumulate was 2 and is 1" in caplog.text


def test_a_finished_run_is_not_replaced_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few: dict[str, Any] = {"steps": 2, "save_every": 0}
    Run().train(tmp_path, evaluate=lambda: 1.0, **few)
    best = tmp_path / "best" / "model.safetensors"
    before = best.read_bytes()
    with pytest.raises(FileExistsError, match=r"holds best of an earlier run: resume it .*over"):
        Run().train(tmp_path, evaluate=lambda: 1.0, **few)
    assert best.read_bytes() == before
    with pytest.raises(FileExistsError, match="has left, but no checkpoint to resume it from"):
        Run().train(tmp_path, resume=True, evaluate=lambda: 1.0, **few)
    assert best.read_bytes() == before
    (tmp_path / "summary.json").write_text("{}", encoding="utf-8")
    best.unlink()
    with pytest.raises(FileExistsError, match="has left, but no checkpoint to resume it from"):
        Run().train(tmp_path, resume=True, evaluate=lambda: 1.0, **few)
    with pytest.raises(ValueError, match="ask for one"):
        Run().train(tmp_path, resume=True, overwrite=True)
    Run().train(tmp_path, evaluate=lambda: math.nan, overwrite=True, **few)
    assert not best.exists() and not (tmp_path / "summary.json").exists()
    assert "step 2: the validation loss is nan" in caplog.text
    assert "no validation loss was finite, so no model is the best; the last one" in caplog.text
    assert saved_step(tmp_path) == 2


@pytest.mark.parametrize(
    "found", [[math.nan, 2.0, 3.0], [2.0, math.nan, 1.0], [math.inf, 2.0, 2.0]]
)
def test_a_validation_loss_that_is_no_number_is_never_the_best(
    found: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights: list[dict[str, Tensor]] = []
    run, calls = Run(), iter(found)

    def evaluate() -> float:
        weights.append(run.weights())
        return next(calls)

    run.train(tmp_path, steps=2, save_every=0, evaluate_every=1, evaluate=evaluate)
    best = dict(GPT2.from_pretrained(tmp_path / "best").named_parameters())
    lowest = found.index(min(loss for loss in found if math.isfinite(loss)))
    for name, weight in weights[lowest].items():
        assert torch.equal(best[name], weight)
    assert "the validation loss is" in caplog.text and "no validation loss" not in caplog.text


def test_training_stops_early_and_resumes_so(tmp_path: Path) -> None:
    keep: dict[str, Any] = {"evaluate_every": 2, "patience": 2}
    found = [5.0, 4.0, 6.0, 3.0, 4.0, 3.0]  # after steps 0, 2, 4, 6, 8, 10
    straight, resumed = Run(), Run(seed=1)
    rows = straight.train(evaluate=losses(*found), **keep)
    assert rows[-1]["step"] == 10 and "loss" in rows[-1]
    with pytest.raises(Killed):
        Run().train(tmp_path, evaluate=losses(*found), loss_function=killed_at(9), **keep)
    assert saved_step(tmp_path) == 5
    again = resumed.train(tmp_path, evaluate=losses(*found[3:]), resume=True, **keep)
    assert without_speed(again) == without_speed(rows)
    assert_ends_with(resumed, straight.weights())
    assert Run().train(tmp_path, evaluate=losses(), resume=True, **keep) == again
    with pytest.raises(ValueError, match="this run has none"):
        Run().train(patience=1, evaluate_every=1)
    with pytest.raises(ValueError, match="set evaluate_every too"):
        Run().train(patience=1)


def test_a_run_that_is_further_than_asked_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run().train(tmp_path, steps=5)
    Run().train(tmp_path, steps=4, resume=True)
    assert "is at step 5 of 4 already: there is nothing left to do" in caplog.text


def test_looking_at_the_first_batch_leaves_no_trace() -> None:
    class Shuffled:
        """Batches whose order comes from the generators that all share."""

        def __iter__(self) -> Iterator[Batch]:
            while True:
                ids = torch.randint(TINY.vocab_size, (2, 16)) + random.randrange(9)
                yield Batch(ids, ids)

    torch.manual_seed(0)
    found = fingerprint(Shuffled())
    assert list(found) == ["first batch"] and found == fingerprint(Shuffled())
    assert fingerprint(iter(Shuffled())) == {}
    assert fingerprint([torch.tensor(1)]) != fingerprint([torch.tensor(2)])


@pytest.mark.parametrize(("first", "every"), [(0, 1), (3, 1), (1, 3), (29, 2), (47, 5)])
def test_part_of_the_batches(first: int, every: int) -> None:
    """Past the ends of epochs too: there are 15 batches in each."""
    batches = TokenBatches(random_ids(500).numpy(), [range(500)], 2, 16, seed=0)
    whole = [batch.token_ids for _ in range(6) for batch in batches][:80]
    found = [b.token_ids for b, _ in zip(batches.part(first, every), range(6), strict=False)]
    assert_close(found, whole[first::every][:6])


def test_batches_of_any_kind_are_read_from_where_the_run_stopped() -> None:
    found = remaining_batches(["a", "b", "c"], 4)
    assert list(islice(found, 5)) == ["b", "c", "a", "b", "c"]


def test_a_sampler_that_shares_the_data_out_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loader = DataLoader(range(8), 2, sampler=DistributedSampler(range(8), 2, 0))  # type: ignore
    remaining_batches(loader, 0)
    monkeypatch.setattr("gpt2mini.training.batches.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="leave out the DistributedSampler"):
        remaining_batches(loader, 0)


def shuffling_loader(kind: str = "loader", seed: int = 0) -> DataLoader:
    """Epochs of four batches. kind: to what the generator is given."""
    rows: Any = list(random_ids(8, 16))  # a list is a dataset to DataLoader
    own = torch.Generator().manual_seed(seed)

    def batch(chosen: list[Tensor]) -> Batch:
        return Batch(torch.stack(chosen), torch.stack(chosen))

    if kind == "loader":
        return DataLoader(rows, 2, shuffle=True, generator=own, collate_fn=batch)
    return DataLoader(rows, 2, sampler=RandomSampler(rows, generator=own), collate_fn=batch)


loaders = pytest.mark.parametrize("kind", ["loader", "sampler"])


@loaders
def test_a_loader_is_read_in_the_same_order_with_and_without_a_folder(
    kind: str, tmp_path: Path
) -> None:
    without, within = Run(), Run()
    without.train(batches=shuffling_loader(kind))
    within.train(tmp_path, batches=shuffling_loader(kind))
    assert_ends_with(within, without.weights())


@loaders
@pytest.mark.parametrize("same", [True, False], ids=["same loader", "new loader"])
def test_a_run_on_a_loader_resumes(kind: str, same: bool, tmp_path: Path) -> None:
    """In the process in which it was stopped, twice, and as in another one."""
    straight, resumed = Run(), Run()
    straight.train(batches=shuffling_loader(kind))
    loader = shuffling_loader(kind)
    Run().train(tmp_path, steps=7, batches=loader)
    for steps in (14, STEPS):
        loader = loader if same else shuffling_loader(kind)
        resumed = Run(seed=1)
        resumed.train(tmp_path, steps=steps, batches=loader, resume=True)
    assert_ends_with(resumed, straight.weights())


@loaders
def test_a_loader_with_another_seed_is_refused(kind: str, tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5, batches=shuffling_loader(kind))
    with pytest.raises(ValueError, match=r"another seed .*\(different: first batch\)"):
        Run().train(tmp_path, resume=True, batches=shuffling_loader(kind, seed=1))


def test_a_run_without_clipping_resumes_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Run().train(tmp_path, steps=5, max_grad_norm=math.inf)
    resumed, straight = Run(), Run()
    resumed.train(tmp_path, resume=True, max_grad_norm=math.inf)
    assert "other settings" not in caplog.text
    straight.train(max_grad_norm=1e9)
    assert_ends_with(resumed, straight.weights())
    Run().train(tmp_path, resume=True)
    assert "max_grad_norm was inf and is 1.0" in caplog.text


def test_a_folder_may_lie_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    Run().train(Path("~/run"), steps=5)
    assert saved_step(tmp_path / "run") == 5


# ---- broken checkpoints


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    Run().train(tmp_path, save_every=3, keep_last=3)
    names = [path.name for path in RunCheckpoints(tmp_path / "checkpoints").all()]
    assert names == ["step-00000020", "step-00000018", "step-00000015"]
    with pytest.raises(ValueError, match="keep_last must be at least 1"):
        Run().train(tmp_path, keep_last=0)


def spoil(folder: Path, how: str) -> None:
    tensors = folder / "__0_0.distcp"
    if how == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-1000])
    elif how == "overwritten":
        tensors.write_bytes(b"x" * tensors.stat().st_size)
    elif how == "missing":
        (folder / ".metadata").unlink()
    elif how == "no json":
        (folder / "progress.json").write_text("{", encoding="utf-8")
    elif how == "foreign":
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
    else:
        malicious(folder)


class Malicious:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("it-was-executed",)


def malicious(folder: Path) -> None:
    file = folder / ".metadata"
    size = file.stat().st_size
    file.write_bytes(pickle.dumps(Malicious()).ljust(size, b"\0"))


class GetAttribute:
    """An object whose pickle asks for `getattr`."""

    def __init__(self, owner: Any, name: str) -> None:
        self.asked = owner, name

    def __reduce__(self) -> tuple:
        return getattr, self.asked


def test_an_index_as_some_pythons_write_it_is_read() -> None:
    """3.11.0 to 3.11.3, Debian 12's among them, pickle a member of an enumeration through
    `getattr`."""
    kind = metadata._MEM_FORMAT_ENCODING
    for member in kind:
        index = io.BytesIO(pickle.dumps(GetAttribute(kind, member.name)))
        assert IndexUnpickler(index).load() is member


@pytest.mark.parametrize("owner", [metadata._MEM_FORMAT_ENCODING, torch.Size, metadata.Metadata])
def test_an_index_gets_at_nothing_but_members(owner: type) -> None:
    index = io.BytesIO(pickle.dumps(GetAttribute(owner, "__init__")))
    with pytest.raises(pickle.UnpicklingError, match=r"__init__, which no checkpoint needs"):
        IndexUnpickler(index).load()


@pytest.mark.parametrize(
    "how", ["truncated", "overwritten", "missing", "no json", "foreign", "malicious"]
)
def test_a_broken_checkpoint_is_skipped_for_the_one_before(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    resumed = Run(seed=1)
    Run().train(tmp_path, steps=10)
    spoil(tmp_path / "checkpoints" / "step-00000010", how)
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())
    assert "skipped" in caplog.text and "step-00000010" in caplog.text
    assert not Path("it-was-executed").exists()


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5)
    with pytest.raises(ValueError, match="can be read, or they belong to another model"):
        Run("lora").train(tmp_path, resume=True)


def test_a_model_with_other_heads_is_refused(tmp_path: Path) -> None:
    """Its weights have the same shapes."""
    Run().train(tmp_path, steps=5)
    other = Run()
    other.model = GPT2(replace(other.model.config, n_heads=3))
    other.optimizers = [adamw(other.model, lr=0.01)]
    with pytest.raises(ValueError, match="belong to another model"):
        other.train(tmp_path, resume=True)


def test_a_new_run_does_not_begin_among_another_s_checkpoints(tmp_path: Path) -> None:
    """It would drop its own, whose numbers are lower."""
    Run().train(tmp_path, steps=10)
    log = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    with pytest.raises(FileExistsError, match="holds checkpoints of an earlier run: resume it"):
        Run().train(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text(encoding="utf-8") == log


def test_what_else_lies_among_the_checkpoints_is_left_alone(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step-00000005", folder / "step-00000005-keep")
    (folder / "step-x").mkdir()
    (folder / "step-00.txt").write_text("mine", encoding="utf-8")
    Run().train(tmp_path, resume=True, keep_last=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["step-00.txt", "step-00000005-keep", "step-00000020", "step-x"]


def test_a_broken_checkpoint_does_not_outlive_newer_ones(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=10)
    spoil(tmp_path / "checkpoints" / "step-00000010", "truncated")
    with pytest.raises(TrainingStopped, match="stopped after step 7"):
        stop_early = signal_at(1, signal.SIGTERM)
        Run().train(tmp_path, resume=True, keep_last=1, save_every=0, loss_function=stop_early)
    assert saved_step(tmp_path) == 7
    resumed = Run(seed=1)
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())


def test_a_save_that_fails_leaves_the_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed = Run(seed=1)
    Run().train(tmp_path, steps=5)

    save = torch.save

    def no_space(states: object, file: Path | io.BytesIO) -> None:
        if isinstance(file, Path):
            raise RuntimeError("PytorchStreamWriter failed writing file: No space left on device")
        save(states, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        with pytest.raises(OSError, match=r"cannot save the run in .*step-00000010.*No space left"):
            Run().train(tmp_path, resume=True)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())


def test_a_full_disk_is_seen_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 8, 1))
    run = Run()
    before = run.weights()
    with pytest.raises(OSError, match=r"has 0 MB of free disk.*make room"):
        run.train(tmp_path)
    assert_close(run.weights(), before)


# ---- signals


def test_a_signal_to_be_ignored_is_ignored(tmp_path: Path) -> None:
    """As Ctrl-C is by what a script starts with `&`: it is meant for something else."""
    run = Run()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        run.train(tmp_path, save_every=0, loss_function=signal_at(7, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert_ends_with(run, left_alone())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_and_saves(number: int, tmp_path: Path) -> None:
    resumed, stopped = Run(seed=1), Run()
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingStopped, match=r"stopped after step 8 of 20.*step-00000008") as info:
        stopped.train(tmp_path, save_every=0, loss_function=signal_at(7, number))
    assert info.value.signal_number == number
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    resumed.train(tmp_path, save_every=0, resume=True)
    assert_ends_with(resumed, left_alone())


def test_a_signal_in_an_evaluation_stops_the_run(tmp_path: Path) -> None:
    """In the first, before any step, and in the last, after all."""

    def interrupted(number: int) -> Callable[[], float]:
        calls = iter(range(100))

        def evaluate() -> float:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGINT)
            return 1.0

        return evaluate

    for number, step in ((0, 0), (1, STEPS)):
        out = tmp_path / str(number)
        with pytest.raises(TrainingStopped, match=f"stopped after step {step} of 20"):
            Run().train(out, save_every=0, evaluate=interrupted(number))
        resumed = Run(seed=1)
        resumed.train(out, resume=True, evaluate=lambda: 1.0)
        assert_ends_with(resumed, left_alone())


def test_a_second_signal_acts_at_once(tmp_path: Path) -> None:
    calls = iter(range(100))

    def impatient(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return next_token_step(model, batch)

    with pytest.raises(KeyboardInterrupt) as info:
        Run().train(tmp_path, loss_function=impatient)
    assert not isinstance(info.value, TrainingStopped)
    assert next(calls) == 6


def test_the_first_signal_is_answered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(TrainingStopped):
        Run().train(tmp_path, loss_function=signal_at(2, signal.SIGINT))
    assert "stopping after this step or evaluation; a second signal stops at once" in caplog.text


def test_without_a_folder_a_signal_acts_as_ever() -> None:
    with pytest.raises(KeyboardInterrupt) as info:
        Run().train(loss_function=signal_at(2, signal.SIGINT))
    assert not isinstance(info.value, TrainingStopped)


# ---- bad steps


def loss_with(value: float, call: int) -> Callable[[GPT2, Batch], tuple[Tensor, Tensor]]:
    """The usual loss, times `value` in one call: nan, inf, or a spike."""
    calls = iter(range(1000))

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_step(model, batch)
        return loss * (value if next(calls) == call else 1.0), count

    return loss_function


@pytest.mark.parametrize("value", [math.nan, math.inf, 50.0])
def test_a_bad_step_stops_the_run_before_it_changes_anything(value: float, tmp_path: Path) -> None:
    bad = Run()
    with pytest.raises(FloatingPointError, match=r"step 8, batches 16 to 17: .*step-00000008"):
        bad.train(tmp_path, loss_function=loss_with(value, call=17), spike=5.0)
    assert_ends_with(bad, left_alone(steps=8))
    assert saved_step(tmp_path) == 8


def test_no_gradient_that_is_no_number_stays_behind() -> None:
    bad = Run()
    with pytest.raises(FloatingPointError):
        bad.train(loss_function=loss_with(math.nan, call=3))
    assert all(p.grad is None for p in bad.model.parameters())


def test_too_many_bad_steps_in_a_row_stop_a_run_that_skips_them() -> None:
    def spoiled(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_step(model, batch)
        return loss * math.nan, count

    with pytest.raises(FloatingPointError, match=r"step 9, .* as in the 9 steps before it"):
        Run().train(on_bad_step="skip", loss_function=spoiled)


def test_the_log_is_json_even_if_a_loss_is_no_number(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5, evaluate=lambda: math.nan, save_every=0)
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert "NaN" not in text and '"validation_loss": null' in text
    assert math.isnan(rows_until(5, tmp_path / "metrics.jsonl")[0]["validation_loss"])


def test_the_state_before_a_bad_step_is_the_whole_state(tmp_path: Path) -> None:
    """Resumed without what made it bad, the run is the one that nothing disturbed: the same
    dropout too."""
    with pytest.raises(FloatingPointError):
        Run().train(tmp_path, save_every=0, loss_function=loss_with(math.nan, call=17))
    resumed = Run(seed=1)
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, left_alone())


def test_losses_below_zero_do_not_leap_by_being_there() -> None:
    def below_zero(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_step(model, batch)
        return loss - 10 * count, count

    assert Run().train(spike=3.0, loss_function=below_zero)[-1]["loss"] < 0


def test_a_gradient_that_is_never_a_number_is_no_overflow(tmp_path: Path) -> None:
    def never(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_step(model, batch)
        model.tok_emb.weight.register_hook(lambda gradient: gradient * math.nan)
        return loss, count

    with pytest.raises(FloatingPointError, match="the gradient became nan"):
        Run().train(tmp_path, precision="fp16", loss_function=never, accumulate=1)


def test_half_precision_goes_on_from_single(tmp_path: Path) -> None:
    Run().train(tmp_path, steps=5)
    rows = Run().train(tmp_path, resume=True, precision="fp16")
    assert rows[-1]["step"] == STEPS


@pytest.mark.parametrize("value", [math.nan, 50.0])
def test_a_bad_step_is_skipped_if_asked(value: float, caplog: pytest.LogCaptureFixture) -> None:
    run = Run()
    rows = run.train(
        loss_function=loss_with(value, call=17), on_bad_step="skip", spike=5.0, log_every=1
    )
    assert "skipped step 8, batches 16 to 17" in caplog.text
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] < 10 for row in rows if row["step"] != 9)
    assert all(torch.isfinite(weight).all() for weight in run.weights().values())
    with pytest.raises(ValueError, match="on_bad_step must be 'stop' or 'skip', not 'ignore'"):
        run.train(on_bad_step="ignore")


def test_a_step_that_is_skipped_does_not_count_in_the_figures() -> None:
    figures, bad = Figures(), loss_with(math.nan, call=17)

    def with_figure(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = bad(model, batch)
        figures.add(loss_again=loss)
        return loss, count

    run = Run()
    rows = run.train(loss_function=with_figure, on_bad_step="skip", figures=figures, log_every=3)
    assert all(math.isfinite(row["loss_again"]) for row in rows)


def test_half_precision_is_scaled_and_resumes(tmp_path: Path) -> None:
    def enormous_at_first() -> Callable[[GPT2, Batch], tuple[Tensor, Tensor]]:
        calls = iter(range(1000))

        def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
            loss, count = next_token_step(model, batch)
            return loss * (1e30 if next(calls) < 2 else 1.0), count

        return loss_function

    straight, resumed = Run(), Run(seed=1)
    straight.train(precision="fp16", loss_function=enormous_at_first())
    Run().train(tmp_path, precision="fp16", loss_function=enormous_at_first(), steps=10)
    resumed.train(tmp_path, precision="fp16", resume=True)
    assert_ends_with(resumed, straight.weights())
    folder = RunCheckpoints(tmp_path / "checkpoints").all()[0]
    states = torch.load(folder / "process-0.pt", weights_only=True)
    assert states["scaler"]["scale"] == 2.0**4  # halved once: the first step overflowed


def test_what_no_optimizer_holds_has_no_say_in_the_size_of_a_step() -> None:
    """In fp16 its gradients are scaled still, and may be infinite."""

    def steps(precision: str, rest_learns: bool) -> tuple[float, Tensor]:
        run = Run()
        run.model.out_head = torch.nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
        run.model.out_head.weight.data.copy_(run.model.tok_emb.weight)
        run.model.requires_grad_(rest_learns).out_head.requires_grad_(True)
        run.optimizers = [torch.optim.SGD(run.model.out_head.parameters(), lr=0.1)]  # type: ignore[list-item]
        rows = run.train(precision=precision, steps=3, log_every=1)
        return rows[0]["grad_norm"], run.model.out_head.weight.detach()

    norm, expected = steps("fp32", rest_learns=False)
    for precision in ("fp32", "fp16"):
        found, weight = steps(precision, rest_learns=True)
        assert found == pytest.approx(norm, rel=1e-2)
        assert_close(weight, expected, rtol=1e-2, atol=1e-4)


class Slowing(torch.optim.SGD):
    """Counts its steps in the parameter group, as schedule-free optimizers do."""

    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["steps_done"] = group.get("steps_done", 0) + 1
            for parameter in group["params"]:
                parameter.grad /= group["steps_done"]
        super().step()


def test_what_an_optimizer_keeps_in_its_groups_is_resumed(tmp_path: Path) -> None:
    straight, stopped, resumed = Run(), Run(), Run()
    for run in (straight, stopped, resumed):
        run.optimizers = [Slowing(run.model.parameters(), lr=0.1)]  # type: ignore[list-item]
    straight.train()
    stopped.train(tmp_path, steps=10)
    resumed.train(tmp_path, resume=True)
    assert_ends_with(resumed, straight.weights())


def test_a_state_that_cannot_be_read_back_is_refused_at_the_start(tmp_path: Path) -> None:
    class Stream(list):
        def state_dict(self) -> dict[str, Any]:
            return {"position": np.int64(0)}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError("it is never read")

    ids = torch.tensor([[1, 2]])
    with pytest.raises(TypeError, match="state_dict of the batches cannot be read back"):
        Run().train(tmp_path, batches=Stream([Batch(ids, labels=ids)]))


# ---- kills


def test_a_run_killed_at_random_instants_ends_with_the_same_bits(tmp_path: Path) -> None:
    """A few; `python tests/kill_training.py --kills 50` for many."""
    script = Path(__file__).parent / "kill_training.py"
    command = [sys.executable, str(script), "--kills", "4", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout


def test_an_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    run = Run()
    run.optimizers = Run().optimizers
    with pytest.raises(ValueError, match="tensors that are not parameters of the model"):
        run.train(tmp_path)
    assert not list(tmp_path.rglob("step-*"))
