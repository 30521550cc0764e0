"""The explorer's interventions: what is switched off in the page is off as in `patched`, and the
Python that the page gives for a view prints the numbers of the page."""

import ast
import base64
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import torch
from command import HANGS

from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.explorer.contents import Contents, Origin, page_contents
from gpt2mini.inspection.explorer.page import FOLDER
from gpt2mini.inspection.explorer.weights import with_packed_weights
from gpt2mini.lora import add_lora, lora_layers

NODE = shutil.which("node")
needs_node = pytest.mark.skipif(NODE is None, reason="node is not installed")
HARNESS = Path(__file__).with_name("explorer") / "interventions.mjs"
TEXT = "The old keeper lit the lamp. Then the old keeper"
HARD_TEXT = 'A "quoted" \\n text\n\t中 \u2028 \x7f </script> \N{SQUID} {braces}'
VIEWS: dict[str, dict[str, Any]] = {
    "plain": {"layer": 8, "head": 2},
    "a head": {"layer": 8, "head": 2, "off": "8.2"},
    "mean of a head": {"layer": 9, "head": 1, "off": "mean:8.2,mean:8.1"},
    "all kinds": {"layer": 11, "head": 3, "off": "5.0,mlp:3,attn:1,layer:7"},
    "means of all kinds": {"layer": 11, "off": "mean:mlp:3,mean:attn:2,mean:layer:7"},
    "the same block twice": {"layer": 10, "off": "layer:7,mean:mlp:7"},
    "patch": {"layer": 9, "patch": "5.10.3", "second": "The young captain saw the sea."},
    "patch and head": {"layer": 9, "off": "8.2", "patch": "5.2.1", "second": "中 \u2028 text"},
    "patch from a long text": {"layer": 9, "patch": "5.10.3", "second": "The sea was calm. " * 60},
    "patch beyond the end": {"layer": 9, "patch": "5.99.1", "second": "Too short"},
    "token": {"layer": 8, "head": 2, "token": 4, "off": "4.1"},
    "sampling": {"temperature": 0.7, "topK": 4, "topP": 0.9, "off": "8.2"},
    "greedy": {"temperature": 0},
    "another text": {"text": HARD_TEXT, "off": "mean:0.0"},
    "no text": {"text": ""},
    "long text": {"text": "The lamp was lit. " * 60, "off": "8.2"},
    "both": {"right": "compare", "off": "8.2,mean:mlp:3"},
    "both, the other one": {"right": "compare", "model": 1, "layer": 3},
}


@dataclass(frozen=True)
class View:
    code: str
    models: list[dict[str, Any]]  # names of patches, and numbers before and after


@pytest.fixture(scope="module")
def nano() -> tuple[GPT2, Tokenizer]:
    return GPT2.from_pretrained("gpt2-nano"), Tokenizer.from_pretrained("gpt2-nano")


@pytest.fixture(scope="module")
def in_page(nano: tuple[GPT2, Tokenizer]) -> GPT2:
    """The model with the weights of the page."""
    return with_packed_weights(nano[0], "int8")


@pytest.fixture(scope="module")
def adapted() -> GPT2:
    """The model with an adapter that changes what it says."""
    tuned = GPT2.from_pretrained("gpt2-nano")
    torch.manual_seed(0)
    add_lora(tuned, rank=2)
    for layer in lora_layers(tuned).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return tuned


@torch.no_grad()
def add_change(model: GPT2, adapted: GPT2) -> None:
    """As `load_adapter`, which refuses to adapt a model with the page's weights."""
    for name, layer in lora_layers(adapted).items():
        model.get_parameter(f"{name}.weight").add_(layer.merged_weight() - layer.weight)


@pytest.fixture(scope="module")
def views(
    nano: tuple[GPT2, Tokenizer], adapted: GPT2, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, View]:
    """What a live page of the model and its adapter shows of each of VIEWS."""
    model, tokenizer = nano
    contents = page_contents(model, tokenizer, TEXT, "gpt2-nano", adapted, "captain", "int8")
    return shown_views(contents, VIEWS, tmp_path_factory.mktemp("views"))


def shown_views(
    contents: Contents, asked_views: dict[str, dict[str, Any]], folder: Path
) -> dict[str, View]:
    if NODE is None:
        pytest.skip("node is not installed")
    asked, answered = folder / "input.json", folder / "output.json"
    page = {
        "data": contents.data,
        "blobs": [base64.b64encode(blob).decode() for blob in contents.weights],
        "kernel": base64.b64encode((FOLDER / "model" / "kernel.wasm").read_bytes()).decode(),
        "tokenizer": base64.b64encode(contents.tokenizer).decode(),
        "hashes": ["#" + urlencode(view) for view in asked_views.values()],
    }
    asked.write_text(json.dumps(page), encoding="utf-8")
    subprocess.run([NODE, HARNESS, asked, answered], check=True, timeout=HANGS)
    found = json.loads(answered.read_text(encoding="utf-8"))
    return {name: View(**view) for name, view in zip(asked_views, found, strict=True)}


def printed(code: str) -> list[dict[str, Any]]:
    """What a script prints, once for each call of `show`: the numbers of a page's reading."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, "view.py", "exec"), {})
    found: list[dict[str, Any]] = []
    for line in output.getvalue().split("\n"):
        number = re.match(r"  (\d\.\d+)  ", line)
        if "attends to" in line:
            found.append({"attention": [], "target": None, "next": []})
        elif said := re.search(r"comes next with (\d\.\d+)$", line):
            found[-1]["target"] = float(said[1])
        elif number and found[-1]["target"] is None:
            found[-1]["attention"].append(float(number[1]))
        elif number and float(number[1]) > 0:  # sampling rules leave fewer than five
            found[-1]["next"].append(float(number[1]))
    return found


def expected(view: View, state: dict[str, Any]) -> list[dict[str, Any]]:
    """What the page shows, in the order in which its script prints it."""
    first = int(state.get("model", 0))
    models = [first, 1 - first] if state.get("right") == "compare" else [first]
    numbers = []
    for model in (view.models[i] for i in models):
        numbers += [model["before"], *([model["after"]] if model["patches"] else [])]
    return numbers


@needs_node
@pytest.mark.parametrize("name", VIEWS)
def test_the_python_of_a_view_prints_the_numbers_of_the_page(
    name: str,
    in_page: GPT2,
    views: dict[str, View],
    adapted: GPT2,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scripts run on the weights of the page."""
    monkeypatch.setattr(GPT2, "from_pretrained", staticmethod(lambda name: deepcopy(in_page)))
    monkeypatch.setattr(
        "gpt2mini.lora.load_adapter", lambda model, name: add_change(model, adapted)
    )
    prints(views[name], VIEWS[name])


def prints(view: View, state: dict[str, Any]) -> None:
    """The view's script prints what the page shows."""
    found, right = printed(view.code), expected(view, state)
    assert len(found) == len(right)
    for one, other in zip(found, right, strict=True):
        # The page has the adapter in float16.
        tolerance = 2e-5 if "compare" not in state.values() else 2e-3
        assert one["target"] == pytest.approx(other["target"], abs=tolerance)
        assert one["attention"] == pytest.approx(other["attention"], abs=tolerance)
        shown = [p for p in other["next"] if p > 5e-7]
        assert one["next"] == pytest.approx(shown, abs=tolerance)


@needs_node
def test_the_python_of_a_short_context_prints_the_numbers_of_the_page(
    word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The means are those of the whole bundled text, in rows of 64 tokens."""
    states: dict[str, dict[str, Any]] = {
        "means": {"layer": 2, "off": "mean:0.1,mean:mlp:1"},
        "a long second text": {"layer": 2, "patch": "0.3.60", "second": "The sea. " * 60},
    }
    contents = page_contents(word_model, tokenizer, TEXT, "small", None, "", "int8")
    in_page = with_packed_weights(word_model, "int8")
    monkeypatch.setattr(GPT2, "from_pretrained", staticmethod(lambda name: deepcopy(in_page)))
    monkeypatch.setattr(Tokenizer, "from_pretrained", staticmethod(lambda name: tokenizer))
    views = shown_views(contents, states, tmp_path)
    for name, view in views.items():
        assert view.models[0]["patches"]
        prints(view, states[name])


@needs_node
@pytest.mark.parametrize("live", ["int8", "fp16"])
def test_the_python_loads_each_model_and_its_adapter(
    live: str, word_model: GPT2, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    origins = [Origin("base", "captain"), Origin("base", "sailor")]
    contents = page_contents(
        *(word_model, tokenizer, TEXT, "any name", word_model, "another", live), origins=origins
    )
    views = shown_views(contents, {"both": {"right": "compare"}}, tmp_path)
    lines = views["both"].code.split("\n")
    assert "from gpt2mini.lora import load_adapter" in lines
    loading = [line for line in lines if re.search(r"= \w+\.from_pretrained|^load_adapter", line)]
    assert loading == [
        'model = GPT2.from_pretrained("base")',
        'load_adapter(model, "captain")',
        'tokenizer = Tokenizer.from_pretrained("base")',
        'other = GPT2.from_pretrained("base")',
        'load_adapter(other, "sailor")',
    ]
    assert lines[lines.index(loading[1]) - 1] == "# Put the adapter's path in place of its name."


@needs_node
def test_an_intervention_changes_what_the_page_shows(views: dict[str, View]) -> None:
    model = views["a head"].models[0]
    assert model["patches"] == ["blocks.8.head.2"]
    assert model["before"]["target"] > 0.05  # " lit", which stood there before
    assert model["after"]["target"] < 0.01
    assert views["patch"].models[0]["patches"] == ["blocks.5.stream"]
    assert views["the same block twice"].models[0]["patches"] == [
        "blocks.7.attn_out",
        "blocks.7.mlp_out",
    ]
    for name in ("plain", "patch beyond the end"):
        for model in views[name].models:
            assert model["before"] == model["after"] and not model["patches"]


@needs_node
def test_the_python_of_a_view_runs_by_itself(views: dict[str, View], tmp_path: Path) -> None:
    """With the model's own weights, as a reader runs it: close to the page's int8 weights."""
    script = tmp_path / "view.py"
    script.write_text(views["mean of a head"].code, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, script], check=True, capture_output=True, text=True, timeout=HANGS
    )
    said = re.findall(r"comes next with (\d\.\d+)$", found.stdout, re.M)
    model = views["mean of a head"].models[0]
    right = [model["before"]["target"], model["after"]["target"]]
    assert list(map(float, said)) == pytest.approx(right, rel=0.1)


@needs_node
def test_no_text_of_the_page_breaks_out_of_a_string_or_comment(views: dict[str, View]) -> None:
    for view in views.values():
        for line in view.code.split("\n"):
            assert line.isprintable(), line
    strings = [
        node.value
        for node in ast.walk(ast.parse(views["another text"].code))
        if isinstance(node, ast.Constant)
    ]
    assert HARD_TEXT in strings


@needs_node
def test_the_python_says_that_the_page_has_rounded_weights(views: dict[str, View]) -> None:
    code = views["plain"].code
    assert "int8 weights" in code.split("\n")[1]
    assert "put its path in place of the name" in code
