"""From a name to a folder: paths, bundled models, the Hugging Face Hub, OpenAI's storage.

A path or a bundled name touches no network. Anything else is downloaded once, and from then on
found in the cache without asking anybody.
"""

import re
from pathlib import Path

from gpt2mini.checkpoints.config_json import read_config
from gpt2mini.checkpoints.download import cache_folder, download_files
from gpt2mini.checkpoints.names import published_shape, rules
from gpt2mini.checkpoints.stored import WEIGHT_FILES, CheckpointError, reading
from gpt2mini.config import GPT2Config
from gpt2mini.files import read_json

BUNDLED = ("gpt2-nano",)
PUBLISHED = {  # names of the sizes on the Hub -> repositories
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
TOKENIZER_FILES = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]

OPENAI_STORAGE = "https://openaipublic.blob.core.windows.net/gpt-2/models"
OPENAI_SIZES = ("124M", "355M", "774M", "1558M")
OPENAI_TOKENIZER_FILES: dict[str, int | None] = {"encoder.json": 1_042_301, "vocab.bpe": 456_318}


def find_model(name_or_folder: str | Path, weights: bool = True) -> Path:
    """The folder of a model, downloaded if need be; without its weights if only the tokenizer is
    asked for.

    Raises FileNotFoundError if there is no such model, ConnectionError if it cannot be had,
    CheckpointError if it is no GPT-2.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if name in BUNDLED:
        return bundled_folder(name)
    if name in OPENAI_SIZES:
        return from_openai(name, weights)
    if name in PUBLISHED:
        return from_hub(PUBLISHED[name], weights)
    # What begins with a folder of ours is a mistyped path, and not asked for on the network.
    if (
        REPOSITORY.fullmatch(name)
        and isinstance(name_or_folder, str)
        and not folder.parent.exists()
    ):
        return from_hub(name, weights)
    raise FileNotFoundError(
        f"there is no model {name!r}: expected a folder, a bundled model ({', '.join(BUNDLED)}), "
        f"a published one ({', '.join([*PUBLISHED, *OPENAI_SIZES])}) or owner/name on the Hub"
    )


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
    from huggingface_hub.errors import RepositoryNotFoundError

    cached = huggingface_hub.try_to_load_from_cache(repository, "config.json")
    if isinstance(cached, str):
        folder = Path(cached).parent
        if has_weights(folder) if weights else has_tokenizer(folder):
            return folder
    try:
        # The config first: whoever names some other model should not wait for gigabytes of it.
        read_config(Path(huggingface_hub.hf_hub_download(repository, "config.json")).parent)
        files = wanted_files(huggingface_hub.list_repo_files(repository), weights)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except CheckpointError:
        raise
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository} is neither a folder here nor a model on the Hub that you may read"
        ) from error
    except Exception as error:  # whatever stands between here and there
        files = ["config.json", *(["model.safetensors"] if weights else []), *TOKENIZER_FILES[:2]]
        raise ConnectionError(
            f"{repository} could not be downloaded ({type(error).__name__}: {error}). To place it "
            f"by hand, get {', '.join(files)} from https://huggingface.co/{repository} where there "
            f"is a network (hf download {repository} {' '.join(files)} --local-dir FOLDER), and "
            "give the path of that FOLDER instead of the name."
        ) from error


def wanted_files(available: list[str], weights: bool) -> list[str]:
    """Of the files of a repository, those that make the model: one form of its weights."""
    wanted = [name for name in ["config.json", "generation_config.json", *TOKENIZER_FILES]]
    if weights:
        form = next((name for name in WEIGHT_FILES if name in available), None)
        if form is None:
            raise CheckpointError(f"no weights there: expected one of {', '.join(WEIGHT_FILES)}")
        stem, _, suffix = form.removesuffix(".index.json").rpartition(".")
        wanted += [form, f"{stem}-*.{suffix}"] if form.endswith(".json") else [form]
    return wanted


def has_weights(folder: Path) -> bool:
    """Whether a cached folder is whole; a download that was broken off leaves a part."""
    form = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if form is None:
        return False
    if form.suffix != ".json":
        return True
    with reading(form):
        return all((folder / name).is_file() for name in read_json(form)["weight_map"].values())


def has_tokenizer(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return "tokenizer.json" in names or names >= {"vocab.json", "merges.txt"}


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
            f"{size} could not be downloaded ({error}). To place it by hand, where there is a "
            f"network: for f in {' '.join(files)}; do curl -fLO {OPENAI_STORAGE}/{size}/$f; done; "
            f"then move the files to {folder}, or give the path of their folder instead of the "
            "name."
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
