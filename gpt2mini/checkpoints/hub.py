"""From a name to a folder: paths, bundled models, the Hugging Face Hub, OpenAI's storage.

A path or a bundled name touches no network. Anything else is downloaded once, and from then on
found in the cache without asking anybody.
"""

import fnmatch
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2mini.checkpoints.config_json import (
    CONFIG,
    CONFIG_FILES,
    read_config,
    where_the_model_is,
)
from gpt2mini.checkpoints.download import cache_folder, download_files
from gpt2mini.checkpoints.names import published_shape, rules
from gpt2mini.checkpoints.single_files import CONFIGS, find_single_file, single_files
from gpt2mini.checkpoints.stored import (
    ADAPTER_FILES,
    WEIGHT_FILES,
    CheckpointError,
    shards,
    weight_file,
)
from gpt2mini.config import GPT2Config
from gpt2mini.files import local_path
from gpt2mini.tokenizer_files import CHAT_TEMPLATES, TOKENIZER_FILES

BUNDLED = ("gpt2-nano",)
PUBLISHED = {  # names of the sizes on the Hub -> repositories
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
BY_HAND = ("model.safetensors", "vocab.json", "merges.txt")
CARD = "card.json"  # what is expected of a model, in its folder: see gpt2mini.verification
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
SECONDS_TO_ANSWER = 10  # for the Hub's first answer; without one there is no network

OPENAI_STORAGE = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = {  # OpenAI's names -> the same weights on the Hub
    "124M": PUBLISHED["gpt2"],
    "355M": PUBLISHED["gpt2-medium"],
    "774M": PUBLISHED["gpt2-large"],
    "1558M": PUBLISHED["gpt2-xl"],
}
OPENAI_TOKENIZER_FILES: dict[str, int | None] = {"encoder.json": 1_042_301, "vocab.bpe": 456_318}


def find_model(name_or_folder: str | Path, weights: bool = True) -> Path:
    """The folder of a model, downloaded if need be; without its weights if only the tokenizer is
    asked for. The path of the file that holds a folder's weights stands for the folder.

    Raises FileNotFoundError if there is no such model, ConnectionError if it cannot be had,
    CheckpointError if it is no GPT-2.
    """
    if not isinstance(name_or_folder, str | os.PathLike):
        raise TypeError(
            f"expected the name or the folder of a model, not a {type(name_or_folder).__name__}"
        )
    folder, name = local_path(name_or_folder), str(name_or_folder)
    if folder.is_dir():
        lacks_tokenizer = not weights and not has_tokenizer(folder) and not single_files(folder)
        if lacks_tokenizer and (advice := where_the_model_is(folder)):
            raise CheckpointError(advice)
        return folder
    if folder.is_file():
        return folder_of_file(folder)
    if name in BUNDLED:
        return bundled_folder(name)
    if name in OPENAI_SIZES:
        return from_openai(name, weights)
    if name in PUBLISHED:
        return from_hub(PUBLISHED[name], weights)
    if isinstance(name_or_folder, str) and is_repository(name):
        return from_hub(name, weights)
    raise FileNotFoundError(
        f"there is no model {name!r}: expected a folder, a bundled model ({', '.join(BUNDLED)}), "
        f"a published one ({', '.join([*PUBLISHED, *OPENAI_SIZES])}) or owner/name on the Hub"
    )


def is_repository(name: str) -> bool:
    """Whether a name that is no folder here may be one of the Hub. What begins with a folder of
    ours is a mistyped path, and not asked for on the network."""
    return REPOSITORY.fullmatch(name) is not None and not Path(name).parent.exists()


def folder_of_file(file: Path) -> Path:
    """The folder of a model whose config or weights were given. Raises CheckpointError for another
    file than the one that is read."""
    if find_single_file(file):
        return file.parent
    names = {entry.name for entry in file.parent.iterdir()}
    read = {CONFIG, "hparams.json", weight_file(names)}
    if file.name not in read:
        held = f", of which {weight_file(names)} is read" if weight_file(names) else ""
        raise CheckpointError(
            f"{file} is a file: give the folder of a model, with its {CONFIG} and its weights "
            f"({' or '.join(WEIGHT_FILES)}), such as {file.parent}{held}"
        )
    return file.parent


def base_name(name_or_folder: str | Path, folder: Path) -> str:
    """By what others find the model: a repository on the Hub, or the folder's full path."""
    name = str(name_or_folder)
    if local_path(name_or_folder).exists() or name in BUNDLED:
        return str(folder.resolve())
    return PUBLISHED.get(name) or OPENAI_SIZES.get(name) or name


def bundled_folder(name: str) -> Path:
    """Beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent.parent
    for place in (package / "weights" / name, package.parent / "weights" / name):
        if (place / "config.json").is_file():
            return place
    raise FileNotFoundError(
        f"the bundled model {name} is missing from this installation: reinstall gpt2mini"
    )


# ---- the Hugging Face Hub


def from_hub(repository: str, weights: bool) -> Path:
    """The cached folder of a repository. `huggingface_hub` resumes, verifies, and keeps two
    processes apart."""
    import huggingface_hub

    cached = huggingface_hub.try_to_load_from_cache(repository, CONFIG)
    if isinstance(cached, str):
        folder = Path(cached).parent
        if has_weights(folder) if weights else has_tokenizer(folder):
            return folder
    with explaining(repository):
        # This first question is asked once: where there is no network, the downloads themselves
        # would ask for half a minute.
        api = huggingface_hub.HfApi()
        info = api.model_info(repository, timeout=SECONDS_TO_ANSWER)
        available = [file.rfilename for file in info.siblings or []]
        return download(repository, available, weights)


def download(repository: str, available: list[str], weights: bool) -> Path:
    """Fetch what is read of a repository's files: what is small, then one form of its weights."""
    from huggingface_hub import hf_hub_download, snapshot_download

    if CONFIG not in available:
        raise CheckpointError(why_no_model(repository, available))
    # The config first: whoever names some other model should not wait for gigabytes of it.
    read_config(Path(hf_hub_download(repository, CONFIG)).parent)
    files = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES, CARD) if name in available]
    files += fnmatch.filter(available, CHAT_TEMPLATES)
    if weights:
        form = weight_file(available)
        if form is None:
            raise CheckpointError(
                f"{repository} has no weights: expected one of {', '.join(WEIGHT_FILES)}; found "
                f"{sorted(available)}"
            )
        files.append(form)
        if form.endswith(".index.json"):
            files += shards(Path(hf_hub_download(repository, form)))
    return Path(snapshot_download(repository, allow_patterns=files))


def why_no_model(repository: str, available: list[str]) -> str:
    """What is said of a repository without config.json."""
    if ADAPTER_FILES[0] in available:
        return (
            f"{repository} holds an adapter ({ADAPTER_FILES[0]}), not a whole model: fetch it with "
            f"`hf download {repository} --local-dir FOLDER`, load the model that it was trained "
            "on, then add it with load_adapter(model, FOLDER); in the command --model BASE "
            "--adapter FOLDER"
        )
    return f"{repository} has no {CONFIG}, so it is no GPT-2 that loads; found {sorted(available)}"


@contextmanager
def explaining(repository: str) -> Iterator[None]:
    """Whatever stands between here and the Hub is a ConnectionError that says how to do without."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is neither a folder here nor a model on the Hub that you may read"
        ) from error
    except Exception as error:
        files = " ".join([CONFIG, *BY_HAND])
        raise ConnectionError(
            f"{repository} could not be downloaded from the Hub ({type(error).__name__}: {error}), "
            "and is no folder here. To place it by hand, get "
            f"{files.replace(' ', ', ')} from https://huggingface.co/{repository} where there is a "
            f"network (hf download {repository} {files} --local-dir FOLDER), and give the path of "
            "that FOLDER instead of the name."
        ) from error


def has_weights(folder: Path) -> bool:
    """Whether a cached folder is whole; a download that was broken off leaves a part."""
    form = weight_file(file.name for file in folder.iterdir())
    if form is None:
        return False
    if not form.endswith(".index.json"):
        return True
    return all((folder / name).is_file() for name in shards(folder / form))


def has_tokenizer(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    forms = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {*OPENAI_TOKENIZER_FILES})
    return any(names >= form for form in forms)


def files_that_are_read(folder: Path) -> list[Path]:
    """The files of a folder that say which model and which tokenizer it holds."""
    names = (*CONFIGS, *CONFIG_FILES, *WEIGHT_FILES, *ADAPTER_FILES, *TOKENIZER_FILES, CARD)
    return [*(folder / n for n in names if (folder / n).is_file()), *folder.glob(CHAT_TEMPLATES)]


# ---- OpenAI's storage


def from_openai(size: str, weights: bool) -> Path:
    """The cached folder of OpenAI's own files of one size."""
    files = dict(OPENAI_TOKENIZER_FILES)
    if weights:
        files |= openai_weight_files(GPT2Config.from_name(size))
    folder = cache_folder() / "openai" / size
    try:
        download_files(f"{OPENAI_STORAGE}/{size}", files, folder)
    except OSError as error:
        raise ConnectionError(
            f"{size} could not be downloaded into {folder} ({error}). The variable GPT2MINI_CACHE "
            "chooses another folder for downloads. To place the files by hand, where there is a "
            f"network: for f in {' '.join(files)}; do curl -fLO {OPENAI_STORAGE}/{size}/$f; done; "
            f"then move them to {folder}, or give the path of their folder instead of the name."
        ) from error
    return folder


def openai_weight_files(config: GPT2Config) -> dict[str, int | None]:
    """Names and sizes: the numbers are float32, end to end, nothing else. None: not known."""
    parameters = 0
    for rule in rules(config):
        count = 1
        for length in published_shape(rule, config, classes=0):
            count *= length
        parameters += count
    return {
        "checkpoint": None,
        "hparams.json": None,
        "model.ckpt.index": None,
        "model.ckpt.data-00000-of-00001": 4 * parameters,
    }
