"""`gpt2mini verify`: the card of gpt2-nano holds, and notices every change; what is published fits
the code that is to check it."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import run
from conftest import enlarge, shared_data

from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.checkpoints import CheckpointError
from gpt2mini.config import PUBLISHED_SIZES
from gpt2mini.evaluation import zero_shot
from gpt2mini.verification import (
    Installation,
    Report,
    known_facts,
    make_facts,
    read_card,
    verify,
    write_card,
)
from gpt2mini.verification.contents import FileChecksum, ParameterCount
from gpt2mini.verification.outputs import GreedyTexts
from gpt2mini.verification.published import WEIGHTS, published_facts, published_name
from gpt2mini.verification.task_figures import TaskFigure

NAMES = tuple(WEIGHTS)


def verdicts(report: Report) -> dict[str, str]:
    """The kind of each fact that did not pass, and its reason."""
    return {
        type(finding.fact).__name__: finding.reason
        for finding in report.findings
        if finding.verdict != "pass"
    }


def verified(folder: Path) -> dict[str, str]:
    installation = Installation(folder)
    return verdicts(verify(installation, known_facts(installation)))


# ---- the card of gpt2-nano


@pytest.fixture(scope="module")
def nano() -> Installation:
    return Installation("gpt2-nano")


def test_the_card_of_gpt2_nano_holds(nano: Installation) -> None:
    report = verify(nano, known_facts(nano))
    assert verdicts(report) == {} and report.passed
    kinds = {type(finding.fact).__name__ for finding in report.findings}
    assert kinds == {
        *("Hyperparameters", "ParameterCount", "TensorDigests", "VocabularyDigests"),
        *("Logits", "BitsPerByte", "GreedyTexts"),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_its_greedy_texts_do_not_depend_on_rounding(nano: Installation, dtype: torch.dtype) -> None:
    """Nor on the processor, then, whose kernels differ far less than these dtypes."""
    rounded = Installation("gpt2-nano")
    rounded.model = GPT2.from_pretrained("gpt2-nano", dtype=dtype)
    facts = [fact for fact in known_facts(nano) if isinstance(fact, GreedyTexts)]
    assert len(facts) == 4 and verdicts(verify(rounded, facts)) == {}


# ---- a small model and its card


@pytest.fixture(scope="module")
def original(word_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cards") / "original"
    shutil.copytree(word_folder, folder)
    GPT2.from_pretrained(folder).half().save_pretrained(folder)  # numbers that float16 holds
    installation = Installation(folder)
    write_card(installation, make_facts(installation))
    return folder


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy with its card, to be changed."""
    return shutil.copytree(original, tmp_path / "copy")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_the_same_numbers_in_another_dtype_are_the_same_model(copy: Path, dtype: str) -> None:
    GPT2.from_pretrained(copy, dtype=dtype).save_pretrained(copy)
    assert verified(copy) == {}


def test_rounded_numbers_are_noticed(copy: Path) -> None:
    GPT2.from_pretrained(copy, dtype="bfloat16").save_pretrained(copy)
    assert "rounded to a narrower dtype" in verified(copy)["TensorDigests"]


@pytest.mark.parametrize(
    "name", ["tok_emb.weight", "pos_emb.weight", "trf_blocks.2.norm2.bias", "final_norm.weight"]
)
@torch.no_grad()
def test_a_tensor_with_one_changed_number_is_named(copy: Path, name: str) -> None:
    model = GPT2.from_pretrained(copy)
    flat = model.state_dict()[name].view(-1)
    flat[-1] = -flat[-1] if flat[-1] else 1.0
    model.save_pretrained(copy)
    assert verified(copy)["TensorDigests"] == f"changed: {name}"


@torch.no_grad()
def test_a_model_that_computes_no_numbers_fails(nano: Installation, tmp_path: Path) -> None:
    """It cannot write a text; its tensor is named all the same."""
    model = GPT2.from_pretrained(nano.folder)
    model.state_dict()["trf_blocks.1.mlp.mlp_in.weight"][0, 0] = math.nan
    model.save_pretrained(tmp_path)
    Tokenizer.from_pretrained(nano.folder).save_pretrained(tmp_path)
    found = verdicts(verify(Installation(tmp_path), known_facts(nano)))
    assert found["TensorDigests"] == "changed: trf_blocks.1.mlp.mlp_in.weight"
    assert "NaN or infinity" in found["GreedyTexts"]


def test_a_foreign_model_of_this_shape_fails(copy: Path) -> None:
    enlarge(model := GPT2.from_pretrained(copy), seed=1)
    model.save_pretrained(copy)
    found = verified(copy)
    assert {"TensorDigests", "Logits", "BitsPerByte"} <= found.keys()
    assert "another model of this shape" in found["TensorDigests"]
    assert not {"Hyperparameters", "ParameterCount", "VocabularyDigests"} & found.keys()


def test_a_model_of_another_shape_fails(copy: Path, tokenizer: Tokenizer) -> None:
    GPT2(GPT2Config(tokenizer.vocab_size, 64, emb_dim=16, n_heads=2, n_layers=2)).save_pretrained(
        copy
    )
    found = verified(copy)
    assert found["Hyperparameters"] == "n_layers is 2, expected 3"
    assert "missing: trf_blocks.2.norm1.weight" in found["TensorDigests"]


def test_a_changed_hyperparameter_is_named(copy: Path) -> None:
    """The shapes of all tensors stay; what the model computes does not."""
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps(config | {"n_head": 4}), encoding="utf-8")
    found = verified(copy)
    assert found["Hyperparameters"] == "n_heads is 4, expected 2" and "Logits" in found


def test_a_changed_vocabulary_is_noticed(copy: Path) -> None:
    vocab = json.loads((copy / "vocab.json").read_text(encoding="utf-8"))
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (copy / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert verified(copy)["VocabularyDigests"] == "changed: vocabulary of the tokenizer"


def test_an_edited_architecture_is_noticed_too(original: Path) -> None:
    """The weights are the same; a hook changes what is computed with them."""
    installation = Installation(original)
    installation.model.final_norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    found = verdicts(verify(installation, known_facts(installation)))
    assert {"Logits", "BitsPerByte"} <= found.keys() and "TensorDigests" not in found


def test_a_truncated_file_is_an_error_that_names_it(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        verified(copy)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no facts"),
        ('{"facts": [{"kind": "Magic"}]}', "a fact of the kind 'Magic': expected FileChecksum"),
        (
            '{"facts": [{"kind": "ParameterCount", "size": 3}]}',
            "a ParameterCount with other fields",
        ),
    ],
)
def test_a_card_that_is_none_is_refused(tmp_path: Path, contents: str, message: str) -> None:
    (tmp_path / "card.json").write_text(contents, encoding="utf-8")
    with pytest.raises(ValueError, match=f"card.json .*{message}"):
        read_card(tmp_path / "card.json")


# ---- whose facts


def test_another_model_s_card_can_be_asked_for(original: Path, copy: Path) -> None:
    (copy / "card.json").unlink()
    installation = Installation(copy)
    assert verify(installation, known_facts(installation, like=original)).passed


def test_a_folder_without_card_is_refused_with_advice(copy: Path, tmp_path: Path) -> None:
    (copy / "card.json").unlink()
    with pytest.raises(ValueError, match=r"no card.json in .*--as NAME.*--write-card"):
        known_facts(Installation(copy))


@pytest.mark.parametrize("name", ["gpt2", "124M", "openai-community/gpt2"])
def test_all_names_of_a_published_model_lead_to_its_facts(name: str) -> None:
    assert published_name(name) == "gpt2" and published_name("gpt2-nano") is None
    assert known_facts(Installation(name)) == published_facts("gpt2")
    assert known_facts(Installation("some folder"), like=name) == published_facts("gpt2")


# ---- what is published


@pytest.mark.parametrize("name", NAMES)
def test_published_facts_have_sources_and_the_slow_ones_a_remark(name: str) -> None:
    for fact in published_facts(name):
        assert "https://" in fact.source
        assert fact.remark or not fact.is_slow


@pytest.mark.parametrize("name", NAMES)
def test_published_parameter_counts_follow_from_the_dimensions(name: str) -> None:
    (fact,) = [f for f in published_facts(name) if isinstance(f, ParameterCount)]
    emb, layers = PUBLISHED_SIZES[name]["emb_dim"], PUBLISHED_SIZES[name]["n_layers"]
    block = 12 * emb * emb + 13 * emb  # 4 + 8 matrices; 9 biases and 4 vectors of norms
    assert fact.expected == (50257 + 1024) * emb + layers * block + 2 * emb


def test_published_digests_are_those_of_openai_s_vocabulary(tmp_path: Path) -> None:
    """The genuine files, under either of their names; one more byte is noticed."""
    genuine = shared_data("gpt2-bpe")
    facts = [f for f in published_facts("gpt2") if isinstance(f, FileChecksum)]
    assert [f.verdict for f in verify(Installation(genuine), facts).findings] == [
        *("skip", "pass", "pass", "skip")
    ]
    shutil.copy(genuine / "encoder.json", tmp_path / "vocab.json")
    (tmp_path / "merges.txt").write_bytes((genuine / "vocab.bpe").read_bytes() + b"\n")
    assert [f.verdict for f in verify(Installation(tmp_path), facts).findings] == [
        *("skip", "pass", "FAIL", "skip")
    ]


TASK_FILES = {
    "lambada": '{"text": "The old man looked at the sea"}\n',
    "hellaswag": '{"ctx": "A man", "endings": ["sits.", "reads.", "runs."], "label": 1}\n',
    "wikitext-2": " = Title = \n \n The sea <unk> , he said .\n",
    "wikitext-103": " = Title = \n \n The sea <unk> , he said .\n",
    "wikitext-2-raw": " = Title = \n \n The sea , he said .\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_published_figures_are_figures_that_evaluation_gives(
    name: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Each selects one row of its task, of a model with the published context."""
    usual = {"lambada": "lambada_test.jsonl", "hellaswag": "hellaswag_val.jsonl"}
    for task, text in TASK_FILES.items():
        (tmp_path / usual.get(task, f"{task}.test.txt")).write_text(text, encoding="utf-8")
    installation = Installation("a small model", data=tmp_path)
    installation.model = GPT2(GPT2Config(tokenizer.vocab_size, 1024, 16, 2, 1)).eval()
    installation.tokenizer = tokenizer
    figures = [f for f in published_facts(name) if isinstance(f, TaskFigure)]
    assert figures
    for fact in figures:
        here = replace(fact, lines=TASK_FILES[fact.task].count("\n"))
        rows = zero_shot(
            *(installation.model, tokenizer),
            {fact.task: installation.task_file(fact.task)},
            stride=fact.stride,
        ).rows
        values = [
            r.value for r in rows if (r.metric, r.setting[:9]) == (fact.metric, fact.setting[:9])
        ]
        assert [here.find(installation)] == values


# ---- figures of tasks


@pytest.fixture
def figure() -> Callable[..., TaskFigure]:
    def make(expected: float, tolerance: float = 0.1, lines: int = 1) -> TaskFigure:
        return TaskFigure(
            task="lambada",
            metric="perplexity",
            setting="whole",
            expected=expected,
            tolerance=tolerance,
            lines=lines,
        )

    return make


def test_a_figure_agrees_within_its_tolerance(
    original: Path, tmp_path: Path, figure: Callable[..., TaskFigure]
) -> None:
    (tmp_path / "lambada_test.jsonl").write_text(TASK_FILES["lambada"], encoding="utf-8")
    installation = Installation(original, data=tmp_path)
    value = figure(0.0).find(installation)
    facts = [figure(value + 0.09), figure(value - 0.11)]
    report = verify(installation, facts, thorough=True)
    assert [finding.verdict for finding in report.findings] == ["pass", "FAIL"]
    assert len(installation.measured) == 1  # both from one measurement


def test_figures_are_skipped_where_their_file_is_missing_or_another(
    original: Path, tmp_path: Path, figure: Callable[..., TaskFigure]
) -> None:
    missing = verify(Installation(original, data=tmp_path), [figure(1.0)], thorough=True)
    assert "needs a file" in missing.findings[0].reason and not missing.passed
    (tmp_path / "lambada_test.jsonl").write_text(TASK_FILES["lambada"] * 3, encoding="utf-8")
    part = verify(Installation(original, data=tmp_path), [figure(1.0, lines=5)], thorough=True)
    assert "has 3 lines; the figure is for a file of 5" in part.findings[0].reason


def test_figures_are_left_out_unless_they_are_asked_for(
    original: Path, figure: Callable[..., TaskFigure]
) -> None:
    report = verify(Installation(original), [figure(1.0)])
    assert report.findings == [] and report.left_out == 1 and "--thorough" in str(report)


# ---- the command


def test_the_command_prints_a_table_and_writes_it(original: Path, tmp_path: Path) -> None:
    done = run("verify", original, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"pass  parameters +[\d,]+ +[\d,]+\n", done.stdout)
    shown = done.stdout[done.stdout.index("fact") : done.stdout.index("summary:")]
    assert max(map(len, shown.splitlines())) <= 80
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["passed"] and {row["verdict"] for row in summary["rows"]} == {"pass"}
    assert {"torch", "gpt2mini", "processor"} <= summary.keys()


def test_the_command_ends_with_status_1_where_a_fact_fails(copy: Path, tmp_path: Path) -> None:
    done = run("verify", copy, "--as", "gpt2", "--out", tmp_path)
    assert done.returncode == 1 and "FAIL  sha256 of model.safetensors" in done.stdout
    assert max(map(len, done.stdout.split("\n\n")[1].splitlines())) <= 80
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    rows = {row["fact"]: row for row in summary["rows"]}
    assert not summary["passed"] and rows["parameters"]["expected"] == 124_439_808
    assert rows["parameters"]["source"].startswith("https://")


def test_a_model_of_a_short_context_has_a_card_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    GPT2(GPT2Config(tokenizer.vocab_size, 3, 16, 2, 1)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert run("verify", tmp_path / "model", "--write-card").returncode == 0
    done = run("verify", tmp_path / "model", "--out", tmp_path)
    assert done.returncode == 0 and "pass  logits of" in done.stdout, done.stderr


def test_the_command_writes_a_card_that_then_holds(copy: Path, tmp_path: Path) -> None:
    (copy / "card.json").unlink()
    assert "no card.json" in run("verify", copy, "--out", tmp_path).stderr
    assert run("verify", copy, "--write-card").returncode == 0
    assert run("verify", copy, "--out", tmp_path).returncode == 0
    misplaced = run("verify", copy, "--write-card", "--as", "gpt2")
    assert "--as is for verification without --write-card" in misplaced.stderr
