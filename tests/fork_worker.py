"""Run every path of `fork_paths.py` on edited copies of the package, in a process of its own.

    python tests/fork_worker.py START '[[NAME, FOLDER, COMPILED], ...]'

Each folder holds a gpt2mini. Prints {name: {"moved": ..., "failures": [...]}} as JSON. The copies
are imported one after another: to import torch for each would take longer than all checks.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch


def main() -> None:
    start = torch.load(sys.argv[1])
    torch.set_num_threads(1)
    jobs = json.loads(sys.argv[2])
    print(json.dumps({name: results(Path(copy), start, compiled) for name, copy, compiled in jobs}))


def results(folder: Path, start: dict[str, Any], compiled: bool) -> dict[str, Any]:
    for name in list(sys.modules):
        if name.split(".")[0] in ("gpt2mini", "fork_paths"):
            del sys.modules[name]  # those of the copy before
    sys.path.insert(0, str(folder))
    try:
        paths = importlib.import_module("fork_paths")
        assert Path(sys.modules["gpt2mini"].__file__ or "").is_relative_to(folder)
        model = paths.model_with(start["state_dict"])
        logits = paths.logits_of(model, start["token_ids"])
        moved = paths.relative_difference(logits, start["logits"])
        return {"moved": moved, "failures": paths.failures(model, compiled)}
    except Exception as error:
        return {"moved": 0.0, "failures": [f"does not run: {type(error).__name__}: {error}"]}
    finally:
        sys.path.remove(str(folder))


if __name__ == "__main__":
    main()
