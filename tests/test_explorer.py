"""The explorer's page: its numbers are the model's, and in a browser it does what it says."""

import base64
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from textwrap import dedent
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from command import HANGS
from torch import nn

import gpt2mini
from gpt2mini import GPT2, GPT2Config, Tokenizer
from gpt2mini.inspection import logit_lens, trace
from gpt2mini.inspection.explorer import page_data, source_of, write_page
from gpt2mini.model import MLP, TransformerBlock

TEXT = "The lamp </script><b>&amp; 中 it"
MODEL_FILE = Path(gpt2mini.__file__).with_name("model.py").read_text(encoding="utf-8").split("\n")

# What a reader does, put at the end of a copy of the page; what is then seen stands in a text area.
SCRIPT = """<script>
{
const seen = {};
%s
const area = document.createElement("textarea");
area.id = "seen";
area.textContent = btoa(encodeURIComponent(JSON.stringify(seen)));
document.body.append(area);
}
</script>"""

ACTIONS = """
document.querySelectorAll("details").forEach((box) => box.querySelector("summary").click());
seen.open = [...document.querySelectorAll("details[open] pre")].map((e) => e.textContent);
seen.parameters = [...document.querySelectorAll("details[open]")].map((box) => [
  box.querySelectorAll("p")[1].textContent,
  [...box.querySelectorAll("tr")].map((row) => [...row.children].map((e) => e.textContent)),
]);
document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowLeft" }));
at("layer").value = 1;
at("layer").dispatchEvent(new Event("input"));
at("heads").children[1].click();
seen.strongest = at("strongest").textContent;
at("weights").children[2].dispatchEvent(new MouseEvent("mouseenter"));
seen.hover = at("strongest").textContent;
at("temperature").value = 0.5;
at("temperature").dispatchEvent(new Event("input"));
seen.next = at("next").querySelector("tr").textContent;
seen.lens = at("lens").querySelector("tr").textContent;
seen.length = at("norms").querySelectorAll("tr")[3].children[3].textContent;
seen.attention = attention(1, 1, 3, 2);
seen.bold = document.querySelectorAll("b").length;
"""

# Where the keyboard's focus stays, which keys are the browser's, what the pointer on a head shows.
FOCUS_AND_HOVER = """
const heads = at("heads").children, weights = at("weights").children;
const summary = document.querySelector("summary");
function arrow(element, key, modifier = {}) {
  const options = { key, bubbles: true, cancelable: true, ...modifier };
  return !element.dispatchEvent(new KeyboardEvent("keydown", options));  // whether it was taken
}
seen.focus = [];
for (const element of [heads[1], summary, at("layer"), at("tokens").children[3], weights[3]]) {
  token = 3; draw();
  element.focus();
  arrow(element, "ArrowLeft");
  at("layer").dispatchEvent(new Event("input"));
  const group = element.parentNode, moves = group === at("tokens") || group === at("weights");
  seen.focus.push(document.activeElement === (moves ? group.children[2] : element));
}
document.activeElement.blur();
seen.taken = {};
for (const modifier of ["altKey", "ctrlKey", "metaKey", "shiftKey", "none"]) {
  token = 3; draw();
  seen.taken[modifier] = [arrow(document.body, "ArrowLeft", { [modifier]: true }), token];
}
function shown() {
  const pressed = [...heads].map((button) => button.getAttribute("aria-pressed")).join();
  return [at("strongest").textContent.slice(0, 15), weights[0].style.background, pressed];
}
token = 3; draw();
seen.chosen = shown();
heads[1].dispatchEvent(new MouseEvent("mouseenter"));
seen.hover = shown();
at("layer").dispatchEvent(new Event("input"));
seen.redrawn = shown();
heads[1].dispatchEvent(new MouseEvent("mouseleave"));
seen.left = shown();
heads[1].dispatchEvent(new FocusEvent("focus"));
seen.focused = shown();
heads[1].dispatchEvent(new FocusEvent("blur"));
seen.blurred = shown();
heads[1].click();
heads[1].dispatchEvent(new MouseEvent("mouseleave"));
seen.clicked = shown();
seen.greys = [0, 1].map((h) => Math.round(255 * (1 - attention(0, h, 3, 0))));
"""


@pytest.fixture(scope="module")
def token_ids(tokenizer: Tokenizer) -> torch.Tensor:
    return torch.tensor([tokenizer.encode(TEXT)])


@pytest.fixture(scope="module")
def page(word_model: GPT2, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_page(word_model, tokenizer, TEXT, path, name="<tiny>")
    return path


@pytest.fixture(scope="module")
def data(page: Path) -> dict[str, Any]:
    """The JSON of the written page, as a browser finds it: up to the first </script>."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found[1])


def test_attention_on_the_page_is_the_models(
    data: dict[str, Any], word_model: GPT2, token_ids: torch.Tensor
) -> None:
    n = token_ids.shape[1]
    shares = np.frombuffer(base64.b64decode(data["attention"]), "<u2").reshape(3, 2, -1) / 65535
    rows, columns = np.tril_indices(n)
    for layer, attention in enumerate(trace(word_model, token_ids).of_each_block("attention")):
        expected = attention[0].numpy()[:, rows, columns]
        np.testing.assert_allclose(shares[layer], expected, atol=1e-5)


def test_lens_norms_and_logits_on_the_page_are_the_models(
    data: dict[str, Any], word_model: GPT2, token_ids: torch.Tensor, tokenizer: Tokenizer
) -> None:
    lens, found = logit_lens(word_model, token_ids), trace(word_model, token_ids)
    shown = [[[p for _, p in place] for place in layer] for layer in data["lens"]]
    np.testing.assert_allclose(shown, lens.probabilities[:, 0], atol=1e-5)
    streams = [found["embedding"], *found.of_each_block("stream")]
    for row, stream in zip(data["norms"]["stream"], streams, strict=True):
        np.testing.assert_allclose(row, stream[0].norm(dim=1), atol=1e-4)
    logits = np.frombuffer(base64.b64decode(data["next"]["logits"]), "<f4")
    np.testing.assert_allclose(logits, found["logits"][0, -1].sort(descending=True).values)
    assert data["token_ids"] == token_ids[0].tolist()


def size(box: dict[str, Any]) -> int:
    return sum(math.prod(shape) for shape in box["parameters"].values())


def test_boxes_have_the_lines_of_the_architecture_and_name_all_parameters(
    data: dict[str, Any], word_model: GPT2
) -> None:
    boxes = {box["title"]: box for box in data["boxes"]}
    for box in boxes.values():
        first = box["first_line"] - 1
        lines = MODEL_FILE[first : first + len(box["code"].split("\n"))]
        assert box["file"] == "model.py" and dedent("\n".join(lines)) == box["code"]
        assert box["code"].startswith(("def ", "class ", "@"))
    named = {name: list(p.shape) for name, p in word_model.trf_blocks[0].named_parameters()}
    assert boxes["Block"]["parameters"] == named
    assert boxes["Attention"]["parameters"] | boxes["MLP"]["parameters"] == named
    assert {"norm1.weight", "attn.query.weight"} < set(boxes["Attention"]["parameters"])
    assert {"norm2.weight", "mlp.mlp_in.weight"} < set(boxes["MLP"]["parameters"])
    assert list(boxes["Embedding"]["parameters"]) == ["tok_emb.weight", "pos_emb.weight"]
    parts = [size(boxes[title]) for title in ("Embedding", "Final norm", "Output head")]
    assert size(boxes["Block"]) == size(boxes["Attention"]) + size(boxes["MLP"])
    assert sum(parts) + 3 * size(boxes["Block"]) == data["parameters"]
    assert data["parameters"] == sum(p.numel() for p in word_model.parameters())


def test_the_page_loads_nothing_and_no_text_breaks_out_of_it(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "http" not in text and "<tiny>" not in text and " src=" not in text
    assert text.count("</script>") == 2
    assert "{{" not in text


def test_an_untied_head_opens_to_the_function_that_calls_it(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    untied = deepcopy(word_model)
    untied.out_head = nn.Linear(16, tokenizer.vocab_size)
    head = page_data(untied, tokenizer, "a", "")["boxes"][-1]
    assert head["code"].startswith("def forward(") and "self.out_head(" in head["code"]
    n = tokenizer.vocab_size
    assert head["parameters"] == {"out_head.weight": [n, 16], "out_head.bias": [n]}


def test_the_page_shows_the_source_of_the_models_own_parts(
    word_model: GPT2, tokenizer: Tokenizer
) -> None:
    class Doubled(MLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    own = deepcopy(word_model)
    block = own.trf_blocks[0]
    assert isinstance(block, TransformerBlock)
    block.mlp.__class__ = Doubled
    box = page_data(own, tokenizer, "a", "")["boxes"][3]
    assert box["file"] == "test_explorer.py" and "2 * super().forward(x)" in box["code"]
    typed: dict[str, Any] = {"__name__": "typed"}
    exec("class Typed:\n    def forward(self): ...", typed)  # as in an interactive session
    assert source_of(typed["Typed"].forward) == ("typed", 1, "# Typed.forward: no source file")


def test_what_a_page_cannot_show_is_refused(word_model: GPT2, tokenizer: Tokenizer) -> None:
    for text, n in (("", 0), (" a" * 129, 129)):
        with pytest.raises(ValueError, match=f"from 1 to 128 tokens; the text has {n}"):
            page_data(word_model, tokenizer, text, "")
    classifier = GPT2(GPT2Config(tokenizer.vocab_size, 64, emb_dim=16, n_heads=2, n_layers=1))
    classifier.out_head = nn.Linear(16, 2)
    with pytest.raises(ValueError, match="the output head has 2 outputs"):
        page_data(classifier, tokenizer, "a", "")


def explore(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command: Sequence[str | Path] = [sys.executable, "-m", "gpt2mini", "explore", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=HANGS)


def test_the_command_writes_a_page_and_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    done = explore("--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "page.html (0." in done.stdout
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    done = explore("--text", "", "--out", tmp_path / "page.html")
    assert done.stderr.startswith("error: the page shows from 1") and done.stderr.count("\n") == 1


def seen_in_a_browser(page: Path, folder: Path, actions: str) -> dict[str, Any]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    acted = folder / "acted.html"
    text = page.read_text(encoding="utf-8").replace("</body>", SCRIPT % actions + "</body>")
    acted.write_text(text, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", acted.as_uri()]
    done = subprocess.run([browser, *flags], capture_output=True, encoding="utf-8", timeout=HANGS)
    assert "CONSOLE" not in done.stderr
    found = re.search(r'id="seen">([^<]*)<', done.stdout)
    assert found, done.stderr
    return json.loads(unquote(base64.b64decode(found[1]).decode()))


def test_in_a_browser_the_page_does_what_it_says(
    page: Path, tmp_path: Path, word_model: GPT2, token_ids: torch.Tensor
) -> None:
    seen = seen_in_a_browser(page, tmp_path, ACTIONS)
    check_what_was_seen(seen, word_model, token_ids)
    check_listed_parameters(seen, word_model)


def test_redrawing_keeps_the_focus_and_the_browsers_keys_and_hover_shows_a_head(
    page: Path, tmp_path: Path
) -> None:
    seen = seen_in_a_browser(page, tmp_path, FOCUS_AND_HOVER)
    assert seen["focus"] == [True] * 5
    taken = seen["taken"]
    assert taken.pop("none") == [True, 2]
    assert list(taken.values()) == [[False, 3]] * 4
    grey = [f"rgb({share}, {share}, {share})" for share in seen["greys"]]
    assert grey[0] != grey[1]
    first = ["Layer 0, head 0", grey[0], "true,false"]
    assert seen["chosen"] == seen["left"] == seen["blurred"] == first
    second = ["Layer 0, head 1", grey[1], "true,false"]  # shown, not chosen
    assert seen["hover"] == seen["redrawn"] == seen["focused"] == second
    assert seen["clicked"] == ["Layer 0, head 1", grey[1], "false,true"]


def check_listed_parameters(seen: dict[str, Any], model: GPT2) -> None:
    named = dict(model.named_parameters())
    named |= dict(model.trf_blocks[0].named_parameters())
    for text, rows in seen["parameters"]:
        for name, shape, count in rows:
            assert shape == f"({', '.join(map(str, named[name].shape))})"
            assert int(count.replace(",", "")) == named[name].numel()
        total = sum(int(count.replace(",", "")) for _, _, count in rows)
        assert text.startswith(f"{total:,} parameters")
    attention, mlp = [[name for name, _, _ in seen["parameters"][i][1]] for i in (2, 3)]
    assert attention[:3] == ["norm1.weight", "norm1.bias", "attn.query.weight"]
    assert mlp[:3] == ["norm2.weight", "norm2.bias", "mlp.mlp_in.weight"]


def check_what_was_seen(seen: dict[str, Any], model: GPT2, token_ids: torch.Tensor) -> None:
    found, n = trace(model, token_ids), token_ids.shape[1]
    assert len(seen["open"]) == 6 and seen["bold"] == 0
    assert seen["strongest"].startswith("Layer 1, head 1: ")
    assert f"(token {n - 2}) attends to" in seen["strongest"]  # one to the left of the last
    assert "(token 2) attends to" in seen["hover"]
    attention = found["blocks.1.attention"][0, 1]
    assert seen["attention"] == pytest.approx(float(attention[3, 2]), abs=1e-5)
    most = float(attention[n - 2].max())
    assert f"{100 * most:.{2 if most < 0.1 else 1}f}" in seen["strongest"]
    p = float((found["logits"][0, -1] / 0.5).softmax(dim=0).max())
    assert f"{100 * p:.{2 if p < 0.1 else 1}f}" in seen["next"]
    length = float(found["blocks.1.stream"][0, n - 2].norm())
    assert float(seen["length"]) == pytest.approx(length, abs=0.006)
    assert seen["lens"].startswith("block 2")
