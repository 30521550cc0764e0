"""The READMEs say what is so: code runs, commands and links exist, the map names every module."""

import re
import runpy
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from test_imports import FILES, own_imports, parts_of

from gpt2mini.cli import main

ROOT = Path(__file__).parents[1]
PACKAGE, BENCHMARKS = ROOT / "gpt2mini", ROOT / "tests" / "benchmarks"
READMES = [
    ROOT / "README.md",
    *sorted(PACKAGE.rglob("README.md")),
    BENCHMARKS / "README.md",
    *sorted((ROOT / "weights").rglob("README.md")),
]
BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
COMMAND = re.compile(
    r"(?:python ((?:examples|tests)/[\w/]+\.py)|(?<!from )\b(gpt2mini [a-z]+))([^\n#|`]*)"
)  # (script, or the command with a job; its arguments)
PROGRAM = re.compile(r"`(?:[A-Z_]+=\S+ )*(?:python|gpt2mini) [^`]+`$")

each_readme = pytest.mark.parametrize("path", READMES, ids=lambda p: str(p.relative_to(ROOT)))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def code(text: str) -> Iterator[str]:
    """The shell blocks and the code inside sentences and tables."""
    yield from (block for language, block in BLOCK.findall(text) if language == "sh")
    yield from re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))


def commands() -> dict[str, set[str]]:
    """The flags that the READMEs give to each script of the repository and each job."""
    found: dict[str, set[str]] = {}
    for piece in (piece for path in READMES for piece in code(read(path))):
        for script, job, arguments in COMMAND.findall(re.sub(r"\\\n *", " ", piece)):
            flags = re.findall(r"(?:^| )(--[\w-]+)", arguments)
            found.setdefault(script or job, set()).update(flags)
    return found


@each_readme
def test_python_blocks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for language, block in BLOCK.findall(read(path)):
        if language == "python":  # one after another, as a reader would paste them
            exec(compile(block, str(path), "exec"), names)


@pytest.mark.parametrize(("program", "flags"), sorted(commands().items()))
def test_commands_have_the_flags_that_the_readmes_give_them(
    program: str,
    flags: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:  # in this process, which has imported torch already
        if program.startswith("gpt2mini "):
            main([program.split()[1], "--help"])
        else:
            script = ROOT / program
            monkeypatch.setattr(sys, "argv", [str(script), "--help"])
            monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
            runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code in (None, 0)
    shown = capsys.readouterr().out
    assert {flag for flag in flags if not re.search(rf"{flag}(?![\w-])", shown)} == set()


@each_readme
def test_named_files_exist(path: Path) -> None:
    named = set(re.findall(r"\b(?:examples|gpt2mini|tests)/[\w/]+\.\w+", read(path)))
    assert {name for name in named if not (ROOT / name).is_file()} == set()


@each_readme
def test_links_between_files_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", read(path)))
    files = {target for target in targets if not re.match(r"\w+:", target)}
    assert {target for target in files if not (path.parent / target).exists()} == set()


def test_the_map_names_every_module_and_no_other_file() -> None:
    modules = {str(file.relative_to(PACKAGE).as_posix()) for file in PACKAGE.rglob("*.py")}
    named = set(re.findall(r"`([\w/]+\.py)`", read(PACKAGE / "README.md")))
    assert {name for name in modules if not name.endswith("__init__.py")} <= named
    assert {name for name in named - modules if not (ROOT / name).is_file()} == set()


def test_the_map_lists_the_rooms_in_the_order_of_their_imports() -> None:
    rooms = re.findall(r"^## (\w+)/", read(PACKAGE / "README.md"), re.MULTILINE)
    assert set(rooms) == {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    for path in (path for path in FILES if path.parent != PACKAGE):
        room = parts_of(path)[0]
        below = set(rooms[rooms.index(room) + 1 :])
        assert not [name for name in own_imports(path) if name.split(".")[0] in below], path


@pytest.mark.parametrize("folder", ["examples", "tests/benchmarks"])
def test_every_script_is_named_in_a_readme(folder: str) -> None:
    text = "".join(map(read, READMES))
    scripts = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{folder}/*.py")]
    assert scripts
    assert [script for script in scripts if script not in text] == []


def test_every_measured_figure_names_its_command() -> None:
    """In the last column of its table, or for the whole table in the paragraph above it."""
    paragraphs = read(BENCHMARKS / "README.md").split("\n\n")
    tables = [(above, p) for above, p in pairwise(paragraphs) if p.startswith("|")]
    assert tables
    for above, table in tables:
        header, _, *rows = table.strip().splitlines()
        if last_cell(header) == "command":
            assert [row for row in rows if not PROGRAM.match(last_cell(row))] == []
        else:
            assert any(PROGRAM.match(piece) for piece in re.findall(r"`[^`]+`", above)), header


def last_cell(row: str) -> str:
    return row.split("|")[-2].strip()
