"""`align` from pairs of answers: the reward model and DPO."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli import common
from gpt2mini.cli.align_job import Job
from gpt2mini.cli.tables import print_rows
from gpt2mini.data.instructions import EncodedExchange
from gpt2mini.lora import lora_layers, merge_lora, save_adapter
from gpt2mini.preferences.comparison import end_of
from gpt2mini.preferences.dpo import dpo_step, evaluate_dpo, with_reference
from gpt2mini.preferences.pairs import (
    EncodedPreference,
    PreferenceBatches,
    encode_preferences,
)
from gpt2mini.preferences.reward_model import (
    CLASS_NAMES,
    CalibrationBin,
    RewardReport,
    calibration,
    calibration_table,
    evaluate_rewards,
    give_reward_head,
    reward_step,
)
from gpt2mini.training import adamw
from gpt2mini.training.distributed import get_world_size


def train_reward_model(job: Job) -> tuple[dict[str, Any], list[CalibrationBin]]:
    flags, out = job.flags, job.out
    longest = min(flags.pairs.longest, job.model.config.context_length)
    pairs, validation = (
        encode_preferences(part, job.tokenizer, longest) for part in (job.training, job.held_out)
    )
    job.choose_what_learns()
    give_reward_head(job.model, torch.Generator().manual_seed(job.seed))
    save_reward_model = partial(GPT2.save_pretrained, class_names=CLASS_NAMES)
    step = partial(reward_step, figures=job.figures)
    evaluate = partial(evaluate_rewards, job.model, validation)
    train_on_pairs(job, pairs, step, evaluate, common.how_to_save(job.model, save_reward_model))
    model = job.load_best(classifier=True)
    if lora_layers(model):  # a whole model rates answers, or an adapter on the policy's base
        save_adapter(model, out / "adapter", replace=True)
        job.tokenizer.save_pretrained(out / "adapter")
        merge_lora(model)
        save_reward_model(model, out / "best")
        print(f"adapter, for a policy on the same base: --reward {out / 'adapter'} --lora")
    job.report_best()
    report = evaluate_rewards(model, validation)
    rated = list(zip(validation, report.chosen, report.rejected, strict=True))
    for pair, better, worse in rated[: flags.answers]:
        prompt, chosen = texts_of(pair.chosen, job.tokenizer)
        _, rejected = texts_of(pair.rejected, job.tokenizer)
        print(f"--- {end_of(prompt)}\n[chosen   {float(better):+.3f}] {chosen.strip()}")
        print(f"[rejected {float(worse):+.3f}] {rejected.strip()}\n")
    bins = calibration(report.margins)
    print(f"held out: {report}\n\ncalibration: is it right as often as its confidence says?")
    print(f"{calibration_table(bins)}\n\nas a reward: gpt2mini align --reward {out / 'best'}")
    return {**report.summary(), "calibration": [one.summary() for one in bins]}, bins


def texts_of(exchange: EncodedExchange, tokenizer: Tokenizer) -> tuple[str, str]:
    """The prompt and the response as the model reads them, which may have been cut."""
    ids = [int(i) for i in exchange.token_ids]
    response = [i for i in ids[exchange.n_prompt :] if i != tokenizer.eos_id]
    return tokenizer.decode(ids[: exchange.n_prompt]), tokenizer.decode(response)


def tune_dpo(job: Job) -> tuple[GPT2, dict[str, Any]]:
    flags, model, asked = job.flags, job.model, vars(job.flags.dpo)
    longest = min(flags.pairs.longest, model.config.context_length)
    pairs, validation = (
        with_reference(
            encode_preferences(part, job.tokenizer, longest), model, precision=job.precision
        )
        for part in (job.training, job.held_out)
    )
    job.choose_what_learns()
    step = partial(dpo_step, **asked, figures=job.figures)
    evaluate = partial(evaluate_dpo, model, validation, **asked, precision=job.precision)
    train_on_pairs(job, pairs, step, evaluate, common.how_to_save(model))
    tuned = job.load_best()
    job.report_best()
    report = evaluate_dpo(tuned, validation, **asked, precision=job.precision)
    print(f"held out: {report}")
    return tuned, report.summary()


def train_on_pairs(
    job: Job,
    pairs: list[EncodedPreference],
    step: Callable,
    evaluate: Callable[[], RewardReport],
    save: common.Save,
) -> None:
    """The training loop, for the reward model and for DPO; the best model lands in best/."""
    flags, model = job.flags, job.model
    batches = PreferenceBatches(pairs, flags.batch_size or 8, job.seed)
    steps = flags.steps or math.ceil(flags.pairs.epochs * len(batches) / get_world_size())

    def validate() -> dict[str, float]:
        report = evaluate()
        return {"validation_loss": report.loss, "validation_accuracy": report.accuracy}

    flags.parallel.apply(model, job.precision)
    rows = job.train(
        model,
        batches,
        [adamw(model, job.peak_rate())],
        *(steps, step, validate, save, job.figures),
        unit="pairs",
    )
    print_rows(rows, ["validation_loss", "validation_accuracy"], where="validation_loss")
