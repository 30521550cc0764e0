"""Two processes do what one does: the same gradients, the same runs, and each other's."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from command import HANGS
from parallel_rollouts import METHODS
from parallel_worker import (
    STEPS,
    STOP,
    adam,
    classify,
    make_model,
    muon,
    prefer,
    run,
    sgd,
    validation_loss,
)
from torch import Tensor
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.files import read_json
from gpt2mini.training.distributed import can_shard_on_cpu, shard

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch was built without torch.distributed"
)

needs_newer_torch = pytest.mark.skipif(
    not can_shard_on_cpu(), reason=f"torch {torch.__version__} has FSDP2 for GPUs alone"
)
WAYS = ("ddp", "fsdp")
HOW = ["ddp", pytest.param("fsdp", marks=needs_newer_torch)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left, once, for all tests."""
    folder = tmp_path_factory.mktemp("parallel")
    for name in WAYS:
        model = make_model()
        evaluate = partial(validation_loss, model)
        out = folder / f"alone-then-{name}"
        run(model, adam, 4, out, steps=STOP, save_every=STOP, evaluate=evaluate)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = Path(__file__).with_name("parallel_worker.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(worker), str(folder)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone() -> GPT2:
    """The model that one process ends with."""
    model = make_model()
    run(model, adam, 4)
    return model


def weights(model: GPT2) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("lora", [False, True], ids=["all", "lora"])
@pytest.mark.parametrize("how", HOW)
def test_gradients_are_those_of_one_process(how: str, lora: bool, folder: Path) -> None:
    """One step of SGD at a rate of 1 moves each weight by its gradient."""
    model = make_model(lora)
    before = {name: p.clone() for name, p in weights(model).items()}
    run(model, sgd, 4, steps=1, max_grad_norm=1e9, schedule=lambda step: 1.0)
    found = torch.load(folder / f"{how}{'-lora' * lora}.pt", weights_only=True)
    assert found.keys() == before.keys()  # the tied head is no second tensor
    moved = 0
    for name, weight in weights(model).items():
        assert_close(found[name] - before[name], weight - before[name], atol=1e-6, rtol=0)
        moved += not torch.equal(weight, before[name])
    assert moved == (4 if lora else len(before))  # of the adapters, B alone at first


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Sums in another order round otherwise. Keys' biases change no attention, so their gradients
    are rounding alone, which AdamW makes large: they are left out."""
    for name, weight in expected.items():
        if not name.endswith("key.bias"):
            assert_close(found[name], weight, atol=5e-6, rtol=0)


@pytest.mark.parametrize("how", HOW)
def test_a_run_of_two_goes_on_with_one(how: str, folder: Path, alone: GPT2) -> None:
    model = make_model()
    arguments = {"save_every": STOP, "evaluate": partial(validation_loss, model)}
    rows = run(model, adam, 4, folder / how, resume=True, **arguments)
    assert_near(weights(model), weights(alone))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("how", HOW)
def test_a_run_of_one_goes_on_with_two(how: str, folder: Path, alone: GPT2) -> None:
    found = torch.load(folder / f"alone-then-{how}.pt", weights_only=True)
    assert_near(found, weights(alone))
    lines = (folder / f"alone-then-{how}" / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [row["step"] for row in map(json.loads, lines.splitlines()) if "loss" in row]
    assert steps == list(range(1, STEPS + 1))  # the first process alone writes


@pytest.mark.parametrize("how", HOW)
def test_the_best_model_is_saved_whole(how: str, folder: Path, alone: GPT2) -> None:
    best = GPT2.from_pretrained(folder / f"alone-then-{how}" / "best")
    assert validation_loss(best) == pytest.approx(validation_loss(alone), abs=1e-4)
    assert best.out_head.weight is best.tok_emb.weight


@pytest.mark.parametrize("method", ["classifier", "dpo", "reward"])
def test_other_losses_teach_the_same(method: str, folder: Path) -> None:
    """A classifier's last block works for the last token alone, and its stream is kept, unless it
    is spread over the processes; likewise a reward model's."""
    classify(folder) if method == "classifier" else prefer(method, folder)
    others = ["2", "2-spread"] if can_shard_on_cpu() else ["2"]
    one, *others = (f"{method}-{name}.pt" for name in ["1", *others])
    expected = torch.load(folder / one, weights_only=True)
    for name in others:
        assert_near(torch.load(folder / name, weights_only=True), expected)
        assert read_json(folder / f"{name}.json") == pytest.approx(
            read_json(folder / f"{one}.json")
        )


@pytest.mark.parametrize("how", HOW)
def test_muon_takes_the_same_steps(how: str, folder: Path) -> None:
    """A matrix that is spread is gathered to be orthogonalized."""
    model = make_model()
    run(model, muon, 4, steps=2)
    found = torch.load(folder / f"{how}-muon.pt", weights_only=True)
    for name, weight in weights(model).items():
        assert_close(found[name], weight, atol=1e-5, rtol=0)


def sampled(name: str, folder: Path) -> list[dict[str, Tensor]]:
    """The last experience of each of the two processes."""
    return [torch.load(folder / f"{name}-rank-{i}.pt", weights_only=True) for i in (0, 1)]


@needs_newer_torch
def test_answers_of_different_lengths_wait_for_no_other_process(folder: Path) -> None:
    shapes = []
    for i in (0, 1):
        whole, sharded = (
            torch.load(folder / f"answers-{how}-rank-{i}.pt", weights_only=True) for how in WAYS
        )
        assert torch.equal(whole, sharded)
        shapes.append(whole.shape[1])
    assert shapes[1] - shapes[0] == 9


@needs_newer_torch
@pytest.mark.parametrize("method", METHODS)
def test_a_sharded_policy_samples_and_learns_the_same(method: str, folder: Path) -> None:
    """In the second rollout too, so the weights that sample are those that were trained."""
    whole, sharded = sampled(f"{method}-ddp", folder), sampled(f"{method}-fsdp", folder)
    for expected, found in zip(whole, sharded, strict=True):
        assert torch.equal(found["token_ids"], expected["token_ids"])
        assert torch.equal(found["response_mask"], expected["response_mask"])
        for name in ("logprobs", "reference_logprobs", "advantages"):
            assert_close(found[name], expected[name], atol=1e-5, rtol=0)
    lengths = [one["response_mask"].sum(dim=1).tolist() for one in whole]
    assert lengths[0] != lengths[1]  # each process samples its own
    ends = [torch.load(folder / f"{method}-{how}.pt", weights_only=True) for how in WAYS]
    assert ends[0].keys() == ends[1].keys()
    for name, weight in ends[0].items():
        assert_close(ends[1][name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("how", HOW)
def test_a_stopped_ppo_run_of_two_goes_on_within_a_rollout(how: str, folder: Path) -> None:
    straight, resumed = (
        torch.load(folder / f"ppo-{name}.pt", weights_only=True) for name in (how, f"{how}-resumed")
    )
    assert_close(resumed, straight, atol=0, rtol=0)
    one, other = sampled(f"ppo-{how}", folder), sampled(f"ppo-{how}-resumed", folder)
    assert all(torch.equal(a["token_ids"], b["token_ids"]) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("how", HOW)
def test_a_policy_is_saved_whole(how: str, folder: Path) -> None:
    trained = torch.load(folder / f"ppo-{how}.pt", weights_only=True)
    saved = weights(GPT2.from_pretrained(folder / f"ppo-{how}-best"))
    assert_close(saved, {name: trained[f"policy.{name}"] for name in saved}, atol=0, rtol=0)


@needs_newer_torch
def test_each_process_holds_half(folder: Path) -> None:
    held = [int((folder / f"held-{i}.txt").read_text(encoding="utf-8")) for i in (0, 1)]
    total = sum(p.numel() for p in make_model().parameters())
    assert sum(held) == total and max(held) < 0.52 * total


def test_a_torch_that_cannot_spread_a_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2mini.training.distributed.is_distributed", lambda: True)
    monkeypatch.setattr("gpt2mini.training.distributed.can_shard_on_cpu", lambda: False)
    with pytest.raises(NotImplementedError, match=r"over GPUs alone: install a newer torch"):
        shard(make_model())


def test_a_single_process_cannot_spread_a_model() -> None:
    with pytest.raises(ValueError, match="start it with torchrun"):
        shard(make_model())


THREADS_AFTERWARDS = """
import torch, gc
from pathlib import Path
from gpt2mini.training.distributed import process_group, get_world_size
with process_group():
    loss = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(3, 1))(torch.ones(2, 3)).sum()
    loss.backward()
    assert get_world_size() == 1
    del loss
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert any("gloo" in name for name in names)
gc.collect()
print(*[(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed on Linux")
def test_no_thread_of_a_process_group_outlives_it() -> None:
    """One that works while the interpreter ends aborts the process, after everything is saved."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    done = subprocess.run(
        [*launch, "--no-python", sys.executable, "-c", THREADS_AFTERWARDS],
        capture_output=True,
        encoding="utf-8",
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "python" in done.stdout and "gloo" not in done.stdout
