"""Download plain files over HTTP: resumed, checked, and once even if two processes ask.

For OpenAI's storage only; the Hub has a library of its own.
"""

import logging
import os
import time
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from filelock import FileLock
from tqdm import tqdm

from gpt2mini.files import local_path

logger = logging.getLogger(__name__)

ATTEMPTS = 5
SECONDS_WITHOUT_DATA = 30
PIECE = 2**20  # bytes read at a time, at the most


def cache_folder() -> Path:
    """Where downloads are kept: $GPT2MINI_CACHE, or gpt2mini in the user's cache folder."""
    if chosen := os.environ.get("GPT2MINI_CACHE"):
        return local_path(chosen)
    try:
        return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gpt2mini"
    except ValueError as error:  # there is no home
        raise FileNotFoundError(
            "there is no folder for downloads, for this user has no home: choose one with the "
            "variable GPT2MINI_CACHE"
        ) from error


def download_files(address: str, files: dict[str, int | None], folder: Path) -> None:
    """Make sure that the files of a web folder lie in a folder here; sizes are checked if known.

    Raises OSError (as are all errors of `urllib` and of the disk).
    """
    if all((folder / name).is_file() for name in files):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # a second process waits here, and then finds them
        for name, size in files.items():
            if not (folder / name).is_file():
                download_file(f"{address}/{name}", folder / name, size)


def download_file(address: str, path: Path, size: int | None) -> None:
    """One file; a connection that breaks is taken up again where it broke, in a later call too."""
    partial = path.with_name(path.name + ".partial")
    for attempt in range(ATTEMPTS):
        try:
            complete = fetch_rest(address, partial)
            break
        except HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS - 1:
                raise OSError(f"{address}: {error}") from error
        except (OSError, HTTPException) as error:
            if attempt == ATTEMPTS - 1:
                raise OSError(f"{address}: {error}") from error
        logger.info("%s broke off; trying again", address)
        time.sleep(0.5 * 2**attempt)
    found = partial.stat().st_size
    if found != (size or complete):
        partial.unlink()
        raise OSError(f"{address} has {found:,} bytes; expected {size or complete:,}")
    partial.replace(path)


def fetch_rest(address: str, partial: Path) -> int:
    """Append what is still missing to `partial`; the size that the whole file has to have."""
    start = partial.stat().st_size if partial.is_file() else 0
    request = Request(address, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response: HTTPResponse = urlopen(request, timeout=SECONDS_WITHOUT_DATA)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing lies beyond: it was complete, or is another file
            return int(error.headers.get("Content-Range", "*/0").rpartition("/")[2])
        raise
    with response, partial.open("ab", buffering=0) as file:  # a killed process loses nothing
        if response.status != 206:  # the whole file, whatever was asked for
            start = file.truncate(0)
        length = response.headers["Content-Length"]  # None: the server does not say
        complete = None if length is None else start + int(length)
        with tqdm(
            desc=partial.stem, total=complete, initial=start, unit="B", unit_scale=True
        ) as bar:
            while piece := response.read1(PIECE):
                file.write(piece)
                bar.update(len(piece))
    found = partial.stat().st_size
    if complete is not None and found < complete:
        raise OSError(f"the connection ended after {found:,} bytes")
    return found
