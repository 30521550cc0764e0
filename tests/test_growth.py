"""Progressive depth: a run that begins shallow and grows is the loop by hand, and resumes."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from command import run as run_command
from conftest import TINY, random_ids
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader

from gpt2mini import GPT2
from gpt2mini.checkpoints.origin import origin_of
from gpt2mini.data.text import Batch, TokenBatches, sequential_batches
from gpt2mini.files import read_json
from gpt2mini.lora import add_lora
from gpt2mini.surgery import grow_depth
from gpt2mini.training import (
    Settings,
    adamw,
    muon_and_adamw,
    next_token_step,
    train_growing,
    warmup_stable_decay,
)
from gpt2mini.training.loop import divide_and_clip
from gpt2mini.training.metrics import rows_until

STEPS, GROW, DEEP = 12, 7, 6
schedule = partial(warmup_stable_decay, steps=STEPS, warmup_steps=2)
ids = random_ids(2, 9)


# ---- growing a model


def test_a_grown_model_computes_the_same(own_model: GPT2) -> None:
    before, parameters = own_model(ids), list(own_model.parameters())
    grow_depth(own_model, 2 * TINY.n_layers)
    assert own_model.config == replace(TINY, n_layers=2 * TINY.n_layers)
    assert len(own_model.trf_blocks) == 2 * TINY.n_layers
    assert_close(own_model(ids), before, atol=0, rtol=0)
    assert set(parameters) <= set(own_model.parameters())  # an optimizer keeps what it knows


def test_every_copy_learns(own_model: GPT2) -> None:
    """In the second step, when its projections are no longer zero, all of it (but the keys' biases,
    which change no attention)."""
    grow_depth(own_model, 2 * TINY.n_layers)
    before = [p.detach().clone() for p in own_model.parameters()]
    optimizer = torch.optim.SGD(own_model.parameters(), lr=1e-3)
    for _ in range(2):
        next_token_step(own_model, Batch(ids, ids))[0].backward()
        optimizer.step()
    for (name, now), then in zip(own_model.named_parameters(), before, strict=True):
        assert name.endswith("key.bias") or not torch.equal(now, then), name


def test_a_block_of_ones_own_is_copied(own_model: GPT2) -> None:
    class Halved(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.norm1, self.attn, self.norm2, self.mlp = (
                getattr(block, name) for name in ("norm1", "attn", "norm2", "mlp")
            )

        def forward(self, x: Tensor, attn_mask: Tensor | None, cache: Any = None) -> Tensor:
            x = x + self.attn(self.norm1(x), attn_mask, cache) / 2
            return x + self.mlp(self.norm2(x)) / 2

    own_model.trf_blocks = nn.ModuleList(map(Halved, own_model.trf_blocks))
    before = own_model(ids)
    grow_depth(own_model, 2 * TINY.n_layers)
    assert all(isinstance(block, Halved) for block in own_model.trf_blocks)
    assert_close(own_model(ids), before, atol=0, rtol=0)


def test_the_head_and_what_the_files_said_stay(word_folder: Path) -> None:
    model = GPT2.from_pretrained(word_folder)
    model.out_head = nn.Linear(model.config.emb_dim, 2)
    before, origin = model(ids), origin_of(model)
    grow_depth(model, 6)
    assert_close(model(ids), before, atol=0, rtol=0)
    assert origin.base and origin.samples  # of which it is no longer a copy
    assert origin_of(model) == replace(origin, base=None, samples={})


@pytest.mark.parametrize("n_layers", [0, 2, 4])
def test_other_depths_are_refused(own_model: GPT2, n_layers: int) -> None:
    with pytest.raises(ValueError, match=f"can grow to a multiple of that, not to {n_layers}"):
        grow_depth(own_model, n_layers)
    assert len(own_model.trf_blocks) == TINY.n_layers


def test_adapters_are_refused(own_model: GPT2) -> None:
    add_lora(own_model, rank=2, alpha=4, targets=("mlp_out",))
    with pytest.raises(ValueError, match=r"merge adapters first \(merge_lora\)"):
        grow_depth(own_model, 6)


def test_an_architecture_whose_copies_have_an_effect_is_refused(own_model: GPT2) -> None:
    own_model.trf_blocks[1].register_forward_hook(lambda module, x, out: 2 * out)
    with pytest.raises(ValueError, match="a copy of block 1 changes the stream although"):
        grow_depth(own_model, 6)
    assert len(own_model.trf_blocks) == TINY.n_layers


# ---- a run that grows


def batches() -> TokenBatches:
    return TokenBatches(random_ids(500).numpy(), [range(500)], 2, 16, seed=0)


def new_run(optimizer: str) -> tuple[GPT2, list[Optimizer]]:
    torch.manual_seed(0)
    model = GPT2(replace(TINY, n_layers=2, drop_rate=0.1))
    both = partial(muon_and_adamw, model, lr=0.01, adamw_lr=0.01)
    return model, list(both()) if optimizer == "muon" else [adamw(model, lr=0.01)]


def grown(out: Path, optimizer: str, loss_function: Any = next_token_step, **changes: Any) -> GPT2:
    model, optimizers = new_run(optimizer)
    options = {name: changes.pop(name) for name in ("resume", "evaluate") if name in changes}
    settings = Settings(
        **{"steps": STEPS, "schedule": schedule, "precision": "fp32", "progress": False, **changes}
    )
    torch.manual_seed(1)
    train_growing(
        *(model, batches(), optimizers, settings, loss_function),
        n_layers=DEEP,
        grow_step=GROW,
        out=out,
        **options,
    )
    return model


def assert_same(found: GPT2, expected: GPT2) -> None:
    assert found.config.n_layers == expected.config.n_layers
    for (name, one), other in zip(found.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), f"{name} differs"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_is_the_loop_by_hand(optimizer: str, tmp_path: Path) -> None:
    """Seven steps of two blocks, then five of six; averages of old parameters go on."""
    model, optimizers = new_run(optimizer)
    model.train()
    torch.manual_seed(1)
    for step, batch in enumerate(islice(batches().part(0, 1), STEPS)):
        if step == GROW:
            twins = {p: name for name, p in model.named_parameters()}
            grow_depth(model, DEEP)
            own = dict(model.named_parameters())
            for one in optimizers:
                for group in one.param_groups:
                    for parameter in list(group["params"]):
                        kind, number, *rest = twins[parameter].split(".")
                        if kind == "trf_blocks":
                            first = 3 * int(number)
                            names = (".".join([kind, str(first + i), *rest]) for i in (1, 2))
                            group["params"] += [own[name] for name in names]
        loss, count = next_token_step(model, batch)
        loss.backward()
        divide_and_clip(model.parameters(), float(count), 1.0)
        for one in optimizers:
            for group in one.param_groups:
                group["lr"] = 0.01 * schedule(step)
            one.step()
            one.zero_grad()
    assert_same(grown(tmp_path, optimizer, recompute=False), model)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def killed_at(step: int) -> Callable[[GPT2, Batch], tuple[Tensor, Tensor]]:
    calls = iter(range(1000))

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) == step:
            raise Killed
        return next_token_step(model, batch)

    return loss_function


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory) -> GPT2:
    """What a run ends with that nobody disturbs."""
    return grown(tmp_path_factory.mktemp("straight"), "muon")


@pytest.mark.parametrize("step", [4, GROW, 10])
def test_a_stopped_run_ends_with_the_same_bits(step: int, left_alone: GPT2, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        grown(tmp_path, "muon", killed_at(step), save_every=3)
    assert_same(grown(tmp_path, "muon", resume=True, save_every=3), left_alone)


def test_a_run_stopped_between_the_two_grows_when_it_is_resumed(
    left_alone: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shallow steps are done and saved, the grown model is not."""

    def stopped(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("gpt2mini.training.growth.grow_saved", stopped)
        with pytest.raises(ZeroDivisionError):
            grown(tmp_path, "muon")
    assert_same(grown(tmp_path, "muon", resume=True), left_alone)
    assert_same(grown(tmp_path, "muon", resume=True), left_alone)  # nothing left to do


def test_it_is_one_run_with_one_log(tmp_path: Path) -> None:
    losses = iter(range(100, 0, -1))
    every = {"evaluate_every": 5, "log_every": 3}
    model = grown(tmp_path, "adamw", evaluate=lambda: float(next(losses)), **every)
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == len(set(lines))
    assert '"step": 7, "validation_loss"' in "".join(lines)  # beside the model as it then was
    assert_same(GPT2.from_pretrained(tmp_path / "best"), model)


def test_patience_counts_the_evaluations_of_the_grown_model(tmp_path: Path) -> None:
    """Two without a lower loss before it grows, and one after, do not end the run; two after do."""
    found = iter([5.0, 4.0, 4.1, 4.2, 4.3, 3.0, 3.1, 3.2])  # after steps 0, 2, 4, 6, 7, 8, 10, 12
    often = {"evaluate_every": 2, "patience": 2, "log_every": 1}
    model = grown(tmp_path, "adamw", evaluate=lambda: next(found), **often)
    assert model.config.n_layers == DEEP and next(found, None) is None

    found = iter([5.0, 4.0, 4.1, 4.2, 4.3, 4.4, 4.5])
    resumed = grown(tmp_path / "b", "adamw", evaluate=lambda: next(found), **often)
    steps = [row["step"] for row in rows_until(STEPS, tmp_path / "b" / "metrics.jsonl")]
    assert max(steps) == 10 and resumed.config.n_layers == DEEP


def test_a_run_on_a_shuffling_loader_grows(tmp_path: Path) -> None:
    """Its epochs of five batches go on as without growing."""
    seen: list[int] = []

    def loss_function(model: GPT2, batch: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(int(batch[0, 0]))
        return next_token_step(model, Batch(batch, batch))

    def loader() -> DataLoader:
        rows: Any = random_ids(5, 16)
        own = torch.Generator().manual_seed(0)
        return DataLoader(rows, batch_size=1, shuffle=True, generator=own)

    model, optimizers = new_run("adamw")
    settings = Settings(steps=STEPS, schedule=schedule, precision="fp32", progress=False)
    depth: dict[str, Any] = {"n_layers": DEEP, "grow_step": GROW, "out": tmp_path}
    train_growing(model, loader(), optimizers, settings, loss_function, **depth)
    same = loader()
    assert seen == [int(batch[0, 0]) for _ in range(3) for batch in same][:STEPS]
    assert model.config.n_layers == DEEP


@pytest.mark.parametrize("grow_step", [0, STEPS])
def test_it_grows_within_the_run(grow_step: int, tmp_path: Path) -> None:
    model, optimizers = new_run("adamw")
    settings = Settings(steps=STEPS, schedule=schedule)
    options: dict[str, Any] = {"n_layers": DEEP, "grow_step": grow_step, "out": tmp_path}
    with pytest.raises(ValueError, match="grow_step must lie in 1 to 11"):
        train_growing(model, batches(), optimizers, settings, **options)


def test_a_depth_that_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    model, optimizers = new_run("adamw")
    options: dict[str, Any] = {"n_layers": 5, "grow_step": GROW, "out": tmp_path}
    with pytest.raises(ValueError, match="a model of 2 blocks can grow to a multiple of that"):
        train_growing(model, [], optimizers, Settings(steps=STEPS, schedule=schedule), **options)
    assert not list(tmp_path.iterdir())


# ---- the command


def test_pretrain_begins_shallow(tmp_path: Path) -> None:
    flags = ["--vocab-size", "300", "--emb-dim", "32", "--n-heads", "2", "--context-length", "32"]
    flags += ["--n-layers", "4", "--start-layers", "2", "--grow-at", "0.5", "--steps", "4"]
    done = run_command("pretrain", "--out", tmp_path, "--validation-tokens", "256", *flags)
    assert done.returncode == 0, done.stderr
    assert "parameters in 2 of 4 blocks" in done.stdout
    assert "step 2: the model grows to 4 blocks" in done.stderr + done.stdout
    assert read_json(tmp_path / "best" / "config.json")["n_layer"] == 4


def test_pretrain_validates_at_the_length_it_trains(
    word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At positions that were not trained the loss is another."""
    lengths = set()

    def windows(*arguments: Any) -> Any:
        lengths.add(arguments[-1])
        return sequential_batches(*arguments)

    monkeypatch.setattr("gpt2mini.cli.pretrain.sequential_batches", windows)
    flags = ["--init-from", word_folder, "--steps", "1", "--sequence-length", "8"]
    done = run_command("pretrain", "--out", tmp_path, "--validation-tokens", "256", *flags)
    assert done.returncode == 0 and lengths == {8}, done.stderr


@pytest.mark.parametrize(("flags", "n_layers"), [([], 3), (["--n-layers", "6"], 6)])
def test_an_earlier_model_grows_only_when_asked(
    word_folder: Path, tmp_path: Path, flags: list[str], n_layers: int
) -> None:
    flags = [*flags, "--init-from", str(word_folder), "--steps", "1"]
    done = run_command("pretrain", "--out", tmp_path, "--validation-tokens", "256", *flags)
    assert done.returncode == 0, done.stderr
    assert f"parameters in {n_layers} blocks" in done.stdout
    assert read_json(tmp_path / "best" / "config.json")["n_layer"] == n_layers


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--start-layers", "5"], "--n-layers 12 must be a multiple of --start-layers 5"),
        (["--start-layers", "1", "--grow-at", "1"], "--grow-at 1 of 40 steps is step 40"),
        (["--grow-at", "0.5"], "--grow-at is for --start-layers"),
        (["--start-layers", "3", "--init-from", "gpt2-nano"], "is for a new model, without --init"),
        (["--start-layers", "1", "--shard"], "leave out --shard or --start-layers"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags: list[str], message: str, tmp_path: Path) -> None:
    done = run_command("pretrain", "--out", tmp_path / "out", *flags)
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()
