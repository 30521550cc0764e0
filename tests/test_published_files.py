"""Every form in which `transformers` and its users have saved a GPT-2, read bit for bit."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY, enlarge, random_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import CheckpointError, read_class_names
from gpt2mini.checkpoints.names import to_published
from gpt2mini.model import TiedHead

PRECISION = 1e-4  # float32, two implementations
Tensors = dict[str, Tensor]


def config(**changes: object) -> transformers.GPT2Config:
    numbers: dict[str, Any] = dict(
        vocab_size=TINY.vocab_size,
        n_positions=TINY.context_length,
        n_embd=TINY.emb_dim,
        n_head=TINY.n_heads,
        n_layer=TINY.n_layers,
        bos_token_id=TINY.vocab_size - 1,
        eos_token_id=TINY.vocab_size - 1,
    )
    return transformers.GPT2Config(**(numbers | changes))


@pytest.fixture
def theirs() -> GPT2LMHeadModel:
    """A random model of `transformers`, biases and norms included."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config()).eval()
    enlarge(model)
    return model


def assert_same(ours: GPT2, tensors: Tensors) -> None:
    """Bit for bit: all of our tensors, in the published layout, are those of `transformers`."""
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    found = to_published(
        {name: t for name, t in ours.state_dict().items() if not name.startswith("out_head")},
        ours.config,
    )
    assert found.keys() == plain.keys() - {"lm_head.weight", "score.weight"}
    for name, tensor in found.items():
        assert torch.equal(tensor, plain[name]), name


# ---- ways to write a folder


def safetensors(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder)


def shards(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="60KB")
    assert not (folder / "model.safetensors").exists()


def inner_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """Without `transformer.` in front of the names, as OpenAI's own folder on the Hub."""
    model.transformer.save_pretrained(folder)


def torch_file(model: GPT2LMHeadModel, folder: Path, **options: object) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin", **options)  # type: ignore[arg-type]


def old_torch_file(model: GPT2LMHeadModel, folder: Path) -> None:
    """As torch wrote before 1.6, with the buffers that `transformers` wrote before 2023."""
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    causal = torch.ones(1, 1, TINY.context_length, TINY.context_length, dtype=torch.uint8).tril()
    for layer in range(TINY.n_layers):
        tensors[f"transformer.h.{layer}.attn.bias"] = causal
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def torch_shards(model: GPT2LMHeadModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    tensors = model.state_dict()
    del tensors["lm_head.weight"]  # shares its memory with the embedding
    weight_map: dict[str, str] = {}
    for i in range(3):
        part = dict(list(tensors.items())[i::3])
        torch.save(part, folder / f"pytorch_model-{i}.bin")
        weight_map |= dict.fromkeys(part, f"pytorch_model-{i}.bin")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")


def wrapped(prefix: str) -> Callable[[GPT2LMHeadModel, Path], None]:
    def write(model: GPT2LMHeadModel, folder: Path) -> None:
        model.config.save_pretrained(folder)
        tensors = {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")

    write.__name__ = prefix
    return write


def head_alone(model: GPT2LMHeadModel, folder: Path) -> None:
    """Of the two names of the tied tensor, the other one."""
    model.config.save_pretrained(folder)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["transformer.wte.weight"]
    save_file(tensors, folder / "model.safetensors")


FORMS = [
    safetensors,
    shards,
    inner_model,
    torch_file,
    old_torch_file,
    torch_shards,
    wrapped("module."),  # DataParallel, DistributedDataParallel
    wrapped("_orig_mod."),  # torch.compile
    wrapped("model."),  # Lightning
    wrapped("module._orig_mod."),
    wrapped("_orig_mod.module."),
    head_alone,
]


@pytest.mark.parametrize("write", FORMS, ids=lambda write: write.__name__)
def test_every_form_is_read_bit_for_bit(
    theirs: GPT2LMHeadModel, tmp_path: Path, write: Callable[[GPT2LMHeadModel, Path], None]
) -> None:
    write(theirs, tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    assert isinstance(ours.out_head, TiedHead)
    assert_same(ours, dict(theirs.state_dict()))
    ids = random_ids(2, 9)
    assert_close(ours(ids), theirs(ids).logits, atol=PRECISION, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_is_read_and_cast_once(
    theirs: GPT2LMHeadModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    theirs.to(dtype)  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    assert_same(GPT2.from_pretrained(tmp_path, dtype=dtype), dict(theirs.state_dict()))
    cast = {name: tensor.bfloat16() for name, tensor in theirs.state_dict().items()}
    assert_same(GPT2.from_pretrained(tmp_path, dtype=torch.bfloat16), cast)


# ---- heads


def test_an_untied_model_keeps_a_head_of_its_own_even_if_it_equals_the_embedding(
    theirs: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """They would part in training."""
    untied = GPT2LMHeadModel(config(tie_word_embeddings=False))
    untied.load_state_dict(theirs.state_dict())
    untied.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    assert isinstance(ours.out_head, nn.Linear)
    assert ours.out_head.weight.data_ptr() != ours.tok_emb.weight.data_ptr()
    assert torch.equal(ours.out_head.weight, ours.tok_emb.weight)


def test_an_untied_model_without_a_head_in_the_file_is_refused(
    theirs: GPT2LMHeadModel, tmp_path: Path
) -> None:
    """`transformers` would make one up, at random."""
    theirs.config.tie_word_embeddings = False
    inner_model(theirs, tmp_path)
    with pytest.raises(CheckpointError, match=r"1 missing \['lm_head.weight'\]"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_a_classifier_of_theirs_is_read_with_its_head(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(0)
    theirs = GPT2ForSequenceClassification(config(num_labels=classes, pad_token_id=0)).eval()
    enlarge(theirs)
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_pretrained(tmp_path)
    assert_same(ours, dict(theirs.state_dict()))
    assert isinstance(ours.out_head, nn.Linear)
    assert torch.equal(ours.out_head.weight, theirs.score.weight)
    ids = 1 + random_ids(2, 9) % (TINY.vocab_size - 1)  # no padding among them
    assert_close(ours(ids)[:, -1], theirs(ids).logits, atol=PRECISION, rtol=0)


def test_the_names_that_transformers_leaves_out_are_read(tmp_path: Path) -> None:
    GPT2ForSequenceClassification(config(num_labels=2)).save_pretrained(tmp_path)
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert read_class_names(tmp_path) == ["LABEL_0", "LABEL_1"]
    GPT2LMHeadModel(config()).save_pretrained(tmp_path)  # no classifier has no classes
    with pytest.raises(CheckpointError, match="does not name the classes"):
        read_class_names(tmp_path)


def test_a_classifier_of_ours_is_read_by_them_with_its_head_and_its_names(
    own_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)
    own_model.save_pretrained(tmp_path, class_names=["no", "perhaps", "yes"])
    opened: Any = GPT2ForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    theirs, report = opened
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "no", 1: "perhaps", 2: "yes"}
    assert theirs.config.label2id == {"no": 0, "perhaps": 1, "yes": 2}
    ids = random_ids(4, 9) % (TINY.vocab_size - 1)
    assert_close(theirs.eval()(ids).logits, own_model(ids)[:, -1], atol=PRECISION, rtol=0)


def test_a_classifier_of_ours_comes_back_with_its_head_and_its_names(
    own_model: GPT2, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    own_model.save_pretrained(tmp_path, class_names=["ham", "spam"])
    assert read_class_names(tmp_path) == ["ham", "spam"]
    back = GPT2.from_pretrained(tmp_path)
    assert torch.equal(back.out_head.weight, own_model.out_head.weight)  # type: ignore[arg-type]


def test_a_head_with_a_bias_comes_back_whole_and_the_user_is_told(
    own_model: GPT2, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`transformers` has no bias there; the head of the README's example has one."""
    own_model.out_head = nn.Linear(in_features=TINY.emb_dim, out_features=2)
    with caplog.at_level(logging.WARNING):
        own_model.save_pretrained(tmp_path)
    assert "bias=False" in caplog.text
    assert read_class_names(tmp_path) == ["LABEL_0", "LABEL_1"]
    ids = random_ids(2, 9)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), own_model(ids), atol=0, rtol=0)


def test_class_names_have_to_be_as_many_as_the_classes(own_model: GPT2, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 class names for a head of 0 classes"):
        own_model.save_pretrained(tmp_path, class_names=["ham", "spam"])


def test_a_language_model_has_no_class_names(tiny_model: GPT2, tmp_path: Path) -> None:
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"config.json does not name the classes"):
        read_class_names(tmp_path)


def test_a_head_that_does_not_fit_the_names_of_its_classes_is_refused(tmp_path: Path) -> None:
    GPT2ForSequenceClassification(config(num_labels=3)).save_pretrained(tmp_path)
    contents = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    contents["id2label"] = {"0": "no", "1": "yes"}
    (tmp_path / "config.json").write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"shape \(3, 48\); config.json lists 2 classes"):
        GPT2.from_pretrained(tmp_path)


# ---- shards that do not hold what their index says


@pytest.fixture
def sharded(theirs: GPT2LMHeadModel, tmp_path: Path) -> Path:
    shards(theirs, tmp_path)
    return tmp_path


def rewrite_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text(encoding="utf-8"))
    change(index["weight_map"])
    path.write_text(json.dumps(index), encoding="utf-8")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a\\b", "", ".."])
def test_an_index_cannot_lead_out_of_its_folder(sharded: Path, name: str) -> None:
    rewrite_index(sharded, lambda names: names.update({"transformer.wte.weight": name}))
    with pytest.raises(CheckpointError, match="expected a file in the same folder"):
        GPT2.from_pretrained(sharded)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"index.json refers to {shard.name}, which is miss"):
        GPT2.from_pretrained(sharded)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    rewrite_index(sharded, lambda names: names.update({name: second.name}))
    with pytest.raises(CheckpointError, match=rf"{name} is not in {second.name}"):
        GPT2.from_pretrained(sharded)


def test_a_tensor_in_two_shards_is_named(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    twice = dict(list(load_file(first).items())[:1])
    save_file(load_file(second) | twice, second)
    with pytest.raises(CheckpointError, match=rf"{next(iter(twice))} is in two of the files"):
        GPT2.from_pretrained(sharded)


# ---- what is written


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_dtype_of_the_file_is_the_user_s_choice(
    tiny_model: GPT2, tmp_path: Path, dtype: torch.dtype
) -> None:
    tiny_model.save_pretrained(tmp_path, dtype=dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert GPT2LMHeadModel.from_pretrained(tmp_path, dtype="auto").dtype == dtype
    assert next(tiny_model.parameters()).dtype == torch.float32


def test_a_folder_of_ours_is_all_that_transformers_needs_to_write_text(tmp_path: Path) -> None:
    nano_tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    model = GPT2(replace(TINY, vocab_size=nano_tokenizer.vocab_size)).eval()
    model.save_pretrained(tmp_path)
    nano_tokenizer.save_pretrained(tmp_path)
    theirs: Any = GPT2LMHeadModel.from_pretrained(tmp_path)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.generation_config.eos_token_id == nano_tokenizer.eos_id
    ids = their_tokenizer("It was a dark night.").input_ids
    assert ids == nano_tokenizer.encode("It was a dark night.")
    assert theirs.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False).shape[1] > 3


KILL_ME_WHILE_SAVING = """
import sys, torch
from gpt2mini import GPT2, GPT2Config
model = GPT2(GPT2Config(vocab_size=50_000, context_length=16, emb_dim=64, n_heads=2, n_layers=2))
number = 0
print("ready", flush=True)
while True:
    number = 1 - number
    torch.nn.init.constant_(model.tok_emb.weight, number)
    torch.nn.init.constant_(model.pos_emb.weight, number)
    model.save_pretrained(sys.argv[1])
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
@pytest.mark.parametrize("delay", [0.02, 0.05, 0.11])
def test_a_killed_save_leaves_a_folder_that_loads(tmp_path: Path, delay: float) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", KILL_ME_WHILE_SAVING, tmp_path], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    while not (tmp_path / "config.json").exists():
        assert writer.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(delay)
    writer.kill()
    writer.communicate()
    model = GPT2.from_pretrained(tmp_path)
    assert model.tok_emb.weight.unique().tolist() == model.pos_emb.weight.unique().tolist()
