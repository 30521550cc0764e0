"""What is to work on a GPU, on a device that behaves like one; `test_devices.py` runs this file."""

import importlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from conftest import random_ids
from pretended_device import OnDevice, pretended, waits
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.testing import assert_close

from gpt2mini import GPT2, generate
from gpt2mini.cli import common, main
from gpt2mini.data.samples import sample
from gpt2mini.data.text import Batch
from gpt2mini.training import Settings, adamw, muon_and_adamw, next_token_step, train

KEEPER = str(sample("keeper.jsonl"))
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0]])
SEVERAL_TEXTS = torch.tensor([[1, 1, 1, 2, 2, 3, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0]])


@pytest.fixture
def device() -> Iterator[torch.device]:
    with pretended() as device:
        waits.clear()
        yield device


def test_it_refuses_what_gpus_refuse(device: torch.device) -> None:
    there = torch.ones(3, device=device)
    with pytest.raises(RuntimeError, match="and on the CPU"):
        there + torch.ones(3)
    with pytest.raises(TypeError, match="no float64"):
        there.double()
    with pytest.raises(TypeError, match=r"\.cpu\(\) first"):
        there.numpy()
    assert not waits
    doubled = there * torch.tensor(2.0)  # a single number may come from the CPU
    assert isinstance(doubled, OnDevice) and not isinstance(doubled.cpu(), OnDevice)
    assert float(doubled.sum()) == 6
    assert waits.total() == 2


@pytest.mark.parametrize("mask", [None, MASK, SEVERAL_TEXTS])
def test_logits_and_gradients(device: torch.device, own_model: GPT2, mask: Tensor | None) -> None:
    there = deepcopy(own_model).to(device)
    batch = Batch(random_ids(2, 8), random_ids(2, 8), mask)
    for model, own_batch in ((own_model, batch), (there, batch.to(device))):
        logits = model(own_batch.token_ids, own_batch.attention_mask)
        (logits.square().mean() + next_token_step(model, own_batch)[0]).backward()
    for parameter, other in zip(own_model.parameters(), there.parameters(), strict=True):
        assert parameter.grad is not None and isinstance(other.grad, OnDevice)
        assert_close(parameter.grad, other.grad.cpu(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", [None, MASK])
def test_greedy_text(device: torch.device, own_model: GPT2, mask: Tensor | None) -> None:
    found = []
    for place in ("cpu", device):
        own_mask = None if mask is None else mask.to(place)
        answer = generate(
            own_model.to(place), random_ids(2, 8).to(place), 60, own_mask,
            temperature=0.0, top_k=20, top_p=0.9, repetition_penalty=1.1, no_repeat_ngram_size=3,
            stop_ids=[5], num_samples=2, overflow="slide",
        )  # fmt: skip
        found.append((answer.token_ids.cpu(), answer.response_mask.cpu(), answer.logprobs.cpu()))
    assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_a_new_token_is_waited_for_twice(device: torch.device, own_model: GPT2) -> None:
    """Once to see that its logits are numbers, once that it is in the vocabulary."""
    model, prompt = own_model.to(device), random_ids(2, 8).to(device)
    counts = []
    for tokens in (10, 20):
        waits.clear()
        generate(model, prompt, tokens, temperature=0.0)
        counts.append(waits.total())
    assert counts[1] - counts[0] <= 20, waits


@pytest.mark.parametrize("weights", ["fp16", "bf16", "int8", "int4"])
def test_quantized_weights(device: torch.device, own_model: GPT2, weights: str) -> None:
    expected = own_model(random_ids(2, 8)).detach()
    model = own_model.to(device).quantize(weights)
    with torch.no_grad():
        logits = model(random_ids(2, 8).to(device)).cpu()
    assert (logits - expected).norm() < (0.3 if weights == "int4" else 0.05) * expected.norm()
    assert generate(model, random_ids(2, 8).to(device), 5).token_ids.device == device


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loaded_in_two_bytes_a_weight(
    device: torch.device, own_model: GPT2, dtype: torch.dtype, tmp_path: Path
) -> None:
    own_model.save_pretrained(tmp_path)
    found = []
    for place in ("cpu", device):
        model = GPT2.from_pretrained(tmp_path, dtype, place)
        answer = generate(model, random_ids(2, 8).to(place), 20, temperature=0.0)
        found.append((answer.token_ids.cpu(), answer.logprobs.cpu()))
    assert_close(found[0][0], found[1][0])
    assert_close(found[0][1], found[1][1], rtol=0, atol=0.05)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
def test_training_and_going_on(
    device: torch.device, own_model: GPT2, optimizer: str, tmp_path: Path
) -> None:
    make: dict[str, Callable[[GPT2], list[Optimizer]]] = {
        "sgd": lambda model: [SGD(model.parameters(), lr=1e-3)],
        "adamw": lambda model: [adamw(model, 1e-3)],
        "muon": lambda model: [*muon_and_adamw(model, 1e-2, 1e-3)],
    }

    def trained(place: str | torch.device, stops: Sequence[int], out: Path) -> GPT2:
        for steps in stops:
            model = deepcopy(own_model).to(place)
            settings = Settings(steps, lambda step: 1.0, accumulate=2, progress=False)
            train(model, Endless(), make[optimizer](model), settings, out=out, resume=True)
        return model.cpu()

    at_once = trained(device, [4], tmp_path / "at once")
    in_two = trained(device, [2, 4], tmp_path / "in two")
    for parameter, other in zip(at_once.parameters(), in_two.parameters(), strict=True):
        assert torch.equal(parameter, other)
    if optimizer == "sgd":  # the others make steps of the same size of gradients near 0
        on_cpu = trained("cpu", [4], tmp_path / "on the CPU")
        for parameter, other in zip(at_once.parameters(), on_cpu.parameters(), strict=True):
            assert_close(parameter, other, rtol=1e-3, atol=1e-3)


class Endless:
    """Batches without end, from the first each time."""

    def __iter__(self) -> Iterator[Batch]:
        return itertools.cycle([Batch(ids, ids) for ids in random_ids(6, 2, 16)])


RUNS = [
    "finetune --steps 1 --save-every 1 --activation-checkpointing --max-new-tokens 5",
    "finetune --method lora --data KEEPER --steps 1 --fraction 0.2 --answers 1 --max-new-tokens 5",
    "classify --steps 1 --method full",
    "classify --steps 1 --method lora",
    "classify --steps 1",
    "finetune --data KEEPER --steps 1 --fraction 0.2 --answers 1 --max-new-tokens 5",
    "align --steps 1 --rollout-rows 4 --batch-size 4 --compare 2 --lora --max-new-tokens 5",
    "align --steps 1 --rollout-rows 4 --batch-size 4 --compare 2 --method grpo --max-new-tokens 5",
    "align --steps 1 --held-out-pairs 4 --compare 2 --method dpo --lora --max-new-tokens 5",
    "align --steps 1 --held-out-pairs 4 --method reward",
    "pretrain --steps 1 --vocab-size 400 --context-length 32 --emb-dim 32 --n-heads 2 --n-layers 2",
    "evaluate --samples 1 --max-new-tokens 5",
    "generate --max-new-tokens 5 --quantize int8",
    "inspect trace",
    "inspect attention",
    "inspect lens",
    "inspect compare --other MODEL",
]


@pytest.mark.parametrize("run", RUNS)
def test_jobs(
    device: torch.device,
    run: str,
    word_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, *flags = run.replace("KEEPER", KEEPER).replace("MODEL", str(word_folder)).split()
    if job != "generate":
        flags += ["--out", str(tmp_path)]
    if job != "pretrain":
        flags += ["--model", str(word_folder)]
    module = importlib.import_module(f"gpt2mini.cli.{job}")
    monkeypatch.setattr(module, "pick_device", lambda name: device, raising=False)
    monkeypatch.setattr(common, "pick_device", lambda name: device)
    main([job, *flags])
    assert waits  # it was the device that computed
