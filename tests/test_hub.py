"""Names: what is downloaded, once, whole, and what is said when it cannot be.

The servers are on this machine; `huggingface_hub` is the real one, in processes of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from command import HANGS, run
from conftest import TINY
from fixtures.make_openai_folders import FOLDERS
from loopback import Loopback, serving
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import download, find_model, hub, openai
from gpt2mini.checkpoints.config_json import CONFIG_FILES
from gpt2mini.checkpoints.download import cache_folder, download_file, download_files
from gpt2mini.checkpoints.stored import ADAPTER_FILES
from gpt2mini.config import GPT2Config
from gpt2mini.data.text import Batch
from gpt2mini.tokenizer_files import FOREIGN_FILES, TOKENIZER_FILES
from gpt2mini.training import Settings, train

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Loopback]:
    (tmp_path / "web").mkdir()
    with serving(tmp_path / "web") as server:
        yield server


@pytest.fixture
def on_the_hub(tiny_model: GPT2, web: Loopback) -> Path:
    """A repository `someone/tiny`, with a tokenizer and a file that has nothing to do with it."""
    folder = web.root / "someone" / "tiny"
    tiny_model.save_pretrained(folder)
    Tokenizer.from_pretrained("gpt2-nano").save_pretrained(folder)
    (folder / "rust_model.ot").write_bytes(bytes(1000))
    return folder


def environment(web: Loopback, cache: Path, **changes: str) -> dict[str, str]:
    settings = {
        "HF_HUB_OFFLINE": "0",  # whatever the suite runs with
        "HF_ENDPOINT": web.address,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GPT2MINI_CACHE": str(cache),
    }
    return os.environ | settings | changes


def start(code: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0, err
    return out


SUM = """
import sys
from gpt2mini import GPT2
model = GPT2.from_pretrained("{name}")
print(sum(p.double().sum().item() for p in model.parameters()))
"""


def checksum(model: GPT2) -> float:
    return sum(p.double().sum().item() for p in model.parameters())


# ---- names


def test_an_unknown_name_is_answered_with_the_choices(socket_attempts: list[str]) -> None:
    message = r"no model 'gpt5'.*gpt2-nano.*gpt2, gpt2-medium.*124M.*owner/name"
    with pytest.raises(FileNotFoundError, match=message):
        GPT2.from_pretrained("gpt5")
    assert not socket_attempts


@pytest.mark.parametrize("name", ["runs/finetune", "a/b/c", "../x/y", "/x/y"])
def test_a_mistyped_path_is_not_asked_for_on_the_network(
    name: str, socket_attempts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        GPT2.from_pretrained(name)
    assert not socket_attempts


# ---- the Hub


def test_a_repository_is_downloaded_once_and_only_what_is_needed(
    tiny_model: GPT2, on_the_hub: Path, web: Loopback, tmp_path: Path
) -> None:
    settings = environment(web, tmp_path / "cache")
    found = finish(start(SUM.format(name="someone/tiny"), settings))
    assert float(found) == checksum(tiny_model)
    names = [line.split("/")[-1] for line in web.downloads_of("resolve")]
    assert sorted(names) == [
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer_config.json",
        "vocab.json",
    ]
    asked = len(web.requests)
    finish(start(SUM.format(name="someone/tiny"), settings))
    assert len(web.requests) == asked, "the cache was not enough"


def test_a_tokenizer_is_had_without_the_weights(
    on_the_hub: Path, web: Loopback, tmp_path: Path
) -> None:
    code = 'from gpt2mini import Tokenizer; print(Tokenizer.from_pretrained("someone/tiny").eos_id)'
    settings = environment(web, tmp_path / "cache")
    assert int(finish(start(code, settings))) == 8191
    assert not web.downloads_of("safetensors")
    finish(start(SUM.format(name="someone/tiny"), settings))  # and a part of a model is no model


def test_shards_are_downloaded_with_their_index(
    web: Loopback, tmp_path: Path, tiny_model: GPT2
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    theirs.save_pretrained(web.root / "someone" / "large", max_shard_size="60KB")
    code = SUM.format(name="someone/large")
    assert float(finish(start(code, environment(web, tmp_path / "cache")))) == checksum(tiny_model)


def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(
    on_the_hub: Path, web: Loopback, tmp_path: Path
) -> None:
    config = on_the_hub / "config.json"
    contents = json.loads(config.read_text(encoding="utf-8")) | {"model_type": "llama"}
    config.write_text(json.dumps(contents), encoding="utf-8")
    process = start(SUM.format(name="someone/tiny"), environment(web, tmp_path / "cache"))
    _, err = process.communicate(timeout=HANGS)
    assert "CheckpointError" in err
    assert "model of type 'llama'; expected 'gpt2'" in err
    assert not web.downloads_of("safetensors")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "adapter_config.json",
            "someone/other holds an adapter (adapter_config.json), not a whole",
        ),
        ("README.md", "someone/other has no config.json, so it is no GPT-2 that loads; found ['RE"),
    ],
)
def test_a_repository_without_a_model_is_called_so(
    web: Loopback, tmp_path: Path, name: str, message: str
) -> None:
    (web.root / "someone" / "other").mkdir(parents=True)
    (web.root / "someone" / "other" / name).write_text("{}")
    process = start(SUM.format(name="someone/other"), environment(web, tmp_path / "cache"))
    _, err = process.communicate(timeout=HANGS)
    assert f"CheckpointError: {message}" in err


def test_a_repository_that_does_not_exist_is_no_model(web: Loopback, tmp_path: Path) -> None:
    process = start(SUM.format(name="someone/nothing"), environment(web, tmp_path / "cache"))
    _, err = process.communicate(timeout=HANGS)
    assert (
        "FileNotFoundError: someone/nothing is neither a folder here nor a model on the Hub" in err
    )


@pytest.mark.parametrize(
    "changes", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}]
)
def test_without_a_network_the_error_says_how_to_place_the_files(
    web: Loopback, tmp_path: Path, changes: dict[str, str]
) -> None:
    settings = environment(web, tmp_path / "cache", **changes)
    _, err = start(SUM.format(name="gpt2-medium"), settings).communicate(timeout=HANGS)
    last = err.strip().splitlines()[-1]
    assert last.startswith("ConnectionError: openai-community/gpt2-medium could not be downloaded")
    for named in (
        "config.json, model.safetensors, vocab.json, merges.txt",  # the files
        "https://huggingface.co/openai-community/gpt2-medium",  # the place
        "hf download openai-community/gpt2-medium config.json",  # the command
        "--local-dir FOLDER",
    ):
        assert named in err


@pytest.mark.parametrize("weights", [True, False])
def test_the_error_without_a_network_lists_all_files_and_comes_at_once(
    web: Loopback, tmp_path: Path, weights: bool
) -> None:
    """Also where the tokenizer is asked for first. The Hub is asked once, and not again."""
    web.shutdown()  # connections are refused
    kind = "GPT2" if weights else "Tokenizer"
    code = f'from gpt2mini import {kind}; {kind}.from_pretrained("models/none")'
    settings = environment(web, tmp_path / "cache", HF_ENDPOINT="http://127.0.0.1:9")
    _, err = start(code, settings).communicate()
    assert "config.json, model.safetensors, vocab.json, merges.txt" in err
    assert "and is no folder here" in err
    assert "Retrying" not in err


def test_shards_of_any_name_are_downloaded(web: Loopback, tmp_path: Path, tiny_model: GPT2) -> None:
    """Their names are those of the index."""
    folder = web.root / "someone" / "large"
    tiny_model.save_pretrained(tmp_path / "model")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "model")
    theirs.save_pretrained(folder, max_shard_size="60KB")
    index = folder / "model.safetensors.index.json"
    text = index.read_text(encoding="utf-8").replace("model-", "gpt2_part-")
    index.write_text(text, encoding="utf-8")
    for shard in folder.glob("model-*"):
        shard.rename(folder / shard.name.replace("model-", "gpt2_part-"))
    (folder / "gpt2_part-of-another.safetensors").write_bytes(bytes(10))
    code = SUM.format(name="someone/large")
    assert float(finish(start(code, environment(web, tmp_path / "cache")))) == checksum(tiny_model)
    assert not web.downloads_of("of-another")


def test_all_that_the_tokenizer_reads_is_downloaded(
    on_the_hub: Path, web: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it looks for in a folder is on the list of the Hub's downloader."""
    asked: set[str] = set()
    is_file = Path.is_file

    def remember(path: Path) -> bool:
        asked.add(path.name)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", remember)
    Tokenizer.from_pretrained(on_the_hub)
    with pytest.raises(FileNotFoundError):
        (tmp_path / "empty").mkdir()
        Tokenizer.from_pretrained(tmp_path / "empty")
    read = {name for name in asked if name.endswith((".json", ".txt", ".jinja"))}
    # looked for, to say what a folder holds instead
    model_s = {*CONFIG_FILES, *ADAPTER_FILES, "hparams.json"}
    others = {*hub.OPENAI_TOKENIZER_FILES, *FOREIGN_FILES}  # looked for, likewise
    assert read - others - model_s <= {*TOKENIZER_FILES}


def test_added_tokens_are_downloaded(on_the_hub: Path, web: Loopback, tmp_path: Path) -> None:
    added = {"<|user|>": 8192, "[PAD]": 8193}
    (on_the_hub / "added_tokens.json").write_text(json.dumps(added), encoding="utf-8")
    code = 'from gpt2mini import Tokenizer; print(Tokenizer.from_pretrained("someone/tiny").vocab)'
    assert "<|user|>" in finish(start(code, environment(web, tmp_path / "cache")))


# ---- the Hub: two at once, and killed


@pytest.fixture
def large_on_the_hub(on_the_hub: Path, web: Loopback) -> Path:
    """The same with weights of a megabyte, which take a second."""
    save_file(
        load_file(on_the_hub / "model.safetensors") | {"h.0.attn.bias": torch.zeros(250_000)},
        on_the_hub / "model.safetensors",
    )
    web.seconds_per_piece = 0.01
    return on_the_hub


def test_two_processes_that_ask_at_once_end_in_one_good_copy(
    tiny_model: GPT2, large_on_the_hub: Path, web: Loopback, tmp_path: Path
) -> None:
    settings = environment(web, tmp_path / "cache")
    both = [start(SUM.format(name="someone/tiny"), settings) for _ in range(2)]
    assert [float(finish(process)) for process in both] == [checksum(tiny_model)] * 2
    assert one_good_copy(tmp_path / "cache", large_on_the_hub / "model.safetensors")


def test_a_download_that_is_killed_half_way_is_completed(
    tiny_model: GPT2, large_on_the_hub: Path, web: Loopback, tmp_path: Path
) -> None:
    settings = environment(web, tmp_path / "cache")
    first = start(SUM.format(name="someone/tiny"), settings)
    wait_until(lambda: web.pieces_sent > 20, first)
    first.kill()
    first.communicate()
    found = finish(start(SUM.format(name="someone/tiny"), settings))
    assert float(found) == checksum(tiny_model)
    assert one_good_copy(tmp_path / "cache", large_on_the_hub / "model.safetensors")


def one_good_copy(cache: Path, original: Path) -> bool:
    size = original.stat().st_size
    copies = [f for f in cache.rglob("*") if f.is_file() and not f.is_symlink()]
    large = [f for f in copies if f.stat().st_size > size // 2]
    return len(large) == 1 and large[0].read_bytes() == original.read_bytes()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """However long it takes, unless the process ends without it."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


# ---- OpenAI's storage


def test_the_sizes_of_openai_s_data_files_are_known() -> None:
    """Four bytes for each parameter: 124,439,808 x 4, as the storage has it."""
    name = "model.ckpt.data-00000-of-00001"
    sizes = [hub.openai_weight_files(GPT2Config.from_name(s))[name] for s in hub.OPENAI_SIZES]
    assert sizes == [497_759_232, 1_419_292_672, 3_096_120_320, 6_230_444_800]


@pytest.fixture
def storage(web: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loopback:
    """OpenAI's storage with a tiny 124M in it."""
    hparams = FOLDERS["openai-tiny"]
    folder = shutil.copytree(FIXTURES / "openai-tiny", web.root / "124M")
    (folder / "encoder.json").write_bytes(b"encoder")
    (folder / "vocab.bpe").write_bytes(b"vocab")
    monkeypatch.setenv("GPT2MINI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "OPENAI_STORAGE", web.address)
    monkeypatch.setattr(hub, "OPENAI_TOKENIZER_FILES", {"encoder.json": 7, "vocab.bpe": 5})
    numbers: dict[str, Any] = {openai.HPARAMS[name]: n for name, n in hparams.items()}
    tiny = GPT2Config(**numbers)
    monkeypatch.setattr(hub.GPT2Config, "from_name", lambda size: tiny)
    monkeypatch.setattr(download.time, "sleep", lambda seconds: None)
    return web


def test_openai_s_own_files_are_downloaded_once(storage: Loopback, tmp_path: Path) -> None:
    model = GPT2.from_pretrained("124M")
    assert checksum(model) == checksum(GPT2.from_pretrained(FIXTURES / "openai-tiny"))
    assert sorted(f.name for f in (tmp_path / "cache/openai/124M").glob("[!.]*")) == [
        "checkpoint",
        "encoder.json",
        "hparams.json",
        "model.ckpt.data-00000-of-00001",
        "model.ckpt.index",
        "vocab.bpe",
    ]
    asked = len(storage.requests)
    GPT2.from_pretrained("124M")
    assert len(storage.requests) == asked


def test_only_the_tokenizer_s_files_are_downloaded_for_the_tokenizer(storage: Loopback) -> None:
    assert sorted(f.name for f in find_model("124M", weights=False).glob("[!.]*")) == [
        "encoder.json",
        "vocab.bpe",
    ]


def test_a_file_of_the_wrong_size_is_not_kept(storage: Loopback, tmp_path: Path) -> None:
    (storage.root / "124M" / "vocab.bpe").write_bytes(b"a page that says: log in")
    with pytest.raises(ConnectionError, match=r"vocab.bpe has 24 bytes; expected 5"):
        GPT2.from_pretrained("124M")
    assert not list((tmp_path / "cache").rglob("vocab.bpe*"))


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    storage: Loopback, tmp_path: Path
) -> None:
    storage.break_after = 2000
    GPT2.from_pretrained("124M")
    spans = [line.split("00001")[1] for line in storage.downloads_of("data-00000")]
    assert spans == ["", " bytes=2000-", " bytes=4000-"]


def test_a_connection_that_breaks_for_good_is_an_error_and_the_next_call_goes_on(
    storage: Loopback, tmp_path: Path
) -> None:
    storage.break_after = 100
    with pytest.raises(ConnectionError, match="the connection ended after 500 bytes"):
        GPT2.from_pretrained("124M")
    storage.break_after = None
    GPT2.from_pretrained("124M")
    assert any(line.endswith("bytes=500-") for line in storage.requests)


def test_a_server_that_knows_no_ranges_is_asked_from_the_start(
    storage: Loopback, tmp_path: Path
) -> None:
    part = tmp_path / "cache/openai/124M/model.ckpt.index.partial"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half of it")
    storage.answer_ranges = False
    assert GPT2.from_pretrained("124M").config.n_layers == 2


def test_a_part_that_is_already_whole_is_taken(storage: Loopback, tmp_path: Path) -> None:
    part = tmp_path / "file.partial"
    part.write_bytes((storage.root / "124M" / "model.ckpt.index").read_bytes())
    download_file(f"{storage.address}/124M/model.ckpt.index", tmp_path / "file", None)
    assert (tmp_path / "file").is_file()
    assert not part.exists()


@pytest.mark.parametrize(
    "named",
    [
        "encoder.json vocab.bpe checkpoint hparams.json model.ckpt.index model.ckpt.data",
        "curl -fLO http",
        "move them to .*cache.openai.355M",
    ],
)
def test_a_failed_download_from_openai_says_how_to_place_the_files(
    storage: Loopback, named: str
) -> None:
    with pytest.raises(ConnectionError, match=named):
        GPT2.from_pretrained("355M")  # which this storage has not


DOWNLOAD = """
import sys
from pathlib import Path
from gpt2mini.checkpoints.download import download_files
download_files(sys.argv[1], {"data": int(sys.argv[2])}, Path(sys.argv[3]))
"""


def start_download(web: Loopback, size: int, folder: Path) -> subprocess.Popen[str]:
    arguments = [f"{web.address}/files", str(size), str(folder)]
    return subprocess.Popen(
        [sys.executable, "-c", DOWNLOAD, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def data(web: Loopback) -> bytes:
    """A file of a megabyte, sent in about a second."""
    (web.root / "files").mkdir()
    contents = torch.arange(250_000, dtype=torch.int32).numpy().tobytes()
    (web.root / "files" / "data").write_bytes(contents)
    web.seconds_per_piece = 0.01
    return contents


def test_two_processes_that_download_at_once_end_in_one_good_copy(
    web: Loopback, data: bytes, tmp_path: Path
) -> None:
    both = [start_download(web, len(data), tmp_path / "target") for _ in range(2)]
    for process in both:
        finish(process)
    assert (tmp_path / "target" / "data").read_bytes() == data
    assert len(web.downloads_of("data")) == 1
    assert not list((tmp_path / "target").glob("*.partial"))


def test_a_killed_download_goes_on_where_it_was(web: Loopback, data: bytes, tmp_path: Path) -> None:
    web.hold_after = 900_000  # so that it is not finished, however late it is killed
    first = start_download(web, len(data), tmp_path / "target")
    partial = tmp_path / "target" / "data.partial"
    wait_until(lambda: partial.exists() and partial.stat().st_size > 0, first)
    first.kill()
    first.communicate()
    web.go_on.set()
    kept = partial.stat().st_size
    assert 0 < kept < len(data)
    finish(start_download(web, len(data), tmp_path / "target"))
    assert (tmp_path / "target" / "data").read_bytes() == data
    assert web.downloads_of("data")[-1].endswith(f"bytes={kept}-")


def test_the_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GPT2MINI_CACHE", raising=False)
    assert cache_folder() == tmp_path / "gpt2mini"
    monkeypatch.setenv("GPT2MINI_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_without_a_home_the_error_says_how_to_choose_a_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "GPT2MINI_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def no_such_user(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_such_user)
    with pytest.raises(FileNotFoundError, match=r"has no home: .*GPT2MINI_CACHE"):
        cache_folder()


def test_an_unwritable_cache_is_named(
    storage: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GPT2MINI_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConnectionError, match=r"into .*file.*GPT2MINI_CACHE"):
        GPT2.from_pretrained("124M")


def test_files_that_are_there_are_not_asked_for(tmp_path: Path, socket_attempts: list[str]) -> None:
    (tmp_path / "data").touch()
    download_files("http://127.0.0.1:9", {"data": None}, tmp_path)
    assert not socket_attempts


# ---- python -m gpt2mini


def command(
    *arguments: object, settings: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "gpt2mini", *map(str, arguments)],
        env=settings,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_download_says_where_the_files_are(on_the_hub: Path, web: Loopback, tmp_path: Path) -> None:
    settings = environment(web, tmp_path / "cache")
    done = command("download", "someone/tiny", "--to", tmp_path / "here", settings=settings)
    assert done.stdout.strip() == str(tmp_path / "here"), done.stderr
    assert (tmp_path / "here" / "model.safetensors").is_file()
    assert not (tmp_path / "here" / "model.safetensors").is_symlink()
    assert GPT2.from_pretrained(tmp_path / "here").config == TINY


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_download_leaves_the_old_model_or_the_new_one(
    tiny_model: GPT2, word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_model.save_pretrained(tmp_path / "here")
    before, copyfile = contents(tmp_path / "here"), shutil.copyfile

    def copy_until_the_disk_is_full(source: Path, target: Path) -> None:
        copyfile(source, target)
        if "model.safetensors" in target.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", copy_until_the_disk_is_full)
    done = run("download", word_folder, "--to", tmp_path / "here")
    assert done.returncode == 1 and "model.safetensors: No space left" in done.stderr
    assert contents(tmp_path / "here") == before


def test_download_does_not_mix_two_models(
    word_folder: Path, own_model: GPT2, tmp_path: Path
) -> None:
    own_model.save_pretrained(tmp_path / "old")
    for name in ("added_tokens.json", "adapter_config.json", "tokenizer.json", "card.json"):
        shutil.copyfile(tmp_path / "old" / "model.safetensors", tmp_path / "old" / name)
    (tmp_path / "old" / "notes.txt").write_text("mine")
    (tmp_path / "new").mkdir()
    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(word_folder / name, tmp_path / "new" / name)
    weights = load_file(word_folder / "model.safetensors")
    torch.save(weights, tmp_path / "new" / "pytorch_model.bin")
    (tmp_path / "new" / "additional_chat_templates").mkdir()
    (tmp_path / "new" / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    before, others = contents(tmp_path / "old"), ["model.safetensors", "adapter_config.json"]
    done = run("download", tmp_path / "new", "--to", tmp_path / "old")
    assert done.returncode == 1 and "holds files of another model" in done.stderr
    assert all(name in done.stderr for name in others) and "notes.txt" not in done.stderr
    assert contents(tmp_path / "old") == before
    for name in before.keys() - {"notes.txt"}:
        (tmp_path / "old" / name).unlink()
    done = run("download", tmp_path / "new", "--to", tmp_path / "old")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "old") == contents(tmp_path / "new") | {"notes.txt": b"mine"}
    assert (tmp_path / "old" / "additional_chat_templates" / "rag.jinja").is_file()
    found = GPT2.from_pretrained(tmp_path / "old")
    assert checksum(found) == checksum(GPT2.from_pretrained(word_folder))


def test_download_does_not_copy_a_folder_onto_itself(word_folder: Path) -> None:
    before = contents(word_folder)
    done = run("download", word_folder, "--to", word_folder / ".")
    assert done.returncode == 0 and "nothing to copy" in done.stdout, done.stderr
    assert contents(word_folder) == before


def test_convert_makes_a_hugging_face_folder_of_openai_s(tmp_path: Path) -> None:
    done = command("convert", FIXTURES / "openai-tiny", tmp_path / "out", "--dtype", "float16")
    assert "1,212 parameters in float16" in done.stdout, done.stderr
    assert "no tokenizer files" in done.stdout
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        torch.float16
    }
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").config.n_layer == 2


def test_convert_takes_a_checkpoint_of_a_run(tmp_path: Path, own_model: GPT2) -> None:
    settings = Settings(steps=1, schedule=lambda step: 1.0, save_every=1, progress=False)
    ids = torch.arange(20)[None]
    own_model.save_pretrained(tmp_path / "base")
    said = {"eos_token_id": [210, 7], "my_note": "kept"}
    for name in ("config.json", "generation_config.json"):
        contents = json.loads((tmp_path / "base" / name).read_text(encoding="utf-8"))
        (tmp_path / "base" / name).write_text(json.dumps(contents | said), encoding="utf-8")
    own_model = GPT2.from_pretrained(tmp_path / "base")
    optimizer = torch.optim.SGD(own_model.parameters(), lr=0.1)
    train(own_model, [Batch(ids, ids)], [optimizer], settings, out=tmp_path)
    checkpoint = tmp_path / "checkpoints" / "step-00000001"
    done = command("convert", checkpoint, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    found = GPT2.from_pretrained(tmp_path / "out").state_dict()
    assert_close(found, own_model.state_dict(), rtol=0, atol=0)
    for name in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / name).read_text(encoding="utf-8"))
        assert {field: written[field] for field in said} == said
    progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    progress["config"]["n_layers"] = 2
    (checkpoint / "progress.json").write_text(json.dumps(progress), encoding="utf-8")
    done = command("convert", checkpoint, tmp_path / "other")
    assert "holds no whole GPT-2" in done.stderr and "Traceback" not in done.stderr


def test_convert_takes_tokenizer_and_class_names_along(tmp_path: Path, own_model: GPT2) -> None:
    own_model.out_head = torch.nn.Linear(TINY.emb_dim, 2, bias=False)
    own_model.save_pretrained(tmp_path / "in", class_names=["ham", "spam"])
    Tokenizer.from_pretrained("gpt2-nano").save_pretrained(tmp_path / "in")
    done = command("convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    contents = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert contents["label2id"] == {"ham": 0, "spam": 1}
    assert Tokenizer.from_pretrained(tmp_path / "out").eos_id == 8191


def test_convert_takes_a_language_model_whose_config_names_classes(
    tmp_path: Path, tiny_model: GPT2
) -> None:
    tiny_model.save_pretrained(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text(encoding="utf-8"))
    config["id2label"] = {"0": "LABEL_0"}  # as distilgpt2's
    (tmp_path / "in" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    done = command("convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 0, done.stderr


def test_convert_leaves_no_other_model_s_tokenizer(
    word_folder: Path, tiny_model: GPT2, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "in")
    shutil.copytree(word_folder, tmp_path / "out")
    done = run("convert", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 1 and "out has a tokenizer, which need not be" in done.stderr
    assert contents(tmp_path / "out") == contents(word_folder)


def test_push_refuses_a_folder_that_is_no_model(tmp_path: Path) -> None:
    done = command("push", tmp_path, "someone/tiny")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "no config.json" in done.stderr


def test_push_asks_nobody_about_what_is_no_folder(
    word_folder: Path, socket_attempts: list[str]
) -> None:
    for given in ("gpt2-nano", word_folder / "model.safetensors"):
        done = run("push", given, "someone/tiny")
        assert done.returncode == 1 and f"{given} is no folder: give that of" in done.stderr
    assert not socket_attempts


def test_push_without_a_login_says_how_to_log_in(
    tiny_model: GPT2, web: Loopback, tmp_path: Path
) -> None:
    tiny_model.save_pretrained(tmp_path / "model")
    settings = environment(web, tmp_path / "cache")
    settings.pop("HF_TOKEN", None)
    done = command("push", tmp_path / "model", "someone/tiny", settings=settings)
    assert done.returncode == 1
    assert "hf auth login" in done.stderr


def test_a_bad_command_line_is_answered_in_a_line(tmp_path: Path) -> None:
    done = command("convert", tmp_path / "nothing", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no model")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_server_of_these_tests_answers(web: Loopback) -> None:
    (web.root / "file").write_bytes(b"hello")
    with urlopen(f"{web.address}/file") as response:
        assert response.read() == b"hello"
