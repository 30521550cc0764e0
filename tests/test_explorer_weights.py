"""Weights in the explorer page: packed and restored, and of a second model only what differs."""

import base64
import gzip
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import run
from conftest import enlarge, random_ids
from torch import Tensor, nn
from written_page import data_of, unpacked

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.inspection import mean_activations, trace
from gpt2mini.inspection.explorer import page_data, write_page
from gpt2mini.inspection.explorer.contents import page_contents
from gpt2mini.inspection.explorer.weights import pack_weights, with_packed_weights
from gpt2mini.lora import LoRALinear, add_lora, lora_disabled, merge_lora, save_adapter

QUERY = "trf_blocks.0.attn.query.weight"


def restored(index: dict[str, Any], blob: bytes) -> dict[str, np.ndarray]:
    """The tensors of a page, read as the page reads them."""
    stored = gzip.decompress(blob)
    found = {}
    for name, entry in index.items():
        shape = tuple(entry["shape"])
        size = int(np.prod(shape))
        assert entry["offset"] % 16 == 0
        numbers = np.frombuffer(stored, entry["dtype"], size, entry["offset"]).reshape(shape)
        found[name] = numbers.astype(np.float32)
        if "scale_offset" in entry:
            scales = np.frombuffer(stored, "<f4", shape[0], entry["scale_offset"])
            found[name] = found[name] * scales[:, None]
    return found


@pytest.mark.parametrize("precision", ["int8", "float16"])
@pytest.mark.parametrize("kind", ["tied", "untied", "head with bias", "no qkv bias"])
def test_a_model_with_the_packed_weights_has_the_numbers_of_the_page(
    precision: str, kind: str
) -> None:
    torch.manual_seed(0)
    config = GPT2Config(53, 16, emb_dim=20, n_heads=4, n_layers=2, qkv_bias=kind != "no qkv bias")
    model = GPT2(config)
    if kind in ("untied", "head with bias"):
        model.out_head = nn.Linear(20, 53, bias=kind == "head with bias")
    enlarge(model)
    numbers = restored(*pack_weights(model, precision))
    packed = with_packed_weights(model, precision)
    assert numbers.keys() == dict(packed.named_parameters()).keys()
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == torch.float32
        np.testing.assert_array_equal(parameter, numbers[name])
    assert not packed.training and not any(p.requires_grad for p in packed.parameters())
    ids = random_ids(2, 9) % 53
    with torch.no_grad():
        np.testing.assert_allclose(packed(ids), model.eval()(ids), atol=0.3)


def test_int8_rows_are_off_by_at_most_half_a_scale_and_vectors_are_exact(
    tiny_model: GPT2,
) -> None:
    index, blob = pack_weights(tiny_model, "int8")
    numbers = restored(index, blob)
    for name, weight in tiny_model.state_dict().items():
        if index[name]["dtype"] == "int8":
            half = weight.abs().amax(dim=1, keepdim=True).numpy() / 127 / 2
            assert (np.abs(numbers[name] - weight.numpy()) <= half * 1.001).all()
        elif name == "pos_emb.weight":
            np.testing.assert_array_equal(numbers[name], weight.half().float())
        else:
            assert weight.ndim == 1
            np.testing.assert_array_equal(numbers[name], weight)
    kinds = [entry["dtype"] for entry in index.values()]
    assert kinds.count("int8") == 1 + 3 * 6 and kinds.count("float16") == 1


def test_float16_is_half_precision_and_float32_where_that_does_not_reach(
    own_model: GPT2,
) -> None:
    own_model.get_parameter(QUERY).data[0, 0] = 1e5
    index, blob = pack_weights(own_model, "float16")
    assert index[QUERY]["dtype"] == "float32"
    assert restored(index, blob)[QUERY][0, 0] == np.float32(1e5)
    name = "tok_emb.weight"
    assert index[name]["dtype"] == "float16"
    expected = own_model.get_parameter(name).half().float().detach()
    np.testing.assert_array_equal(restored(index, blob)[name], expected)


def test_a_row_of_zeros_stays_zero_and_the_bytes_are_the_same_at_any_time(
    own_model: GPT2,
) -> None:
    own_model.get_parameter(QUERY).data[3] = 0
    first = pack_weights(own_model, "int8")
    assert not restored(*first)[QUERY][3].any()
    assert first == pack_weights(own_model, "int8")
    with pytest.raises(ValueError, match="precision must be 'int8' or 'float16', not 'int4'"):
        pack_weights(own_model, "int4")


def test_packing_draws_no_random_numbers_and_changes_nothing(own_model: GPT2) -> None:
    before = {name: weight.clone() for name, weight in own_model.state_dict().items()}
    state = torch.get_rng_state()
    with_packed_weights(own_model, "int8")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, before[name]) for name, w in own_model.state_dict().items())


def test_gpt2_nano_with_int8_rows_predicts_nearly_the_same(tokenizer: Tokenizer) -> None:
    nano = GPT2.from_pretrained("gpt2-nano")
    ids = torch.tensor([tokenizer.encode("The old keeper lit the lamp. Then the old keeper")])
    with torch.no_grad():
        shares = nano(ids)[0].softmax(dim=1)
        packed = with_packed_weights(nano, "int8")(ids)[0].softmax(dim=1)
    assert float((shares - packed).abs().max()) < 0.02
    assert torch.equal(shares.argmax(dim=1), packed.argmax(dim=1))


# ---- the page's check, and the means for ablation


@pytest.mark.parametrize("live", ["int8", "fp16"])
def test_the_check_and_the_recorded_numbers_are_of_the_packed_weights(
    word_model: GPT2, tokenizer: Tokenizer, live: str
) -> None:
    text = "The old keeper lit the lamp"
    (model,) = page_data(word_model, tokenizer, text, live=live)["models"]
    packed = with_packed_weights(word_model, "int8" if live == "int8" else "float16")
    ids = torch.tensor([tokenizer.encode(text)])
    assert model["recorded"]["token_ids"] == ids[0].tolist()
    check = model["check"]
    with torch.no_grad():
        logits = packed(torch.tensor([check["token_ids"]]))[0]
    longest = word_model.config.context_length  # all that the page can read
    assert len(check["token_ids"]) == longest < 128
    assert check["positions"] == [0, longest // 2, longest - 1]
    np.testing.assert_allclose(unpacked(check["logits"]), logits[check["positions"]], atol=1e-5)
    shares = unpacked(model["recorded"]["attention"])[2, 1] / 65535
    rows, columns = np.tril_indices(ids.shape[1])
    attention = trace(packed, ids)["blocks.2.attention"][0, 1]
    np.testing.assert_allclose(shares, attention.numpy()[rows, columns], atol=1e-5)


def test_means_are_those_of_the_packed_model_over_a_bundled_text(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    contents = page_contents(word_model, tokenizer, "a lamp", "", None, "", "int8")
    numbers = restored(contents.data["models"][0]["tensors"], contents.weights[0])
    packed = with_packed_weights(word_model, "int8")
    sample = Path(__file__).parents[1] / "gpt2mini" / "data" / "samples" / "general.txt"
    ids = tokenizer.encode(sample.read_text(encoding="utf-8"))
    texts = torch.tensor(ids[: len(ids) // 64 * 64]).view(-1, 64)
    names = ["blocks.1.head.0", "blocks.1.head.1", "blocks.1.mlp_out", "blocks.1.attn_out"]
    means = mean_activations(packed, texts, names)
    context = torch.cat([means["blocks.1.head.0"], means["blocks.1.head.1"]])
    np.testing.assert_allclose(numbers["means.blocks.1.context"], context, atol=1e-5)
    for part in ("mlp_out", "attn_out"):
        expected = means[f"blocks.1.{part}"]
        np.testing.assert_allclose(numbers[f"means.blocks.1.{part}"], expected, atol=1e-5)
    assert len([name for name in numbers if name.startswith("means.")]) == 9


# ---- a second model


def second_model(
    first: GPT2, other: GPT2, tokenizer: Tokenizer, live: str = "int8"
) -> tuple[dict[str, Any], dict[str, np.ndarray], bytes]:
    """(its data, its own tensors, its blob)"""
    contents = page_contents(first, tokenizer, "a lamp", "first", other, "second", live)
    data = contents.data["models"][1]
    assert data["name"] == "second"
    return data, restored(data["tensors"], contents.weights[1]), contents.weights[1]


def check_logits(data: dict[str, Any], expected: GPT2) -> None:
    """The page checks its engine with the logits of this model."""
    with torch.no_grad():
        logits = expected(torch.tensor([data["check"]["token_ids"]]))[0]
    found = unpacked(data["check"]["logits"])
    np.testing.assert_allclose(found, logits[data["check"]["positions"]], rtol=1e-4, atol=1e-4)


def without_means(tensors: dict[str, np.ndarray]) -> set[str]:
    return {name for name in tensors if not name.startswith("means.")}


def test_of_a_tuned_model_only_the_tensors_that_differ_are_stored(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    tuned = deepcopy(word_model)
    changed = {"trf_blocks.2.mlp.mlp_in.weight", "trf_blocks.2.mlp.mlp_in.bias"}
    for name in changed:
        tuned.get_parameter(name).data += 0.1
    data, tensors, _ = second_model(word_model, tuned, tokenizer)
    assert without_means(tensors) == changed and data["adapters"] == {}
    check_logits(data, with_packed_weights(tuned, "int8"))
    data, tensors, blob = second_model(word_model, deepcopy(word_model), tokenizer)
    assert without_means(tensors) == set() and len(blob) < 5000


def with_adapter(model: GPT2, layer: type[LoRALinear] = LoRALinear) -> GPT2:
    tuned = deepcopy(model)
    add_lora(tuned, rank=2, alpha=6, layer=layer)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if name.endswith(("lora_A", "lora_B")):
            parameter.data = 0.5 * torch.randn(parameter.shape, generator=generator)
    return tuned.eval()


def test_an_adapter_costs_its_own_bytes(word_model: GPT2, tokenizer: Tokenizer) -> None:
    tuned = with_adapter(word_model)
    data, tensors, blob = second_model(word_model, tuned, tokenizer)
    layers = [f"trf_blocks.{i}.attn.{part}" for i in range(3) for part in ("query", "value")]
    assert list(data["adapters"]) == layers
    assert without_means(tensors) == {f"{layer}.{x}" for layer in layers for x in ("A", "B")}
    numbers = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    means = 4 * sum(x.size for name, x in tensors.items() if name.startswith("means."))
    assert len(blob) < 2 * numbers + means + 500
    base = with_packed_weights(word_model, "int8")
    for layer, adapter in data["adapters"].items():
        a, b = tensors[adapter["A"]], tensors[adapter["B"]]
        assert adapter["scale"] == 3.0 and a.shape == (2, 16) and b.shape == (16, 2)
        base.get_parameter(f"{layer}.weight").data += 3.0 * torch.from_numpy(b @ a)
    check_logits(data, base)


def test_an_adapter_that_is_off_or_of_another_kind_or_on_another_base(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    class Doubled(LoRALinear):
        def adapted(self, input: Tensor) -> Tensor:
            return nn.functional.linear(input, self.merged_weight(), self.bias)

        def merged_weight(self) -> Tensor:
            return 2 * super().merged_weight()

    merged = merge_copy(with_adapter(word_model))
    other_kind = with_adapter(word_model, Doubled)
    # The page's engine knows plain low-rank adapters alone.
    with pytest.raises(ValueError, match=r"attn\.query is a Doubled, not a Linear"):
        second_model(word_model, other_kind, tokenizer)
    tuned = with_adapter(word_model)
    with lora_disabled(tuned):
        data, tensors, _ = second_model(word_model, tuned, tokenizer)
    assert data["adapters"] == {} and without_means(tensors) == set()
    # On another base (here: one into which an adapter is merged) the whole weights are stored.
    data, tensors, _ = second_model(merged, tuned, tokenizer)
    assert {type(x) for x in data["adapters"].values()} <= {dict}
    check_logits(data, with_packed_weights(tuned, "int8"))


def merge_copy(model: GPT2) -> GPT2:
    merged = deepcopy(model)
    merge_lora(merged)
    return merged


def test_a_merged_adapter_is_a_tuned_model(word_model: GPT2, tokenizer: Tokenizer) -> None:
    merged = merge_copy(with_adapter(word_model))
    data, tensors, _ = second_model(word_model, merged, tokenizer)
    assert data["adapters"] == {} and len(without_means(tensors)) == 6
    check_logits(data, with_packed_weights(merged, "int8"))


@pytest.mark.parametrize("first_is_untied", [True, False])
def test_a_tied_and_an_untied_head_beside_each_other(
    word_model: GPT2, tokenizer: Tokenizer, first_is_untied: bool
) -> None:
    untied = deepcopy(word_model)
    untied.out_head = nn.Linear(16, tokenizer.vocab_size)
    models = (untied, word_model) if first_is_untied else (word_model, untied)
    data, tensors, _ = second_model(*models, tokenizer)
    assert without_means(tensors) == {"out_head.weight", "out_head.bias"}
    check_logits(data, with_packed_weights(models[1], "int8"))


def test_a_second_model_of_another_shape_is_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    n = tokenizer.vocab_size
    for config in (
        GPT2Config(n, 64, emb_dim=32, n_heads=2, n_layers=3),
        GPT2Config(n, 64, emb_dim=16, n_heads=2, n_layers=2),
        GPT2Config(n, 64, emb_dim=16, n_heads=4, n_layers=3),
        GPT2Config(n, 64, emb_dim=16, n_heads=2, n_layers=3, qkv_bias=False),
        GPT2Config(n + 5, 64, emb_dim=16, n_heads=2, n_layers=3),
    ):
        for live in ("int8", "off"):
            with pytest.raises(ValueError, match="only models of the same shape"):
                page_data(word_model, tokenizer, "a", other=GPT2(config), live=live)


# ---- the command


def test_the_command_compares_with_a_model_or_an_adapter(
    word_model: GPT2, word_folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tuned = deepcopy(word_model)
    tuned.get_parameter("final_norm.bias").data += 0.5
    tuned.save_pretrained(tmp_path / "runs" / "best")
    tokenizer.save_pretrained(tmp_path / "runs" / "best")
    save_adapter(with_adapter(word_model), tmp_path / "adapter")
    page = tmp_path / "page.html"
    sizes = []
    for other, name in (("runs/best", "runs/best"), ("adapter", "adapter")):
        command = ("--model", word_folder, "--other", tmp_path / other, "--out", page)
        done = run("explore", *command, "--text", "a lamp")
        assert done.returncode == 0, done.stderr
        models = data_of(page)["models"]
        assert [model["name"] for model in models] == [word_folder.name, name]
        assert str(tmp_path) not in page.read_text(encoding="utf-8")
        blob = re.search(r'id="weights-1">([^<]*)<', page.read_text(encoding="utf-8"))
        assert blob
        sizes.append(len(base64.b64decode(blob[1])))
    assert len(models[1]["adapters"]) == 6
    assert max(sizes) < 6000


def test_the_command_refuses_another_vocabulary(
    word_folder: Path, word_model: GPT2, tmp_path: Path
) -> None:
    from gpt2mini.tokenizer import train_tokenizer

    other = train_tokenizer("a b c d a b", 260)
    word_model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    arguments = ("--other", tmp_path / "other", "--out", tmp_path / "page.html")
    done = run("explore", "--model", word_folder, *arguments)
    assert "has another vocabulary than" in done.stderr and not (tmp_path / "page.html").exists()


def test_a_merged_adapter_of_the_command_is_named_after_its_folder(
    word_model: GPT2, word_folder: Path, tmp_path: Path
) -> None:
    save_adapter(with_adapter(word_model), tmp_path / "run" / "best")
    page = tmp_path / "page.html"
    flags = ("--adapter", tmp_path / "run" / "best", "--out", page, "--live", "off")
    done = run("explore", "--model", word_folder, *flags, "--text", "a lamp")
    assert done.returncode == 0, done.stderr
    name = f"{word_folder.name} with the adapter run/best"
    assert data_of(page)["models"][0]["name"] == name


def test_pages_of_models_in_half_precision(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    half = deepcopy(word_model).bfloat16()
    for live in ("int8", "off"):
        written = write_page(half, tokenizer, "a lamp", tmp_path / f"{live}.html", live=live)
        assert (written.precision == "int8") == (live == "int8")
