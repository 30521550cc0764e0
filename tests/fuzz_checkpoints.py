"""Damage checkpoint folders in every way that we can think of, and load them.

    python tests/fuzz_checkpoints.py --cases 10000 --seed 1

Each must load, or end in a CheckpointError that names a file: in a bounded number of steps (calls
and returns of functions, so that a slow machine finds the same), without running code from a file,
without a large allocation. `test_fuzz.py` runs a sample of this.
"""

import argparse
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import tempfile
import threading
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gpt2mini import GPT2, GPT2Config
from gpt2mini.checkpoints import CheckpointError

FIXTURES = Path(__file__).parent / "fixtures"
CONFIG = GPT2Config(vocab_size=29, context_length=8, emb_dim=6, n_heads=2, n_layers=2)
STEPS = 2_000_000  # ten times what the largest of the whole folders takes
MEGABYTES = 500  # more than the tiny models need by three orders of magnitude

Mutation = Callable[[Path, random.Random], None]


# ---- whole folders of every kind


def make_folders(parent: Path) -> list[Path]:
    """One small folder of each form in which people have GPT-2."""
    model = GPT2(CONFIG)
    plain = parent / "safetensors"
    model.save_pretrained(plain)
    tensors = load_file(plain / "model.safetensors")

    for name, legacy in (("bin", False), ("old-bin", True)):
        folder = without_weights(plain, parent / name)
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    folder = without_weights(plain, parent / "shards")
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    weight_map: dict[str, str] = {}
    for i, half in enumerate(halves):
        save_file(half, folder / f"model-{i}.safetensors")
        weight_map |= dict.fromkeys(half, f"model-{i}.safetensors")
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})

    model.out_head = nn.Linear(CONFIG.emb_dim, 3, bias=False)
    model.save_pretrained(parent / "classes", class_names=["a", "b", "c"])
    for name in ("openai-tiny", "openai-sharded"):
        shutil.copytree(FIXTURES / name, parent / name)
    return sorted(parent.iterdir())


def without_weights(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    (target / "model.safetensors").unlink()
    return target


def write_json(path: Path, contents: Any) -> None:
    path.write_text(json.dumps(contents), encoding="utf-8")


# ---- ways to damage one


def files(folder: Path, *suffixes: str) -> list[Path]:
    found = sorted(folder.iterdir())
    return [f for f in found if f.name.endswith(suffixes)] if suffixes else found


def flip_bytes(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder))
    data = bytearray(path.read_bytes())
    head = rng.choice([len(data), min(len(data), 400)])  # headers are the interesting part
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(head)] = rng.randrange(256)
    path.write_bytes(data)


def truncate(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def append_garbage(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder))
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.choice([1, 8, 1000])))


def replace_by_garbage(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder)).write_bytes(rng.randbytes(rng.choice([0, 1, 8, 100, 5000])))


def swap_files(folder: Path, rng: random.Random) -> None:
    first, second = rng.sample(files(folder), 2)
    aside = folder / "aside"
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def take_from_another(folder: Path, rng: random.Random) -> None:
    other = rng.choice([f for f in folder.parent.parent.glob("whole/*/*")])
    shutil.copy(other, folder / rng.choice([other.name, *(f.name for f in files(folder))]))


def remove_file(folder: Path, rng: random.Random) -> None:
    rng.choice(files(folder)).unlink()


def replace_by_folder(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder))
    path.unlink()
    path.mkdir()


ABSURD = [0, -1, 1, 10**6, 10**12, 10**400, 2**63, 1.5, 1e308, float("nan"), None, "", "6", True]
ABSURD += [[], {}, [10**9], {"0": 1}, "\x00", "../../etc/passwd", [[[[]]]]]  # type: ignore[list-item]


def absurd_setting(folder: Path, rng: random.Random) -> None:
    path = rng.choice(files(folder, "config.json", "hparams.json"))
    contents = json.loads(path.read_text(encoding="utf-8"))
    for _ in range(rng.choice([1, 1, 3])):
        contents[rng.choice(sorted(contents))] = rng.choice(ABSURD)
    write_json(path, contents)


def strange_json(folder: Path, rng: random.Random) -> None:
    texts = [
        "[" * 100_000,
        '{"a":' * 50_000,
        "null",
        "1",
        "[]",
        '"x"',
        "{}",
        "\ufeff{}",
        "9" * 5000,
    ]
    rng.choice(files(folder, ".json")).write_text(rng.choice(texts), encoding="utf-8")


def change_tensors(folder: Path, rng: random.Random) -> None:
    """A file that is whole, with tensors that are not those of the model."""
    weights = files(folder, ".safetensors", ".bin")
    if not weights:
        return flip_bytes(folder, rng)
    path = rng.choice(weights)
    tensors: dict[Any, Any] = (
        load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    )
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    strange: list[Any] = [
        tensor.T.contiguous() if tensor.ndim == 2 else tensor[None],
        tensor[..., :-1].clone(),
        torch.zeros(0),
        tensor.long(),
        tensor.bool(),
        tensor.to(torch.complex64),
        tensor.to(torch.float8_e4m3fn),
        tensor.double(),
        None,
    ]
    if path.suffix == ".bin":
        strange += [
            torch.zeros(1).expand(10**6, 10**6),
            torch.zeros(1).expand(tensor.shape),
            tensor.to_sparse(),
            tensor.to("meta"),
            nn.Parameter(tensor),
            "text",
            {"deeper": tensor},
            tensor.tolist(),
        ]
    change = rng.randrange(3)
    if change == 0:
        renamed = rng.choice(["x", "", "transformer." + name, "module." + name, "h.9.ln_1.weight"])
        tensors[renamed] = tensors.pop(name)
    elif change == 1:
        del tensors[name]
    else:
        value = rng.choice(strange)
        tensors.pop(name) if value is None else tensors.update({name: value})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def absurd_header(folder: Path, rng: random.Random) -> None:
    """Sizes in a safetensors header that the file does not have."""
    weights = files(folder, ".safetensors")
    if not weights:
        return flip_bytes(folder, rng)
    path = rng.choice(weights)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    key = rng.choice(["shape", "data_offsets", "dtype"])
    header[name][key] = rng.choice(
        [[10**18], [2**62, 4], [-1], [0, 2**60], [5, 1], "F128", [], 7, [0, 0, 0]]
    )
    text = json.dumps(header).encode()
    size = rng.choice([len(text), len(text), 2**63, 10**9, 0])
    path.write_bytes(size.to_bytes(8, "little") + text + data[8 + length :])


class Payload:
    """What a malicious pickle holds: the wish that something be called."""

    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def malicious_pickle(folder: Path, rng: random.Random) -> None:
    canary = str(folder.parent / "executed")
    payload = rng.choice(
        [
            Payload(os.system, f"touch {canary}"),
            Payload(exec, f"open({canary!r}, 'w')"),
            Payload(open, canary, "w"),
            Payload(bytearray, 10**13),
            Payload(bytes, 10**13),
            Payload(torch.zeros, 10**7, 10**7),
            Payload(torch.load, canary),
            Payload(torch.hub.load_state_dict_from_url, "file:///etc/passwd"),
        ]
    )
    path = folder / "pytorch_model.bin"
    for other in files(folder, ".safetensors", "index.json"):
        other.unlink()
    contents = rng.choice([payload, {"transformer.wte.weight": payload}, [payload]])
    form = rng.randrange(4)
    if form == 3:
        path.write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    elif form == 0:
        path.write_bytes(pickle.dumps(contents, protocol=rng.choice([2, 4])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == 1)


def zip_bomb(folder: Path, rng: random.Random) -> None:
    """An archive that is small and says that it is large."""
    for other in files(folder, ".safetensors", "index.json"):
        other.unlink()
    buffer = io.BytesIO()
    torch.save({"transformer.wte.weight": torch.zeros(29, 6)}, buffer)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(buffer) as source, zipfile.ZipFile(path, "w") as bomb:
        for entry in source.infolist():
            data = source.read(entry)
            if entry.filename.endswith(rng.choice(["data.pkl", "data/0"])):
                bomb.writestr(entry.filename, data.ljust(10**7, b"\0"), zipfile.ZIP_DEFLATED)
            else:
                bomb.writestr(entry.filename, data)
    if rng.random() < 0.5:  # and headers that disagree with each other
        damaged = bytearray(path.read_bytes())
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)


def path_tricks(folder: Path, rng: random.Random) -> None:
    names = ["../model.safetensors", "/etc/passwd", "..", ".", "", "a\0b", "C:\\x", "config.json"]
    names += ["x" * 5000, "model.safetensors.index.json", 7, None, ["a"], {}]  # type: ignore[list-item]
    for other in files(folder, "model.safetensors", ".bin"):
        other.unlink()
    weight_map: Any = {"wte.weight": rng.choice(names), "wpe.weight": rng.choice(names)}
    weight_map = rng.choice([weight_map, weight_map, [], None, {"a": {}}, "x"])
    kind = rng.choice(["model.safetensors.index.json", "pytorch_model.bin.index.json"])
    write_json(folder / kind, rng.choice([{"weight_map": weight_map}, weight_map]))


MUTATIONS: list[Mutation] = [
    flip_bytes,
    flip_bytes,
    flip_bytes,
    truncate,
    append_garbage,
    replace_by_garbage,
    swap_files,
    take_from_another,
    remove_file,
    replace_by_folder,
    absurd_setting,
    absurd_setting,
    strange_json,
    change_tensors,
    change_tensors,
    absurd_header,
    malicious_pickle,
    zip_bomb,
    path_tricks,
]


# ---- the trial


def run(cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Damage and load `cases` folders: (how many ended how, what should not have happened)."""
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        parent = Path(temporary)
        whole = make_folders_in(parent / "whole")
        for folder in whole:
            GPT2.from_pretrained(folder)
        before = peak_megabytes()
        for case in range(cases):
            rng = random.Random(f"{seed} {case}")
            source, mutation = rng.choice(whole), rng.choice(MUTATIONS)
            folder = parent / "damaged" / source.name
            shutil.copytree(source, folder)
            try_mutation(mutation, folder, rng)
            what = f"{mutation.__name__} on {source.name} (case {case}, seed {seed})"
            with counting_steps() as counter:
                try:
                    outcomes[f"{mutation.__name__}: {load(folder)}"] += 1
                except AssertionError as error:
                    wrong.append(f"{what}: {error}")
            if counter.steps > STEPS:
                wrong.append(f"{what}: took {counter.steps:,} steps")
            if (folder.parent / "executed").exists():
                wrong.append(f"{what}: code was executed")
            if (grown := peak_megabytes() - before) > MEGABYTES:
                wrong.append(f"{what}: memory grew by {grown:.0f} MB")
                before = peak_megabytes()
            shutil.rmtree(folder.parent)
    return outcomes, wrong


class StepCounter:
    steps = 0

    def __call__(self, *event: Any) -> None:
        self.steps += 1


@contextmanager
def counting_steps() -> Iterator[StepCounter]:
    """Count calls and returns, of Python and of C functions, in this thread and in new ones."""
    counter = StepCounter()
    before = sys.getprofile()
    threading.setprofile(counter)
    sys.setprofile(counter)
    try:
        yield counter
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


def make_folders_in(parent: Path) -> list[Path]:
    parent.mkdir()
    return make_folders(parent)


def try_mutation(mutation: Mutation, folder: Path, rng: random.Random) -> None:
    """A mutation that does not apply to a folder (nothing to truncate, say) leaves it as it is."""
    try:
        mutation(folder, rng)
    except (IndexError, ValueError, OSError, RuntimeError):
        flip_bytes(folder, rng)


def load(folder: Path) -> str:
    """How loading ended; AssertionError if in any other way than it may."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = GPT2.from_pretrained(folder)
    except CheckpointError as error:
        message = str(error)
        named = [f.name for f in folder.iterdir()] + [folder.name]
        assert any(name in message for name in named), f"no file is named in {message!r}"
        assert len(message) < 3000, f"a message of {len(message)} characters"
        return "refused"
    except BaseException as error:
        raise AssertionError(f"{type(error).__name__}: {str(error)[:300]}") from error
    assert sum(p.numel() for p in model.parameters()) < 10**6, "a large model came out"
    return "loaded"


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    outcomes, wrong = run(args.cases, args.seed)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(*wrong, f"{len(wrong)} of {args.cases} folders were answered wrongly", sep="\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
