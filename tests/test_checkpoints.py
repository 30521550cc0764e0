"""Files <-> model: bit for bit, with `transformers` and without; and what damaged files get."""

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, enlarge, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2mini import GPT2
from gpt2mini.checkpoints import CheckpointError, find_model, huggingface, model_from_tensors

WEIGHTS = "model.safetensors"
PRECISION = 1e-4  # float32, logits of the size of 1, two implementations

Tensors = dict[str, Tensor]


@pytest.fixture
def folder(tiny_model: GPT2, tmp_path: Path) -> Path:
    """The tiny model, saved."""
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rewrite_weights(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def rewrite_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(contents | changes), encoding="utf-8")


def assert_same_weights(found: GPT2, expected: GPT2) -> None:
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in found.state_dict().items():
        assert tensor.dtype == expected.state_dict()[name].dtype, name
        assert torch.equal(tensor, expected.state_dict()[name]), name


# ---- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_round_trip_keeps_every_bit(own_model: GPT2, tmp_path: Path, dtype: torch.dtype) -> None:
    own_model.to(dtype).save_pretrained(tmp_path)
    assert_same_weights(GPT2.from_pretrained(tmp_path, dtype=dtype), own_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_is_float32_whatever_the_file_holds(
    own_model: GPT2, tmp_path: Path, dtype: torch.dtype
) -> None:
    own_model.to(dtype).save_pretrained(tmp_path)
    assert_same_weights(GPT2.from_pretrained(tmp_path), own_model.to(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_while_loading_is_rounding_afterwards(
    own_model: GPT2, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    own_model.to(stored).save_pretrained(tmp_path)
    assert_same_weights(GPT2.from_pretrained(tmp_path, dtype=dtype), own_model.to(dtype))


def test_a_round_trip_keeps_the_config(folder: Path) -> None:
    assert GPT2.from_pretrained(folder).config == TINY


def test_a_round_trip_keeps_a_model_without_qkv_bias(tmp_path: Path) -> None:
    """The published layout always has the bias, so the file must say that it is zero."""
    model = GPT2(replace(TINY, qkv_bias=False)).eval()
    enlarge(model)
    model.save_pretrained(tmp_path)
    ids = random_ids(1, 8)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), model(ids), atol=PRECISION, rtol=0)


def test_a_round_trip_keeps_an_untied_head(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.save_pretrained(tmp_path)
    assert_same_weights(GPT2.from_pretrained(tmp_path), own_model)


def test_saving_makes_the_folders_on_the_way(tiny_model: GPT2, tmp_path: Path) -> None:
    tiny_model.save_pretrained(str(tmp_path / "new" / "model"))
    assert (tmp_path / "new" / "model" / WEIGHTS).is_file()


def test_saving_leaves_the_model_alone(own_model: GPT2, tiny_model: GPT2, tmp_path: Path) -> None:
    own_model.train().save_pretrained(tmp_path)
    assert own_model.training
    assert_same_weights(own_model, tiny_model)


def test_a_head_that_is_not_linear_has_no_place_in_a_folder(
    own_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Sequential(nn.Linear(TINY.emb_dim, 2))
    with pytest.raises(ValueError, match=r"(?s)output head is Sequential.*nn.Linear\(48, 211"):
        own_model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


def test_saving_into_a_file_is_refused_by_name(tiny_model: GPT2, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("not a folder", encoding="utf-8")
    with pytest.raises(OSError, match="taken"):
        tiny_model.save_pretrained(tmp_path / "taken")


# ---- transformers opens what we save (test_model.py has the other direction)


def open_with_transformers(folder: Path) -> tuple[GPT2LMHeadModel, dict[str, Any]]:
    opened: Any = GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    model, report = opened
    return model.eval(), report


def test_transformers_misses_no_tensor_of_ours(folder: Path) -> None:
    _, report = open_with_transformers(folder)
    assert not any(report.values()), report


def test_transformers_gives_our_logits(tiny_model: GPT2, folder: Path) -> None:
    theirs, _ = open_with_transformers(folder)
    ids = random_ids(2, 20)
    assert_close(theirs(ids).logits, tiny_model(ids), atol=PRECISION, rtol=0)


def test_transformers_gives_the_logits_of_our_untied_head(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.save_pretrained(tmp_path)
    theirs, report = open_with_transformers(tmp_path)
    assert not any(report.values()), report
    ids = random_ids(2, 20)
    assert_close(theirs(ids).logits, own_model(ids), atol=PRECISION, rtol=0)


# ---- heads and settings in the file (test_published_files.py has the forms of files)


def test_an_untied_head_in_the_file_becomes_the_output_head(tiny_model: GPT2, folder: Path) -> None:
    head = torch.randn(TINY.vocab_size, TINY.emb_dim)
    rewrite_weights(folder, lambda tensors: tensors | {"lm_head.weight": head})
    loaded = GPT2.from_pretrained(folder)
    ids = random_ids(2, 20)
    expected = tiny_model.hidden_states(ids) @ head.T
    assert_close(loaded(ids), expected, atol=PRECISION, rtol=1e-5)


def test_dropout_in_the_file_is_not_taken_over(folder: Path) -> None:
    rewrite_config(folder, attn_pdrop=0.1, embd_pdrop=0.1, resid_pdrop=0.1)  # OpenAI's own
    assert GPT2.from_pretrained(folder).config.drop_rate == 0.0


# ---- dtypes, devices and modes


NAMES = {
    torch.float32: ("float32", "fp32", "float", "torch.float32"),
    torch.float16: ("float16", "fp16", "half", "torch.float16"),
    torch.bfloat16: ("bfloat16", "bf16", "torch.bfloat16"),
    torch.float64: ("float64", "fp64", "double", "torch.float64"),
}


@pytest.mark.parametrize("dtype", NAMES)
def test_a_dtype_may_be_given_by_its_name(folder: Path, dtype: torch.dtype) -> None:
    for name in NAMES[dtype]:
        model = GPT2.from_pretrained(folder, dtype=name)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        model.save_pretrained(folder.parent / name, dtype=name)
        assert {t.dtype for t in load_file(folder.parent / name / WEIGHTS).values()} == {dtype}


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn, "int8", ""]
)
def test_a_dtype_that_weights_cannot_have_is_refused(
    folder: Path, tiny_model: GPT2, dtype: Any
) -> None:
    """On saving, before the good file is touched."""
    for call in (tiny_model.save_pretrained, GPT2.from_pretrained):
        with pytest.raises(ValueError, match=r"weights cannot be of dtype .*float32, float16"):
            call(folder, dtype=dtype)
    assert_same_weights(GPT2.from_pretrained(folder), tiny_model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_file_of_a_dtype_that_weights_cannot_have_is_refused(
    folder: Path, dtype: torch.dtype
) -> None:
    rewrite_weights(folder, lambda tensors: {n: t.to(dtype) for n, t in tensors.items()})
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*holds {dtype}; expected weights"):
        GPT2.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.usefixtures("no_shape_checks")
def test_a_model_in_a_dtype_that_no_file_may_have_is_not_saved(
    own_model: GPT2, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"weights cannot be of dtype torch.complex64"):
        own_model.to(torch.complex64).save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_a_device_is_taken_in_any_of_torch_s_forms(folder: Path, device: Any) -> None:
    assert GPT2.from_pretrained(folder, device=device).tok_emb.weight.device.type == "cpu"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("device", [0, 1, "cuda", "gpu", "gpu:0", "", True])
@pytest.mark.usefixtures("no_shape_checks")
def test_a_device_that_is_not_here_is_not_the_cpu(folder: Path, device: Any) -> None:
    with pytest.raises(ValueError, match=rf"there is no device {device!r}.*take auto or cpu"):
        GPT2.from_pretrained(folder, device=device)


def test_a_model_is_loaded_in_inference_mode_and_can_be_trained_afterwards(
    folder: Path, tiny_model: GPT2
) -> None:
    with torch.inference_mode():
        model = GPT2.from_pretrained(folder)
    assert_same_weights(model, tiny_model)
    model(random_ids(1, 4)).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_torch_s_default_dtype_changes_nothing(
    folder: Path, tiny_model: GPT2, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    try:
        model = GPT2.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_weights(model, tiny_model)


# ---- what loading leaves alone


def test_a_loaded_model_is_in_eval_mode(folder: Path) -> None:
    assert not any(module.training for module in GPT2.from_pretrained(folder).modules())


def test_a_loaded_model_can_be_trained(folder: Path) -> None:
    assert all(parameter.requires_grad for parameter in GPT2.from_pretrained(folder).parameters())


def empty_file(path: Path) -> None:
    path.write_bytes(b"")  # a mapped file would end the process here, with SIGBUS


def write_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def save_another_model(path: Path) -> None:
    GPT2(TINY).save_pretrained(path.parent)


@pytest.mark.parametrize("change", [empty_file, write_zeros, save_another_model, Path.unlink])
def test_a_loaded_model_does_not_depend_on_its_file(
    tiny_model: GPT2, folder: Path, change: Callable[[Path], None]
) -> None:
    loaded = GPT2.from_pretrained(folder)
    change(folder / WEIGHTS)
    assert_same_weights(loaded, tiny_model)


def test_a_loaded_model_is_saved_over_its_own_file(tiny_model: GPT2, folder: Path) -> None:
    loaded = GPT2.from_pretrained(folder)
    loaded.save_pretrained(folder)
    assert_same_weights(GPT2.from_pretrained(folder), tiny_model)
    save_file(loaded.state_dict(), folder / WEIGHTS)
    assert_same_weights(loaded, tiny_model)


def test_training_a_loaded_model_leaves_its_file_alone(tiny_model: GPT2, folder: Path) -> None:
    loaded = GPT2.from_pretrained(folder)
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert_same_weights(GPT2.from_pretrained(folder), tiny_model)


def test_loading_leaves_the_random_numbers_alone(folder: Path) -> None:
    before = torch.get_rng_state()
    GPT2.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_a_folder_opens_no_socket(folder: Path, socket_attempts: list[str]) -> None:
    GPT2.from_pretrained(folder)
    assert not socket_attempts


# ---- damaged and foreign weights


def shape_changed(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: tensors[name].T.contiguous()}


def test_a_missing_tensor_is_named(folder: Path) -> None:
    name = "transformer.h.1.mlp.c_fc.bias"
    rewrite_weights(folder, lambda tensors: {n: t for n, t in tensors.items() if n != name})
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*1 missing \['h.1.mlp.c_fc.bias'\]"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [
        "h.3.ln_1.weight",  # one block more than the config says
        "h.3.attn.c_attn.bias",  # ends like the old buffer `attn.bias`, and is none
        "multiple_choice_head.summary.weight",  # of another of transformers' classes
    ],
)
def test_an_unknown_tensor_is_named(folder: Path, name: str) -> None:
    extra = {f"transformer.{name}": torch.zeros(TINY.emb_dim)}
    rewrite_weights(folder, lambda tensors: tensors | extra)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*1 unknown \['{name}'\]"):
        GPT2.from_pretrained(folder)


def test_a_tensor_that_is_there_under_both_names_is_refused(folder: Path) -> None:
    """With and without the prefix: which of the two would be meant?"""
    extra = {"wpe.weight": torch.zeros(TINY.context_length, TINY.emb_dim)}
    rewrite_weights(folder, lambda tensors: tensors | extra)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: .*wpe.weight"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("name", ["wte.weight", "h.2.attn.c_attn.weight", "h.0.mlp.c_proj.weight"])
def test_a_tensor_of_the_wrong_shape_is_named(folder: Path, name: str) -> None:
    rewrite_weights(folder, shape_changed(f"transformer.{name}"))
    message = rf"{WEIGHTS}: {name} has the shape \(\d+, \d+\); the config asks for \(\d+, \d+\)"
    with pytest.raises(ValueError, match=message):
        GPT2.from_pretrained(folder)


def test_both_shapes_of_a_wrong_tensor_are_told(folder: Path) -> None:
    rewrite_weights(folder, shape_changed("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(ValueError, match=r"shape \(192, 48\); the config asks for \(48, 192\)"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("shape", [(TINY.vocab_size + 1, TINY.emb_dim), (1, TINY.emb_dim)])
def test_an_output_head_of_the_wrong_shape_is_named(folder: Path, shape: tuple[int, int]) -> None:
    """The second shape could be broadcast, and must not be."""
    rewrite_weights(folder, lambda tensors: tensors | {"lm_head.weight": torch.zeros(shape)})
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: lm_head.weight has the shape"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(folder: Path, share: float) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
        GPT2.from_pretrained(folder)


def test_a_file_of_another_kind_is_refused_by_name(folder: Path, tiny_model: GPT2) -> None:
    torch.save(tiny_model.state_dict(), folder / WEIGHTS)
    with pytest.raises(ValueError, match=f"{WEIGHTS} cannot be read"):
        GPT2.from_pretrained(folder)


def test_a_head_that_was_tied_by_hand_is_saved_as_tied(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.out_head.weight = own_model.tok_emb.weight
    own_model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path)
    assert torch.equal(loaded(random_ids(1, 5)), own_model(random_ids(1, 5)))
    assert loaded.out_head.weight is loaded.tok_emb.weight


def test_a_pickle_of_more_than_tensors_is_refused_and_nobody_is_told_to_trust_it(
    folder: Path, tiny_model: GPT2
) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"wte.weight": tiny_model.tok_emb.weight, "f": print}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors") as caught:
        GPT2.from_pretrained(folder)
    assert "weights_only" not in str(caught.value)


def test_a_folder_without_weights_says_what_it_has_instead(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "weights.safetensors")
    message = rf"has no weights: expected one of {WEIGHTS}.*'config.json'.*'weights.safetensors'"
    with pytest.raises(CheckpointError, match=message):
        GPT2.from_pretrained(folder)


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 548105171\n"
WEB_PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "pytorch_model.bin"])
@pytest.mark.parametrize(
    ("contents", "words"), [(LFS_POINTER, "a Git LFS pointer.*git lfs pull"), (WEB_PAGE, "HTML")]
)
def test_what_lies_in_a_file_s_place_is_called_by_its_name(
    folder: Path, name: str, contents: bytes, words: str
) -> None:
    if name == "pytorch_model.bin":
        (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"{name} is .*{words}"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_as_windows_editors_save_it_is_read(folder: Path, encoding: str) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding=encoding)
    assert GPT2.from_pretrained(folder).config == TINY


# ---- damaged and foreign configs


def test_a_folder_without_a_config_is_no_model(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"model is not a model folder.*config.json"):
        GPT2.from_pretrained(folder)


def test_a_config_that_is_no_json_is_refused_by_name(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "gp', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        GPT2.from_pretrained(folder)


def test_another_kind_of_model_is_refused_by_name(folder: Path) -> None:
    rewrite_config(folder, model_type="llama")
    with pytest.raises(ValueError, match=r"config.json .*type 'llama'; expected 'gpt2'"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_function", "relu"),
        ("layer_norm_epsilon", 1e-6),
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("n_inner", 100),
    ],
)
def test_another_architecture_is_refused_by_the_name_of_the_setting(
    folder: Path, name: str, value: object
) -> None:
    rewrite_config(folder, **{name: value})
    with pytest.raises(ValueError, match=rf"config.json.*: {name} is '?{value}'?; GPT-2"):
        GPT2.from_pretrained(folder)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("changes", [{"n_head": 5}, {"n_layer": 0}, {"n_embd": "48"}])
def test_an_impossible_number_is_refused_by_the_name_of_the_file(
    folder: Path, changes: dict[str, object]
) -> None:
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=r"config.json cannot be read: (emb_dim|n_layers)"):
        GPT2.from_pretrained(folder)


# ---- paths as people type them


def test_the_home_folder_is_written_with_a_tilde(
    tiny_model: GPT2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("~/models/mine")
    assert (tmp_path / "home/models/mine" / WEIGHTS).is_file()
    assert not (tmp_path / "~").exists()
    for path in ("~/models/mine", Path("~/models/mine")):
        assert_same_weights(GPT2.from_pretrained(path), tiny_model)
    with pytest.raises(ValueError, match="~nobody-of-that-name"):
        GPT2.from_pretrained("~nobody-of-that-name/models")


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_the_file_that_is_read_stands_for_its_folder(
    folder: Path, tiny_model: GPT2, name: str
) -> None:
    assert_same_weights(GPT2.from_pretrained(folder / name), tiny_model)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.onnx", "README.md"])
def test_another_file_does_not(folder: Path, name: str) -> None:
    """pytorch_model.bin would not be read beside model.safetensors."""
    (folder / name).write_bytes(b"")
    message = rf"{name} is a file: give the folder .*{folder}, of which {WEIGHTS} is read"
    with pytest.raises(CheckpointError, match=message):
        GPT2.from_pretrained(folder / name)


def test_the_folder_around_a_model_names_it(folder: Path, tmp_path: Path) -> None:
    """As a run's folder, with its best model inside."""
    with pytest.raises(CheckpointError, match=rf"no config.json.*give the folder .*{folder}$"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.usefixtures("no_shape_checks")
def test_what_is_no_path_is_refused() -> None:
    with pytest.raises(TypeError, match="name or the folder of a model, not a dict"):
        find_model({"model": 1})  # type: ignore[arg-type]


def test_a_file_that_cannot_be_written_is_named_and_not_the_temporary_one(
    tiny_model: GPT2, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str, **_: Any) -> None:
        if text:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        tiny_model.save_pretrained(folder)
    assert ".partial" not in str(caught.value)
    assert f"cannot write {folder / 'config.json'}" in str(caught.value)


# ---- crashes while saving


def save_until_the_disk_is_full(model: GPT2, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save `model`; writing its weights stops after some bytes."""

    def write_some_and_fail(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"the first few bytes")
        raise OSError("no space left on device")

    monkeypatch.setattr(huggingface, "save_file", write_some_and_fail)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(folder)


def test_an_interrupted_save_leaves_the_old_model(
    tiny_model: GPT2, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_until_the_disk_is_full(GPT2(replace(TINY, n_layers=1)), folder, monkeypatch)
    assert_same_weights(GPT2.from_pretrained(folder), tiny_model)


def test_an_interrupted_save_leaves_no_other_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_until_the_disk_is_full(GPT2(TINY), folder, monkeypatch)
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        WEIGHTS,
    }


def test_a_format_of_ones_own_is_read_through_the_published_names(
    tiny_model: GPT2, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    arrays: dict[str, Any] = {name: t.numpy() for name, t in tensors.items()}
    np.savez(tmp_path / "model.npz", **arrays)
    with np.load(tmp_path / "model.npz") as file:
        own = {name: torch.from_numpy(file[name]) for name in file}
    model = model_from_tensors(tiny_model.config, own)
    ids = random_ids(2, 7)
    assert torch.equal(model(ids), tiny_model(ids))
    del own["transformer.wte.weight"]
    with pytest.raises(CheckpointError, match="1 missing"):
        model_from_tensors(tiny_model.config, own, source="model.npz")


@pytest.mark.parametrize("device", ["meta", torch.device("meta")])
def test_a_model_without_numbers_is_loaded_on_meta(folder: Path, device: str) -> None:
    model = GPT2.from_pretrained(folder, device=device)
    assert all(p.is_meta for p in model.parameters()) and model.config == TINY
