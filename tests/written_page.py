"""What a written page holds, and its recorded readings in node, for tests of the explorer."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import HANGS

TEXT = "The lamp </script><b>&amp; 中 it"


def unpacked(stored: dict[str, Any]) -> np.ndarray:
    numbers = np.frombuffer(base64.b64decode(stored["data"]), stored["dtype"])
    return numbers.reshape(stored["shape"]).astype(np.float64)


def data_of(page: Path) -> dict[str, Any]:
    """The JSON of a written page, as a browser finds it: up to the first </script>."""
    found = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.S)
    assert found
    return json.loads(found[1])


def called(data: dict[str, Any], folder: Path, *calls: list[Any], model: int = 0) -> list[Any]:
    """What the members of a recorded reading return, in JavaScript."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    given, found = folder / "input.json", folder / "output.json"
    given.write_text(json.dumps({"data": data, "model": model, "calls": calls}), encoding="utf-8")
    script = Path(__file__).with_name("explorer") / "read_recorded.mjs"
    done = subprocess.run(
        [node, script, given, found], capture_output=True, encoding="utf-8", timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(found.read_text(encoding="utf-8"))
