"""The explorer page's Python highlighting, and the lines that its steps mark in model.py."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from gpt2mini import GPT2, GPT2Config
from gpt2mini.inspection.explorer.architecture import parts

NODE = shutil.which("node")
FOLDER = Path(__file__).parents[1] / "gpt2mini" / "inspection" / "explorer"
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def run_in_node(module: str, script: str, value: object) -> object:
    """What `script`, an expression of `module` and `value`, is in node."""
    address = (FOLDER / module).as_uri()
    program = (
        f'const module = await import("{address}"); const value = {json.dumps(value)};'
        f"console.log(JSON.stringify({script}));"
    )
    command = [str(NODE), "--input-type=module", "--eval", program]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_highlighting_keeps_every_character_and_finds_what_python_finds() -> None:
    code = 'def f(x):\n    """A docstring\n    for two lines."""\n    return x  # not "a string"\n'
    lines = run_in_node("panels/source_code.js", "module.pythonLines(value)", code)
    assert isinstance(lines, list)
    texts = ["".join(piece["text"] for piece in line) for line in lines]
    assert "\n".join(texts) == code
    kinds = [[piece["kind"] for piece in line if piece["kind"]] for line in lines]
    assert kinds == [["keyword"], ["string"], ["string"], ["keyword", "comment"], []]


def test_every_step_marks_lines_of_the_model() -> None:
    config = GPT2Config(vocab_size=10, context_length=4, emb_dim=4, n_heads=2, n_layers=1)
    codes = {part["key"]: part["code"] for part in parts(GPT2(config))}
    steps = run_in_node("panels/steps.js", "module.STEPS.map((step) => step.lines)", None)
    assert isinstance(steps, list) and len(steps) == 8
    for step in steps:
        for part, beginnings in step.items():
            lines = [line.strip() + "\n" for line in codes[part].split("\n")]
            for beginning in beginnings:
                assert any(line.startswith(beginning) for line in lines), (part, beginning)
