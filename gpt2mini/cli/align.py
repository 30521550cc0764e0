"""Learn from preferences and from rewards: reward model, DPO, PPO, GRPO.

Examples:
  gpt2mini align                                  # PPO: more cheerful words, two minutes
  gpt2mini align --method dpo                     # from pairs of answers, no sampling
  gpt2mini align --method reward --out runs/reward
  gpt2mini align --method grpo --reward runs/reward/best --lora
  gpt2mini align --reward runs/reward/adapter --lora     # one base in memory
  gpt2mini align --reward my_rewards:politeness          # any Python function

The data are records with prompt, chosen and rejected, or HH's pairs of dialogues, of which PPO and
GRPO take the prompts alone. Prompts that were held out are answered before and after, and both
answers rated. Writes metrics.jsonl, summary.json, pictures and best/, the tuned model or its
adapter, to --out.
"""

import sys
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from gpt2mini import GPT2
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.cli.align_job import FIGURES, Flags, Job, different_prompts
from gpt2mini.cli.align_pairs import train_reward_model, tune_dpo
from gpt2mini.cli.align_rollouts import tune_on_policy
from gpt2mini.data.instructions import Exchange, ExchangeBatches, encode_exchanges
from gpt2mini.data.text import Batch
from gpt2mini.inspection import plot_calibration, plot_figures
from gpt2mini.preferences.comparison import answer_prompts, best_of_n, compare_answers
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.reward_functions import RewardFunction

__all__ = ["Flags", "run"]

LOST = 2.0  # times the perplexity of general text: more is warned of


def run(flags: Flags) -> None:
    job, pictures = Job(flags), {}
    if flags.method == "reward":
        summary, bins = train_reward_model(job)
        pictures["calibration"] = partial(plot_calibration, bins)
    else:
        summary = tune_policy(job)

    def figures(path: Path) -> None:
        plot_figures(job.out / "metrics.jsonl", FIGURES[flags.method], path, title)

    title = f"{flags.method} on {Path(flags.data).name}"
    unit = "nats per pair" if flags.method in ("reward", "dpo") else "per token"
    job.finish(summary, title, unit, figures=figures, **pictures)


def tune_policy(job: Job) -> dict[str, Any]:
    """DPO, PPO or GRPO, between two rounds of answers to prompts held out."""
    flags, model = job.flags, job.model
    asked = flags.comparison
    sys.path.append(str(Path.cwd()))  # where --reward my_rewards:politeness is looked for
    reward = find_reward(asked.reward, job.device, base=base_of_reward(job))
    prompts = different_prompts(job.held_out)[: asked.compare]

    def answers(model: GPT2) -> list[str]:
        generator = job.generator()
        return answer_prompts(
            model, job.tokenizer, prompts, asked.max_new_tokens, generator=generator
        )

    before, best = answers(model), best_of(job, prompts, reward)
    tuned, summary = tune_dpo(job) if flags.method == "dpo" else tune_on_policy(job, reward)
    found = compare_answers(prompts, before, answers(tuned), reward)
    print(f"\n{found.show(flags.answers)}\n{asked.reward}: {found}")
    if best is not None:
        print(f"without any tuning, the best of {asked.best_of} answers: {best:.4f}")
    forgotten = job.report_forgetting(tuned, job.tokenizer, chosen_answers(job))
    warn_of_lost_language(forgotten["forgetting"]["general"], flags.method)
    return {
        "reward_function": asked.reward,
        "best_of_n": best,
        **(summary | found.summary() | forgotten),
    }


def base_of_reward(job: Job) -> GPT2 | None:
    """Of a reward model that is an adapter: the model as it is before training. With --lora the
    policy's own weights stay so; else it is a copy."""
    if not holds_adapter(Path(job.flags.comparison.reward)):
        return None
    return job.model if job.flags.lora else deepcopy(job.model)


def chosen_answers(job: Job) -> Iterator[Batch]:
    """The chosen answers held out, as batches whose labels are the answers."""
    longest = min(job.flags.pairs.longest, job.model.config.context_length)
    exchanges = [Exchange(one.prompt, one.chosen) for one in job.held_out]
    encoded = encode_exchanges(exchanges, job.tokenizer, longest)
    return ExchangeBatches(encoded, batch_size=8, seed=job.seed).in_order()


def warn_of_lost_language(general: dict[str, float], method: str) -> None:
    """If general prose has become much less likely: a reward that rises is then no success."""
    before, after = general["perplexity_base"], general["perplexity_tuned"]
    if after > LOST * before:
        remedy = "a larger --beta" if method == "dpo" else "a larger --kl or fewer --rollouts"
        print(
            f"warning: the perplexity of general text has risen from {before:.0f} to {after:.0f}: "
            f"the model has left the language for the reward. Try {remedy}, or a lower --lr\n"
        )


def best_of(job: Job, prompts: list[str], reward: RewardFunction) -> float | None:
    """The mean reward that the untuned model gets with the best of several answers."""
    n, tokens = job.flags.comparison.best_of, job.flags.comparison.max_new_tokens
    if n < 2:
        return None
    generator = job.generator()
    return float(
        best_of_n(job.model, job.tokenizer, prompts, reward, n, tokens, generator)[1].mean()
    )
