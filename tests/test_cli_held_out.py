"""The command on a file of one's own to hold out, and a classifier on new texts."""

import json
import math
import re
from pathlib import Path

import pytest
from command import run
from transformers import AutoTokenizer

from gpt2mini.files import read_json

MESSAGES = [
    ("ham", "see you at six"),
    ("spam", "win a prize"),
    ("ham", "how are you"),
    ("spam", "free money"),
]


def messages(path: Path, start: int, n: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{MESSAGES[i % 4][0]}\t{MESSAGES[i % 4][1]} {i}\n" for i in range(start, start + n)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def records(path: Path, start: int, n: int) -> Path:
    rows = [
        {"prompt": f"The cat {i}", "completion": "sat", "chosen": "ran fast", "rejected": "sat"}
        for i in range(start, start + n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


# ---- --held-out


def test_classify_tests_with_the_file_given(
    word_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, other = messages(tmp_path / "a.tsv", 0, 32), messages(tmp_path / "b.tsv", 28, 12)
    flags = ["--model", word_folder, "--steps", "1", "--out", tmp_path / "out"]
    done = run("classify", "--data", data, "--held-out", other, *flags)
    assert done.returncode == 0, done.stderr
    assert "28 to learn from, 4 to validate, 12 to test" in done.stdout and "b.tsv" in done.stdout
    assert sum(map(sum, read_json(tmp_path / "out" / "summary.json")["confusion"])) == 12
    assert "4 of 12 texts held out are learned from too" in caplog.text


def test_classify_uses_the_parts_of_a_folder(word_folder: Path, tmp_path: Path) -> None:
    for name, start, n in (("train", 0, 16), ("dev", 100, 4), ("test", 200, 8)):
        messages(tmp_path / "data" / f"{name}.tsv", start, n)
    flags = ["--model", word_folder, "--steps", "1", "--out", tmp_path / "out"]
    done = run("classify", "--data", tmp_path / "data", *flags)
    assert done.returncode == 0, done.stderr
    assert "16 to learn from, 4 to validate, 8 to test (test.tsv)" in done.stdout


@pytest.mark.parametrize("job", ["finetune", "align --method dpo", "align --method reward"])
def test_records_of_a_file_are_held_out(word_folder: Path, tmp_path: Path, job: str) -> None:
    data, other = records(tmp_path / "a.jsonl", 0, 8), records(tmp_path / "b.jsonl", 100, 3)
    name, *flags = job.split()
    flags += ["--max-new-tokens", "2"] if "reward" not in job else []
    flags += ["--data", str(data), "--held-out", str(other), "--steps", "1"]
    done = run(name, "--model", word_folder, "--out", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "to learn from, 3 held out (b.jsonl)" in done.stdout and "8 " in done.stdout


def test_text_of_a_file_is_held_out(word_folder: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "data", tmp_path / "other.txt"
    data.mkdir()
    for name, text in (("train.txt", "one two three " * 100), ("valid.txt", "four five " * 20)):
        (data / name).write_text(text, encoding="utf-8")
    other.write_text("six seven " * 20, encoding="utf-8")
    short = ["--steps", "1", "--max-new-tokens", "2", "--sequence-length", "16"]
    for flags, where in (([], "valid.txt"), (["--held-out", str(other)], "other.txt")):
        out = tmp_path / f"run on {where}"
        done = run("finetune", "--model", word_folder, "--data", data, "--out", out, *short, *flags)
        assert done.returncode == 0, done.stderr
        assert f"held out ({where})" in done.stdout


def test_a_run_says_that_it_has_stopped_early(word_folder: Path, tmp_path: Path) -> None:
    data, other = tmp_path / "a.txt", tmp_path / "b.txt"
    data.write_text("one two three " * 100, encoding="utf-8")
    other.write_text("four five " * 20, encoding="utf-8")
    flags = ["--data", data, "--held-out", other, "--out", tmp_path / "out", "--lr", "0.5"]
    short = ["--steps", "9", "--patience", "1", "--evaluate-every", "1", "--max-new-tokens", "2"]
    done = run("finetune", "--model", word_folder, *flags, *short, "--sequence-length", "16")
    assert done.returncode == 0, done.stderr
    last = json.loads(
        (tmp_path / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    )["step"]
    assert f"stopped after step {last} of 9, as --patience asks" in done.stdout


def test_copies_of_the_training_text_in_the_file_held_out_are_counted(
    word_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, half = tmp_path / "data.txt", " ".join(str(i) for i in range(200, 260))
    data.write_text(" ".join(str(i) for i in range(100, 260)), encoding="utf-8")
    (tmp_path / "other.txt").write_text(f"{half} {half[::-1]}", encoding="utf-8")
    flags = ["--data", data, "--held-out", tmp_path / "other.txt", "--out", tmp_path / "out"]
    short = ["--steps", "1", "--max-new-tokens", "2", "--sequence-length", "16"]
    done = run("finetune", "--model", word_folder, *flags, *short)
    assert done.returncode == 0, done.stderr
    (share,) = re.findall(r"(\d+) % of the text held out is learned from too", caplog.text)
    assert 40 <= int(share) <= 60


def test_pretrain_validates_on_the_file_given(tmp_path: Path) -> None:
    data, other = tmp_path / "a.txt", tmp_path / "b.txt"
    data.write_text("one two three " * 200, encoding="utf-8")
    other.write_text("one two " * 20, encoding="utf-8")
    small = ["--vocab-size", "264", "--emb-dim", "16", "--n-heads", "2", "--n-layers", "1"]
    small += ["--context-length", "16", "--steps", "1"]
    done = run("pretrain", "--data", data, "--held-out", other, "--out", tmp_path / "out", *small)
    assert done.returncode == 0, done.stderr
    assert "held out (b.txt)" in done.stdout and "bits a byte on the text held out" in done.stdout


# ---- predict


@pytest.fixture(scope="module")
def classifier(word_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    data = messages(folder / "a.tsv", 0, 40)
    flags = ["--data", data, "--steps", "20", "--method", "full", "--lr", "0.01"]
    done = run("classify", "--model", word_folder, "--out", folder / "out", *flags)
    assert done.returncode == 0, done.stderr
    return folder / "out" / "best"


def test_predict_names_the_class_of_each_text(classifier: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "new" / "found.jsonl", tmp_path / "new.csv"
    texts = ["win a prize 7", "see you at six 8"]
    done = run("predict", "--model", classifier, "--text", *texts, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == texts
    for row, line in zip(rows, done.stdout.splitlines(), strict=False):
        assert line.startswith(f"{row['label']}\t({row['label']} ")
        assert row["label"] == max(row["probabilities"], key=row["probabilities"].get)
        assert math.isclose(sum(row["probabilities"].values()), 1, rel_tol=1e-5)
    data.write_text("id,text\n1,win a prize 7\n2,see you at six 8\n", encoding="utf-8")
    printed = done.stdout.splitlines()[:2]
    for flags, stdin in ((["--text", "-"], "\n\n".join(texts)), (["--data", data], "")):
        again = run("predict", "--model", classifier, *flags, stdin=stdin)
        assert again.stdout.splitlines() == printed


def test_predict_refuses_an_output_before_it_reads_the_texts(
    classifier: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    flags = ["--data", tmp_path / "missing.csv", "--out", tmp_path / "file" / "found.jsonl"]
    done = run("predict", "--model", classifier, *flags)
    assert done.returncode and f"cannot write into {tmp_path / 'file'}" in done.stderr


def test_predict_measures_a_classifier_on_labeled_texts(classifier: Path, tmp_path: Path) -> None:
    data = messages(tmp_path / "test.tsv", 100, 8)
    done = run("predict", "--model", classifier, "--evaluate", data)
    assert done.returncode == 0, done.stderr
    assert "on 8 texts" in done.stdout and "macro-F1" in done.stdout
    data.write_text("ham\tx\neggs\ty\n", encoding="utf-8")
    done = run("predict", "--model", classifier, "--evaluate", data)
    assert done.returncode and "classes that the training data lack: 'eggs' (1)" in done.stderr


def test_predict_says_what_is_wrong(
    classifier: Path, word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for flags, message in (
        (["--text", "a"], "there is no classifier in runs/classify/best: train one"),
        (["--model", "gpt2-nano", "--text", "a"], "is not the folder of a classifier"),
        (["--model", str(word_folder), "--text", "a"], "does not name the classes"),
        (["--model", str(classifier)], "there is nothing to classify: give --text"),
        (["--model", str(classifier), "--text", "a", "--out", "."], "--out . is a folder: give"),
    ):
        done = run("predict", *flags)
        assert done.returncode and message in done.stderr


def test_predict_cuts_texts_as_in_training(word_folder: Path, tmp_path: Path) -> None:
    data, out = messages(tmp_path / "a.tsv", 0, 40), tmp_path / "found.jsonl"
    flags = ["--data", data, "--steps", "1", "--longest", "6", "--keep", "tail"]
    done = run("classify", "--model", word_folder, "--out", tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    texts = [f"{start} how are you and all of us" for start in ("one", "see you at six")]
    asked = [flag for text in texts for flag in ("--text", text)]

    def probabilities(*flags: str) -> list[dict[str, float]]:
        model = ["--model", tmp_path / "out" / "best"]
        done = run("predict", *model, *asked, "--out", out, *flags)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [row["text"] for row in rows] == texts
        return [row["probabilities"] for row in rows]

    alike, other = probabilities()
    assert alike == pytest.approx(other, rel=1e-4)  # they end alike
    first, second = probabilities("--keep", "head")
    assert first != pytest.approx(second, rel=1e-4)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out" / "best")
    cut = theirs(texts, truncation=True)["input_ids"]
    assert cut[0] == cut[1] and len(cut[0]) == 6
