"""The command `gpt2mini JOB`, also `python -m gpt2mini JOB` and `torchrun ... -m gpt2mini JOB`.

A job is a module of this folder: its docstring is its help, its `Flags` a dataclass of which tyro
makes the flags, its `run(flags)` does the work. `options` has the groups of flags
that jobs share, `common` the course of a training job, `data` what they read.
"""

import difflib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from gpt2mini.files import local_path

JOBS = {
    "generate": "continue a text, token by token",
    "finetune": "train on plain text, or on prompts and completions",
    "classify": "train a classifier of texts",
    "predict": "classify new texts, or measure a classifier on labeled ones",
    "align": "reward model, DPO, PPO, GRPO",
    "pretrain": "a vocabulary and a model from random weights",
    "evaluate": "zero-shot tasks, perplexity, generation quality",
    "inspect": "trace, compare, attention, logit lens",
    "explore": "write a page that shows a forward pass in the browser",
    "verify": "prove that a model is what it is called",
    "download": "fetch a published model",
    "convert": "write any model, or a checkpoint of a run, as a Hugging Face folder",
    "push": "upload a folder to the Hugging Face Hub",
}
HELP = """\
usage: gpt2mini JOB [--help] [flags]

{jobs}

Each runs without flags, offline, on the bundled gpt2-nano and sample data; only
predict needs a classifier, download, convert and push names, inspect a word.
Flags of a job: gpt2mini JOB --help

  gpt2mini generate --prompt "It was a dark night"
  gpt2mini finetune --data novel.txt --out runs/novel
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a job. arguments: the job's name and its flags; default: those of the command line."""
    job, *flags = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with errors_in_one_line():
        show_any_text()
        if job in ("-h", "--help"):
            jobs = "\n".join(f"  {name:<10} {purpose}" for name, purpose in JOBS.items())
            print(HELP.format(jobs=jobs))
        elif job not in JOBS:
            near = difflib.get_close_matches(job, JOBS, n=1)
            meant = f"; did you mean {near[0]}?" if near else f": {', '.join(JOBS)}"
            raise ValueError(f"there is no job {job!r}{meant}")
        else:
            run_job(job, flags)


def show_any_text() -> None:
    """Where the console is not UTF-8, characters that it lacks are shown as "?" instead of ending
    the job; and that is said."""
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if encoding.lower().replace("-", "").replace("_", "") != "utf8":
        print(
            f"note: this console's encoding is {encoding}; characters that it lacks are shown as "
            '"?". With PYTHONUTF8=1 in the environment they are UTF-8',
            file=sys.stderr,
        )


def run_job(name: str, arguments: Sequence[str]) -> None:
    """In one process, or in each of torchrun's, of which only rank 0 prints."""
    from gpt2mini.cli.options import refuse_misplaced
    from gpt2mini.training.distributed import process_group

    arguments = [with_home(argument) for argument in arguments]
    job = import_module(f"gpt2mini.cli.{name}")
    flags = parse(job, name, arguments)
    refuse_misplaced(flags, arguments)
    rank_zero = int(os.environ.get("RANK", 0)) == 0
    with process_group(), redirect_stdout(sys.stdout if rank_zero else None):
        job.run(flags)


def with_home(argument: str) -> str:
    """--out=~/runs with the home folder in place of `~`: bash replaces it only at the beginning of
    a word. A text with spaces, as in --text "export PATH=~/bin", stays as it is."""
    head, equals, path = argument.partition("=~")
    is_path = equals and len(head.split()) == 1 and (not path or path[0] in "/\\")
    return f"{head}={local_path('~' + path)}" if is_path else argument


def parse(job: Any, name: str, arguments: Sequence[str]) -> Any:
    """The job's `Flags`.

    tyro, of three libraries tried: it takes help from the comments beside the fields, nests
    dataclasses as groups with flat names, and depends on three small packages. cyclopts 5 needs
    Python 3.11 and rich; jsonargparse has dotted names with underscores and --flag {true,false}.
    """
    import tyro

    conf, said = tyro.conf, io.StringIO()
    try:
        with redirect_stderr(said):
            return tyro.cli(
                job.Flags,
                prog=f"gpt2mini {name}",
                description=job.__doc__.strip(),
                args=list(arguments),
                config=(conf.OmitArgPrefixes, conf.DisallowNone, conf.FlagCreatePairsOff),
            )
    except SystemExit as end:
        if end.code:
            print(f"error: {in_one_line(said.getvalue())}", file=sys.stderr)
            print(f"the flags: gpt2mini {name} --help", file=sys.stderr)
        raise


def in_one_line(box: str) -> str:
    """What tyro's box of several lines says: its first part, and the flag that was meant."""
    lines = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    parts = " ".join(lines or [box.strip()]).split("───")
    parts = [part.strip("─ ") for part in parts if part.strip("─ ")]
    found = parts[0].removeprefix("Error parsing ")
    for part in parts[1:]:
        if part.startswith("Perhaps you meant"):
            found += f". {' '.join(part.split()[:4])}"
    return found


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What the user can mend ends the process with one line, without a traceback."""
    from gpt2mini.training.signals import TrainingStopped

    try:
        yield
        sys.stdout.flush()  # a closed pipe is noticed here, and not while Python ends
    except TrainingStopped as stopped:
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"\n{stopped}\nto go on: the same command with --resume", file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except BrokenPipeError:  # the reader has closed, as in `... | head`
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        sys.exit(0)
    except (ValueError, OSError, ImportError, FloatingPointError, NotImplementedError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
