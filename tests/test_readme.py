"""The README says what is so: its code runs, its map is complete, its commands exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(
    set(re.findall(r"python ((?:examples|tests/benchmarks)/\w+\.py[^\n`#]*)", README))
)


def test_file_map_lists_every_file_of_the_package_and_the_examples() -> None:
    folders = [ROOT / "gpt2mini", ROOT / "examples", ROOT / "tests" / "benchmarks"]
    files = [file for folder in folders for file in folder.rglob("*.py")]
    missing = [f.name for f in files if f.name != "__init__.py" and f.name not in README]
    assert not missing


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:  # one after another, as a reader would paste them
        exec(compile(block, "README.md", "exec"), names)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_flags_that_the_readme_gives_them(command: str) -> None:
    script, *arguments = command.split()
    shown = subprocess.run(
        [sys.executable, ROOT / script, "--help"], capture_output=True, encoding="utf-8", check=True
    ).stdout
    for flag in (argument for argument in arguments if argument.startswith("--")):
        assert flag in shown


def test_measured_facts_name_their_commands() -> None:
    table = README.split("## Measured")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert rows and all("`" in row.split("|")[3] for row in rows)
