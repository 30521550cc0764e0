"""Runs the page's engine (JavaScript) in node, for tests that compare it with Python."""

import base64
import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpt2mini
from gpt2mini import GPT2, Tokenizer
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.inspection.explorer.weights import (
    packed_difference,
    packed_model,
    plain_model,
    stored_model,
)

EXPLORER = Path(gpt2mini.__file__).parent / "inspection" / "explorer"
SCRIPT = Path(__file__).parent / "explorer" / "run_engine.mjs"
CONFIG = ("n_layers", "n_heads", "emb_dim", "vocab_size", "context_length", "gelu")
KERNELS = ("JavaScript", "WebAssembly")


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def numbers(x: Tensor | float) -> Any:
    """A patch's value, or logits, as the script reads them."""
    if isinstance(x, Tensor):
        return {"float32": base64_of(x.detach().float().numpy().astype("<f4").tobytes())}
    return x


def restored(x: Any) -> Any:
    """The script's results, with arrays as tensors (one axis)."""
    if isinstance(x, dict) and x.keys() == {"float32"}:
        return torch.from_numpy(np.frombuffer(base64.b64decode(x["float32"]), "<f4").copy())
    if isinstance(x, dict):
        return {key: restored(value) for key, value in x.items()}
    return [restored(value) for value in x] if isinstance(x, list) else x


class Engine:
    """The models, packed as a page holds them. `models` are torch's, with the same numbers."""

    def __init__(
        self,
        models: Sequence[GPT2] = (),
        precision: str = "int8",
        tokenizer: Tokenizer | None = None,
        kernel: str = "WebAssembly",
    ) -> None:
        self.models: list[GPT2] = []
        self.input: dict[str, Any] = {"models": [], "blobs": []}
        packed: list[Any] = []
        for model in models:
            packed.append(
                packed_difference(models[0], packed[0], model, precision)
                if packed
                else packed_model(model, precision)
            )
            self.models.append(plain_model(model, packed[-1].weights))
            tensors, adapters, blob = stored_model(packed[-1])
            config = {field: getattr(model.config, field) for field in CONFIG}
            entry = {"config": config, "tensors": tensors, "adapters": adapters}
            self.input["models"].append(entry)
            self.input["blobs"].append(base64_of(blob))
        wasm = (EXPLORER / "model" / "kernel.wasm").read_bytes() if kernel == "WebAssembly" else b""
        self.input["kernel"] = base64_of(wasm)
        if tokenizer is not None:
            self.input["tokenizer"] = base64_of(pack_tokenizer(tokenizer))

    def run(self, folder: Path, *calls: dict[str, Any]) -> list[Any]:
        """The results of the calls, which run_engine.mjs lists; skips where there is no node."""
        node = shutil.which("node")
        if node is None:
            pytest.skip("needs node, which is not installed")
        paths = folder / "input.json", folder / "output.json"
        paths[0].write_text(json.dumps(self.input | {"calls": calls}), encoding="utf-8")
        result = subprocess.run(
            [node, str(SCRIPT), *map(str, paths)], capture_output=True, text=True, encoding="utf-8"
        )
        assert result.returncode == 0, result.stderr
        return restored(json.loads(paths[1].read_text(encoding="utf-8")))
