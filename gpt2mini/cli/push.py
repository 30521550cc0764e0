"""Upload a model's folder to the Hugging Face Hub, after making sure that it loads.

Examples:
  gpt2mini push models/gpt2 my-name/my-gpt2
"""

from dataclasses import dataclass

from tyro.conf import Positional

from gpt2mini.checkpoints import load_model
from gpt2mini.files import local_path


@dataclass(frozen=True)
class Flags:
    folder: Positional[str]  # a Hugging Face folder, as `convert` writes it
    repository: Positional[str]  # owner/name
    private: bool = False  # a repository that only you see, if it is new


def run(flags: Flags) -> None:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    folder = local_path(flags.folder)
    if not folder.is_dir():  # before a repository is made for nothing
        raise NotADirectoryError(
            f"{flags.folder} is no folder: give that of a model, as gpt2mini convert or download "
            "--to writes it"
        )
    load_model(folder)
    api = HfApi()
    try:
        api.create_repo(flags.repository, private=flags.private, exist_ok=True)
        print(api.upload_folder(repo_id=flags.repository, folder_path=folder))
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ConnectionError(
            f"{flags.repository} does not accept the files: {error}. To say who you are: "
            "hf auth login"
        ) from error
