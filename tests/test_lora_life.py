"""The life of an adapter: in half precision, merged and built upon, one of several, in files."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command import run
from conftest import TINY, enlarge, random_ids
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2mini import GPT2, Tokenizer, resize_vocab
from gpt2mini.checkpoints import CheckpointError
from gpt2mini.lora import (
    TARGETS,
    active_adapter,
    adapter_names,
    add_lora,
    load_adapter,
    lora_disabled,
    lora_layers,
    merge_lora,
    save_adapter,
    set_adapter,
    unmerge_lora,
    using_adapter,
)
from gpt2mini.losses import next_token_loss

EVERYTHING = tuple(TARGETS)
HALF = [torch.float16, torch.bfloat16]
ids = random_ids(2, 9)


def randomize(model: GPT2, seed: int = 0) -> None:
    """Adapters that do something, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.1, generator=generator)


@pytest.fixture
def base_folder(tiny_model: GPT2, tmp_path: Path) -> Path:
    tiny_model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def model(base_folder: Path) -> GPT2:
    """The tiny model, from its folder."""
    return GPT2.from_pretrained(base_folder)


@pytest.fixture
def saved(model: GPT2, tmp_path: Path) -> Path:
    """An adapter of it."""
    adapted = copy.deepcopy(model)
    add_lora(adapted, rank=3, targets=EVERYTHING)
    randomize(adapted, seed=7)
    save_adapter(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))


def write_config(folder: Path, **changes: object) -> None:
    text = json.dumps(read_config(folder) | changes)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


# ---- half precision


@pytest.mark.parametrize("dtype", HALF)
def test_adapters_are_float32_on_a_base_in_half_precision(
    base_folder: Path, saved: Path, dtype: torch.dtype
) -> None:
    """New, loaded, saved and with all of their bits."""
    model = GPT2.from_pretrained(base_folder, dtype=dtype)
    load_adapter(model, saved)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    save_adapter(model, again := saved.parent / "again")
    before, after = (load_file(f / "adapter_model.safetensors") for f in (saved, again))
    assert_close(after, before, rtol=0, atol=0)
    assert model(ids).dtype == dtype
    new = GPT2.from_pretrained(base_folder, dtype=dtype)
    add_lora(new)
    assert {p.dtype for p in new.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("dtype", HALF)
def test_a_layer_on_a_half_base_computes_as_peft_s(base_folder: Path, dtype: torch.dtype) -> None:
    theirs: Any = GPT2LMHeadModel.from_pretrained(base_folder, dtype=dtype)
    settings: Any = {"r": 3, "target_modules": ["c_fc"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).eval()
    model = GPT2.from_pretrained(base_folder, dtype=dtype)
    add_lora(model, rank=3, alpha=8, targets=["mlp_in"])
    randomize(model)
    their_layer = theirs.base_model.model.transformer.h[1].mlp.c_fc
    our_layer = lora_layers(model)["trf_blocks.1.mlp.mlp_in"]
    assert their_layer.lora_A.default.weight.dtype == our_layer.lora_A.dtype == torch.float32
    their_layer.lora_A.default.weight.data = our_layer.lora_A.data
    their_layer.lora_B.default.weight.data = our_layer.lora_B.data
    x = torch.randn(5, TINY.emb_dim, dtype=dtype)
    assert_close(our_layer(x), their_layer(x), rtol=2e-3 if dtype is HALF[0] else 2e-2, atol=1e-2)
    assert our_layer(x).dtype == their_layer(x).dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_small_steps_are_not_lost_on_a_half_base(base_folder: Path, dtype: torch.dtype) -> None:
    """A step of 1e-6 on numbers of 0.1, whose spacing in bfloat16 is 5e-4."""
    model = GPT2.from_pretrained(base_folder, dtype=dtype)
    add_lora(model, rank=2)
    randomize(model)
    learning = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in learning]
    optimizer = torch.optim.Adam(learning, lr=1e-6)
    (next_token_loss(model(ids), ids)[0] / 100).backward()
    optimizer.step()
    for parameter, start in zip(learning, before, strict=True):
        moved = parameter.grad.abs() > 1e-5  # type: ignore[union-attr]
        assert torch.all((parameter != start)[moved])


@pytest.mark.parametrize("dtype", HALF)
def test_merging_into_a_half_base_rounds_once(base_folder: Path, dtype: torch.dtype) -> None:
    model = GPT2.from_pretrained(base_folder, dtype=dtype)
    add_lora(model, rank=3, targets=EVERYTHING)
    randomize(model)
    expected = {
        name: (
            layer.weight.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
        )
        for name, layer in lora_layers(model).items()
    }
    state = {n: t.clone() for n, t in model.state_dict().items()}
    merge_lora(model)
    for name, weight in expected.items():
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        assert_close(found, weight.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    unmerge_lora(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]) and tensor.dtype == state[name].dtype, name


@pytest.mark.parametrize("precision", HALF)
def test_under_autocast_it_computes_in_that_precision(model: GPT2, precision: torch.dtype) -> None:
    add_lora(model, rank=3, targets=EVERYTHING)
    randomize(model)
    layer = lora_layers(model)["trf_blocks.1.attn.query"]
    with torch.autocast("cpu", precision):
        assert layer(torch.randn(2, TINY.emb_dim)).dtype == precision
        next_token_loss(model(ids), ids)[0].backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_an_adapter_made_in_inference_mode_can_be_trained(model: GPT2, saved: Path) -> None:
    other = copy.deepcopy(model)
    with torch.inference_mode():
        add_lora(model)
        load_adapter(other, saved)
    for one in (model, other):
        next_token_loss(one(ids), ids)[0].backward()


# ---- merged, and built upon


def test_after_merging_the_merged_weights_are_the_base_of_a_new_adapter(
    model: GPT2, saved: Path
) -> None:
    """The reference of DPO on top of supervised fine-tuning: `lora_disabled` is the tuned model."""
    load_adapter(model, saved)
    tuned = model(ids)
    merge_lora(model)
    add_lora(model, rank=2, targets=["mlp_out"])  # other layers than before
    assert_close(model(ids), tuned, rtol=1e-4, atol=1e-4)
    randomize(model)
    both = model(ids)
    assert not torch.allclose(both, tuned, atol=1e-2)
    with lora_disabled(model):
        assert_close(model(ids), tuned, rtol=1e-4, atol=1e-4)
    merge_lora(model)
    assert_close(model(ids), both, rtol=1e-4, atol=1e-4)
    unmerge_lora(model)  # the second alone
    assert set(lora_layers(model)) == {f"trf_blocks.{i}.mlp.mlp_out" for i in range(3)}
    assert torch.equal(model(ids), both)
    assert adapter_names(model) == ["default"]


def test_an_adapter_on_merged_weights_is_refused_on_the_bare_base(
    model: GPT2, saved: Path, base_folder: Path, tmp_path: Path
) -> None:
    load_adapter(model, saved)
    merge_lora(model)
    add_lora(model)
    save_adapter(model, tmp_path / "second")
    assert read_config(tmp_path / "second")["base_model_name_or_path"] is None
    with pytest.raises(CheckpointError, match="another base model"):
        load_adapter(GPT2.from_pretrained(base_folder), tmp_path / "second")


def test_training_goes_on_from_a_saved_adapter(
    model: GPT2, saved: Path, base_folder: Path, tmp_path: Path
) -> None:
    load_adapter(model, saved)
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning and all("lora_" in name for name in learning)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    next_token_loss(model(ids), ids)[0].backward()
    optimizer.step()
    save_adapter(model, tmp_path / "more")
    again = GPT2.from_pretrained(base_folder)
    load_adapter(again, tmp_path / "more")
    assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)


def test_an_adapter_may_be_loaded_frozen(model: GPT2, saved: Path) -> None:
    load_adapter(model, saved, trainable=False)
    assert not any(p.requires_grad for p in model.parameters())


# ---- several by name


@pytest.fixture
def two(model: GPT2, saved: Path) -> GPT2:
    """ "sft", from a file and frozen, and "dpo", new and active, on other layers."""
    load_adapter(model, saved, name="sft", trainable=False)
    add_lora(model, rank=2, targets=["query", "mlp_in"], name="dpo")
    randomize(model, seed=1)
    return model


def with_one(base: Path, change: Any) -> torch.Tensor:
    model = GPT2.from_pretrained(base)
    change(model)
    return model(ids)


def test_one_of_several_is_active(two: GPT2, base_folder: Path, saved: Path) -> None:
    sft = with_one(base_folder, lambda model: load_adapter(model, saved))
    assert adapter_names(two) == ["sft", "dpo"] and active_adapter(two) == "dpo"
    dpo = two(ids)
    learning = [p for p in two.parameters() if p.requires_grad]
    with using_adapter(two, "sft"):
        assert active_adapter(two) == "sft"
        assert torch.equal(two(ids), sft)
        assert not any(p.requires_grad for p in two.parameters())
    assert torch.equal(two(ids), dpo) and active_adapter(two) == "dpo"
    found = [p for p in two.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(found, learning, strict=True)), "an optimizer has them"
    with lora_disabled(two):
        assert torch.equal(two(ids), GPT2.from_pretrained(base_folder)(ids))


def test_after_an_exception_the_same_one_is_active(two: GPT2) -> None:
    with pytest.raises(KeyError), using_adapter(two, "sft"):
        raise KeyError
    assert active_adapter(two) == "dpo"


def test_the_active_one_is_saved_and_merged(
    two: GPT2, base_folder: Path, saved: Path, tmp_path: Path
) -> None:
    dpo = two(ids)
    save_adapter(two, tmp_path / "dpo")
    alone = with_one(base_folder, lambda model: load_adapter(model, tmp_path / "dpo"))
    assert_close(alone, dpo, rtol=1e-5, atol=1e-5)
    set_adapter(two, "sft")
    save_adapter(two, tmp_path / "sft")
    names = [folder / "adapter_model.safetensors" for folder in (saved, tmp_path / "sft")]
    assert_close(load_file(names[1]), load_file(names[0]), rtol=0, atol=0)
    sft = two(ids)
    merge_lora(two)
    with pytest.raises(ValueError, match="unmerge_lora"):
        set_adapter(two, "dpo")
    assert active_adapter(two) is None
    assert_close(two(ids), sft, rtol=1e-4, atol=1e-4)
    unmerge_lora(two)
    set_adapter(two, "dpo")
    assert torch.equal(two(ids), dpo)


def test_those_beside_the_model_follow_its_dtype_mode_and_copies(two: GPT2) -> None:
    with using_adapter(two, "sft"):
        expected = two(ids)
    twin = copy.deepcopy(two).train().double()
    set_adapter(twin, "sft")
    assert all(layer.training for layer in lora_layers(twin).values())
    assert_close(twin(ids).float(), expected, rtol=1e-3, atol=1e-3)
    for layer in lora_layers(twin).values():
        nn.init.ones_(layer.lora_B)
    with using_adapter(two, "sft"):
        assert torch.equal(two(ids), expected), "the copy has its own"


def test_an_unknown_name_is_answered_with_those_there_are(two: GPT2) -> None:
    with pytest.raises(ValueError, match=r"no adapter 'rlhf'; it has \['sft', 'dpo'\]"):
        set_adapter(two, "rlhf")
    with pytest.raises(ValueError, match="one of them called 'sft'"):
        add_lora(two, name="sft")
    assert active_adapter(two) == "dpo"


def test_a_head_of_one_adapter_would_be_that_of_all(two: GPT2, tmp_path: Path) -> None:
    classifier = GPT2(TINY)
    classifier.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    add_lora(classifier)
    save_adapter(classifier, tmp_path / "classifier")
    rewrite_base(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="a head of its own"):
        load_adapter(two, tmp_path / "classifier")
    save_adapter(two, tmp_path / "another")
    rewrite_base(tmp_path / "another")
    with pytest.raises(CheckpointError, match="the model's head is another one's"):
        load_adapter(classifier, tmp_path / "another", name="another")


def rewrite_base(folder: Path) -> None:
    """As PEFT's own files: without a fingerprint."""
    peft_file = folder / "adapter_model.safetensors"
    tensors = load_file(peft_file)
    peft_file.unlink()
    torch.save(tensors, folder / "adapter_model.bin")


# ---- the files


def test_the_base_is_named_so_that_peft_finds_it(
    model: GPT2, base_folder: Path, tmp_path: Path
) -> None:
    add_lora(model, targets=EVERYTHING)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["base_model_name_or_path"] == str(base_folder)
    theirs: Any = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert_close(theirs.eval()(ids).logits, model(ids), atol=1e-4, rtol=0)


def test_a_name_that_is_given_is_written(model: GPT2, tmp_path: Path) -> None:
    add_lora(model)
    save_adapter(model, tmp_path / "adapter", base_model="someone/tiny")
    assert read_config(tmp_path / "adapter")["base_model_name_or_path"] == "someone/tiny"
    with pytest.raises(CheckpointError, match=r"trained on \(someone/tiny\).*--adapter"):
        GPT2.from_pretrained(tmp_path / "adapter")


def test_of_a_bundled_model_the_folder_is_named(tmp_path: Path) -> None:
    model = GPT2.from_pretrained("gpt2-nano")
    add_lora(model)
    save_adapter(model, tmp_path)
    named = read_config(tmp_path)["base_model_name_or_path"]
    assert Path(named).is_absolute()
    assert torch.equal(GPT2.from_pretrained(named).tok_emb.weight, model.tok_emb.weight)


@pytest.mark.parametrize("change", [lambda model: resize_vocab(model, 220), enlarge])
def test_weights_that_have_changed_are_not_the_folder_s(
    model: GPT2, tmp_path: Path, change: Any
) -> None:
    change(model)
    add_lora(model)
    save_adapter(model, tmp_path / "adapter")
    assert read_config(tmp_path / "adapter")["base_model_name_or_path"] is None


@pytest.mark.parametrize("dtype", HALF)
def test_a_base_in_fewer_bits_is_the_folder_s(
    base_folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    for model in (GPT2.from_pretrained(base_folder, dtype), GPT2.from_pretrained(base_folder)):
        add_lora(model.to(dtype))
        save_adapter(model, tmp_path / "adapter")
        assert read_config(tmp_path / "adapter")["base_model_name_or_path"] == str(base_folder)


def test_adapter_model_bin_is_read_and_nothing_in_it_executed(
    model: GPT2, saved: Path, base_folder: Path
) -> None:
    expected = with_one(base_folder, lambda model: load_adapter(model, saved))
    tensors = load_file(saved / "adapter_model.safetensors")
    (saved / "adapter_model.safetensors").unlink()
    torch.save(tensors, saved / "adapter_model.bin")
    write_config(saved, target_modules=["c_attn", "c_proj", "c_fc"])
    load_adapter(model, saved)
    assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    torch.save(tensors | {"f": print}, saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin holds more than tensors"):
        load_adapter(GPT2.from_pretrained(base_folder), saved)


def test_we_read_the_bin_files_of_peft(model: GPT2, base_folder: Path, tmp_path: Path) -> None:
    theirs: Any = GPT2LMHeadModel.from_pretrained(base_folder)
    settings: Any = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings)).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert (tmp_path / "adapter" / "adapter_model.bin").is_file()
    load_adapter(model, tmp_path / "adapter")
    assert_close(model(ids), theirs(ids).logits, atol=1e-4, rtol=0)
    save_adapter(model, tmp_path / "adapter")  # a bin file of another adapter does not stay
    assert not (tmp_path / "adapter" / "adapter_model.bin").exists()


def test_adapters_in_sub_folders_are_listed(model: GPT2, saved: Path, tmp_path: Path) -> None:
    """PEFT saves named adapters in folders of their names."""
    for name in ("sft", "dpo"):
        shutil.copytree(saved, tmp_path / "both" / name)
    message = r"holds no adapter.*adapters in .*both/dpo, .*both/sft: give one"
    with pytest.raises(CheckpointError, match=message):
        load_adapter(model, tmp_path / "both")
    load_adapter(model, tmp_path / "both" / "sft")


def test_a_folder_that_is_not_there_is_called_that(model: GPT2, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load_adapter(model, tmp_path / "nothing")


def test_a_path_may_begin_with_a_tilde(
    model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    add_lora(model)
    save_adapter(model, "~/mine")
    load_adapter(GPT2.from_pretrained("~/base"), "~/mine")
    assert (tmp_path / "mine" / "adapter_config.json").is_file()


def test_every_setting_of_peft_is_accounted_for(model: GPT2, saved: Path) -> None:
    """Set to something, it is obeyed, without effect, or refused by name."""
    from gpt2mini.lora.peft_format import OBEYED, PLAIN, WITHOUT_EFFECT

    for name in peft.LoraConfig().to_dict().keys() - OBEYED - WITHOUT_EFFECT - PLAIN.keys():
        write_config(saved, **{name: ["something"]})
        with pytest.raises(CheckpointError, match=rf"adapter_config.json .*{name} is "):
            load_adapter(model, saved)
        write_config(saved, **{name: None})
    write_config(saved, of_a_later_version={"a": 1})
    with pytest.raises(CheckpointError, match="of_a_later_version is"):
        load_adapter(model, saved)


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": "8"}, {"lora_alpha": -1}, {"lora_dropout": 2}, {"alpha_pattern": {"c_fc": 0}}],
)
@pytest.mark.usefixtures("no_shape_checks")
def test_an_impossible_number_is_refused(model: GPT2, saved: Path, changes: dict) -> None:
    write_config(saved, **changes)
    with pytest.raises(CheckpointError):
        load_adapter(model, saved)
    assert not lora_layers(model)


# ---- from the shell


@pytest.fixture
def word_adapter(word_folder: Path, tmp_path: Path) -> Path:
    model = GPT2.from_pretrained(word_folder)
    add_lora(model, rank=2, targets=EVERYTHING)
    randomize(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_convert_merges_an_adapter(
    word_folder: Path, word_adapter: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rounded once, after the sum."""
    name = str(dtype).removeprefix("torch.")
    where = ("convert", word_folder, tmp_path / "out", "--adapter", word_adapter)
    done = run(*where, "--dtype", name)
    assert done.returncode == 0, done.stderr
    expected = GPT2.from_pretrained(word_folder)
    load_adapter(expected, word_adapter)
    merge_lora(expected)
    found = GPT2.from_pretrained(tmp_path / "out", dtype=dtype)
    assert_close(found.state_dict(), expected.to(dtype).state_dict(), rtol=0, atol=0)
    text = "The old man"
    ours, theirs = (Tokenizer.from_pretrained(f) for f in (tmp_path / "out", word_folder))
    assert ours.encode(text) == theirs.encode(text)
    done = run("convert", word_folder, word_folder, "--adapter", word_adapter)
    assert "is the base of the adapter: choose another folder" in done.stderr


def test_an_adapter_given_as_a_model_names_the_flag_and_the_base(
    word_folder: Path, word_adapter: Path
) -> None:
    done = run("generate", "--model", word_adapter)
    assert done.returncode == 1
    for words in ("holds an adapter", str(word_folder), "--adapter"):
        assert words in done.stderr
