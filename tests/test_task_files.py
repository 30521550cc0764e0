"""The zero-shot tasks' files: found, or downloaded once from a server on this machine."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from loopback import Loopback, serving

from gpt2mini.evaluation import task_files
from gpt2mini.evaluation.task_files import Source, find_task_file

DATA = b'{"text": "She went down to the sea"}\n' * 1000


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A web server with one task plain and one in a zip, and a cache of our own."""
    folder = tmp_path / "web" / "data"
    folder.mkdir(parents=True)
    (folder / "lambada.jsonl").write_bytes(DATA)
    with zipfile.ZipFile(folder / "text8.zip", "w") as archive:
        archive.writestr("text8", "a text of few wörds")
    monkeypatch.setenv("GPT2MINI_CACHE", str(tmp_path / "cache"))
    with serving(tmp_path / "web") as server:
        sha256 = hashlib.sha256(DATA).hexdigest()
        sources = {
            "lambada": Source(f"{server.address}/data/lambada.jsonl", sha256),
            "hellaswag": Source(f"{server.address}/data/hellaswag.jsonl"),
            "text8": Source(f"{server.address}/data/text8.zip", last=4),  # in the middle of ö
        }
        monkeypatch.setattr(task_files, "SOURCES", sources)
        yield server


def test_a_task_is_downloaded_once(web: Loopback, tmp_path: Path) -> None:
    path = find_task_file("lambada")
    assert path.read_bytes() == DATA and path.is_relative_to(tmp_path / "cache")
    assert find_task_file("lambada") == path
    assert len(web.downloads_of("lambada")) == 1


def test_a_zip_is_unpacked_and_its_last_part_taken(web: Loopback) -> None:
    assert find_task_file("text8").read_text(encoding="utf-8") == "rds"


def test_a_file_of_other_contents_is_refused(web: Loopback) -> None:
    (web.root / "data" / "lambada.jsonl").write_bytes(DATA + b" ")
    with pytest.raises(ConnectionError, match=r"has the sha256 .*; expected .*give lambada=path"):
        find_task_file("lambada")
    (web.root / "data" / "lambada.jsonl").write_bytes(DATA)
    assert find_task_file("lambada").read_bytes() == DATA


@pytest.mark.parametrize("name", ["text8.zip", "hellaswag.jsonl"])
def test_a_page_to_log_in_is_not_kept(web: Loopback, name: str) -> None:
    file, task = web.root / "data" / name, name.partition(".")[0]
    file.with_name("hellaswag.jsonl").write_bytes(DATA)
    good = file.read_bytes()
    file.write_bytes(b"<html>Welcome to the network of the hotel</html>")
    with pytest.raises(
        ConnectionError, match=rf"not give the file of the task {task}.*{task}=path"
    ):
        find_task_file(task)
    file.write_bytes(good)
    assert find_task_file(task).stat().st_size in (3, len(DATA))


def test_a_missing_file_is_named(web: Loopback, monkeypatch: pytest.MonkeyPatch) -> None:
    (web.root / "data" / "lambada.jsonl").unlink()
    with pytest.raises(ConnectionError, match=r"lambada could not be downloaded from http.*=path"):
        find_task_file("lambada")


def test_a_folder_is_searched_and_nothing_downloaded(web: Loopback, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="needs a file: give lambada=path, or a folder"):
        find_task_file("lambada", tmp_path)
    (tmp_path / "lambada_test.jsonl").write_bytes(DATA)
    assert find_task_file("lambada", tmp_path) == tmp_path / "lambada_test.jsonl"
    with pytest.raises(FileNotFoundError, match="the task wikitext-103 needs a file"):
        find_task_file("wikitext-103")
    assert web.requests == []
