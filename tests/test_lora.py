"""LoRA: what it may change and what not; and adapters exchanged with PEFT, both ways."""

import copy
import itertools
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import run
from conftest import TINY, enlarge, random_ids
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from gpt2mini import GPT2, GPT2Config
from gpt2mini.checkpoints import CheckpointError
from gpt2mini.lora import (
    TARGETS,
    LoRALinear,
    add_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    save_adapter,
    unmerge_lora,
    with_shared_weights,
)
from gpt2mini.losses import next_token_loss
from gpt2mini.preferences.named_rewards import load_reward_model
from gpt2mini.surgery import first_blocks

EVERYTHING = tuple(TARGETS)
PRECISION = 1e-5
ids = random_ids(2, 9)


def randomize(model: GPT2) -> None:
    """Adapters that do something, as training leaves them."""
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1)


def base_state(model: GPT2) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}


def assert_same_state(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.fixture
def adapted(own_model: GPT2) -> GPT2:
    add_lora(own_model, rank=3, alpha=7, targets=EVERYTHING)
    randomize(own_model)
    return own_model


# ---- what it is


def test_the_formula(own_model: GPT2) -> None:
    """h = W x + b + (alpha / rank) B A x, written out."""
    base: Any = copy.deepcopy(own_model.trf_blocks[0].get_submodule("attn.query"))
    add_lora(own_model, rank=4, alpha=6, targets=["query"])
    randomize(own_model)
    layer = lora_layers(own_model)["trf_blocks.0.attn.query"]
    x = torch.randn(5, TINY.emb_dim)
    expected = x @ base.weight.T + base.bias + 6 / 4 * (x @ layer.lora_A.T) @ layer.lora_B.T
    assert_close(layer(x), expected)


def test_rank_stabilized_scaling(own_model: GPT2) -> None:
    add_lora(own_model, rank=4, alpha=6, rank_stabilized=True)
    assert lora_layers(own_model)["trf_blocks.0.attn.query"].scaling == 6 / 2


@settings(max_examples=20, deadline=None)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 5),
    layers=st.integers(1, 3),
    rank=st.integers(1, 9),
    targets=st.sets(st.sampled_from(EVERYTHING), min_size=1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    qkv_bias=st.booleans(),
)
def test_at_the_start_nothing_has_changed(
    heads: int,
    head_dim: int,
    layers: int,
    rank: int,
    targets: set[str],
    dtype: torch.dtype,
    qkv_bias: bool,
) -> None:
    config = GPT2Config(11, 6, heads * head_dim, heads, layers, qkv_bias=qkv_bias)
    model = GPT2(config).to(dtype).eval()
    before = model(ids[:, :6] % 11)
    add_lora(model, rank=rank, targets=sorted(targets))
    assert torch.equal(model(ids[:, :6] % 11), before)
    wide = torch.promote_types(dtype, torch.float32)
    assert {layer.lora_A.dtype for layer in lora_layers(model).values()} == {wide}
    assert len(lora_layers(model)) == layers * len(targets)


@pytest.mark.parametrize("targets", [("query",), ("query", "value"), EVERYTHING])
def test_only_the_adapters_learn_and_the_base_keeps_every_bit(
    own_model: GPT2, targets: tuple[str, ...]
) -> None:
    before = base_state(own_model)
    add_lora(own_model, rank=2, targets=targets)
    learning = [n for n, p in own_model.named_parameters() if p.requires_grad]
    assert learning and all(name.endswith(("lora_A", "lora_B")) for name in learning)
    start = {n: p.clone() for n, p in own_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in own_model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # in the first step B is zero, and A has no gradient
        loss_sum, _ = next_token_loss(own_model(ids), ids)
        loss_sum.backward()
        optimizer.step()
    assert_same_state(base_state(own_model), before)
    for name, parameter in own_model.named_parameters():
        assert not parameter.requires_grad or not torch.equal(parameter, start[name]), name


def test_dropout_is_on_the_low_path_and_in_training_only(own_model: GPT2) -> None:
    before = own_model(ids)
    add_lora(own_model, rank=2, dropout=0.5)
    own_model.train()
    assert_close(own_model(ids), before)  # B is zero
    randomize(own_model)
    assert not torch.equal(own_model(ids), own_model(ids))
    own_model.eval()
    assert torch.equal(own_model(ids), own_model(ids))


def test_train_and_eval_change_no_number(adapted: GPT2) -> None:
    before = adapted(ids)
    state = {n: t.clone() for n, t in adapted.state_dict().items()}
    assert torch.equal(adapted.train()(ids), before)
    assert torch.equal(adapted.eval()(ids), before)
    assert_same_state(adapted.state_dict(), state)


# ---- disabled


def test_disabled_it_is_the_base_exactly(own_model: GPT2) -> None:
    before = own_model(ids)
    add_lora(own_model, targets=EVERYTHING)
    randomize(own_model)
    adapted = own_model(ids)
    assert not torch.equal(adapted, before)
    with lora_disabled(own_model):
        assert torch.equal(own_model(ids), before)
        with lora_disabled(own_model):
            pass
        assert torch.equal(own_model(ids), before), "the inner one must not enable"
    assert torch.equal(own_model(ids), adapted)


def test_after_an_exception_it_is_enabled_again(adapted: GPT2) -> None:
    before = adapted(ids)
    with pytest.raises(KeyError), lora_disabled(adapted):
        raise KeyError
    assert torch.equal(adapted(ids), before)


def test_what_is_not_there_or_merged_cannot_be_disabled(own_model: GPT2) -> None:
    with pytest.raises(ValueError, match="is not there"), lora_disabled(own_model):
        pass
    add_lora(own_model)
    merge_lora(own_model)
    with pytest.raises(ValueError, match="unmerge_lora"), lora_disabled(own_model):
        pass


# ---- merged


@pytest.mark.parametrize("target", EVERYTHING)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_merged_equals_unmerged(own_model: GPT2, target: str, rank_stabilized: bool) -> None:
    add_lora(own_model, rank=3, alpha=5, targets=[target], rank_stabilized=rank_stabilized)
    randomize(own_model)
    before = own_model(ids)
    merge_lora(own_model)
    assert_close(own_model(ids), before, atol=PRECISION, rtol=PRECISION)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerged_everything_is_back_bit_for_bit(adapted: GPT2, dtype: torch.dtype) -> None:
    adapted.to(dtype)
    state = {n: t.clone() for n, t in adapted.state_dict().items()}
    before = adapted(ids)
    for _ in range(3):
        merge_lora(adapted)
        unmerge_lora(adapted)
    assert_same_state(adapted.state_dict(), state)
    assert torch.equal(adapted(ids), before)
    assert all(p.requires_grad == ("lora_" in n) for n, p in adapted.named_parameters())


def test_merging_twice_and_unmerging_what_is_not_merged_are_errors(adapted: GPT2) -> None:
    with pytest.raises(ValueError, match="no merged adapter"):
        unmerge_lora(adapted)
    merge_lora(adapted)
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(adapted)


def test_merged_it_is_a_plain_gpt2_that_transformers_opens(adapted: GPT2, tmp_path: Path) -> None:
    merge_lora(adapted)
    adapted.save_pretrained(tmp_path)
    expected = adapted(ids)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), expected, atol=0, rtol=0)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_close(theirs(ids).logits, expected, atol=1e-4, rtol=0)


def test_a_model_with_adapters_is_not_saved_as_a_whole(adapted: GPT2, tmp_path: Path) -> None:
    message = r"unknown \['trf_blocks.0.attn.*lora.*merge_lora\(model\) first, or save_adapter"
    with pytest.raises(ValueError, match=message):
        adapted.save_pretrained(tmp_path)


def test_merging_draws_no_random_number(adapted: GPT2) -> None:
    before = torch.get_rng_state()
    merge_lora(adapted)
    unmerge_lora(adapted)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_is_whole_and_apart(adapted: GPT2, merged: bool) -> None:
    before = adapted(ids)
    if merged:
        merge_lora(adapted)
    twin = copy.deepcopy(adapted)
    assert torch.equal(twin(ids), adapted(ids))
    if merged:
        unmerge_lora(twin)
    for layer in lora_layers(twin).values():
        nn.init.ones_(layer.lora_B)
    assert not torch.equal(twin(ids), before)
    assert_close(adapted(ids), before, atol=PRECISION, rtol=PRECISION)


def test_the_state_dict_takes_adapters_to_another_model(adapted: GPT2) -> None:
    other = GPT2(TINY).eval()
    add_lora(other, rank=3, alpha=7, targets=EVERYTHING)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(ids), adapted(ids))


# ---- another kind of adapter


class DoRALinear(LoRALinear):
    """Liu et al. 2024, "DoRA", equation 5: rows of the direction W + B A, of learned lengths."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        norms = self.weight.float().norm(dim=1, keepdim=True)  # (out, 1)
        self.lora_magnitude = nn.Parameter(norms)

    def merged_weight(self) -> torch.Tensor:
        direction = super().merged_weight()
        length = direction.norm(dim=1, keepdim=True).detach()  # a constant (section 4.3)
        return (self.lora_magnitude * direction / length).to(self.weight.dtype)

    def adapted(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, self.merged_weight(), self.bias)


def test_another_kind_learns_in_float32_on_a_base_of_half_precision(own_model: GPT2) -> None:
    model = own_model.bfloat16()
    add_lora(model, layer=DoRALinear)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in learning} == {torch.float32}
    model(ids).float().sum().backward()
    assert all(parameter.grad is not None for parameter in learning)


DORA_TARGETS = {  # ours -> published, one to one
    "attn.attn_out": "attn.c_proj",
    "mlp.mlp_in": "mlp.c_fc",
    "mlp.mlp_out": "mlp.c_proj",
}


@pytest.fixture
def dora(own_model: GPT2) -> GPT2:
    targets = ("attn_out", "mlp_in", "mlp_out")
    add_lora(own_model, rank=3, alpha=7, targets=targets, layer=DoRALinear)
    return own_model


def randomize_dora(model: GPT2) -> None:
    randomize(model)
    for layer in lora_layers(model).values():
        assert isinstance(layer, DoRALinear)
        layer.lora_magnitude.data *= 1 + 0.2 * torch.rand(layer.out_features, 1)


def test_dora_starts_as_the_base_and_trains_its_own_parameters_alone(
    dora: GPT2, tiny_model: GPT2
) -> None:
    assert_close(dora(ids), tiny_model(ids), atol=1e-4, rtol=1e-5)
    with lora_disabled(dora):
        assert torch.equal(dora(ids), tiny_model(ids))
    learning = {n.rsplit(".")[-1] for n, p in dora.named_parameters() if p.requires_grad}
    assert learning == {"lora_A", "lora_B", "lora_magnitude"}


def test_merged_dora_is_dora(dora: GPT2) -> None:
    randomize_dora(dora)
    before = dora(ids)
    merge_lora(dora)
    assert not lora_layers(dora)
    assert_close(dora(ids), before, atol=PRECISION, rtol=PRECISION)
    unmerge_lora(dora)
    assert torch.equal(dora(ids), before)


def test_dora_is_that_of_peft(dora: GPT2, tiny_model: GPT2, tmp_path: Path) -> None:
    """Values and gradients."""
    randomize_dora(dora)
    tiny_model.save_pretrained(tmp_path)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        use_dora=True,
        target_modules=list(DORA_TARGETS.values()),
        fan_in_fan_out=True,
    )
    theirs: Any = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path), config).eval()
    parameters = dict(theirs.named_parameters())
    pairs = []
    layers: dict[str, Any] = dict(lora_layers(dora))
    for name, layer in layers.items():
        block, path = name.removeprefix("trf_blocks.").split(".", 1)
        prefix = f"base_model.model.transformer.h.{block}.{DORA_TARGETS[path]}"
        pairs += [
            (layer.lora_A, parameters[f"{prefix}.lora_A.default.weight"]),
            (layer.lora_B, parameters[f"{prefix}.lora_B.default.weight"]),
            (layer.lora_magnitude, parameters[f"{prefix}.lora_magnitude_vector.default.weight"]),
        ]
    for ours, their in pairs:
        their.data.copy_(ours.detach().view_as(their))
    logits, their_logits = dora(ids), theirs(ids).logits
    assert_close(their_logits, logits, atol=1e-4, rtol=0)
    next_token_loss(logits, ids)[0].backward()
    next_token_loss(their_logits, ids)[0].backward()
    for ours, their in pairs:
        assert ours.grad is not None and their.grad is not None
        assert_close(their.grad.view_as(ours), ours.grad, atol=1e-3, rtol=1e-3)


def test_dora_has_no_place_in_the_files_of_plain_lora(dora: GPT2, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hold plain LoRA, not DoRALinear: merge_lora\(model\)"):
        save_adapter(dora, tmp_path)
    assert not list(tmp_path.iterdir())
    merge_lora(dora)
    dora.save_pretrained(tmp_path)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), dora(ids))


# ---- refused


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_layer_whose_own_computation_would_be_lost_is_refused(own_model: GPT2) -> None:
    query: Any = own_model.trf_blocks[1].get_submodule("attn.query")
    hook = query.register_forward_hook(lambda module, arguments, output: 2 * output)
    with hook, pytest.raises(ValueError, match=r"cannot be adapted.*has forward hooks"):
        add_lora(own_model)
    own_model.trf_blocks[1].attn.query = Scaled(48, 48)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"Scaled.* cannot be adapted.*a forward of its own"):
        add_lora(own_model)
    assert not lora_layers(own_model)
    assert all(parameter.requires_grad for parameter in own_model.parameters())


@pytest.mark.parametrize("target", ["tok_emb", "out_head", "lm_head"])
def test_a_tied_tensor_is_refused_with_the_reason(own_model: GPT2, target: str) -> None:
    with pytest.raises(ValueError, match="embedding and output head are one tensor"):
        add_lora(own_model, targets=["query", target])
    assert not lora_layers(own_model)


@pytest.mark.parametrize("targets", [["c_attn"], [], "query"])
def test_unknown_targets_are_answered_with_the_choices(own_model: GPT2, targets: Any) -> None:
    with pytest.raises(ValueError, match="query, key, value, attn_out, mlp_in, mlp_out"):
        add_lora(own_model, targets=targets)


@pytest.mark.parametrize(
    "numbers",
    [{"rank": 0}, {"rank": 2.5}, {"alpha": 0}, {"alpha": math.nan}, {"alpha": math.inf}],
)
@pytest.mark.usefixtures("no_shape_checks")  # they would catch the half rank first
def test_impossible_numbers_are_refused(own_model: GPT2, numbers: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_lora(own_model, **numbers)
    assert all(parameter.requires_grad for parameter in own_model.parameters())


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan])
def test_an_impossible_dropout_is_refused(own_model: GPT2, dropout: float) -> None:
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, not"):
        add_lora(own_model, dropout=dropout)
    assert all(parameter.requires_grad for parameter in own_model.parameters())


def test_a_second_adapter_of_the_same_name_is_refused(adapted: GPT2, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    before = adapted(ids)
    message = r"has adapters already, one of them called 'default'.*merge_lora.*name=\.\.\."
    with pytest.raises(ValueError, match=message):
        add_lora(adapted)
    with pytest.raises(ValueError, match=message):
        load_adapter(adapted, tmp_path)
    assert torch.equal(adapted(ids), before)


# ---- saved and loaded


TARGET_SETS = [
    ("query",),
    ("key",),
    ("value",),
    ("query", "value"),
    ("query", "key", "value"),
    ("attn_out",),
    ("mlp_in", "mlp_out"),
    EVERYTHING,
]


@pytest.fixture
def base_folder(tiny_model: GPT2, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("targets", TARGET_SETS, ids="+".join)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_saved_and_loaded_it_is_the_same_adapter(
    own_model: GPT2, tmp_path: Path, targets: tuple[str, ...], rank_stabilized: bool
) -> None:
    fresh = copy.deepcopy(own_model)
    add_lora(own_model, 3, 7, 0.25, targets, rank_stabilized)
    randomize(own_model)
    save_adapter(own_model, tmp_path)
    load_adapter(fresh, tmp_path)
    assert_same_state(fresh.state_dict(), dict(own_model.state_dict()))
    assert_close(fresh(ids), own_model(ids), atol=PRECISION, rtol=PRECISION)
    for found, expected in zip(
        lora_layers(fresh).values(), lora_layers(own_model).values(), strict=True
    ):
        assert (found.rank, found.lora_dropout.p) == (3, 0.25)
        assert found.scaling == pytest.approx(expected.scaling)
    assert all(p.requires_grad == ("lora_" in n) for n, p in fresh.named_parameters())


@pytest.mark.parametrize("targets", TARGET_SETS, ids="+".join)
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_peft_reads_our_adapters(
    own_model: GPT2,
    base_folder: Path,
    tmp_path: Path,
    targets: tuple[str, ...],
    rank_stabilized: bool,
) -> None:
    add_lora(own_model, 3, 7, targets=targets, rank_stabilized=rank_stabilized)
    randomize(own_model)
    save_adapter(own_model, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base_folder), tmp_path / "adapter"
    ).eval()
    assert_close(theirs(ids).logits, own_model(ids), atol=1e-4, rtol=0)


PEFT_TARGETS = [
    ["c_attn"],
    ["attn.c_proj"],
    ["mlp.c_proj"],
    ["c_fc"],
    ["c_attn", "c_proj", "c_fc"],
]


def random_peft(base: Any, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(fan_in_fan_out=True, **settings)
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("targets", PEFT_TARGETS, ids="+".join)
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 3, "lora_alpha": 5},
        {"r": 4, "lora_alpha": 5, "use_rslora": True},
        {"r": 2, "rank_pattern": {"TARGET": 5}, "alpha_pattern": {r"h\.1\..*TARGET": 9}},
        {"r": 2, "layers_to_transform": [1], "layers_pattern": "h"},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_we_read_peft_s_adapters(
    own_model: GPT2, base_folder: Path, tmp_path: Path, targets: list[str], settings: Any
) -> None:
    settings = json.loads(json.dumps(settings).replace("TARGET", targets[0]))
    theirs = random_peft(
        GPT2LMHeadModel.from_pretrained(base_folder), target_modules=targets, **settings
    )
    theirs.save_pretrained(tmp_path / "adapter")
    fresh = copy.deepcopy(own_model)
    load_adapter(own_model, tmp_path / "adapter")
    assert_close(own_model(ids), theirs(ids).logits, atol=1e-4, rtol=0)

    save_adapter(own_model, tmp_path / "again")
    load_adapter(fresh, tmp_path / "again")
    assert_close(fresh(ids), own_model(ids), atol=PRECISION, rtol=PRECISION)
    peft_again = peft.PeftModel.from_pretrained(
        GPT2LMHeadModel.from_pretrained(base_folder), tmp_path / "again"
    ).eval()
    assert_close(peft_again(ids).logits, own_model(ids), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:lora with eva")  # a wish for more memory
@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva"])
def test_we_read_peft_s_adapters_however_they_began(
    own_model: GPT2, base_folder: Path, tmp_path: Path, init: Any
) -> None:
    """As long as that left the base as it is."""
    settings = {"eva_config": peft.EvaConfig()} if init == "eva" else {}
    base = GPT2LMHeadModel.from_pretrained(base_folder)
    theirs = random_peft(base, r=4, target_modules=["c_attn"], init_lora_weights=init, **settings)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(own_model, tmp_path / "adapter")
    assert_close(own_model(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_we_read_peft_s_adapter_of_a_classifier_with_its_head(
    own_model: GPT2, base_folder: Path, tmp_path: Path
) -> None:
    base = GPT2ForSequenceClassification.from_pretrained(base_folder, num_labels=3, pad_token_id=0)
    theirs = random_peft(base, target_modules=["c_attn"], task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(own_model, tmp_path / "adapter")
    texts = 1 + ids % (TINY.vocab_size - 1)
    assert_close(own_model(texts)[:, -1], theirs(texts).logits, atol=1e-4, rtol=0)


def test_peft_reads_our_adapter_of_a_classifier_with_its_head(
    own_model: GPT2, base_folder: Path, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)
    add_lora(own_model)
    randomize(own_model)
    save_adapter(own_model, tmp_path / "adapter")
    base = GPT2ForSequenceClassification.from_pretrained(base_folder, num_labels=3, pad_token_id=0)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    texts = 1 + ids % (TINY.vocab_size - 1)
    assert_close(theirs(texts).logits, own_model(texts)[:, -1], atol=1e-4, rtol=0)


def test_peft_reads_our_adapter_with_a_token_head(
    own_model: GPT2, base_folder: Path, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.save_pretrained(base_folder)
    fresh = copy.deepcopy(own_model)
    add_lora(own_model)
    own_model.out_head.weight.requires_grad_(True)
    randomize(own_model)
    nn.init.normal_(own_model.out_head.weight)
    save_adapter(own_model, tmp_path / "adapter")
    base = GPT2LMHeadModel.from_pretrained(base_folder)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_close(theirs(ids).logits, own_model(ids), atol=1e-4, rtol=0)
    load_adapter(fresh, tmp_path / "adapter")
    assert_close(fresh(ids), own_model(ids), atol=PRECISION, rtol=PRECISION)


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")
def test_we_read_peft_s_adapter_with_a_token_head(
    own_model: GPT2, base_folder: Path, tmp_path: Path
) -> None:
    """Over a tied base: PEFT trains a copy of the embedding as the head."""
    base = GPT2LMHeadModel.from_pretrained(base_folder)
    theirs = random_peft(base, target_modules=["c_attn"], modules_to_save=["lm_head"])
    with torch.no_grad():
        theirs.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(own_model, tmp_path / "adapter")
    assert_close(own_model(ids), theirs(ids).logits, atol=1e-4, rtol=0)


def test_a_classifier_s_adapter_fits_a_base_with_a_token_head_of_its_own(
    own_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    base = copy.deepcopy(own_model)
    add_lora(own_model)
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    randomize(own_model)
    save_adapter(own_model, tmp_path)
    load_adapter(base, tmp_path)
    assert_close(base(ids), own_model(ids), atol=PRECISION, rtol=PRECISION)


@pytest.mark.parametrize("bias", [False, True])
def test_a_head_comes_back_with_the_adapter(
    own_model: GPT2, tmp_path: Path, bias: bool, caplog: pytest.LogCaptureFixture
) -> None:
    fresh = copy.deepcopy(own_model)
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=bias)
    add_lora(own_model)
    randomize(own_model)
    own_model.out_head.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        save_adapter(own_model, tmp_path)
    assert ("bias" in caplog.text) == bias
    load_adapter(fresh, tmp_path)
    assert_close(fresh(ids), own_model(ids), atol=PRECISION, rtol=PRECISION)
    assert all(p.requires_grad for p in fresh.out_head.parameters())


def test_loading_draws_no_random_number(adapted: GPT2, tiny_model: GPT2, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    fresh, before = copy.deepcopy(tiny_model), torch.get_rng_state()
    load_adapter(fresh, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["final_norm", "tok_emb"])
def test_what_the_files_cannot_hold_is_not_left_out(
    adapted: GPT2, tmp_path: Path, name: str
) -> None:
    adapted.get_submodule(name).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"would be lost: {name}.weight.*merge_lora"):
        save_adapter(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- adapters and whole models share no folder

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_classifier_saved_over_its_adapter_is_that_classifier_to_transformers(
    own_model: GPT2, tmp_path: Path
) -> None:
    """PEFT is installed: an adapter left in the folder would be applied once more."""
    own_model.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)
    add_lora(own_model, targets=EVERYTHING)
    randomize(own_model)
    save_adapter(own_model, tmp_path)
    merge_lora(own_model)
    own_model.save_pretrained(tmp_path, class_names=["a", "b", "c"])
    assert not ADAPTER_FILES & names_in(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    texts = ids % (TINY.vocab_size - 1)  # without its padding
    assert_close(theirs(texts).logits, own_model(texts)[:, -1], atol=1e-4, rtol=0)


def test_a_folder_with_a_model_and_an_adapter_is_refused(
    base_folder: Path,
) -> None:
    """`transformers` would apply the adapter, which PEFT leaves there if told to."""
    peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(base_folder), peft.LoraConfig(fan_in_fan_out=True)
    ).save_pretrained(str(base_folder))
    with pytest.raises(CheckpointError, match="a whole model and an adapter"):
        GPT2.from_pretrained(base_folder)


def test_another_model_saved_over_an_adapter_is_that_model_to_transformers(
    adapted: GPT2, tmp_path: Path
) -> None:
    save_adapter(adapted, tmp_path)
    other = GPT2(TINY).eval()
    enlarge(other, seed=1)
    other.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(theirs(ids).logits, other(ids), atol=1e-4, rtol=0)


def test_a_failed_save_leaves_the_adapter(
    adapted: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted, tmp_path)
    merge_lora(adapted)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("gpt2mini.checkpoints.huggingface.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        adapted.save_pretrained(tmp_path)
    assert names_in(tmp_path) == ADAPTER_FILES


def test_an_adapter_takes_the_place_of_an_earlier_run_s_model(
    own_model: GPT2, tmp_path: Path
) -> None:
    for _ in range(2):
        model = copy.deepcopy(own_model)
        add_lora(model, targets=EVERYTHING)
        randomize(model)
        save_adapter(model, tmp_path, replace=True)
        assert names_in(tmp_path) == ADAPTER_FILES
        expected = model(ids)
        merge_lora(model)
        model.save_pretrained(tmp_path)
        assert not ADAPTER_FILES & names_in(tmp_path)
        assert_close(GPT2.from_pretrained(tmp_path)(ids), expected, atol=PRECISION, rtol=PRECISION)
    add_lora(own_model)
    with pytest.raises(ValueError, match=r"holds a whole model.*or pass replace=True"):
        save_adapter(own_model, tmp_path)
    assert not ADAPTER_FILES & names_in(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_does_not_push_its_own_base_out(
    own_model: GPT2, base_folder: Path, dtype: torch.dtype
) -> None:
    before = names_in(base_folder)
    own_model.to(dtype)
    add_lora(own_model)
    with pytest.raises(ValueError, match=r"base holds the base model of the adapter"):
        save_adapter(own_model, base_folder, replace=True)
    assert names_in(base_folder) == before


def test_an_adapter_leaves_a_model_of_another_kind_alone(adapted: GPT2, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    with pytest.raises(ValueError, match="type 'llama'"):
        save_adapter(adapted, tmp_path, replace=True)
    assert names_in(tmp_path) == {"config.json"}


def test_a_reward_model_is_the_whole_one_or_the_adapter(
    own_model: GPT2, tiny_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 1, bias=False)
    add_lora(own_model)
    randomize(own_model)
    save_adapter(own_model, tmp_path)
    expected = own_model(ids)
    assert_close(
        load_reward_model(tmp_path, None, copy.deepcopy(tiny_model))(ids),
        expected,
        atol=1e-5,
        rtol=1e-5,
    )
    merge_lora(own_model)
    own_model.save_pretrained(tmp_path)
    assert_close(load_reward_model(tmp_path, None, None)(ids), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_s_folder_is_no_model_and_says_what_it_is(adapted: GPT2, tmp_path: Path) -> None:
    save_adapter(adapted, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds an adapter .*load_adapter\(model, folder\)"):
        GPT2.from_pretrained(tmp_path)


# ---- from the shell


@pytest.fixture(scope="module")
def nano_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = GPT2.from_pretrained("gpt2-nano")
    add_lora(model, rank=2)
    randomize(model)
    save_adapter(model, folder := tmp_path_factory.mktemp("nano"))
    return folder


def test_generate_continues_with_an_adapter(nano_adapter: Path) -> None:
    prompt = ("--prompt", "The ship", "--max-new-tokens", "8", "--temperature", "0")
    plain = run("generate", *prompt)
    adapted = run("generate", *prompt, "--adapter", nano_adapter, "--quantize", "bf16")
    assert adapted.returncode == 0, adapted.stderr
    assert adapted.stdout.startswith("The ship") and adapted.stdout != plain.stdout


def test_inspect_compares_with_an_adapter(nano_adapter: Path, tmp_path: Path) -> None:
    done = run("inspect", "compare", "--other", nano_adapter, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    changed = {row["name"] for row in found["parameters"] if row["maximum"] > 0}
    assert changed and all(name.endswith(("query.weight", "value.weight")) for name in changed)


# ---- adapters that do not belong to the model


def rewrite(path: Path, change: Any) -> None:
    tensors = change(load_file(path / "adapter_model.safetensors"))
    save_file(tensors, path / "adapter_model.safetensors")


@pytest.fixture
def saved(adapted: GPT2, tmp_path: Path) -> Iterator[Path]:
    """An adapter; whatever the test does, a model that refuses it is left as it was."""
    save_adapter(adapted, tmp_path / "adapter")
    yield tmp_path / "adapter"


def test_an_adapter_of_other_weights_is_refused(saved: Path, own_model: GPT2) -> None:
    other = GPT2(TINY).eval()
    enlarge(other)
    before = {n: (t.clone(), t.requires_grad) for n, t in other.named_parameters()}
    with pytest.raises(CheckpointError, match=r"trained on another base model: tok_emb.weight"):
        load_adapter(other, saved)
    assert {n: t.requires_grad for n, t in other.named_parameters()} == {
        n: flag for n, (_, flag) in before.items()
    }
    assert not lora_layers(other)


def test_the_same_base_in_another_dtype_is_the_same(saved: Path, tiny_model: GPT2) -> None:
    twin = copy.deepcopy(tiny_model).bfloat16()
    load_adapter(twin, saved)
    assert {layer.lora_A.dtype for layer in lora_layers(twin).values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_that_was_saved_in_fewer_bits_is_the_same(
    saved: Path, tiny_model: GPT2, tmp_path: Path, dtype: torch.dtype
) -> None:
    tiny_model.save_pretrained(tmp_path, dtype=dtype)
    load_adapter(GPT2.from_pretrained(tmp_path), saved)  # in float32
    rounded = GPT2.from_pretrained(tmp_path)
    add_lora(rounded)
    save_adapter(rounded, tmp_path / "of the rounded")
    load_adapter(copy.deepcopy(tiny_model), tmp_path / "of the rounded")


def test_a_frozen_head_of_the_base_s_own_is_part_of_it(own_model: GPT2, tmp_path: Path) -> None:
    tied = copy.deepcopy(own_model)
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    twin = copy.deepcopy(own_model)
    add_lora(own_model)
    save_adapter(own_model, tmp_path)
    load_adapter(twin, tmp_path)
    with pytest.raises(CheckpointError, match=r"another base model: out_head.weight has None here"):
        load_adapter(tied, tmp_path)


def test_a_base_with_a_head_of_its_own_is_not_pushed_out(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.save_pretrained(tmp_path)
    add_lora(own_model)
    with pytest.raises(ValueError, match="holds the base model of the adapter"):
        save_adapter(own_model, tmp_path, replace=True)


def test_a_head_that_the_files_have_no_place_for_is_refused(adapted: GPT2, tmp_path: Path) -> None:
    adapted.out_head = nn.Sequential(nn.Linear(TINY.emb_dim, 3))
    with pytest.raises(ValueError, match=r"have a place for nn.Linear\(48, classes\)"):
        save_adapter(adapted, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_switched_off_adapter_is_not_merged(adapted: GPT2) -> None:
    with lora_disabled(adapted), pytest.raises(ValueError, match="switched off"):
        merge_lora(adapted)


def test_a_second_model_on_the_same_weights_freezes_its_own(own_model: GPT2) -> None:
    second = with_shared_weights(own_model)
    add_lora(second)
    assert all(parameter.requires_grad for parameter in own_model.parameters())
    assert second.tok_emb.weight.data_ptr() == own_model.tok_emb.weight.data_ptr()


@pytest.mark.parametrize("changes", [{"emb_dim": 96}, {"n_layers": 2}])
def test_an_adapter_of_another_shape_is_refused(saved: Path, changes: dict[str, int]) -> None:
    config = GPT2Config(**{**vars(TINY), **changes})
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors .*for another model"):
        load_adapter(GPT2(config), saved)


def test_an_adapter_of_the_first_blocks_is_refused_on_all(own_model: GPT2, tmp_path: Path) -> None:
    shallow = copy.deepcopy(first_blocks(own_model, 1))
    add_lora(shallow)
    save_adapter(shallow, tmp_path)
    with pytest.raises(CheckpointError, match=r"trf_blocks\.1\..* is not in that one"):
        load_adapter(own_model, tmp_path)


def test_first_blocks_are_not_called_the_model_s_folder(base_folder: Path, tmp_path: Path) -> None:
    shallow = first_blocks(GPT2.from_pretrained(base_folder), 1)
    add_lora(shallow)
    save_adapter(shallow, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] is None


def test_an_adapter_of_a_head_tied_by_hand_loads_on_its_base(
    own_model: GPT2, tiny_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.out_head.weight = own_model.tok_emb.weight
    add_lora(own_model)
    save_adapter(own_model, tmp_path)
    load_adapter(copy.deepcopy(tiny_model), tmp_path)


def test_a_wrong_rank_is_refused(saved: Path, tiny_model: GPT2) -> None:
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    config["r"] = 5
    (saved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the config says rank 5"):
        load_adapter(copy.deepcopy(tiny_model), saved)


def test_a_missing_head_is_refused(own_model: GPT2, tiny_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    add_lora(own_model)
    save_adapter(own_model, tmp_path)
    rewrite(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if "score" not in n})
    with pytest.raises(CheckpointError, match=r"the head .* is missing"):
        load_adapter(copy.deepcopy(tiny_model), tmp_path)


def test_a_head_of_other_classes_is_refused(own_model: GPT2, tmp_path: Path) -> None:
    other = copy.deepcopy(own_model)
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    add_lora(own_model)
    save_adapter(own_model, tmp_path)
    other.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)
    with pytest.raises(CheckpointError, match="has 2 classes; the model's has 3"):
        load_adapter(other, tmp_path)


def test_half_an_adapter_is_refused(saved: Path, tiny_model: GPT2) -> None:
    rewrite(saved, lambda tensors: dict(itertools.islice(tensors.items(), 1)))
    with pytest.raises(CheckpointError, match="has only its"):
        load_adapter(copy.deepcopy(tiny_model), saved)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("use_dora", True),
        ("bias", "all"),
        ("peft_type", "IA3"),
        ("r", 0),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "corda"),
    ],
)
def test_another_method_is_refused_by_name(
    saved: Path, tiny_model: GPT2, setting: str, value: object
) -> None:
    config = json.loads((saved / "adapter_config.json").read_text(encoding="utf-8"))
    config[setting] = value
    (saved / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"adapter_config.json .*{setting} is"):
        load_adapter(copy.deepcopy(tiny_model), saved)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_truncated_file_is_named(saved: Path, tiny_model: GPT2, name: str) -> None:
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=name):
        load_adapter(copy.deepcopy(tiny_model), saved)
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_adapter(copy.deepcopy(tiny_model), saved)


def test_what_is_not_adapted_or_is_merged_is_not_saved(own_model: GPT2, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(own_model, tmp_path)
    add_lora(own_model)
    merge_lora(own_model)
    with pytest.raises(ValueError, match="unmerge_lora"):
        save_adapter(own_model, tmp_path)


def test_the_layer_is_a_linear_layer(adapted: GPT2) -> None:
    layer = lora_layers(adapted)["trf_blocks.0.attn.query"]
    assert isinstance(layer, LoRALinear) and isinstance(layer, nn.Linear)
    assert "lora_A" not in repr(layer) and "in_features=48" in repr(layer)
