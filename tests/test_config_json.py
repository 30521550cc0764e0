"""config.json: every setting is obeyed, refused by name, or kept and written back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, enlarge, random_ids
from torch import nn
from torch.testing import assert_close
from transformers import (
    GPT2Config as TheirConfig,
)
from transformers import (
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    TextClassificationPipeline,
    TextGenerationPipeline,
)
from transformers.activations import ACT2FN

from gpt2mini import GPT2, GPT2Config, Tokenizer, resize_vocab
from gpt2mini.checkpoints import CheckpointError, config_json, read_class_names

ALIASES = {
    "n_positions": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
}
ids = random_ids(2, 20)


@pytest.fixture
def folder(tiny_model: GPT2, tmp_path: Path) -> Path:
    """The tiny model, saved."""
    tiny_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def read(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def rewrite(folder: Path, remove: Any = (), **changes: object) -> None:
    contents = {n: v for n, v in (read(folder) | changes).items() if n not in remove}
    (folder / "config.json").write_text(json.dumps(contents), encoding="utf-8")


def saved_again(folder: Path) -> Path:
    GPT2.from_pretrained(folder).save_pretrained(folder.parent / "again")
    return folder.parent / "again"


# ---- obeyed


def test_the_aliases_are_all_those_of_transformers() -> None:
    known = {alias: names[0] for names in config_json.NUMBERS.values() for alias in names[1:]}
    assert known == {**TheirConfig.attribute_map, "n_ctx": "n_positions"}


@pytest.mark.parametrize("name", ALIASES)
def test_an_alias_means_what_it_means_to_transformers(
    folder: Path, tiny_model: GPT2, name: str
) -> None:
    value = read(folder)[name]
    rewrite(folder, remove=(name, "n_ctx"), **{ALIASES[name]: value})
    found = GPT2.from_pretrained(folder)
    theirs = GPT2LMHeadModel.from_pretrained(folder).eval()
    assert found.config == TINY
    assert_close(theirs(ids).logits, found(ids), atol=1e-4, rtol=0)


def test_a_number_of_heads_under_its_alias_is_not_the_default(tmp_path: Path) -> None:
    """Of 48 columns, 12 heads are possible too, and all shapes fit."""
    model = GPT2(GPT2Config(100, 32, 48, 2, 2)).eval()
    enlarge(model)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, remove=("n_head",), num_attention_heads=2)
    assert torch.equal(GPT2.from_pretrained(tmp_path)(ids % 100), model(ids % 100))


def test_n_ctx_stands_in_for_n_positions(folder: Path) -> None:
    rewrite(folder, remove=("n_positions",))
    assert GPT2.from_pretrained(folder).config == TINY


@pytest.mark.parametrize("name", [*ALIASES, "n_ctx"])
def test_names_of_one_number_that_disagree_are_refused(folder: Path, name: str) -> None:
    rewrite(folder, **{ALIASES.get(name, name): 24})
    first = "n_positions" if name == "n_ctx" else name
    message = rf"config.json .*: {first} is \d+ and {ALIASES.get(name, name)} is 24"
    with pytest.raises(CheckpointError, match=message):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(
    ("said", "vocab_size", "expected"),
    [
        ({"eos_token_id": 3}, 211, 3),
        ({"eos_token_id": [7, 9]}, 211, 7),
        ({"eos_token_id": None}, 211, None),
        ({"eos_token_id": 210}, 211, None),  # the last one
        ({"eos_token_id": 50256}, 211, None),  # of another vocabulary
        ({}, 211, None),
        ({}, 50304, 50256),  # padded: transformers' default
        ({"eos_token_id": [60000, 5]}, 211, 5),
    ],
)
def test_the_end_of_a_text(said: dict, vocab_size: int, expected: int | None) -> None:
    contents = {"n_embd": 16, "n_head": 2, "vocab_size": vocab_size} | said
    assert config_json.parse_config(contents).eos_id == expected


def test_defaults_are_those_of_transformers() -> None:
    found, theirs = config_json.parse_config({}), TheirConfig()
    for ours, (name, *_) in config_json.NUMBERS.items():
        assert getattr(found, ours) == getattr(theirs, name)
    assert config_json.effective_eos_id(found) == theirs.eos_token_id
    for name, value in (config_json.FIXED | config_json.DROPOUTS).items():
        assert getattr(theirs, name) == value


@pytest.mark.parametrize("form", ["tanh", "none"])
def test_the_activations_that_are_taken_are_one_function(form: str) -> None:
    x = torch.linspace(-12, 12, 2001)
    expected = nn.functional.gelu(x, approximate=form)
    same = {n for n in ACT2FN if n != "prelu" and torch.allclose(ACT2FN[n](x), expected, atol=2e-6)}
    assert same == {*config_json.ACTIVATIONS[form]}


def test_the_exact_gelu_computes_what_transformers_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=97,
        n_positions=32,
        n_embd=16,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
    )
    theirs = GPT2LMHeadModel(config).eval()
    enlarge(theirs)
    theirs.save_pretrained(tmp_path / "model")
    ours, token_ids = GPT2.from_pretrained(tmp_path / "model"), ids % 97
    assert ours.config.gelu == "none"
    with torch.no_grad():
        assert_close(ours(token_ids), theirs(token_ids).logits, atol=1e-4, rtol=1e-5)
        expected = ours(token_ids)
    again = saved_again(tmp_path / "model")
    assert read(again)["activation_function"] == "gelu"
    with torch.no_grad():
        assert_close(GPT2.from_pretrained(again)(token_ids), expected, atol=0, rtol=0)
        assert_close(ours.quantize("fp16")(token_ids), expected, atol=0.2, rtol=0.02)


# ---- refused


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization_config", {"quant_method": "gptq"}),
        ("pruned_heads", {"0": [1]}),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Mine"}),
        ("is_encoder_decoder", True),
        ("eos_token_id", "<|endoftext|>"),
        ("bos_token_id", 1.5),
        ("pad_token_id", [True]),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(
    folder: Path, name: str, value: object
) -> None:
    rewrite(folder, **{name: value})
    with pytest.raises(CheckpointError, match=rf"config.json.*{name} is "):
        GPT2.from_pretrained(folder)


def test_class_counts_that_disagree_are_refused(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)
    own_model.save_pretrained(tmp_path, class_names=["a", "b", "c"])
    rewrite(tmp_path, num_labels=2)
    with pytest.raises(CheckpointError, match="num_labels is 2, and id2label lists 3"):
        GPT2.from_pretrained(tmp_path)
    rewrite(tmp_path, remove=("id2label", "label2id"), num_labels=2)
    with pytest.raises(CheckpointError, match=r"score.weight has the shape \(3, 48\).*2 classes"):
        GPT2.from_pretrained(tmp_path)


# ---- kept and written back

KEPT = {
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.3,
    "initializer_range": 0.05,
    "summary_type": "mean",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_first_dropout": 0.4,
    "reorder_and_upcast_attn": True,
    "use_cache": False,
    "activation_function": "gelu_pytorch_tanh",
    "n_inner": 4 * TINY.emb_dim,
    "bos_token_id": 3,
    "eos_token_id": [7, 9],
    "pad_token_id": 5,
    "problem_type": "single_label_classification",
    "task_specific_params": {"text-generation": {"max_length": 50}},
    "transformers_version": "4.2.0",
    "an_unknown_field": {"of": ["anything"]},
}


def test_every_field_of_transformers_is_accounted_for() -> None:
    """Who reads a new version of theirs: decide what becomes of its new fields."""
    numbers = {name for names in config_json.NUMBERS.values() for name in names}
    known = (
        numbers | {"activation_function"} | {*config_json.FIXED} | {*config_json.REFUSED} | {*KEPT}
    )
    known |= {"tie_word_embeddings", "architectures", "model_type", "dtype", "id2label", "label2id"}
    # how transformers calls the model; no numbers
    known |= {"output_hidden_states", "output_attentions", "return_dict", "_name_or_path"}
    known |= {"chunk_size_feed_forward"}  # not used by GPT-2
    assert set(TheirConfig().to_dict()) <= known


def test_what_means_nothing_to_the_numbers_is_written_back(folder: Path, tiny_model: GPT2) -> None:
    rewrite(folder, **KEPT)
    assert torch.equal(GPT2.from_pretrained(folder)(ids), tiny_model(ids))
    found = read(saved_again(folder))
    assert {name: found[name] for name in KEPT} == KEPT


def test_an_alias_is_written_back_under_the_name_of_gpt2(folder: Path) -> None:
    before = read(folder)
    rewrite(folder, remove=tuple(ALIASES), **{ALIASES[n]: before[n] for n in ALIASES})
    found = read(saved_again(folder))
    assert {name: found[name] for name in ALIASES} == {name: before[name] for name in ALIASES}
    assert not set(ALIASES.values()) & set(found)


def test_dropout_that_was_chosen_is_written_and_not_the_file_s(folder: Path) -> None:
    model = GPT2(GPT2Config(100, 32, 16, 2, 2, drop_rate=0.25))
    model.save_pretrained(folder)
    assert {read(folder)[name] for name in config_json.DROPOUTS} == {0.25}
    rewrite(folder, remove=tuple(config_json.DROPOUTS))  # transformers' default holds
    assert {read(saved_again(folder))[name] for name in config_json.DROPOUTS} == {0.1}


def test_a_missing_end_stays_none(folder: Path) -> None:
    rewrite(folder, eos_token_id=None, bos_token_id=None)
    found = read(saved_again(folder))
    assert found["eos_token_id"] is None and found["bos_token_id"] is None


def test_token_ids_beyond_a_cut_vocabulary_are_not_written(tmp_path: Path) -> None:
    GPT2(GPT2Config(100, 32, 16, 2, 2, eos_id=50)).save_pretrained(tmp_path)
    rewrite(tmp_path, eos_token_id=[50, 99], pad_token_id=99, bos_token_id=1)
    model = GPT2.from_pretrained(tmp_path)
    resize_vocab(model, 60)
    model.save_pretrained(tmp_path)
    found = read(tmp_path)
    assert (found["eos_token_id"], found["bos_token_id"]) == (50, 1)
    assert found.get("pad_token_id") is None
    GPT2LMHeadModel.from_pretrained(tmp_path)


def test_generation_settings_are_written_back(folder: Path) -> None:
    settings = {"eos_token_id": [7, 210], "bos_token_id": 1, "temperature": 0.5, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert read(saved_again(folder), "generation_config.json") == settings
    (folder / "generation_config.json").write_text("[1", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        GPT2.from_pretrained(folder)


@pytest.mark.parametrize(("said", "written"), [([210, 7], 211), (210, 211), (7, 7), (None, None)])
def test_an_end_that_has_changed_is_the_end_of_generation_too(
    folder: Path, said: object, written: int | None
) -> None:
    """Where the two files said the same before, they do so again."""
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": said, "do_sample": True}), encoding="utf-8")
    model = GPT2.from_pretrained(folder)
    resize_vocab(model, 213)
    model.config = replace(model.config, eos_id=211)
    model.save_pretrained(folder)
    found = read(folder, "generation_config.json")
    assert read(folder)["eos_token_id"] == 211 and found["do_sample"] is True
    assert found["eos_token_id"] == written


def test_class_names_come_back_without_being_given_again(own_model: GPT2, tmp_path: Path) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 2, bias=False)
    own_model.save_pretrained(tmp_path / "model", class_names=["ham", "spam"])
    rewrite(tmp_path / "model", problem_type="single_label_classification")
    again = saved_again(tmp_path / "model")
    assert read_class_names(again) == ["ham", "spam"]
    assert read(again)["problem_type"] == "single_label_classification"
    model = GPT2.from_pretrained(again)
    model.out_head = nn.Linear(TINY.emb_dim, 3, bias=False)  # other classes
    model.save_pretrained(again)
    assert read_class_names(again) == ["LABEL_0", "LABEL_1", "LABEL_2"]


# ---- what other programs look for


def test_llama_cpp_s_converter_finds_the_context_length(folder: Path) -> None:
    """It reads hparams["n_ctx"] (convert_hf_to_gguf.py, GPT2Model.set_gguf_parameters)."""
    assert read(folder)["n_ctx"] == TINY.context_length


@pytest.mark.parametrize("tokenizer_first", [False, True])
def test_transformers_tokenizer_knows_the_context(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, tokenizer_first: bool
) -> None:
    parts: list[Any] = [word_model, tokenizer]
    for part in reversed(parts) if tokenizer_first else parts:
        part.save_pretrained(tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == word_model.config.context_length
    model = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    answer = TextGenerationPipeline(model=model, tokenizer=theirs)
    assert len(answer("a " * 200, truncation=True, max_new_tokens=1)[0]["generated_text"]) > 0


def test_a_shorter_limit_of_the_tokenizer_is_kept(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path)
    config = read(tmp_path, "tokenizer_config.json") | {"model_max_length": 40}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    word_model.save_pretrained(tmp_path)
    assert read(tmp_path, "tokenizer_config.json")["model_max_length"] == 40


@pytest.mark.parametrize(
    ("contents", "longest"),
    [
        ({"n_positions": 16}, 16),
        ({"max_position_embeddings": 16, "model_type": "llama"}, 16),
        ({}, None),
    ],
)
def test_a_tokenizer_is_saved_beside_any_config(
    tokenizer: Tokenizer, tmp_path: Path, contents: dict[str, Any], longest: int | None
) -> None:
    """One that `transformers.GPT2Config` has written has no architectures."""
    (tmp_path / "config.json").write_text(json.dumps(contents), encoding="utf-8")
    tokenizer.save_pretrained(tmp_path)
    assert read(tmp_path, "tokenizer_config.json").get("model_max_length") == longest


def test_transformers_pipeline_takes_a_batch_of_our_classifier(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = GPT2(GPT2Config(tokenizer.vocab_size, 32, 16, 2, 2)).eval()
    model.out_head = nn.Linear(16, 2, bias=False)
    enlarge(model)
    model.save_pretrained(tmp_path, class_names=["a", "b"])
    tokenizer.save_pretrained(tmp_path)
    pipeline = TextClassificationPipeline(
        model=GPT2ForSequenceClassification.from_pretrained(tmp_path).eval(),
        tokenizer=GPT2Tokenizer.from_pretrained(tmp_path),
    )
    texts = ["one", "and a longer text", "two words"]
    for text, answer in zip(texts, pipeline(texts, batch_size=3), strict=True):
        logits = model(torch.tensor([tokenizer.encode(text)]))[0, -1]
        assert answer["score"] == pytest.approx(logits.softmax(-1).max().item(), abs=1e-4)
        assert answer["label"] == "ab"[int(logits.argmax())]


def test_a_padding_token_that_the_tokenizer_names_is_kept(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    model = GPT2(GPT2Config(tokenizer.vocab_size, 32, 16, 2, 2))
    model.out_head = nn.Linear(16, 2, bias=False)
    tokenizer.save_pretrained(tmp_path)
    names = json.dumps({"pad_token": "!"})
    (tmp_path / "special_tokens_map.json").write_text(names, encoding="utf-8")
    model.save_pretrained(tmp_path)
    assert "pad_token" not in read(tmp_path, "tokenizer_config.json")
