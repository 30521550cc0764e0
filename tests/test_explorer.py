"""The explorer page, Python's side: its numbers are the model's, and what it holds is safe."""

import math
import re
import shutil
import subprocess
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
import torch
from command import ROOT, run
from torch import Tensor, nn
from written_page import TEXT, called, data_of

import gpt2mini
from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.inspection import head_scores
from gpt2mini.inspection.explorer import page_data, write_page
from gpt2mini.inspection.explorer.architecture import source_of
from gpt2mini.inspection.explorer.contents import EXAMPLES
from gpt2mini.inspection.explorer.page import FOLDER, bundle, modules
from gpt2mini.lora import add_lora, save_adapter
from gpt2mini.model import MLP, TransformerBlock

MODEL_FILE = Path(gpt2mini.__file__).with_name("model.py").read_text(encoding="utf-8").split("\n")


@pytest.fixture(scope="module")
def page(word_model: GPT2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    written = write_page(word_model, tokenizer, TEXT, path, "<tiny>")
    assert written.path == path and written.size == path.stat().st_size
    assert written.precision == "int8" and written.why_not_live is None
    return path


# ---- what the page says of the model


def test_facts_scores_and_examples(word_model: GPT2, tokenizer: Tokenizer, page: Path) -> None:
    data = data_of(page)
    (model,) = data["models"]
    assert data["text"] == TEXT and data["live"] is True and data["most_tokens"] == 64
    assert data["examples"] == list(EXAMPLES) and data["forbidden_ids"] == []
    assert model["name"] == "<tiny>" and model["precision"] == "int8"
    assert model["n_parameters"] == sum(p.numel() for p in word_model.parameters())
    config = {"n_layers": 3, "n_heads": 2, "emb_dim": 16, "gelu": "tanh"}
    config |= {"vocab_size": tokenizer.vocab_size, "context_length": 64}
    assert model["config"] == config
    off = page_data(word_model, tokenizer, TEXT, live="off")
    (model,) = off["models"]
    assert off["examples"] == [] and off["recorded_text"] == TEXT
    assert model["precision"] is None and model["tensors"] == {} and model["check"] is None
    scores = head_scores(word_model)
    for kind, of_layers in model["head_scores"].items():
        np.testing.assert_allclose(of_layers, getattr(scores, kind), atol=1e-4)


def test_a_context_too_short_for_scores_has_zeros(tokenizer: Tokenizer) -> None:
    short = GPT2(GPT2Config(tokenizer.vocab_size, 3, emb_dim=8, n_heads=2, n_layers=1))
    data = page_data(short, tokenizer, "a", live="int8")
    assert data["most_tokens"] == 3 and data["examples"] == []
    assert data["models"][0]["head_scores"]["induction"] == [[0, 0]]


def test_the_examples_are_short_and_of_whole_words(tokenizer: Tokenizer) -> None:
    assert 4 <= len(EXAMPLES) <= 5
    for text in EXAMPLES:
        assert len(tokenizer.encode(text)) <= 20
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_parts_have_the_lines_of_the_architecture_and_name_all_parameters(
    word_model: GPT2, page: Path
) -> None:
    parts = {part["key"]: part for part in data_of(page)["parts"]}
    assert list(parts) == ["embedding", "block", "attention", "mlp", "final_norm", "out_head"]
    for part in parts.values():
        first = part["first_line"] - 1
        lines = MODEL_FILE[first : first + len(part["code"].split("\n"))]
        assert part["file"] == "model.py" and dedent("\n".join(lines)) == part["code"]
        assert part["code"].startswith(("def ", "class ", "@"))
        assert part["n_parameters"] == sum(map(math.prod, part["parameters"].values()))
        assert "tokens" in part["shape"]
    named = {name: list(p.shape) for name, p in word_model.trf_blocks[0].named_parameters()}
    assert parts["block"]["parameters"] == named
    assert parts["attention"]["parameters"] | parts["mlp"]["parameters"] == named
    sizes = {key: part["n_parameters"] for key, part in parts.items()}
    assert sizes["block"] == sizes["attention"] + sizes["mlp"]
    total = sizes["embedding"] + 3 * sizes["block"] + sizes["final_norm"] + sizes["out_head"]
    assert total == sum(p.numel() for p in word_model.parameters())
    in_block = [key for key, part in parts.items() if part["in_block"]]
    assert in_block == ["block", "attention", "mlp"]


def test_an_untied_head_opens_to_the_function_that_calls_it(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    untied, n = deepcopy(word_model), tokenizer.vocab_size
    untied.out_head = nn.Linear(16, n)
    head = page_data(untied, tokenizer, "a", live="off")["parts"][-1]
    assert head["code"].startswith("def forward(") and "self.out_head(" in head["code"]
    assert head["parameters"] == {"out_head.weight": [n, 16], "out_head.bias": [n]}


class Doubled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def with_doubled_mlp(model: GPT2) -> GPT2:
    own = deepcopy(model)
    own.trf_blocks[0].get_submodule("mlp").__class__ = Doubled
    return own


def test_the_page_shows_the_source_of_the_models_own_parts(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    part = page_data(with_doubled_mlp(word_model), tokenizer, "a")["parts"][3]
    assert part["file"] == "test_explorer.py" and "2 * super().forward(x)" in part["code"]
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("class Typed:\n    def forward(self): ...", typed)  # as in an interactive session
    assert source_of(typed["Typed"].forward) == ("typed", 1, "# Typed.forward: no source file")


def test_a_block_of_ones_own_is_shown_as_far_as_it_can_be_observed(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    class Sequential(nn.Module):
        """Attention and MLP, without layer norms."""

        def __init__(self, block: TransformerBlock) -> None:
            super().__init__()
            self.attn, self.mlp = block.attn, block.mlp

        def forward(self, x: Tensor, attn_mask: Any = None, cache: Any = None) -> Tensor:
            x = x + self.attn(x, attn_mask, cache)
            return x + self.mlp(x)

    own = deepcopy(word_model)
    own.trf_blocks = nn.ModuleList(
        [Sequential(b) for b in own.trf_blocks if isinstance(b, TransformerBlock)]
    )
    data = page_data(own, tokenizer, "a lamp")
    assert not data["live"]
    step, missing = called(data, tmp_path, ["step", 1, 0], ["norm", "middle", 1, 0])
    assert step["norm1"] == {"norm": None, "values": [], "size": 0}  # NaN in JSON
    assert missing is None and step["stream"]["size"] == 16


# ---- one file, which loads nothing


def test_the_page_loads_nothing_and_no_text_breaks_out_of_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "{{" not in text
    assert "<tiny>" not in text and TEXT not in text
    assert text.count("<script") == text.count("</script>") == 5  # data, 3 blobs, the program
    without_svg = text.replace('"http://www.w3.org/2000/svg"', "")
    assert "http" not in without_svg and "//www" not in without_svg
    assert not re.search(r"\bsrc\s*=|<link(?! rel=\"icon\" href=\"data:,\")|@import|url\(", text)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|\bimport\(|WebSocket|sendBeacon|eval\(", text)
    assert not re.search(r"<[a-z][^<>]*\son[a-z]+=", text.split("<script", 1)[0])


def test_the_page_carries_the_license_of_what_it_holds(page: Path) -> None:
    license_text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (FOLDER / "LICENSE.txt").read_text(encoding="utf-8") == license_text
    comment = page.read_text(encoding="utf-8").split("<!--", 1)[1].split("-->", 1)[0]
    assert license_text.strip() in comment


def test_the_modules_are_one_script_in_which_each_name_is_defined_once(tmp_path: Path) -> None:
    script = bundle()
    assert not re.search(r"^(import|export)\b", script, re.M)
    defined = re.findall(r"^(?:async )?(?:function\*?|const|let|class) (\w+)", script, re.M)
    assert len(defined) > 100 and len(set(defined)) == len(defined)
    names = modules("view.js")
    files = [path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.js")]
    assert sorted(names) == sorted(files)
    assert names[-1] == "view.js" and names.index("model/engine.js") < names.index("model/live.js")
    if node := shutil.which("node"):
        (tmp_path / "page.mjs").write_text(script, encoding="utf-8")
        done = subprocess.run(
            [node, "--check", tmp_path / "page.mjs"], capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 0, done.stderr


def test_the_same_page_is_written_at_any_time(
    page: Path, word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    write_page(word_model, tokenizer, TEXT, tmp_path / "again.html", "<tiny>")
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.parametrize(
    "text",
    [
        "</script><script>alert(1)</script>",
        "<!-- <script> {{data}} {{blobs}}",
        "a\u2028b\u2029c",
        "null \x00 bell \x07 escape \x1b",
        "line\r\nnext\rlast\n",
        "half \udc00 a pair",
    ],
)
@pytest.mark.parametrize("live", ["int8", "off"])
def test_any_text_and_any_name_is_shown_as_it_is(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, text: str, live: str
) -> None:
    path = tmp_path / "page.html"
    write_page(word_model, tokenizer, text, path, name=text, live=live)
    page = path.read_text(encoding="utf-8")
    data = data_of(path)
    shown = text.replace("\udc00", "\ufffd")
    assert data["text"] == data["models"][0]["name"] == shown
    ids = data["models"][0]["recorded"]["token_ids"]
    assert tokenizer.encode(data["recorded_text"]) == ids
    assert ids == tokenizer.encode(text)[: len(ids)]
    assert "alert(1)</script>" not in page and page.count("</script>") == (
        5 if live != "off" else 3
    )


def test_a_live_page_keeps_numbers_of_the_beginning_of_a_long_text(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    text = "中文 " * 7
    ids = tokenizer.encode(text)
    assert 16 < len(ids) <= 64
    data = page_data(word_model, tokenizer, text)
    kept = data["models"][0]["recorded"]["token_ids"]
    assert data["text"] == text and text.startswith(data["recorded_text"])
    assert tokenizer.encode(data["recorded_text"]) == kept == ids[: len(kept)]
    assert 10 < len(kept) <= 16
    whole = page_data(word_model, tokenizer, text, live="off")
    assert whole["models"][0]["recorded"]["token_ids"] == ids


# ---- what cannot be shown


def test_texts_that_do_not_fit_are_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    for live in ("int8", "off"):
        for text, n in (("", 0), (" a" * 65, 65)):
            with pytest.raises(ValueError, match=f"from 1 to 64 tokens; the text has {n}"):
                page_data(word_model, tokenizer, text, live=live)
    long = GPT2(GPT2Config(tokenizer.vocab_size, 256, emb_dim=16, n_heads=2, n_layers=1))
    with pytest.raises(ValueError, match="from 1 to 128 tokens; the text has 129"):
        page_data(long, tokenizer, " a" * 129)


def test_a_classifier_is_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    classifier = deepcopy(word_model)
    classifier.out_head = nn.Linear(16, 2)
    with pytest.raises(ValueError, match="the output head has 2 outputs"):
        page_data(classifier, tokenizer, "a")


@pytest.mark.parametrize("live", ["int8", "off"])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(
    word_model: GPT2, tokenizer: Tokenizer, live: str, number: float
) -> None:
    broken = deepcopy(word_model)
    broken.get_parameter("trf_blocks.1.mlp.mlp_in.weight").data[3, 2] = number
    with pytest.raises(ValueError, match=r"trf_blocks\.1\.mlp\.mlp_in\.weight has .* not finite"):
        page_data(broken, tokenizer, "a", live=live)
    with pytest.raises(ValueError, match="not finite"):
        page_data(word_model, tokenizer, "a", live=live, other=broken)


def test_activations_that_are_not_finite_are_refused_by_name(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    broken = deepcopy(word_model)
    broken.get_parameter("trf_blocks.1.mlp.mlp_out.weight").data[:] = 3e38
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp_out has .* not finite .* on this text"):
        page_data(broken, tokenizer, "a", live="off")


def test_a_quantized_model_is_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    quantized = deepcopy(word_model).quantize("int8")
    with pytest.raises(ValueError, match="the weights are quantized"):
        page_data(quantized, tokenizer, "a")


def test_a_folder_is_no_file_to_write(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(IsADirectoryError, match=f"{tmp_path} is a folder") as refused:
        write_page(word_model, tokenizer, "a", tmp_path)
    assert str(tmp_path / "page.html") in str(refused.value)
    assert not list(tmp_path.iterdir())


# ---- which models are live


def with_hook(model: GPT2) -> GPT2:
    own = deepcopy(model)
    own.trf_blocks[1].register_forward_hook(lambda module, arguments, output: 2 * output)
    return own


def with_own_forward(model: GPT2) -> GPT2:
    own = deepcopy(model)
    block = own.trf_blocks[1]
    block.forward = block.forward
    return own


def with_other_epsilon(model: GPT2) -> GPT2:
    own = deepcopy(model)
    own.final_norm.eps = 1e-6
    return own


def with_relu(model: GPT2) -> GPT2:
    own = deepcopy(model)
    setattr(own.trf_blocks[0].get_submodule("mlp"), "gelu", "none")  # noqa: B010
    return own


def as_subclass(model: GPT2) -> GPT2:
    own = deepcopy(model)
    own.__class__ = type("Scaled", (GPT2,), {})
    return own


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (with_doubled_mlp, r"trf_blocks\.0\.mlp is a Doubled, not a MLP"),
        (with_hook, r"trf_blocks\.1 has forward hooks"),
        (with_own_forward, r"trf_blocks\.1 has a forward of its own"),
        (with_other_epsilon, r"final_norm has other settings"),
        (with_relu, r"trf_blocks\.0\.mlp has gelu='none', and the config 'tanh'"),
        (as_subclass, r"the model is a Scaled, not a GPT2"),
    ],
)
def test_a_model_that_the_engine_does_not_compute_is_not_live(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, changed: Any, why: str
) -> None:
    own = changed(word_model)
    written = write_page(own, tokenizer, "a lamp", tmp_path / "page.html")
    assert written.precision is None and written.why_not_live
    assert re.search(why, written.why_not_live)
    assert not data_of(tmp_path / "page.html")["live"]
    with pytest.raises(ValueError, match=why):
        page_data(own, tokenizer, "a lamp", live="fp16")
    beside = page_data(word_model, tokenizer, "a lamp", other=own)
    assert not beside["live"] and len(beside["models"]) == 2


def test_the_numbers_of_an_own_block_are_its_own(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    own = with_doubled_mlp(word_model)
    ids = torch.tensor([tokenizer.encode("a lamp")])
    with torch.no_grad():
        best = own(ids)[0, -1].softmax(dim=0).max(dim=0)
    (found,) = called(page_data(own, tokenizer, "a lamp"), tmp_path, ["nextTokens", 1, {}, 1])
    assert found[0]["id"] == int(best.indices)
    assert found[0]["p"] == pytest.approx(float(best.values), rel=1e-4)


def test_auto_is_live_below_50_million_parameters(
    word_model: GPT2, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gpt2mini.inspection.explorer.contents.SMALL", 1000)
    written = write_page(word_model, tokenizer, "a", tmp_path / "page.html")
    assert written.precision is None and "below 1,000" in str(written.why_not_live)
    assert page_data(word_model, tokenizer, "a", live="int8")["live"]
    with pytest.raises(ValueError, match="live must be auto, int8, fp16 or off, not 'yes'"):
        page_data(word_model, tokenizer, "a", live="yes")


@pytest.mark.parametrize("live", ["auto", "off"])
def test_a_large_model_gets_no_effects(
    word_model: GPT2,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    live: str,
) -> None:
    module = "gpt2mini.inspection.explorer.recorded.MOST_PARAMETERS_FOR_EFFECTS"
    monkeypatch.setattr(module, 1000)
    data = page_data(word_model, tokenizer, "a lamp", live=live)
    target = data["models"][0]["recorded"]["token_ids"][1]
    found = called(data, tmp_path, ["source.rankHeads", 0, target], ["source.note"])
    assert found[0] == [] and "more than 200 million" in found[1]


def test_the_shape_of_124m_is_shown_with_stored_numbers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    config = GPT2Config(emb_dim=768, n_heads=12, n_layers=2)  # the other 10 blocks are alike
    torch.manual_seed(0)
    model = GPT2(config).eval()
    told: list[tuple[int, int]] = []
    written = write_page(
        *(model, tokenizer, "The old keeper", tmp_path / "page.html"),
        live="off",
        progress=lambda *done: told.append(done),
    )
    assert told[-1] == (24, 24)  # a pass without each head
    assert written.size < 2e6
    data, ids = data_of(tmp_path / "page.html"), torch.tensor([tokenizer.encode("The old keeper")])
    (found,) = called(data, tmp_path, ["nextTokens", 2, {}, 3])
    with torch.no_grad():
        logits = model(ids)[0, 2, : tokenizer.vocab_size]
    best = logits.softmax(dim=0).topk(3)
    assert [token["id"] for token in found] == best.indices.tolist()
    np.testing.assert_allclose([token["p"] for token in found], best.values, rtol=1e-3)


# ---- the command


def test_the_command_says_what_it_wrote(word_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = run("explore", "--model", word_folder, "--out", page)
    assert done.returncode == 0 and f"{page} (" in done.stdout, done.stderr
    assert "MB; live, int8 weights)" in done.stdout
    assert data_of(page)["models"][0]["name"] == word_folder.name
    assert str(word_folder.parent) not in page.read_text(encoding="utf-8")
    done = run("explore", "--model", word_folder, "--out", page, "--live", "off", "--name", "<I>")
    assert "not live, numbers of this text: live is off" in done.stdout
    assert data_of(page)["models"][0]["name"] == "<I>"
    done = run("explore", "--model", word_folder, "--out", page, "--live", "fp16")
    assert "live, float16 weights" in done.stdout


def test_the_command_tells_the_page_what_to_load(
    word_folder: Path, word_model: GPT2, tmp_path: Path
) -> None:
    """By names: "Copy as Python" writes them."""
    adapted, adapter, page = deepcopy(word_model), tmp_path / "captain", tmp_path / "page.html"
    add_lora(adapted, rank=2)
    save_adapter(adapted, adapter)
    asked = ("explore", "--model", word_folder, "--text", "a lamp", "--out", page)
    done = run(*asked, "--adapter", adapter, "--other", word_folder, "--name", "any name")
    assert done.returncode == 0, done.stderr
    base = word_folder.name
    assert loaded(page) == [("any name", base, "captain"), (base, base, None)]
    done = run(*asked, "--other", adapter, "--live", "off")
    assert loaded(page) == [(base, base, None), ("captain", base, "captain")]
    done = run(*asked, "--adapter", adapter)
    assert loaded(page) == [(f"{base} with the adapter captain", base, "captain")]
    assert str(tmp_path) not in page.read_text(encoding="utf-8")


def loaded(page: Path) -> list[tuple[str, str, str | None]]:
    return [(one["name"], one["base"], one["adapter"]) for one in data_of(page)["models"]]


def test_the_command_reads_a_text_from_standard_input(word_folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    run("explore", "--model", word_folder, "--text", "-", "--out", page, stdin="a lamp\n")
    assert data_of(page)["text"] == "a lamp"  # without the line break of `echo`


def test_the_command_refuses_in_one_line(word_folder: Path, tmp_path: Path) -> None:
    done = run("explore", "--model", word_folder, "--text", "", "--out", tmp_path / "page.html")
    assert done.stderr.startswith("error: the page shows from 1") and "\n" not in done.stderr
    done = run("explore", "--model", word_folder, "--out", tmp_path)
    assert done.stderr.startswith(f"error: {tmp_path} is a folder; the page is one file")
    assert not list(tmp_path.iterdir())


def test_the_wheel_holds_all_files_of_the_page() -> None:
    builder = pytest.importorskip("hatchling.builders.wheel", reason="looks at a wheel's files")
    files = builder.WheelBuilder(str(ROOT)).recurse_included_files()
    held = {Path(file.distribution_path).as_posix() for file in files}
    kinds = (".py", ".js", ".css", ".html", ".wasm", ".wat", ".txt", ".json")
    needed = [path for path in FOLDER.rglob("*") if path.suffix in kinds]
    assert len(needed) > 20
    for path in needed:
        assert path.relative_to(ROOT).as_posix() in held
