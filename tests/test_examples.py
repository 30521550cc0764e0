"""The examples that teach: short, straight, the loop in view, and run as a user would run them."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import HANGS

from gpt2mini import GPT2, GPT2Config, Tokenizer

ROOT = Path(__file__).parents[1]
FOLDER = Path(__file__).parents[1] / "examples"

# flags that make a script small, and what it then prints
SCRIPTS = {
    "generate.py": (["--tokens", "4"], ["The old man looked at", "perplexity of its own text"]),
    "finetune_text.py": (["--steps", "1"], ["--- before", "loss", "--- after", "general text"]),
    "finetune_classifier.py": (["--epochs", "1"], ["before    accuracy", "epoch 1   loss"]),
    "finetune_lora.py": (["--steps", "1"], ["parameters learn", "held-out loss", "merged"]),
    "finetune_instructions.py": (["--steps", "1"], ["held-out loss", "--- after", "general text"]),
    "train_reward_model.py": (["--steps", "1"], ["margin", "held out: accuracy", "reward model:"]),
    "dpo.py": (["--steps", "1"], ["loss 0.693", "held out: right", "--- after"]),
    "ppo.py": (["--rollouts", "1"], ["reward 0.", "KL  0.00 nats", "--- after"]),
    "grpo.py": (["--rollouts", "1"], ["reward 0.", "KL  0.00 nats", "--- after"]),
    "evaluate.py": (["--pairs", "2", "--samples", "1"], ["by hand", "library", "distinct-1"]),
    "inspect_model.py": (["--text", "The old"], ["block  1", "induction", "the second"]),
    "pretrain.py": (["--steps", "2", "--layers", "1"], ["parameters", "bits per byte"]),
}
WITHOUT_TRAINING = {"generate.py", "evaluate.py", "inspect_model.py"}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two blocks with the vocabulary of the bundled one."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    tokenizer.save_pretrained(folder)
    config = GPT2Config(tokenizer.vocab_size, 256, emb_dim=32, n_heads=2, n_layers=2)
    GPT2(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_runs(script: str, small_model: Path, tmp_path: Path) -> None:
    flags, printed = SCRIPTS[script]
    if script not in ("generate.py", "pretrain.py"):  # the one with the bundled model; from nothing
        flags = [*flags, "--model", str(small_model)]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(FOLDER / script), *flags],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    for words in printed:
        assert words in done.stdout
    if script == "finetune_text.py":
        best = tmp_path / "runs" / "finetune_text" / "best"
        assert (best / "model.safetensors").is_file() and (best / "vocab.json").is_file()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_is_short_and_straight(script: str) -> None:
    text = (FOLDER / script).read_text(encoding="utf-8")
    assert 40 <= len(text.splitlines()) <= 90
    assert 1 <= text.count(".add_argument(") <= 5
    assert "__main__" not in text
    docstring = " ".join((ast.get_docstring(ast.parse(text)) or "").split())
    assert f"python examples/{script}" in docstring and "Prints" in docstring
    assert "et al." in docstring  # the paper


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_example_needs_the_library_alone_and_not_its_loop(script: str) -> None:
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names
    }
    assert not {path.stem for path in FOLDER.glob("*.py")} & modules
    assert not [name for name in modules if name.startswith(("gpt2mini.cli", "gpt2mini.training"))]


@pytest.mark.parametrize("script", sorted(set(SCRIPTS) - WITHOUT_TRAINING))
def test_the_loop_is_in_view(script: str) -> None:
    tree = ast.parse((FOLDER / script).read_text(encoding="utf-8"))
    loops = [node for node in tree.body if isinstance(node, ast.For)]  # not in a function
    calls = ["optimizer.zero_grad()", "loss.backward()", "optimizer.step()"]
    assert any(all(call in ast.unparse(loop) for call in calls) for loop in loops)
