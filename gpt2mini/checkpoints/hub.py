"""From a name to a folder: bundled models, published ones, paths."""

from pathlib import Path

BUNDLED = ("gpt2-nano",)
PUBLISHED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
PUBLISHED |= {
    "124M": PUBLISHED["gpt2"],
    "355M": PUBLISHED["gpt2-medium"],
    "774M": PUBLISHED["gpt2-large"],
    "1558M": PUBLISHED["gpt2-xl"],
}
FILES = ["config.json", "model.safetensors", "vocab.json", "merges.txt"]


def find_model(name_or_folder: str | Path) -> Path:
    """The folder of a model. A path or a bundled name touches no network.

    A published name is downloaded once by `huggingface_hub`, which verifies and caches it.
    """
    folder = Path(name_or_folder)
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if name in BUNDLED:
        return bundled_folder(name)
    if name in PUBLISHED:
        return download(name)
    raise FileNotFoundError(
        f"there is no model {name!r}: expected a folder, a bundled model ({', '.join(BUNDLED)}) "
        f"or a published one ({', '.join(PUBLISHED)})"
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


def download(name: str) -> Path:
    """The cached folder of a published model, downloading what is not there yet."""
    from huggingface_hub import snapshot_download

    repository = PUBLISHED[name]
    try:
        cached = Path(snapshot_download(repository, allow_patterns=FILES, local_files_only=True))
        if all((cached / file).is_file() for file in FILES):
            return cached
    except OSError:  # nothing there yet
        pass
    try:
        return Path(snapshot_download(repository, allow_patterns=FILES))
    except Exception as error:  # whatever stands between here and there
        raise ConnectionError(
            f"{name} could not be downloaded ({type(error).__name__}: {error}). To place it by "
            f"hand, get {', '.join(FILES)} from https://huggingface.co/{repository} where there "
            f"is a network (hf download {repository} {' '.join(FILES)} --local-dir {name}), and "
            "give the path of that folder instead of the name."
        ) from error
