"""Training: micro-batches add up, resuming changes no bit, and the numbers mean what they say."""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY, random_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.testing import assert_close
from torch.utils.data import DataLoader

from gpt2mini import GPT2, generate
from gpt2mini.data.text import Batch, TokenBatches, pad_batch, sequential_batches
from gpt2mini.device import autocast, pick_device
from gpt2mini.losses import IGNORED
from gpt2mini.training import (
    Settings,
    adamw,
    cosine,
    evaluate_loss,
    muon_and_adamw,
    next_token_step,
    train,
    warmup_stable_decay,
)
from gpt2mini.training.loop import divide_and_clip
from gpt2mini.training.optimizers import Muon, orthogonalize

NO_CLIPPING = 1e9  # a gradient norm that nothing here reaches
LR = 0.01


def settings(steps: int, **changes: Any) -> Settings:
    """A constant learning rate, float32, a row for every step, no progress bar."""
    defaults = {"schedule": lambda step: 1.0, "precision": "fp32", "log_every": 1}
    return Settings(steps=steps, **{**defaults, "progress": False, **changes})


def rows_of_ids(*lengths: int, seed: int = 0) -> list[Tensor]:
    return [random_ids(length, seed=100 * seed + i) for i, length in enumerate(lengths)]


def with_prompt(batch: Batch, prompt_tokens: int = 2) -> Batch:
    """The batch with the first labels of every row ignored."""
    labels = batch.labels.clone()
    labels[:, :prompt_tokens] = IGNORED
    return replace(batch, labels=labels)


def ragged_batches(seed: int = 0) -> Iterator[Batch]:
    """Endless batches whose rows differ in length and whose counts of targets differ."""
    for number in itertools.count(seed):
        lengths = [4 + (number + 1) * step % 11 for step in (1, 2, 4, 5)]
        yield with_prompt(pad_batch(rows_of_ids(*lengths, seed=number)))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor], atol: float = 0.0) -> None:
    for name, weight in weights_of(model).items():
        assert_close(weight, expected[name], atol=atol, rtol=0, msg=f"{name} differs")


def modes_of(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


# Learning-rate schedules

spans = st.tuples(st.integers(2, 200), st.floats(0, 0.5)).map(lambda s: (s[0], int(s[0] * s[1])))


@given(span=spans, final_multiplier=st.floats(0, 1))
def test_cosine_warms_up_to_one_and_falls_to_its_final_multiplier(
    span: tuple[int, int], final_multiplier: float
) -> None:
    steps, warmup = span
    multipliers = [cosine(step, steps, warmup, final_multiplier) for step in range(steps + 1)]
    assert multipliers[0] == pytest.approx(1 / max(1, warmup))
    assert multipliers[warmup] == pytest.approx(1)  # and one step before: the peak is the full rate
    assert multipliers[-1] == pytest.approx(final_multiplier)
    assert multipliers[:warmup] == sorted(multipliers[:warmup])
    assert multipliers[warmup:] == sorted(multipliers[warmup:], reverse=True)


@given(span=spans, final_multiplier=st.floats(0, 1))
def test_cosine_makes_no_jumps(span: tuple[int, int], final_multiplier: float) -> None:
    steps, warmup = span
    multipliers = [cosine(step, steps, warmup, final_multiplier) for step in range(steps + 1)]
    steepest = max(1 / max(1, warmup), math.pi / 2 / (steps - warmup))  # of line and half cosine
    assert all(abs(b - a) <= steepest + 1e-9 for a, b in itertools.pairwise(multipliers))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert cosine(60, steps=100, warmup_steps=20, final_multiplier=0.2) == pytest.approx(0.6)


@given(span=spans, decay_share=st.floats(0.05, 0.5))
def test_warmup_stable_decay_is_level_between_two_lines(
    span: tuple[int, int], decay_share: float
) -> None:
    steps, warmup = span
    multipliers = [
        warmup_stable_decay(step, steps, warmup, decay_share) for step in range(steps + 1)
    ]
    falling = max(1, round(decay_share * steps))
    assert all(
        multiplier == 1 for multiplier in multipliers[max(0, warmup - 1) : steps - falling + 1]
    )
    for line in (multipliers[: max(1, warmup)], multipliers[steps - falling :]):
        slopes = [b - a for a, b in itertools.pairwise(line)]
        assert slopes == pytest.approx([slopes[0]] * len(slopes)) if slopes else True
    assert multipliers[0] == pytest.approx(min(1 / max(1, warmup), steps / falling))
    assert multipliers[-1] == 0
    assert multipliers[-2] > 0  # the last step, steps - 1, still learns


@pytest.mark.parametrize("schedule", [cosine, warmup_stable_decay])
def test_after_its_end_a_schedule_stays_where_it_is(schedule: Callable[..., float]) -> None:
    assert schedule(150, steps=100, warmup_steps=10) == schedule(100, steps=100, warmup_steps=10)


# Optimizers


def parameters_in(optimizers: Iterable[Optimizer]) -> list[nn.Parameter]:
    return [p for o in optimizers for group in o.param_groups for p in group["params"]]


def both_kinds(model: GPT2) -> list[tuple[Optimizer, ...]]:
    return [(adamw(model, lr=LR),), muon_and_adamw(model, lr=LR, adamw_lr=LR)]


@pytest.mark.parametrize("head", ["tied", "own"])
def test_every_trainable_parameter_is_optimized_once(own_model: GPT2, head: str) -> None:
    if head == "own":
        own_model.out_head = nn.Linear(TINY.emb_dim, 2)
    for optimizers in both_kinds(own_model):
        found = [id(parameter) for parameter in parameters_in(optimizers)]
        assert sorted(found) == sorted(map(id, own_model.parameters()))


def test_frozen_parameters_are_not_optimized(own_model: GPT2) -> None:
    frozen = [*own_model.tok_emb.parameters(), *own_model.trf_blocks[0].parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for optimizers in both_kinds(own_model):
        assert not set(frozen) & set(parameters_in(optimizers))


def test_adamw_decays_matrices_only(own_model: GPT2) -> None:
    for group in adamw(own_model, lr=LR, weight_decay=0.3).param_groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.ndim >= 2 else 0.0)


def test_adamw_takes_a_model_of_which_only_the_norms_train(own_model: GPT2) -> None:
    own_model.requires_grad_(False)
    own_model.final_norm.requires_grad_(True)
    optimizer = adamw(own_model, lr=LR)
    assert len(parameters_in([optimizer])) == 2  # its weight and its bias


def test_adamw_refuses_a_model_with_nothing_to_train(own_model: GPT2) -> None:
    own_model.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        adamw(own_model, lr=LR)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest(own_model: GPT2) -> None:
    muon, rest = muon_and_adamw(own_model, lr=LR, adamw_lr=LR)
    matrices = [p for p in own_model.trf_blocks.parameters() if p.ndim == 2]
    assert set(parameters_in([muon])) == set(matrices)
    assert own_model.tok_emb.weight in set(parameters_in([rest]))


shapes = pytest.mark.parametrize(
    "shape", [(8, 32), (32, 8), (16, 16)], ids=["wide", "tall", "square"]
)


def random_matrices(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def orthogonalised_by_svd(matrix: Tensor) -> Tensor:
    """Jordan's polynomial, five times, on the singular values themselves."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ values.diag() @ right


@shapes
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(random_matrices(5, *shape)))
    # Jordan 2024 gives 0.7 to 1.2; the least singular values of a square matrix start from far.
    assert 0.65 < values.min() < values.max() < 1.25


@shapes
def test_orthogonalising_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrices = random_matrices(5, *shape)
    expected = torch.stack([orthogonalised_by_svd(matrix) for matrix in matrices])
    assert_close(orthogonalize(matrices), expected, atol=1e-10, rtol=0)


@given(scale=st.floats(1e-3, 1e3))
def test_orthogonalising_forgets_the_scale(scale: float) -> None:
    matrices = random_matrices(2, 4, 6)
    assert_close(orthogonalize(scale * matrices), orthogonalize(matrices))


@pytest.mark.parametrize("shape", [(3, 32, 128), (3, 128, 32), (3, 32, 32)])
@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-12])
def test_orthogonalising_in_float32_keeps_small_singular_values(
    shape: tuple[int, int, int], smallest: float
) -> None:
    u, s, vh = torch.linalg.svd(random_matrices(*shape), full_matrices=False)
    falling = torch.logspace(0, math.log10(smallest), s.shape[1], dtype=s.dtype)
    matrices = u * falling @ vh
    found, expected = orthogonalize(matrices.float()).double(), orthogonalize(matrices)
    assert (found - expected).norm() < 1e-3 * expected.norm()  # bfloat16: 3e-2


def test_orthogonalising_no_matrices_gives_none() -> None:
    """What a rank does for which no matrix is left."""
    assert orthogonalize(torch.zeros(0, 4, 16)).shape == (0, 4, 16)


def test_orthogonalising_zeros_gives_zeros() -> None:
    assert orthogonalize(torch.zeros(2, 4, 6)).count_nonzero() == 0


def muon_parameters() -> list[nn.Parameter]:
    shapes = [(8, 32), (32, 8), (16, 16), (8, 32)]  # two of one shape, which go together
    return [nn.Parameter(random_matrices(*shape, seed=i)) for i, shape in enumerate(shapes)]


def step_with_random_gradients(optimizer: Optimizer, steps: int = 3) -> None:
    for step in range(steps):
        for i, parameter in enumerate(parameters_in([optimizer])):
            gradient = random_matrices(*parameter.shape, seed=100 * step + i)
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def test_muon_steps_are_those_of_a_reference_in_float64() -> None:
    lr, momentum, decay = 0.02, 0.95, 0.1
    parameters, expected = muon_parameters(), muon_parameters()
    step_with_random_gradients(Muon(parameters, lr, momentum, decay))
    for i, parameter in enumerate(expected):
        average = torch.zeros_like(parameter)
        for step in range(3):
            gradient = random_matrices(*parameter.shape, seed=100 * step + i)
            average = momentum * average + (1 - momentum) * gradient
            ahead = momentum * average + (1 - momentum) * gradient  # Nesterov
            scale = lr * math.sqrt(max(1, parameter.shape[0] / parameter.shape[1]))
            shrunk = (1 - lr * decay) * parameter.detach()
            parameter.data = shrunk - scale * orthogonalised_by_svd(ahead)
    for found, reference in zip(parameters, expected, strict=True):
        assert_close(found, reference, atol=1e-10, rtol=0)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_muon_steps_are_those_of_torch_within_its_bfloat16() -> None:
    ours, theirs, before = muon_parameters(), muon_parameters(), muon_parameters()
    step_with_random_gradients(Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1))
    step_with_random_gradients(
        torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True)
    )
    for our, their, start in zip(ours, theirs, before, strict=True):
        difference, moved = (our - their).norm(), (their - start).norm()
        assert difference < 0.03 * moved  # some steps of bfloat16, of which each is 2**-8


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", 1e-5), ("bf16", 0.03)])
def test_muon_orthogonalises_float32_in_the_precision_asked_for(
    precision: str, allowed: float
) -> None:
    exact, found = muon_parameters(), [nn.Parameter(p.detach().float()) for p in muon_parameters()]
    before = muon_parameters()
    step_with_random_gradients(Muon(exact))
    step_with_random_gradients(Muon(found, precision=precision))
    for parameter, reference, start in zip(found, exact, before, strict=True):
        error = (parameter - reference).norm() / (reference - start).norm()
        assert allowed / 100 < error < allowed and parameter.dtype == torch.float32


def test_muon_leaves_parameters_without_a_gradient_alone() -> None:
    first, second = muon_parameters()[:2]
    before = second.detach().clone()
    first.grad = torch.ones_like(first)
    Muon([first, second], lr=LR).step()
    assert torch.equal(second, before)


# The loop


@pytest.mark.parametrize("kind", [0, 1], ids=["adamw", "muon and adamw"])
def test_the_loss_falls_on_a_repeated_text(kind: int) -> None:
    torch.manual_seed(0)
    model = GPT2(TINY)
    tokens = np.tile(np.arange(10) * 20, 40)
    batches = TokenBatches(tokens, [range(400)], batch_size=4, context_length=32, seed=0)
    rows = train(model, batches, both_kinds(model)[kind], settings(30))
    assert rows[0]["loss"] == pytest.approx(math.log(TINY.vocab_size), rel=0.1)  # knows nothing
    assert rows[-1]["loss"] < 0.5  # each token says which is next


def micro_batches(batch: Batch, rows_each: int) -> Iterator[Batch]:
    """The rows of a padded batch in smaller batches, each padded to its own longest row."""
    assert batch.attention_mask is not None
    rows = [
        ids[mask.bool()] for ids, mask in zip(batch.token_ids, batch.attention_mask, strict=True)
    ]
    for start in range(0, len(rows), rows_each):
        yield with_prompt(pad_batch(rows[start : start + rows_each]))


@pytest.mark.parametrize("accumulate", [2, 4])
@pytest.mark.parametrize("max_grad_norm", [NO_CLIPPING, 0.1], ids=["unclipped", "clipped"])
def test_micro_batches_train_as_one_batch(
    own_model: GPT2, accumulate: int, max_grad_norm: float
) -> None:
    whole, parts = own_model.double(), deepcopy(own_model)
    common: dict[str, Any] = {"steps": 3, "max_grad_norm": max_grad_norm}
    # Plain gradient descent: unlike Adam's, its steps show a gradient of the wrong size.
    train(whole, ragged_batches(), [SGD(whole.parameters(), LR)], settings(**common))
    pieces = (
        piece for batch in ragged_batches() for piece in micro_batches(batch, 4 // accumulate)
    )
    optimizer = SGD(parts.parameters(), LR)
    train(parts, pieces, [optimizer], settings(**common, accumulate=accumulate))
    assert_same_weights(parts, weights_of(whole), atol=1e-12)


@given(
    count=st.integers(1, 100),
    max_norm=st.sampled_from([1e-3, 1.0, 1e6]),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4),
)
def test_gradients_are_clipped_as_torch_clips_those_of_the_mean(
    count: int, max_norm: float, lengths: list[int]
) -> None:
    ours = [nn.Parameter(torch.zeros(length)) for length in lengths]
    theirs = [nn.Parameter(torch.zeros(length)) for length in lengths]
    for i, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        of_the_sum = random_matrices(len(our), seed=i).float()
        our.grad, their.grad = of_the_sum.clone(), of_the_sum / count
    without_gradient = nn.Parameter(torch.zeros(3))
    norm = divide_and_clip(iter([*ours, without_gradient]), float(count), max_norm)
    expected_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(expected_norm.item(), rel=1e-5)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our.grad, their.grad)


def test_earlier_gradients_do_not_enter_the_first_step(own_model: GPT2) -> None:
    clean, used = own_model, deepcopy(own_model)
    next_token_step(used, next(ragged_batches(seed=9)))[0].backward()  # somebody had a look
    for model in (clean, used):
        train(model, ragged_batches(), [SGD(model.parameters(), LR)], settings(1))
    assert_same_weights(used, weights_of(clean))


def test_gradients_of_parameters_without_an_optimizer_do_not_pile_up(own_model: GPT2) -> None:
    optimizer = SGD(own_model.final_norm.parameters(), lr=0.0)
    batches = itertools.repeat(next(ragged_batches()))
    first, second = train(own_model, batches, [optimizer], settings(2))
    assert second["grad_norm"] == pytest.approx(first["grad_norm"])


def test_the_rate_of_every_group_follows_the_schedule_from_its_own_peak(own_model: GPT2) -> None:
    groups = [
        {"params": [own_model.tok_emb.weight], "lr": 0.1},
        {"params": [own_model.pos_emb.weight], "lr": 0.01},
    ]
    optimizer, seen = SGD(groups), []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups]))
    shares = [1.0, 0.5, 0.25]
    for _ in range(2):  # a second run starts from the same peaks
        train(own_model, ragged_batches(), [optimizer], settings(3, schedule=shares.__getitem__))
    assert seen == [[pytest.approx(0.1 * s), pytest.approx(0.01 * s)] for s in shares] * 2


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    own_model: GPT2, wrong: float
) -> None:
    before: dict[str, Tensor] = {}
    numbers = itertools.count()

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss_sum, count = next_token_step(model, batch)
        if next(numbers) == 2:
            before.update(weights_of(model))
            loss_sum = loss_sum * wrong
        return loss_sum, count

    optimizer = SGD(own_model.parameters(), LR)
    with pytest.raises(FloatingPointError, match=f"step 2, batch 2: the loss became {wrong}"):
        train(own_model, ragged_batches(), [optimizer], settings(5), loss_function)
    assert_same_weights(own_model, before)


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", False)])
def test_the_precision_asked_for_is_that_of_the_loss(
    own_model: GPT2, precision: str, expected: bool
) -> None:
    seen = []

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return next_token_step(model, batch)

    optimizer = SGD(own_model.parameters(), LR)
    changed = settings(1, precision=precision)
    train(own_model, ragged_batches(), [optimizer], changed, loss_function)
    evaluate_loss(own_model, [next(ragged_batches())], loss_function, precision)
    assert seen == [expected, expected]
    assert own_model.tok_emb.weight.dtype == torch.float32


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="auto, bf16, fp16 or fp32, not 'int8'"):
        autocast(torch.device("cpu"), "int8")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_named_device_is_taken(name: str) -> None:
    assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["foo", "", "cpu:x", "cpu:1", "meta", "cuda:99", "mps:1"])
def test_what_is_no_device_to_compute_on_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no device '{name}'.*take auto or .*cpu"):
        pick_device(name)


@pytest.mark.parametrize(
    ("cuda_devices", "mps", "best"), [(2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]
)
def test_the_best_device_here_is_found(
    monkeypatch: pytest.MonkeyPatch, cuda_devices: int, mps: bool, best: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda_devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda_devices)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert pick_device().type == best
    assert pick_device(best).type == best


def test_one_of_several_devices_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"no device 'cuda:2'.*auto or cuda or cuda:1 or "):
        pick_device("cuda:2")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"there is no device 'cuda'.*take auto or .*cpu"):
        pick_device("cuda")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"spike": 0.5}, "spike must be above 1, or 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"save_every": -1}, "save_every must be at least 0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm must be above 0 \(math.inf: no clipping\), not 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
        ({"compile": True, "activation_checkpointing": True}, "leave out compile to save memory"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{"steps": 1, "schedule": lambda step: 1.0, **wrong})


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
@pytest.mark.usefixtures("no_shape_checks")
def test_compiled_blocks_change_no_more_than_rounding(own_model: GPT2) -> None:
    compiled, ids = deepcopy(own_model), random_ids(1, 5)
    for model, compile in ((own_model, False), (compiled, True)):
        optimizer, batch = SGD(model.parameters(), LR), pad_batch(list(random_ids(2, 16)))
        train(model, [batch] * 2, [optimizer], settings(2, compile=compile))
    assert_same_weights(compiled, weights_of(own_model), atol=1e-5)
    found = [generate(m, ids, 5, temperature=0).token_ids for m in (own_model, compiled)]
    assert torch.equal(*found)
    assert all(block._compiled_call_impl is None for block in compiled.trf_blocks)


# Metrics


def test_metrics_are_the_rows_returned_one_json_object_a_line(
    own_model: GPT2, tmp_path: Path
) -> None:
    optimizer = SGD(own_model.parameters(), LR)
    changed = settings(5, log_every=2, evaluate_every=4, schedule=lambda step: 1 / (step + 1))
    rows = train(
        own_model,
        ragged_batches(),
        [optimizer],
        changed,
        evaluate=lambda: 2.5,
        out=tmp_path / "new",
    )
    lines = (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [2, 4, 5]
    assert [row["lr_multiplier"] for row in training] == [1 / 2, 1 / 4, 1 / 5]
    assert [row["learning_rate"] for row in training] == [LR / 2, LR / 4, LR / 5]
    assert all(row["tokens_per_second"] > 0 and row["grad_norm"] > 0 for row in training)
    validation = [row for row in rows if "loss" not in row]
    assert validation == [{"step": step, "validation_loss": 2.5} for step in (0, 4, 5)]


def test_the_logged_loss_is_the_mean_over_all_targets_since_the_last_row(own_model: GPT2) -> None:
    optimizer = SGD(own_model.parameters(), lr=0.0)
    changed = settings(3, accumulate=2, log_every=3)
    (row,) = train(own_model, ragged_batches(), [optimizer], changed)
    expected = evaluate_loss(own_model, itertools.islice(ragged_batches(), 6), precision="fp32")
    assert row["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_new_run_starts_a_new_metrics_file(own_model: GPT2, tmp_path: Path) -> None:
    for steps in (3, 2):
        optimizer = SGD(own_model.parameters(), LR)
        train(own_model, ragged_batches(), [optimizer], settings(steps), out=tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


# Checkpoints


def test_best_holds_the_weights_of_the_lowest_validation_loss(
    own_model: GPT2, tmp_path: Path
) -> None:
    losses, weights = iter([3.0, 1.0, 2.0]), []

    def evaluate() -> float:
        weights.append(weights_of(own_model))
        return next(losses)

    optimizer = SGD(own_model.parameters(), LR)
    train(
        own_model,
        ragged_batches(),
        [optimizer],
        settings(2, evaluate_every=1),
        evaluate=evaluate,
        out=tmp_path,
    )
    assert_same_weights(GPT2.from_pretrained(tmp_path / "best"), weights[1])


# Modes


def set_mode(model: GPT2, mode: str) -> None:
    model.train(mode == "train")
    if mode == "mixed":  # a part that is to stay without dropout
        model.train()
        model.trf_blocks[0].eval()


modes = pytest.mark.parametrize("mode", ["train", "eval", "mixed"])


@modes
def test_training_restores_the_mode_it_found(own_model: GPT2, mode: str) -> None:
    set_mode(own_model, mode)
    before = modes_of(own_model)
    train(own_model, ragged_batches(), [SGD(own_model.parameters(), LR)], settings(1))
    assert modes_of(own_model) == before


def test_training_restores_the_mode_after_an_exception(own_model: GPT2) -> None:
    own_model.eval()

    def fail(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        raise InterruptedError

    optimizer = SGD(own_model.parameters(), LR)
    with pytest.raises(InterruptedError):
        train(own_model, ragged_batches(), [optimizer], settings(1), fail)
    assert not any(modes_of(own_model))


@modes
def test_evaluating_restores_the_mode_it_found(own_model: GPT2, mode: str) -> None:
    set_mode(own_model, mode)
    before = modes_of(own_model)
    evaluate_loss(own_model, [next(ragged_batches())])
    assert modes_of(own_model) == before


def test_evaluating_restores_the_mode_after_an_exception(own_model: GPT2) -> None:
    own_model.train()
    ids = torch.full((1, TINY.context_length + 1), 0)  # one token too many
    with pytest.raises(ValueError, match="do not fit the context"):
        evaluate_loss(own_model, [Batch(ids, ids)])
    assert all(modes_of(own_model))


def test_training_is_in_train_mode_and_validation_between_in_eval_mode(own_model: GPT2) -> None:
    seen = []

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        seen.append(model.training)
        return next_token_step(model, batch)

    batch = next(ragged_batches())
    train(
        own_model,
        ragged_batches(),
        [SGD(own_model.parameters(), LR)],
        settings(2, evaluate_every=1),
        loss_function,
        evaluate=lambda: evaluate_loss(own_model, [batch], loss_function),
    )
    assert seen == [False, True, False, True, False]


class Pair(NamedTuple):
    token_ids: Tensor
    labels: Tensor


def test_a_batch_may_be_a_named_tuple(own_model: GPT2) -> None:
    def loss_function(model: GPT2, batch: Pair) -> tuple[Tensor, Tensor]:
        return next_token_step(model, Batch(batch.token_ids, batch.labels))

    batch = next(iter(ragged_batches()))
    pairs = [Pair(batch.token_ids, batch.labels)]
    optimizers = [SGD(own_model.parameters(), LR)]
    rows = train(own_model, pairs, optimizers, settings(1), loss_function)
    assert rows[0]["loss"] > 0


def test_an_evaluation_may_leave_the_model_in_eval_mode(own_model: GPT2) -> None:
    seen = []

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        seen.append(modes_of(model))
        model.trf_blocks[0].eval()  # a part that is to stay without dropout
        return next_token_step(model, batch)

    def evaluate() -> float:
        own_model.eval()
        return 1.0

    optimizers, often = [SGD(own_model.parameters(), LR)], settings(3, evaluate_every=1)
    train(own_model, ragged_batches(), optimizers, often, loss_function, evaluate)
    assert all(seen[0]) and seen[1] == seen[2] and any(seen[1]) and not all(seen[1])


# Validation


@pytest.mark.parametrize("number", [torch.tensor, np.float32, np.array, int])
def test_an_evaluation_may_return_any_number(
    number: Callable[[float], Any], own_model: GPT2, tmp_path: Path
) -> None:
    found = {"validation_loss": number(2.0), "accuracy": number(1.0)}
    optimizers = [SGD(own_model.parameters(), LR)]
    changed = settings(1, save_every=1)
    arguments: dict[str, Any] = {"evaluate": lambda: found, "out": tmp_path}
    rows = train(own_model, ragged_batches(), optimizers, changed, **arguments)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert rows[0] == {"step": 0, "validation_loss": 2.0, "accuracy": 1.0}
    assert type(rows[0]["validation_loss"]) is float


def test_a_validation_loss_may_be_weighted(own_model: GPT2) -> None:
    """Counts are sums of weights then, which need not be whole numbers."""

    def weighted(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, count = next_token_step(model, batch)
        return 0.07 * loss, 0.07 * count

    batches = list(itertools.islice(ragged_batches(), 3))
    expected = evaluate_loss(own_model, batches, precision="fp32")
    found = evaluate_loss(own_model, batches, weighted, precision="fp32")
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_the_validation_loss_does_not_depend_on_the_batch_size(
    tiny_model: GPT2, batch_size: int
) -> None:
    tokens, documents = random_ids(150).numpy(), [range(40), range(40, 47), range(60, 150)]

    def loss(size: int) -> float:
        batches = sequential_batches(tokens, documents, size, context_length=20)
        return evaluate_loss(tiny_model, batches, precision="fp32")

    assert loss(batch_size) == pytest.approx(loss(1), rel=1e-5)


def test_the_validation_loss_is_that_of_the_model_without_dropout(own_model: GPT2) -> None:
    dropping = GPT2(replace(TINY, drop_rate=0.5))
    dropping.load_state_dict(own_model.state_dict())
    batch = next(ragged_batches())
    assert evaluate_loss(dropping.train(), [batch]) == evaluate_loss(own_model, [batch])


def test_the_validation_loss_of_a_model_that_knows_nothing_is_that_of_guessing(
    own_model: GPT2,
) -> None:
    nn.init.zeros_(own_model.tok_emb.weight)  # all logits are then equal
    loss = evaluate_loss(own_model, [next(ragged_batches())], precision="fp32")
    assert loss == pytest.approx(math.log(TINY.vocab_size))


def test_evaluating_leaves_gradients_and_random_numbers_alone(own_model: GPT2) -> None:
    state = torch.get_rng_state()
    evaluate_loss(own_model, [next(ragged_batches())])
    assert all(parameter.grad is None for parameter in own_model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_on_nothing_is_refused(tiny_model: GPT2) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        evaluate_loss(tiny_model, [])


def test_labels_that_are_shifted_already_stop_the_training(own_model: GPT2) -> None:
    ids = random_ids(2, 9)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    optimizer = AdamW(own_model.parameters(), LR)
    with pytest.raises(ValueError, match="already shifted"):
        train(own_model, [Batch(ids, shifted)], [optimizer], settings(1))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_step_that_overflows_for_one_optimizer_is_left_out_for_all(
    bad: float, own_model: GPT2
) -> None:
    before, handles = [], []

    def loss_function(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
        before.append([parameter.detach().clone() for parameter in model.parameters()])
        if len(before) == 3:
            handles.append(model.pos_emb.weight.register_hook(lambda g: torch.full_like(g, bad)))
        elif handles:
            handles.pop().remove()
        return next_token_step(model, batch)

    optimizers = muon_and_adamw(own_model, lr=0.02, adamw_lr=0.001)
    changed = settings(4, precision="fp16")
    rows = train(own_model, ragged_batches(), optimizers, changed, loss_function)
    assert not math.isfinite(rows[2]["grad_norm"])
    assert all(map(torch.equal, before[2], before[3]))
    for i in (0, 1, 3):
        assert math.isfinite(rows[i]["grad_norm"])


def test_batches_that_cannot_be_read_again_are_an_error_in_words(own_model: GPT2) -> None:
    optimizers = [SGD(own_model.parameters(), LR)]
    with pytest.raises(ValueError, match=r"have come to an end after 3.*not a generator"):
        train(own_model, itertools.islice(ragged_batches(), 3), optimizers, settings(4))
    with pytest.raises(ValueError, match="there are no batches to train on"):
        train(own_model, [], optimizers, settings(4))
    with pytest.raises(TypeError, match=r"got a Tensor: make one, Batch\(token_ids"):
        train(own_model, [random_ids(2, 8)], optimizers, settings(4))


def test_a_list_and_a_data_loader_are_read_again_after_each_epoch(own_model: GPT2) -> None:
    """Epochs of three batches, in the order that the loader's own generator shuffles."""
    rows = random_ids(6, 16)

    def loss(model: GPT2, batch: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
        seen.append(batch["rows"][0].tolist())
        return next_token_step(model, Batch(batch["rows"][0], batch["rows"][0]))

    def loader() -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        data: Any = [{"rows": (row, 0)} for row in rows]  # a list is a dataset to DataLoader
        return DataLoader(data, batch_size=2, shuffle=True, generator=generator)

    for batches in (loader(), list(loader())):
        seen: list[list[list[int]]] = []
        train(own_model, batches, [SGD(own_model.parameters(), LR)], settings(7), loss)
        for epoch in (seen[:3], seen[3:6]):
            assert sorted(row for batch in epoch for row in batch) == sorted(rows.tolist())
        assert len(seen) == 7 and (seen[:3] == seen[3:6]) == isinstance(batches, list)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_weights_in_fewer_bits_are_not_trained(
    dtype: torch.dtype, precision: str, own_model: GPT2
) -> None:
    """They would lose most of their updates: in bfloat16 four of five weights never moved."""
    own_model.to(dtype)
    message = rf"parameters in {str(dtype)[6:]} lose small updates.*model.float"
    with pytest.raises(ValueError, match=message):
        train(own_model, ragged_batches(), [SGD(own_model.parameters(), LR)], settings(1))
    for make in (adamw, partial(muon_and_adamw, adamw_lr=LR)):
        with pytest.raises(ValueError, match=message):
            make(own_model, lr=LR)


def test_frozen_weights_may_have_fewer_bits(own_model: GPT2) -> None:
    frozen = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16), requires_grad=False)
    own_model.frozen = frozen
    optimizer = SGD(own_model.parameters(), LR)  # it may hold frozen parameters as well
    train(own_model, ragged_batches(), [optimizer], settings(1))
