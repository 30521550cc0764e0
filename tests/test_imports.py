"""The shape of the package: one direction of imports, no prints, one encoding, a light import."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from gpt2mini import GPT2

PACKAGE = Path(__file__).parents[1] / "gpt2mini"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the inside to the outside: what a GPT-2 is, what one does with it, the command. A file may
# import from its own ring and from those before it.
ROOMS = {"losses", "lora", "data", "classification", "preferences"}
ROOMS |= {"training", "evaluation", "verification", "inspection"}
COMMAND = {"cli", "__main__"}
# The one circle: the model's public methods `from_pretrained`, `save_pretrained` and `quantize`
# import inside the function what imports the model.
METHODS = {("model", "checkpoints"), ("model", "quantize")}

each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def parts_of(path: Path) -> list[str]:
    """gpt2mini/checkpoints/hub.py -> ["checkpoints", "hub"]; an __init__ stands for its folder."""
    parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of what a file imports, at the top or inside functions, but not for types alone.

    `from a import b` yields both "a" and "a.b": b may be a module.
    """
    for node in walk_at_run_time(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative: count up from the folder that the file lies in
                folder = ["gpt2mini", *path.relative_to(PACKAGE).parent.parts]
                base = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [base])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def walk_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, without what stands under `if TYPE_CHECKING:`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from walk_at_run_time(child)


def calls(path: Path) -> Iterator[ast.Call]:
    return (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))


def opens_text(call: ast.Call) -> bool:
    """Is this open(...), path.open(...), path.read_text(...) or path.write_text(...) of text?"""
    if isinstance(call.func, ast.Attribute):
        name, arguments = call.func.attr, call.args
    elif isinstance(call.func, ast.Name) and call.func.id == "open":
        name, arguments = "open", call.args[1:]  # without the path
    else:
        return False
    modes = [*arguments[:1], *(k.value for k in call.keywords if k.arg == "mode")]
    binary = any(isinstance(m, ast.Constant) and "b" in str(m.value) for m in modes)
    return name in {"read_text", "write_text"} or (name == "open" and not binary)


def ring_of(module: str) -> int:
    """0: the core, 1: the rooms, 2: the command. module: its name without the package's."""
    first = module.split(".")[0]
    return 2 if first in COMMAND else 1 if first in ROOMS else 0


def own_imports(path: Path) -> set[str]:
    """The package's modules that a file imports, without the package's name."""
    found = set()
    for name in imported_modules(path):
        if name.startswith("gpt2mini.") and is_module(name):
            found.add(name.removeprefix("gpt2mini."))
    return found


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


@each_file
def test_imports_go_from_the_command_to_the_rooms_to_the_core(path: Path) -> None:
    ring = ring_of(".".join(parts_of(path)) or "__init__")
    assert not [name for name in own_imports(path) if ring_of(name) > ring]


def test_no_room_and_no_module_of_the_core_imports_itself_in_a_circle() -> None:
    """Rooms count as one each, modules of the core by themselves."""
    arrows: dict[str, set[str]] = {}
    for path in FILES:
        here = (parts_of(path) or ["__init__"])[0]
        there = {name.split(".")[0] for name in own_imports(path)}
        arrows.setdefault(here, set()).update(
            name for name in there if name != here and (here, name) not in METHODS
        )
    order = TopologicalSorter(arrows)
    order.prepare()  # raises CycleError, which names the circle


@each_file
def test_the_library_never_prints(path: Path) -> None:
    if COMMAND & set(parts_of(path)):  # its purpose is to say something
        return
    lines = [c.lineno for c in calls(path) if isinstance(c.func, ast.Name) and c.func.id == "print"]
    assert not lines


@each_file
def test_text_files_are_opened_with_an_encoding(path: Path) -> None:
    """Without one, Python takes the platform's, and Windows reads UTF-8 as something else."""
    texts = [call for call in calls(path) if opens_text(call)]
    assert not [c.lineno for c in texts if "encoding" not in {k.arg for k in c.keywords}]


@pytest.fixture(scope="module")
def modules_after_import() -> set[str]:
    """What a fresh Python has in memory after `import gpt2mini`."""
    code = "import sys, gpt2mini; print(*sys.modules)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=PACKAGE.parent, text=True)
    return set(output.split())


@pytest.mark.parametrize("module", ["transformers", "matplotlib", "huggingface_hub", "tokenizers"])
def test_importing_the_package_does_not_import(module: str, modules_after_import: set[str]) -> None:
    assert "gpt2mini" in modules_after_import
    assert module not in modules_after_import


def test_loading_a_model_does_not_import_torchs_compiler(tiny_model: GPT2, tmp_path: Path) -> None:
    """Some operations on the meta device do: 800 modules, seconds, for a model of any size."""
    tiny_model.save_pretrained(tmp_path)
    code = (
        "import sys, gpt2mini; before = set(sys.modules);"
        "gpt2mini.GPT2.from_pretrained(sys.argv[1]); print(*(set(sys.modules) - before))"
    )
    run = [sys.executable, "-c", code, str(tmp_path)]
    loaded = subprocess.check_output(run, cwd=PACKAGE.parent, text=True).split()
    assert not {"sympy", "torch._dynamo", "torch._prims", "torch._refs"} & set(loaded)
