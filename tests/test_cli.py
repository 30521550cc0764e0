"""The command, as users run it, only shorter."""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from command import COMMAND, OFFLINE, ROOT, run, run_apart

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli import JOBS, main
from gpt2mini.cli.generate import SHOWN, shortened
from gpt2mini.data.samples import sample
from gpt2mini.files import alone_in, read_json
from gpt2mini.lora import load_adapter
from gpt2mini.preferences.reward_functions import positive_share
from gpt2mini.training.distributed import can_shard_on_cpu
from gpt2mini.training.metrics import rows_until

KEEPER = str(sample("keeper.jsonl"))  # questions and answers
LITTLE_TEXT = ["--max-new-tokens", "2", "--fraction", "0.1"]  # to write, and to train on


def test_generate_continues_the_prompt() -> None:
    done = run("generate", "--prompt", "The ship", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ship")
    assert "tokens" in done.stderr


def test_generate_reads_a_prompt_from_stdin_and_talks() -> None:
    command = ["generate", "--prompt", "-", "--max-new-tokens", "3", "--temperature", "0"]
    done = run(*command, stdin="Once upon a time")
    assert done.stdout.startswith("Once upon a time"), done.stderr
    assert run(*command, stdin="Once upon a time\n").stdout == done.stdout  # a file's last line
    done = run("generate", "--interactive", "--max-new-tokens", "3", stdin="Hello\nGood day\n\n")
    assert "Hello" in done.stdout and "Good day" in done.stdout


def test_generate_begins_a_text_and_continues_several_prompts() -> None:
    done = run("generate", "--prompt", "", "--max-new-tokens", "8", "--temperature", "0")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr
    flags = ["--num-samples", "2", "--max-new-tokens", "2", "--top-k", "0", "--top-p", "1"]
    done = run("generate", "--prompt", "The ship", "--prompt", "The sea", *flags, "--valid-utf8")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.split("\n") if line.startswith(("---", "The s"))]
    assert lines[0] == "--- prompt 1 of 2, sample 1 of 2"
    assert lines[6] == "--- prompt 2 of 2, sample 2 of 2"
    assert [line[:6] for line in lines[1::2]] == ["The sh", "The sh", "The se", "The se"]


@pytest.mark.parametrize("terminal", [True, False])
def test_generate_shows_the_end_of_a_long_prompt_in_a_terminal(terminal: bool) -> None:
    prompt = "the old man and the sea " * 60
    with patch("sys.stdout") as output:
        output.isatty.return_value = terminal
        shown = shortened(prompt)
        assert shortened("The ship") == "The ship"
        assert shortened("的" * 900) == ("[...] " + "的" * SHOWN if terminal else "的" * 900)
    assert shown == ("[...] " + prompt[-SHOWN:].partition(" ")[2] if terminal else prompt)


def test_a_console_that_is_not_utf8_gets_words(word_folder: Path) -> None:
    """On Windows, or with an old locale."""
    command = ["generate", "--model", str(word_folder), "--max-new-tokens", "1"]
    done = subprocess.run(
        [*COMMAND, *command, "--prompt", "你好, Zürich"],
        capture_output=True,
        env={**OFFLINE, "PYTHONIOENCODING": "cp1252"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("??, Zürich".encode("cp1252"))
    assert b"this console's encoding is cp1252" in done.stderr


def test_generate_shows_the_prompt_once_where_nothing_follows() -> None:
    done = run("generate", "--max-new-tokens", "6", "--stop", " ", "--stop", "e")
    assert done.stdout == "The old man looked at\n", done.stderr


def test_generate_ends_quietly_when_nobody_reads_on() -> None:
    command = shlex.join([*COMMAND, "generate"]) + " --num-samples 5 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, encoding="utf-8", env=OFFLINE)
    assert "error" not in done.stderr and "Traceback" not in done.stderr


def test_a_model_is_not_tuned_in_the_place_where_it_lies(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "weights" / "gpt2-nano", tmp_path / "run" / "best")
    before = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    done = run("finetune", "--model", tmp_path / "run" / "best", "--out", tmp_path / "run")
    assert "choose another --out" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == before


def test_nor_where_either_is_given_with_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    shutil.copytree(ROOT / "weights" / "gpt2-nano", tmp_path / "run" / "best")
    before = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    for model, out in (("~/run/best", tmp_path / "run"), (tmp_path / "run" / "best", "~/run")):
        done = run("finetune", "--model", model, "--out", out)
        assert "choose another --out" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == before


def test_a_path_after_an_equals_sign_may_begin_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bash leaves that `~` alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    (tmp_path / "text.txt").write_text("It was a dark night.", encoding="utf-8")
    done = run("evaluate", "--text=~/text.txt", "--out=~/out")
    assert done.returncode == 0 and (tmp_path / "out" / "summary.json").is_file(), done.stderr


def test_a_text_with_such_a_path_stays_as_it_is(word_folder: Path) -> None:
    arguments = ["--prompt", "export PATH=~/bin", "--max-new-tokens", "1"]
    done = run("generate", "--model", word_folder, *arguments)
    assert done.returncode == 0 and "export PATH=~/bin" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["predict", "--evaluate", "a.csv", "--text", "x"],
            "leave out --text and --data",
        ),
        (["predict", "--text", "x", "--columns", "text=a"], "--columns is for --data and"),
        (["predict", "--text", "x", "-"], "reads the texts from stdin: give it alone"),
        (["evaluate", "--data", "tasks"], "--data is for tasks without a file"),
        (["evaluate", "--data", "tasks", "--tasks", "lambada=a"], "--data is for tasks without"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(arguments: list[str], message: str) -> None:
    done = run(arguments[0], *arguments[1:])
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_generate_is_seeded() -> None:
    first, again, other = (
        run("generate", "--max-new-tokens", "12", "--seed", seed).stdout for seed in ("1", "1", "2")
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "there is no model 'no-such-model'"),
        (["--top-k", "-1"], "top_k must be 0 (off) or more"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--max-new-tokens", "100000"], "do not fit the context"),
    ],
)
def test_generate_says_what_is_wrong_in_one_line(arguments: list[str], message: str) -> None:
    done = run("generate", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_finetune_on_text_learns_and_leaves_its_results(word_folder: Path, tmp_path: Path) -> None:
    done = run(
        "finetune", "--model", word_folder, "--out", tmp_path, "--steps", "6", "--batch-size", "2",
        "--sequence-length", "64", "--fraction", "0.5", "--max-new-tokens", "8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["perplexity_after"] < summary["perplexity_before"]
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["step"] for line in lines} >= {0, 6}
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert "before" in done.stdout and "after" in done.stdout
    again = run("generate", "--model", tmp_path / "best", "--max-new-tokens", "3")
    assert again.returncode == 0, again.stderr


def test_finetune_on_text_takes_a_folder_and_refuses_what_it_cannot_use(
    word_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").write_text("", encoding="utf-8")
    done = run("finetune", "--model", word_folder, "--data", folder, "--out", tmp_path / "out")
    assert "there is no text" in done.stderr and "Traceback" not in done.stderr
    (folder / "latin.txt").write_bytes("naïve".encode("latin-1"))
    done = run("finetune", "--model", word_folder, "--data", folder, "--out", tmp_path / "out")
    assert "latin.txt, line 1: not UTF-8" in done.stderr and "Traceback" not in done.stderr
    done = run("finetune", "--model", word_folder, "--data", tmp_path / "nothing.txt")
    assert "neither a text file nor a folder" in done.stderr
    done = run("finetune", "--model", word_folder, "--out", folder / "empty.txt")
    assert "cannot write into" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("finetune", ["--lr", "0"], "--lr: must be a number above 0, not '0'"),
        ("classify", ["--lr", "0"], "--lr: must be a number above 0, not '0'"),
        ("align", ["--lr", "0"], "--lr: must be a number above 0, not '0'"),
        ("finetune", ["--alpha", "0"], "--alpha: must be a number above 0, not '0'"),
        ("pretrain", ["--adamw-lr", "none"], "--adamw-lr: must be a number above 0, not 'none'"),
        ("finetune", ["--epochs", "0"], "--epochs: must be a number above 0, not '0'"),
        ("finetune", ["--epochs", "inf"], "--epochs: must be a number above 0, not 'inf'"),
        ("finetune", ["--seed", "-1"], "--seed: must be a whole number from 0 to 2**64 - 1"),
        ("generate", ["--seed", str(2**64)], "--seed: must be a whole number from 0 to 2**64 - 1"),
        ("pretrain", ["--weight-decay", "-1"], "--weight-decay: must be a number of at least 0"),
        ("finetune", ["--spike", "0.5"], "--spike: must be 0 or a number above 1, not '0.5'"),
        ("pretrain", ["--decay-share", "-1"], "--decay-share: must be a number from 0 to 1"),
        ("pretrain", ["--validation-tokens", "-5"], "must be a whole number of at least 1, not"),
        ("generate", ["--num-samples", "0"], "must be a whole number of at least 1, not '0'"),
        ("inspect", ["compare", "--rows", "0"], "--rows: must be a whole number of at least 1"),
        ("align", ["--label-smoothing", "0.5"], "must be a number from 0 to below 0.5, not '0.5'"),
        ("align", ["--gamma", "2"], "gamma and gae_lambda must lie in [0, 1], not 2.0"),
        ("pretrain", ["--emb-dim", "30"], "emb_dim 30 cannot be divided evenly among 4 heads"),
        ("generate", ["--temprature", "1"], "Perhaps you meant: --temperature"),
    ],
)
def test_a_flag_refuses_a_value_that_makes_no_sense(
    job: str, arguments: list[str], message: str
) -> None:
    done = run(job, *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "message"),
    [
        ("classify", ["--rank", "4"], "--rank is for --method lora"),
        ("finetune", ["--adapter", "x", "--rank", "4"], "lora without --adapter"),
        ("finetune", ["--data", KEEPER, "--compare", "9"], "--compare is for --reward"),
        ("finetune", ["--reward", "toy"], "--reward is for records"),
        ("classify", ["--rank=8"], "--rank is for --method lora"),  # its default
        ("classify", ["--method", "full", "--train_blocks", "1"], "is for --method last-blocks"),
        ("finetune", ["--no-packing"], "--packing is for records"),
        ("finetune", ["--data", KEEPER, "--sequence-length", "9"], "is for plain text"),
        ("align", ["--beta", "1"], "--beta is for --method dpo"),
        ("align", ["--longest", "64"], "--longest is for --method reward or --method dpo"),
        ("align", ["--rank", "4"], "--rank is for --lora"),
        ("align", ["--patience", "2"], "--patience is for --method reward or --method dpo"),
        ("align", ["--method", "grpo", "--evaluate-every", "1"], "is for --method reward or"),
        ("align", ["--held-out", "x", "--validation-share", "0.1"], "is for a run without --held"),
        ("finetune", ["--held-out", "x", "--validation-share=0.1"], "is for a run without --held"),
        ("pretrain", ["--held-out", "x", "--validation-share", "0.1"], "is for a run without"),
        ("align", ["--method", "grpo", "--target-kl", "6"], "--target-kl is for --method ppo"),
        ("align", ["--method", "reward", "--clip", "1"], "is for --method ppo or --method grpo"),
        ("evaluate", ["--tasks", "text=a.txt", "--samples", "2"], "is for evaluation without"),
        ("inspect", ["lens", "--layer", "2"], "--layer is for inspect trace or inspect attention"),
        ("pretrain", ["--init-from", "gpt2-nano", "--emb-dim", "8"], "is for a new model, without"),
        ("generate", ["--draft-tokens", "9"], "--draft-tokens is for --draft or --lookup"),
        ("generate", ["--interactive", "--prompt", "a"], "leave out --prompt and --num-samples"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(
    job: str, arguments: list[str], message: str
) -> None:
    done = run(job, *arguments)
    assert done.returncode == 1 and done.stderr.startswith("error: --")
    assert message in done.stderr


def names_of_flags(flags: Any) -> Iterator[str]:
    for one in fields(flags):
        if is_dataclass(one.type):
            yield from names_of_flags(one.type)
        else:
            yield one.name.rstrip("_").replace("_", "-")


@pytest.mark.parametrize("job", JOBS)
def test_the_help_of_a_job_shows_every_flag_and_an_example(job: str) -> None:
    done = run(job, "--help")
    assert done.returncode == 0
    for name in names_of_flags(importlib.import_module(f"gpt2mini.cli.{job}").Flags):
        assert f"--{name}" in done.stdout or f"--no-{name}" in done.stdout or name in POSITIONAL
    assert f"\n  gpt2mini {job}" in done.stdout and "default" in done.stdout
    assert "\x1b" not in done.stdout  # no colors where they are not seen


POSITIONAL = {"name", "source", "target", "folder", "repository", "what"}


def test_the_help_of_the_command_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    said = capsys.readouterr().out
    main(["--help"])
    assert capsys.readouterr().out == said
    assert len(said.splitlines()) <= 24 and max(map(len, said.splitlines())) <= 80
    assert all(f"\n  {job}" in said for job in JOBS)


def test_an_unknown_job_is_refused() -> None:
    assert "there is no job 'fintune'; did you mean finetune?" in run("fintune").stderr
    assert "there is no job 'x': generate, finetune" in run("x").stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked into a folder, as pip would."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="builds a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = builder.WheelBuilder(str(ROOT)).build(directory=str(folder))
    shutil.unpack_archive(wheel, folder / "site", format="zip")
    return folder / "site"


@pytest.mark.parametrize(
    "command",
    [
        "generate --max-new-tokens 3",
        "finetune --steps 2 --batch-size 1 --max-new-tokens 3 --fraction 0.1",
    ],
)
def test_the_installed_command_works_in_an_empty_folder(
    command: str, installed: Path, tmp_path: Path
) -> None:
    environment = {**OFFLINE, "PYTHONPATH": str(installed)}
    whole = [*COMMAND, *command.split()]
    done = subprocess.run(
        whole, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert (installed / "gpt2mini").is_dir() and done.stdout
    if command.startswith("finetune"):
        assert (tmp_path / "runs" / "finetune" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation-share", "1.5"], "must lie between 0 and 1, as 0.1, not 1.5"),
        (["--sequence-length", "1"], "context_length must be at least 2, not 1"),
    ],
)
def test_finetune_on_text_refuses_a_number_before_its_first_sample(
    word_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run("finetune", "--model", word_folder, "--out", tmp_path, *arguments)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert "--- before" not in done.stdout


def test_finetune_on_text_refuses_a_text_too_short_to_split(
    word_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("hello there", encoding="utf-8")
    done = run(
        "finetune", "--model", word_folder, "--data", tmp_path / "a.txt", "--out", tmp_path / "out"
    )
    assert "the text is too short to hold out 0.1 of it" in done.stderr
    assert "--- before" not in done.stdout


def test_samples_may_be_longer_than_the_context(tmp_path: Path) -> None:
    small = ["--vocab-size", "300", "--emb-dim", "32", "--n-heads", "2", "--n-layers", "1"]
    small += ["--context-length", "16", "--steps", "1", "--validation-tokens", "64"]
    assert run("pretrain", "--out", tmp_path, *small).returncode == 0
    model, short = ["--model", str(tmp_path / "best")], ["--steps", "1", "--batch-size", "1"]
    commands: dict[str, list[str]] = {
        "text": ["finetune", *short, "--fraction", "0.05"],
        "records": ["finetune", *short, "--data", KEEPER, "--fraction", "0.1"],
        "writing": ["evaluate"],
    }
    for name, (job, *flags) in commands.items():
        done = run(job, "--out", tmp_path / name, *model, "--max-new-tokens", "20", *flags)
        assert done.returncode == 0, done.stderr


STOPPED = """
import os, signal
from gpt2mini.cli import main
from gpt2mini.training.checkpoints import RunCheckpoints

def save_and_be_stopped(self, *arguments, **named):
    RunCheckpoints.save = save  # once
    save(self, *arguments, **named)
    os.kill(os.getpid(), signal.SIGTERM)

save, RunCheckpoints.save = RunCheckpoints.save, save_and_be_stopped
main()
"""  # however slow the machine, the signal comes after the first checkpoint


def test_a_job_that_was_stopped_goes_on(tmp_path: Path, word_folder: Path) -> None:
    short = ["--steps", "6", "--batch-size", "1", "--model", str(word_folder)]
    short += LITTLE_TEXT
    stopped = run_apart(
        "finetune", *short, "--out", tmp_path / "stopped", "--save-every", "2",
        launch=[sys.executable, "-c", STOPPED],
    )  # fmt: skip
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "the same command with --resume" in stopped.stderr
    for name, more in (("stopped", ["--resume"]), ("straight", [])):
        done = run_apart("finetune", *short, "--out", tmp_path / name, *more)
        assert done.returncode == 0, done.stderr
    summaries = (
        json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        for name in ("stopped", "straight")
    )
    # All but how long it took, where it lies, and the flags that stopped and resumed it.
    one, other = ({**found, "seconds": 0, "out": "", "settings": {}} for found in summaries)
    assert one == other


SHORT = {
    "finetune": LITTLE_TEXT,
    "finetune --method lora": LITTLE_TEXT,
    "classify": ["--method", "full", "--longest", "16"],
    "pretrain": ["--vocab-size", "300", "--emb-dim", "32", "--n-heads", "2", "--n-layers", "2"],
}
GROWS = "pretrain --start-layers 1"  # after the first of two steps
SHORT[GROWS] = [*SHORT["pretrain"], "--grow-at", "0.5"]


@pytest.mark.parametrize("job", SHORT)
def test_a_job_runs_in_two_processes(tmp_path: Path, word_folder: Path, job: str) -> None:
    launch = [*COMMAND[:-1], "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*job.split(), "--steps", "2", "--batch-size", "1", *SHORT[job]]
    command += ["--shard"] if can_shard_on_cpu() and job != GROWS else []
    command += ["--model", str(word_folder)] if "pretrain" not in job else []
    done = run_apart(*command, "--out", tmp_path, launch=[*launch, *COMMAND[1:]])
    assert done.returncode == 0, done.stderr
    rows = rows_until(9, tmp_path / "metrics.jsonl")
    steps = [row["step"] for row in rows if "grad_norm" in row]
    assert steps[-1] == 2 and len(steps) == len(set(steps))  # one process writes,
    said = [line for line in done.stdout.splitlines() if len(line) > 40]
    assert len(said) == len(set(said)) > 0  # and speaks
    assert read_json(tmp_path / "summary.json")
    if "lora" not in job:
        model = GPT2.from_pretrained(tmp_path / "best")
        assert "pretrain" not in job or model.config.n_layers == 2
    else:
        load_adapter(GPT2.from_pretrained(word_folder), tmp_path / "best")


def test_pretrain_makes_a_model_and_resumes_and_grows(tmp_path: Path) -> None:
    small = ["--vocab-size", "300", "--emb-dim", "32", "--n-heads", "2", "--n-layers", "2"]
    small += ["--context-length", "32", "--batch-size", "4", "--validation-tokens", "256"]
    done = run("pretrain", "--out", tmp_path, "--steps", "4", "--save-every", "2", *small)
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    done = run("pretrain", "--out", tmp_path, "--steps", "8", "--resume", *small)
    assert done.returncode == 0, done.stderr
    second = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert second["bits_per_byte"] < first["bits_per_byte"]
    deeper = ["--n-layers", "4", "--init-from", str(tmp_path / "best"), "--steps", "2"]
    done = run("pretrain", "--out", tmp_path / "deep", "--validation-tokens", "256", *deeper)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "deep" / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["n_layer"] == 4


def test_a_refused_run_touches_nothing(tmp_path: Path) -> None:
    """Above all not the vocabulary of the run that is there."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text("{}", encoding="utf-8")
    arguments = ["--out", str(tmp_path), "--vocab-size", "300", "--steps", "1"]
    with alone_in(tmp_path):
        done = run("pretrain", *arguments)
    assert done.returncode == 1 and "another run is at work" in done.stderr
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    done = run("pretrain", *arguments)
    assert done.returncode == 1 and "holds checkpoints of an earlier run: resume it" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer", "checkpoints", ".lock"}
    assert (tmp_path / "tokenizer" / "vocab.json").read_text(encoding="utf-8") == "{}"


def test_pretrain_learns_its_vocabulary_from_text_alone(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("The sea is wide.<|endoftext|>" * 60, encoding="utf-8")
    small = ["--emb-dim", "16", "--n-heads", "1", "--n-layers", "1", "--context-length", "16"]
    small += ["--vocab-size", "400", "--steps", "1", "--dtype"]
    validated = []
    for dtype in ("fp32", "bf16"):
        out = tmp_path / dtype
        done = run("pretrain", "--data", path, "--out", out, *small, dtype)
        assert done.returncode == 0, done.stderr
        merges = Tokenizer.from_pretrained(out / "best").merges
        learned = {left + right for left, right in merges}
        assert "Ġsea" in learned and not [piece for piece in learned if "|" in piece]
        validated.append(rows_until(1, out / "metrics.jsonl")[0]["validation_loss"])
    assert validated[0] != validated[1]  # in the precision asked for


def test_pretrain_names_the_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    done = run("pretrain", "--data", tmp_path, "--out", tmp_path / "out")
    assert "latin.txt, line 1: not UTF-8 text" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("method", ["last-blocks", "full", "lora"])
def test_classify_learns_by_every_method(word_folder: Path, tmp_path: Path, method: str) -> None:
    flags = ["--method", method, "--steps", "8", "--save-every", "8"]
    done = run("classify", "--model", word_folder, "--out", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert sum(map(sum, summary["confusion"])) == 18
    assert summary["majority_baseline"] == 0.5
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert {"loss", "texts_per_second"} <= rows[1].keys()
    validated = [row for row in rows if "validation_loss" in row]
    assert validated[-1]["validation_loss"] < validated[0]["validation_loss"]
    assert (tmp_path / "confusion.png").stat().st_size > 1000
    if method == "lora":  # whose best is a whole model by now
        done = run("classify", "--model", word_folder, "--out", tmp_path, *flags, "--resume")
        assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["GPT2ForSequenceClassification"]
    assert config["id2label"] == {"0": "advert", "1": "note"}


def test_classify_says_what_is_wrong_in_one_line(word_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one.tsv").write_text("ham\tx\nham\ty\n", encoding="utf-8")
    done = run(
        "classify",
        "--model",
        word_folder,
        "--data",
        tmp_path / "one.tsv",
        "--out",
        tmp_path / "out",
    )
    assert "only the class 'ham'" in done.stderr and "Traceback" not in done.stderr
    done = run(
        "classify", "--model", word_folder, "--train-blocks", "99", "--out", tmp_path / "out"
    )
    assert "--train-blocks must lie in 0 to 3" in done.stderr


def test_finetune_lora_learns_and_leaves_an_adapter(word_folder: Path, tmp_path: Path) -> None:
    done = run(
        "finetune", "--model", word_folder, "--method", "lora", "--data", KEEPER,
        "--out", tmp_path, "--steps", "6",
        "--log-every", "2",
        "--answers", "1", "--max-new-tokens", "4", "--targets", "query", "mlp_in",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["validation_loss_after"] < summary["validation_loss_before"]
    assert 0 < summary["trainable_share"] < 0.05
    assert "parameters learn: " in done.stdout and "[before]" in done.stdout
    assert {f.name for f in (tmp_path / "best").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors"
    }  # fmt: skip
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_finetune_goes_on_with_an_adapter(word_folder: Path, tmp_path: Path) -> None:
    common = ["--model", str(word_folder), "--data", KEEPER, "--fraction", "0.2", "--answers", "0"]
    common += ["--max-new-tokens", "2", "--steps", "3", "--lr", "0.01"]
    first, second = tmp_path / "first", tmp_path / "second"
    done = run("finetune", *common, "--method", "lora", "--rank", "3", "--out", first)
    assert done.returncode == 0, done.stderr
    done = run("finetune", *common, "--adapter", first / "best", "--out", second)
    assert done.returncode == 0, done.stderr
    losses = [read_json(folder / "summary.json") for folder in (first, second)]
    assert losses[1]["method"] == "lora"
    assert losses[1]["validation_loss_before"] == pytest.approx(
        losses[0]["validation_loss_after"], rel=1e-4
    )
    assert losses[1]["validation_loss_after"] < losses[1]["validation_loss_before"]
    assert read_json(second / "best" / "adapter_config.json")["r"] == 3
    done = run(
        "finetune", *common, "--adapter", first / "best", "--method", "full", "--out", second / "a"
    )
    assert "--method full does not train an adapter" in done.stderr
    done = run("evaluate", "--model", word_folder, "--adapter", second / "best", "--limit", "1",
               "--text", sample("general.txt"), "--out", tmp_path / "evaluated")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_finetune_rates_answers_before_and_after(word_folder: Path, tmp_path: Path) -> None:
    done = run(
        "finetune", "--model", word_folder, "--data", KEEPER, "--out", tmp_path, "--steps", "2",
        "--max-new-tokens", "8", "--answers", "1", "--reward", "toy", "--compare", "3",
        "--prompt", "The sea", "--prompt", "A lamp",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "summary.json")
    found = summary["comparison"]
    assert len(found["prompts"]) == len(set(found["prompts"])) == 3
    assert len(found["answers_after"]) == 3 and 0 <= found["win_rate"] <= 1
    for name in ("before", "after"):
        rewards = positive_share(found["prompts"], found[f"answers_{name}"])
        assert found[f"mean_{name}"] == pytest.approx(sum(rewards) / 3)
    assert "toy: mean reward" in done.stdout and "of 3 prompts" in done.stdout
    assert (
        summary["prompts"]
        == ["The sea", "A lamp"]
        == re.findall("--- (The sea|A lamp)", done.stdout)
    )


@pytest.mark.parametrize("more", [[], ["--data", KEEPER, "--answers", "0"]])
def test_new_text_is_what_the_loss_counts(
    word_folder: Path, tmp_path: Path, more: list[str]
) -> None:
    """The table's row is the validation loss, before and after; positions that were not trained
    have rows of their own."""
    length = [] if more else ["--sequence-length", "32"]
    done = run(
        "finetune", "--model", word_folder, "--out", tmp_path, "--steps", "3",
        "--max-new-tokens", "2", *more, *length,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "summary.json")
    forgetting = summary["forgetting"]
    for one, other in (("before", "base"), ("after", "tuned")):
        expected = summary[f"validation_loss_{one}"]
        assert forgetting["new"][f"loss_{other}"] == pytest.approx(expected, rel=1e-4)
    assert "where it was not trained" in done.stdout
    assert ("new_beyond_trained_length" in forgetting) == (not more)
    assert forgetting["general_beyond_trained_length"]["loss_base"] > 0


def test_finetune_lora_reads_dialogues(word_folder: Path, tmp_path: Path) -> None:
    dialogue = "\n\nHuman: Good day, number {}\n\nAssistant: Good day to you."
    rows = [json.dumps({"chosen": dialogue.format(i), "rejected": ""}) for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
    done = run(
        "finetune", "--model", word_folder, "--method", "lora", "--data", tmp_path / "a.jsonl",
        "--out", tmp_path / "out", "--steps", "1", "--answers", "1", "--max-new-tokens", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--- Human: Good day, number" in done.stdout


@pytest.mark.parametrize("more", [[], ["--no-packing", "--train-on", "all"]])
def test_finetune_on_records_learns(word_folder: Path, tmp_path: Path, more: list[str]) -> None:
    done = run(
        "finetune", "--model", word_folder, "--data", KEEPER,
        "--out", tmp_path, "--steps", "4", "--fraction", "0.2",
        "--longest", "128", "--answers", "1", "--max-new-tokens", "4", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["validation_loss_after"] < summary["validation_loss_before"]
    assert "--- It was a dark and stormy night" in done.stdout and "% padding)" in done.stdout
    again = run("generate", "--model", tmp_path / "best", "--max-new-tokens", "3")
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--template", "Answer:"], "must hold {prompt}"),
        (["--columns", "prompt"], "--columns must read ours=theirs"),
        (["--columns", "prompt=question"], "there is no column 'question', only prompt"),
        (["--data", "no-such.jsonl"], "there is no file no-such.jsonl"),
        (["--fraction", "0"], "--fraction must lie in (0, 1]"),
    ],
)
def test_finetune_on_records_says_what_is_wrong(
    word_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run("finetune", "--model", word_folder, "--data", KEEPER, "--out", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr


def test_a_line_that_is_too_long_does_not_end_the_talk() -> None:
    lines = "word " * 800 + "\nThe ship\n"
    done = run("generate", "--interactive", "--max-new-tokens", "3", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert "do not fit the context" in done.stderr
    assert "The ship" in done.stdout


def test_scores_are_kept_when_nothing_was_written(word_folder: Path, tmp_path: Path) -> None:
    flags = ["--samples", "1", "--max-new-tokens", "1", "--limit", "1"]
    done = run("evaluate", "--model", word_folder, *flags, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "there is nothing to score" in done.stdout
    assert "rows" in read_json(tmp_path / "summary.json")


@pytest.mark.parametrize(
    ("records", "words"),
    [(1, "one record is too few"), (2, "--validation-share 0.8 of 2 records holds out all")],
)
def test_too_few_records_are_an_error_that_names_the_flag(
    word_folder: Path, records: int, words: str, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    line = '{"prompt": "Who?", "completion": "I."}\n'
    data.write_text(line * records, encoding="utf-8")
    flags = ["--validation-share", "0.8", "--out", str(tmp_path / "run")]
    done = run("finetune", "--model", word_folder, "--data", data, *flags)
    assert done.returncode == 1
    assert f"error: {words}" in done.stderr
