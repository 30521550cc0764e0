"""`gpt2mini align`, as users run it, only shorter."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import COMMAND, run, run_apart

from gpt2mini import GPT2, Tokenizer
from gpt2mini.lora import load_adapter
from gpt2mini.training.distributed import can_shard_on_cpu

FEW = ["--steps", "2", "--batch-size", "4", "--fraction", "0.1", "--answers", "1"]
COMPARE = [*FEW, "--max-new-tokens", "4", "--compare", "4", "--best-of", "2"]
SHORT = [*COMPARE, "--rollout-rows", "4"]


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(summary.json, the rows of metrics.jsonl)"""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return summary, [json.loads(line) for line in lines]


def test_a_reward_model_is_learned_and_serves_as_a_reward(
    word_folder: Path, tmp_path: Path
) -> None:
    reward = tmp_path / "reward"
    done = run("align", "--model", word_folder, "--method", "reward", "--out", reward, *FEW)
    assert done.returncode == 0, done.stderr
    summary, rows = read(reward)
    assert 0 <= summary["held_out_accuracy"] <= 1 and summary["held_out_pairs"] == 3
    assert {"validation_loss", "validation_accuracy"} <= rows[0].keys()
    assert (reward / "calibration.png").stat().st_size > 1000
    config = json.loads((reward / "best" / "config.json").read_text(encoding="utf-8"))
    assert config["id2label"] == {"0": "reward"}
    name = str(reward / "best")
    tuned = tmp_path / "grpo"
    arguments = ["--method", "grpo", "--reward", name, "--num-samples", "2"]
    arguments += ["--lora", "--clip", "0.3"]
    done = run("align", "--model", word_folder, "--out", tuned, *arguments, *SHORT)
    assert done.returncode == 0, done.stderr
    summary, rows = read(tuned)
    assert {"mean_before", "mean_after", "win_rate", "best_of_n"} <= summary.keys()
    assert (tuned / "best" / "adapter_config.json").is_file()
    done = run("align", "--model", word_folder, "--out", tmp_path / "ppo", "--reward", name, *SHORT)
    assert done.returncode == 0, done.stderr
    assert "rewards are normalized: before training their mean is" in done.stdout
    assert read(tmp_path / "ppo")[1][0]["kl_coefficient"] == pytest.approx(0.3)


@pytest.mark.parametrize("lora", [[], ["--lora"]])
def test_dpo_leaves_its_results(word_folder: Path, tmp_path: Path, lora: list[str]) -> None:
    done = run(
        "align", "--model", word_folder, "--method", "dpo", "--out", tmp_path, *COMPARE, *lora
    )
    assert done.returncode == 0, done.stderr
    summary, rows = read(tmp_path)
    assert rows[0]["validation_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert {"chosen_reward", "rejected_reward", "margin", "accuracy"} <= rows[1].keys()
    assert len(summary["answers_after"]) == 3
    assert (tmp_path / "best" / ("adapter_config.json" if lora else "config.json")).is_file()
    assert "held out: accuracy" in done.stdout and "[before" in done.stdout
    assert "what has it forgotten?" in done.stdout and summary["forgetting"]


def test_ppo_logs_its_figures_and_draws_them(word_folder: Path, tmp_path: Path) -> None:
    done = run("align", "--model", word_folder, "--out", tmp_path, *SHORT)
    assert done.returncode == 0, done.stderr
    summary, rows = read(tmp_path)
    assert {"reward", "kl", "entropy", "clip_fraction", "value_loss"} <= rows[0].keys()
    assert summary["method"] == "ppo" and summary["reward_function"] == "toy"
    assert summary["forgetting"]
    assert (tmp_path / "figures.png").stat().st_size > 1000
    assert (tmp_path / "best" / "model.safetensors").is_file()


def test_only_the_last_blocks_learn_if_asked(
    word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = "def length(prompts, responses):\n    return [len(text) for text in responses]\n"
    (tmp_path / "length_reward.py").write_text(function, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "out"
    arguments: list[str | Path] = ["--model", word_folder, "--out", out, *SHORT]
    arguments += ["--train-blocks", "1"]
    arguments += ["--reward", "length_reward:length"]
    done = run("align", *arguments)
    assert done.returncode == 0, done.stderr
    before, after = GPT2.from_pretrained(word_folder), GPT2.from_pretrained(out / "best")
    assert torch.equal(before.tok_emb.weight, after.tok_emb.weight)
    old, new = before.state_dict(), after.state_dict()
    names = [f"trf_blocks.{i}.attn.query.weight" for i in range(3)]
    same = [torch.equal(old[name], new[name]) for name in names]
    assert same == [True, True, False]
    summary, rows = read(out)
    assert summary["settings"]["on_policy"]["rollout_rows"] == 4
    assert summary["peak_learning_rates"] == [pytest.approx(1e-3)]
    assert "step 2: loss" in done.stdout and rows[-1]["learning_rate"] > 0
    again = run("align", *arguments)
    assert "an earlier run: resume it (--resume), choose another folder" in again.stderr
    done = run("align", *arguments, "--lora", "--overwrite")
    assert "--lora trains adapters, --train-blocks the last blocks" in done.stderr


def test_ipo_is_validated_by_its_own_loss_and_on_as_many_pairs_as_asked(
    word_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--method", "dpo", "--variant", "ipo", "--held-out-pairs", "2"]
    done = run("align", "--model", word_folder, "--out", tmp_path, *COMPARE, *arguments)
    assert done.returncode == 0, done.stderr
    summary, rows = read(tmp_path)
    assert summary["held_out_pairs"] == 2
    assert rows[0]["validation_loss"] == pytest.approx((1 / (2 * 0.1)) ** 2, rel=0.01)


def test_a_reward_is_found_in_the_current_folder(
    word_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function = "def politeness(prompts, responses):\n    return [len(text) for text in responses]\n"
    (tmp_path / "my_rewards.py").write_text(function, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    settings = ["--clip", "0.1", "--gae-lambda", "0.9", "--whiten-rewards", "--kl-estimator", "k3"]
    arguments = ["--reward", "my_rewards:politeness", *settings]
    done = run("align", "--model", word_folder, "--out", tmp_path / "out", *SHORT, *arguments)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path / "out")[0]["reward_function"] == "my_rewards:politeness"


@pytest.mark.parametrize("method", [["ppo"], ["grpo", "--num-samples", "2", "--lora"]])
def test_a_sharded_policy_learns_from_rewards(
    word_folder: Path, tmp_path: Path, method: list[str]
) -> None:
    launch = [*COMMAND[:-1], "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["align", "--model", word_folder, "--out", tmp_path, *SHORT, "--method", *method]
    command += ["--shard"] if can_shard_on_cpu() else []
    done = run_apart(*command, launch=[*launch, *COMMAND[1:]])
    assert done.returncode == 0, done.stderr
    summary, rows = read(tmp_path)
    assert rows[-1]["step"] == 2 and len(summary["answers_after"]) == 3
    if "--lora" in method:
        load_adapter(GPT2.from_pretrained(word_folder), tmp_path / "best")
    else:
        before, after = GPT2.from_pretrained(word_folder), GPT2.from_pretrained(tmp_path / "best")
        assert not torch.equal(before.tok_emb.weight, after.tok_emb.weight)


def test_rewards_are_printed_beside_what_was_rated(word_folder: Path, tmp_path: Path) -> None:
    """Of adapters on a classifier; and a pair that is equal after the cut is left out."""
    model, base = GPT2.from_pretrained(word_folder), tmp_path / "classifier"
    model.out_head = torch.nn.Linear(model.config.emb_dim, 2, bias=False)
    model.save_pretrained(base, class_names=["no", "yes"])
    Tokenizer.from_pretrained(word_folder).save_pretrained(base)
    long = "the same words again and again " * 40
    pairs = [{"prompt": "one?", "chosen": f"{long}a", "rejected": f"{long}b"}]
    pairs += [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no"} for n in ("two", "three")]
    held_out = tmp_path / "held.jsonl"
    held_out.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    arguments = ["--method", "reward", "--lora", "--held-out", held_out, "--longest", "24"]
    done = run("align", "--model", base, "--out", tmp_path / "reward", *arguments, "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "--- Question: two?" in done.stdout
    assert "Question: one?" not in done.stdout
    assert (tmp_path / "reward" / "adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "tyo"], "neither 'toy' nor a folder"),
        (["--rollout-rows", "10"], "must be a multiple"),
        (["--method", "grpo", "--num-samples", "1"], "num_samples must be at least 2"),
        (["--data", "no.jsonl"], "there is no file no.jsonl"),
        (["--columns", "prompt"], "--columns must read"),
        (["--method", "grpo", "--target-kl", "6"], "--target-kl is for --method ppo"),
        (["--max-new-tokens", "600"], "max_new_tokens (600) leaves no room"),
        (["--shard"], "no ranks to shard the model over: start it with torchrun"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    word_folder: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = run("align", "--model", word_folder, "--out", tmp_path, *SHORT, *arguments)
    assert done.returncode != 0
    assert message in done.stderr and "Traceback" not in done.stderr
