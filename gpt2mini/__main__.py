"""For people who only want files:

python -m gpt2mini download gpt2 --to models/gpt2
python -m gpt2mini convert models/124M models/gpt2 --dtype float16
python -m gpt2mini convert runs/novel/checkpoints/step-00000120 models/novel
python -m gpt2mini push models/gpt2 my-name/my-gpt2
python -m gpt2mini explore --model gpt2 --text "The old keeper lit the lamp" --out page.html
"""

import argparse
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import torch

from gpt2mini.checkpoints import (
    CheckpointError,
    find_model,
    load_model,
    read_class_names,
    save_model,
)
from gpt2mini.checkpoints.huggingface import head_rules, is_classifier
from gpt2mini.files import writable_folder
from gpt2mini.tokenizer import Tokenizer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main() -> None:
    args = parse_arguments()
    try:
        args.command(args)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


def download(args: argparse.Namespace) -> None:
    """Fetch a published model, once, and say where it is."""
    folder = find_model(args.name)
    if args.to:
        for file in folder.iterdir():
            if file.is_file() and not file.name.startswith("."):
                Path(args.to).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, Path(args.to) / file.name)
    print(args.to or folder)


def convert(args: argparse.Namespace) -> None:
    """Read a model in any form, or a checkpoint of a run, write a Hugging Face folder."""
    from gpt2mini.training.checkpoints import is_checkpoint, model_of_checkpoint

    source, target = find_model(args.source), Path(args.target)
    if is_checkpoint(source):
        model = model_of_checkpoint(source).to(DTYPES[args.dtype])
    else:
        model = load_model(source, DTYPES[args.dtype])
    class_names = None
    if is_classifier(head_rules(model)):  # configs of language models may name classes too
        with suppress(CheckpointError):
            class_names = read_class_names(source)
    save_model(model, target, class_names=class_names)
    try:
        Tokenizer.from_pretrained(source).save_pretrained(target)
    except FileNotFoundError:
        print(f"{source} has no tokenizer files, so {target} has none either")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{target}: {parameters:,} parameters in {args.dtype}")


def push(args: argparse.Namespace) -> None:
    """Upload a folder to the Hub, after making sure that it loads."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    load_model(args.folder)
    api = HfApi()
    try:
        api.create_repo(args.repository, private=args.private, exist_ok=True)
        print(api.upload_folder(repo_id=args.repository, folder_path=args.folder))
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ConnectionError(
            f"{args.repository} does not accept the files: {error}. To say who you are: "
            "hf auth login"
        ) from error


def explore(args: argparse.Namespace) -> None:
    """Write a page on which a model reading a text can be explored, in any browser."""
    from gpt2mini.inspection.explorer import write_page

    tokenizer, out = Tokenizer.from_pretrained(args.model), Path(args.out)
    writable_folder(out.parent)
    write_page(load_model(args.model), tokenizer, args.text, out, name=args.model)
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m gpt2mini",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="download | convert | push | explore")

    command = commands.add_parser("download", help=download.__doc__)
    command.set_defaults(command=download)
    command.add_argument("name", help="gpt2 ... gpt2-xl, 124M ... 1558M, or owner/name on the Hub")
    command.add_argument("--to", help="a folder to copy the files to; default: only the cache")

    command = commands.add_parser("convert", help=convert.__doc__)
    command.set_defaults(command=convert)
    command.add_argument("source", help="a model folder of any kind, a checkpoint, or a name")
    command.add_argument("target", help="the folder to write")
    command.add_argument("--dtype", choices=DTYPES, default="float32")

    command = commands.add_parser("push", help=push.__doc__)
    command.set_defaults(command=push)
    command.add_argument("folder", help="a Hugging Face folder, as `convert` writes it")
    command.add_argument("repository", help="owner/name")
    command.add_argument("--private", action="store_true")

    command = commands.add_parser("explore", help=explore.__doc__)
    command.set_defaults(command=explore)
    command.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    command.add_argument(
        "--text", default="The old keeper lit the lamp. Then the old keeper", help="what it reads"
    )
    command.add_argument("--out", default="page.html", help="the file to write (default page.html)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
