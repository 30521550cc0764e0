"""Learn from preferences and from rewards: reward model, DPO, PPO, GRPO.

    python examples/tune_preferences.py                     # PPO: more cheerful words, two minutes
    python examples/tune_preferences.py --method dpo        # from pairs of answers, no sampling
    python examples/tune_preferences.py --method reward --out runs/reward
    python examples/tune_preferences.py --method grpo --reward runs/reward/best --lora
    python examples/tune_preferences.py --reward runs/reward/adapter --lora   # one base in memory
    python examples/tune_preferences.py --reward my_rewards:politeness      # any Python function

The data are JSONL, JSON or CSV with prompt, chosen and rejected, or HH's pairs of dialogues; PPO
and GRPO take only the prompts. Prompts that were held out are answered before and after, and both
answers rated. Writes metrics.jsonl, summary.json, pictures and the tuned model (or, with --lora,
its adapter) to --out.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from flags import (
    below_half,
    draw_losses,
    exit_unless_rank_zero,
    is_small,
    keeping,
    not_negative,
    not_negative_number,
    parse_columns,
    positive,
    positive_number,
    read_and_split,
    record_flags,
    report_forgetting,
    run,
    run_folder,
    shard_if_asked,
    sharding_flag,
    share,
    template_of,
    training_flags,
    write_summary,
)

from gpt2mini import GPT2, Tokenizer
from gpt2mini.checkpoints import holds_adapter
from gpt2mini.data.samples import sample
from gpt2mini.device import pick_device
from gpt2mini.inspection import plot_calibration, plot_figures
from gpt2mini.lora import (
    TARGETS,
    add_lora,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from gpt2mini.preferences.comparison import answer_prompts, best_of_n, compare_answers
from gpt2mini.preferences.dpo import dpo_step, evaluate_dpo, with_reference
from gpt2mini.preferences.grpo import grpo_batches, grpo_step
from gpt2mini.preferences.named_rewards import find_reward
from gpt2mini.preferences.pairs import (
    EncodedPreference,
    Preference,
    PreferenceBatches,
    encode_preferences,
    read_preferences,
)
from gpt2mini.preferences.ppo import ActorCritic, KLController, PPOSettings, ppo_batches, ppo_step
from gpt2mini.preferences.reward_functions import RewardFunction
from gpt2mini.preferences.reward_model import (
    CLASS_NAMES,
    CalibrationBin,
    RewardReport,
    calibration,
    evaluate_rewards,
    give_reward_head,
    reward_step,
)
from gpt2mini.preferences.rollouts import RolloutSettings
from gpt2mini.training import Figures, Settings, adamw, cosine, train
from gpt2mini.training.distributed import get_rank, get_world_size

SAMPLE = sample("preferences.jsonl")
# of gpt2-nano; larger models take a tenth of these rates
PEAK_RATES = {"reward": 2e-4, "dpo": 2e-5, "ppo": 1e-3, "grpo": 1e-3}
WITH_LORA = 10  # times these rates: adapters begin at zero
FIGURES = {
    "reward": ["margin", "accuracy"],
    "dpo": ["chosen_reward", "rejected_reward", "margin", "accuracy"],
    "ppo": ["reward", "kl", "entropy", "clip_fraction", "value_loss", "response_length"],
    "grpo": ["reward", "kl", "entropy", "clip_fraction", "response_length"],
}


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    training, held_out = read_and_split(args, read_preferences)
    if args.held_out:
        others = read_preferences(args.held_out, template_of(args), parse_columns(args.columns))
        training, held_out = training + held_out, others
    held_out = held_out[: args.held_out_pairs]
    print(f"{len(training)} pairs to learn from, {len(held_out)} held out, on {device}")
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    began = time.perf_counter()
    if args.method == "reward":
        summary = tune_reward(args, out, model, tokenizer, training, held_out)
    else:
        sys.path.append(str(Path.cwd()))  # where --reward my_rewards:politeness is looked for
        # an adapter's base must stay as it is: with --lora the policy's own does
        reward = find_reward(args.reward, device, base=model if args.lora else deepcopy(model))
        prompts = different_prompts(held_out)[: args.compare]
        before = answer(args, model, tokenizer, prompts)
        best = best_of(args, model, tokenizer, prompts, reward)
        if args.method == "dpo":
            model, summary = tune_dpo(args, out, model, tokenizer, training, held_out)
        else:
            summary = tune_on_policy(args, out, model, tokenizer, training, reward)
        found = compare_answers(prompts, before, answer(args, model, tokenizer, prompts), reward)
        print(f"\n{found.show(args.answers)}\n{args.reward}: {found}")
        if best is not None:
            print(f"without any tuning, the best of {args.best_of} answers: {best:.4f}")
        base = None if args.lora else GPT2.from_pretrained(args.model, device=device)
        held_out_text = "\n\n".join(one.prompt + one.chosen for one in held_out)
        forgotten = report_forgetting(base, model, tokenizer, held_out_text)
        summary |= {"reward_function": args.reward, **found.summary(), "best_of_n": best}
        summary["forgetting"] = forgotten
    settings = {"model": str(args.model), "data": str(args.data), "method": args.method}
    seconds = round(time.perf_counter() - began, 1)
    write_summary(out, {**settings, "seconds": seconds, **summary})
    draw(out, args)


# ---- the three ways


def tune_reward(
    args: argparse.Namespace,
    out: Path,
    model: GPT2,
    tokenizer: Tokenizer,
    training: list[Preference],
    held_out: list[Preference],
) -> dict[str, Any]:
    longest = min(args.longest, model.config.context_length)
    pairs, validation = (encode_preferences(p, tokenizer, longest) for p in (training, held_out))
    choose_what_learns(args, model)
    give_reward_head(model, torch.Generator().manual_seed(args.seed))
    figures = Figures()
    step = partial(reward_step, figures=figures)
    evaluate = partial(evaluate_rewards, model, validation)
    save = save_learned(args, whole=save_reward_model)
    train_on_pairs(args, out, model, pairs, step, evaluate, figures, save)
    model = load_best(args, out)
    # what rates answers is a whole model, or shares the base with the policy
    if lora_layers(model):
        save_adapter(model, out / "adapter", replace=True)
        tokenizer.save_pretrained(out / "adapter")
        merge_lora(model)
        save_reward_model(model, out / "best")
        print(f"adapter, for a policy on the same base: --reward {out / 'adapter'} --lora")
    tokenizer.save_pretrained(out / "best")
    report = evaluate_rewards(model, validation)
    for pair, better, worse in zip(
        held_out[: args.answers], report.chosen, report.rejected, strict=False
    ):
        print(f"--- {pair.prompt}\n[chosen   {float(better):+.3f}] {pair.chosen.strip()}")
        print(f"[rejected {float(worse):+.3f}] {pair.rejected.strip()}\n")
    print(f"held out: {report}")
    print(f"reward model: {out / 'best'}   (--method ppo --reward {out / 'best'})")
    bins = calibration(report.margins)
    draw_calibration(out, bins)
    return {**report.summary(), "calibration": [vars(one) for one in bins]}


def tune_dpo(
    args: argparse.Namespace,
    out: Path,
    model: GPT2,
    tokenizer: Tokenizer,
    training: list[Preference],
    held_out: list[Preference],
) -> tuple[GPT2, dict[str, Any]]:
    longest = min(args.longest, model.config.context_length)
    pairs, validation = (
        with_reference(encode_preferences(part, tokenizer, longest), model, precision=args.dtype)
        for part in (training, held_out)
    )
    choose_what_learns(args, model)
    figures = Figures()
    options = {
        "beta": args.beta,
        "label_smoothing": args.label_smoothing,
        "variant": args.variant,
        "reference_free": args.reference_free,
    }
    step = partial(dpo_step, **options, figures=figures)
    evaluate = partial(evaluate_dpo, model, validation, **options, precision=args.dtype)
    save = save_learned(args, whole=GPT2.save_pretrained)
    train_on_pairs(args, out, model, pairs, step, evaluate, figures, save)
    model = load_best(args, out)
    tokenizer.save_pretrained(out / "best")
    report = evaluate_dpo(model, validation, **options, precision=args.dtype)
    print(f"held out: {report}\ntuned {kind(args)}: {out / 'best'}")
    return model, report.summary()


def tune_on_policy(
    args: argparse.Namespace,
    out: Path,
    model: GPT2,
    tokenizer: Tokenizer,
    training: list[Preference],
    reward: RewardFunction,
) -> dict[str, Any]:
    reference = None if args.lora else deepcopy(model).requires_grad_(False)
    choose_what_learns(args, model)
    device, figures = model.tok_emb.weight.device, Figures()
    generator = torch.Generator(device).manual_seed(args.seed + get_rank())
    prompts = different_prompts(training)
    settings = RolloutSettings(
        rows=args.rollout_rows,
        minibatch_rows=args.batch_size,
        epochs=args.rollout_epochs,
        max_new_tokens=args.answer_tokens,
        num_samples=args.num_samples if args.method == "grpo" else 1,
        precision=args.dtype,
    )
    learner: torch.nn.Module = model
    if args.method == "ppo":
        own = GPT2.from_pretrained(args.value_model, device=device) if args.value_model else None
        learner = critic = ActorCritic(model, own)
        controller = KLController(args.kl, args.target_kl)
        ppo = PPOSettings(
            clip=args.clip,
            gae_lambda=args.gae_lambda,
            whiten_rewards=args.whiten_rewards,
            kl_estimator=args.kl_estimator,
        )
        batches = ppo_batches(
            critic, tokenizer, prompts, reward, settings, ppo, controller, generator, reference,
            figures,
        )  # fmt: skip
        step: Callable = partial(ppo_step, settings=ppo, figures=figures)
    else:
        batches = grpo_batches(
            model, tokenizer, prompts, reward, settings, generator, reference, figures
        )
        step = partial(grpo_step, kl_coefficient=args.kl, clip=args.clip, figures=figures)
    loop = loop_settings(args, args.steps or args.rollouts * settings.updates, settings.updates)
    optimizer = adamw(learner, lr=peak_rate(args, model), weight_decay=0.0)
    rows = train(
        learner, batches, [optimizer], loop, step, out=out, figures=figures, resume=args.resume
    )
    exit_unless_rank_zero()
    print_rows(rows, FIGURES[args.method])
    save_learned(args, whole=GPT2.save_pretrained)(model, out / "final")
    tokenizer.save_pretrained(out / "final")
    print(f"tuned {kind(args)}: {out / 'final'}")
    return {name: rows[-1].get(name) for name in FIGURES[args.method]}


def train_on_pairs(
    args: argparse.Namespace,
    out: Path,
    model: GPT2,
    pairs: list[EncodedPreference],
    step: Callable,
    evaluate: Callable[[], RewardReport],
    figures: Figures,
    save: Callable[[GPT2, Path], object],
) -> None:
    """The training loop, for the reward model and for DPO; the best model lands in `out`/best."""
    batches = PreferenceBatches(pairs, args.batch_size, args.seed)
    steps = args.steps or math.ceil(args.epochs * batches.batches_per_epoch / get_world_size())
    settings = loop_settings(args, steps, max(1, steps // 20))

    def validate() -> dict[str, float]:
        report = evaluate()
        return {"validation_loss": report.loss, "validation_accuracy": report.accuracy}

    shard_if_asked(args, model)
    optimizer = adamw(model, lr=peak_rate(args, model))
    rows = train(
        model, batches, [optimizer], settings, step, validate, out, args.resume, save, figures
    )
    exit_unless_rank_zero()
    validated = [row for row in rows if "validation_loss" in row]
    print_rows(validated, ["validation_loss", "validation_accuracy"])


# ---- pieces


def choose_what_learns(args: argparse.Namespace, model: GPT2) -> None:
    """Adapters, and a head that is put on afterwards; or everything."""
    if args.lora:
        add_lora(model, rank=args.rank, alpha=2 * args.rank, targets=list(TARGETS))


def kind(args: argparse.Namespace) -> str:
    return "adapter" if args.lora else "model"


def loop_settings(args: argparse.Namespace, steps: int, log_every: int) -> Settings:
    return Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        precision=args.dtype,
        log_every=log_every,
        evaluate_every=max(1, steps // 4),
        unit="pairs" if args.method in ("reward", "dpo") else "tokens",
        **keeping(args),
    )


def peak_rate(args: argparse.Namespace, model: GPT2) -> float:
    usual = PEAK_RATES[args.method] * (WITH_LORA if args.lora else 1)
    usual /= 1 if is_small(model) else 10
    return args.lr or usual


def save_learned(
    args: argparse.Namespace, whole: Callable[[GPT2, Path], object]
) -> Callable[[GPT2, Path], object]:
    """How to save what has learned: the adapters, or the whole model."""
    return partial(save_adapter, replace=True) if args.lora else whole


def save_reward_model(model: GPT2, folder: Path) -> None:
    model.save_pretrained(folder, class_names=CLASS_NAMES)


def load_best(args: argparse.Namespace, out: Path) -> GPT2:
    """The model with the lowest validation loss, as it was saved."""
    device = pick_device(args.device)
    if not holds_adapter(out / "best"):  # or a finished reward run is resumed: merged already
        return GPT2.from_pretrained(out / "best", device=device)
    model = GPT2.from_pretrained(args.model, device=device)
    load_adapter(model, out / "best")
    return model


def different_prompts(preferences: list[Preference]) -> list[str]:
    return list(dict.fromkeys(one.prompt for one in preferences))


def answer(
    args: argparse.Namespace, model: GPT2, tokenizer: Tokenizer, prompts: list[str]
) -> list[str]:
    generator = torch.Generator(model.tok_emb.weight.device).manual_seed(args.seed)
    return answer_prompts(model, tokenizer, prompts, args.answer_tokens, generator=generator)


def best_of(
    args: argparse.Namespace,
    model: GPT2,
    tokenizer: Tokenizer,
    prompts: list[str],
    reward: RewardFunction,
) -> float | None:
    """The mean reward that the untuned model gets with the best of several answers."""
    if args.best_of < 2:
        return None
    generator = torch.Generator(model.tok_emb.weight.device).manual_seed(args.seed)
    n, tokens = args.best_of, args.answer_tokens
    return float(best_of_n(model, tokenizer, prompts, reward, n, tokens, generator)[1].mean())


def print_rows(rows: list[dict[str, Any]], names: list[str]) -> None:
    """A table of some figures, of at most a dozen rows and the last."""
    print("\n step  " + "  ".join(f"{name:>19}" for name in names))
    for row in [*rows[: -1 : math.ceil(len(rows) / 12)], rows[-1]]:
        found = (row.get(name, math.nan) for name in names)
        print(f"{row['step']:5}  " + "  ".join(f"{value:19.4f}" for value in found))
    print()


def draw_calibration(out: Path, bins: list[CalibrationBin]) -> None:
    try:
        plot_calibration(bins, out / "calibration.png")
    except ImportError:
        return  # `draw` says it
    print(f"calibration: {out / 'calibration.png'}")


def draw(out: Path, args: argparse.Namespace) -> None:
    title = f"{args.method} on {Path(args.data).name}"
    of_pairs = args.method in ("reward", "dpo")
    draw_losses(out, title, unit="nats per pair" if of_pairs else "per token")
    try:
        plot_figures(out / "metrics.jsonl", FIGURES[args.method], out / "figures.png", title)
    except ImportError:
        return  # said already
    print(f"figures: {out / 'figures.png'}")


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/tune_preferences")
    sharding_flag(parser)
    add = parser.add_argument
    add("--method", choices=list(PEAK_RATES), default="ppo")
    add("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    record_flags(parser, SAMPLE, held_out=0.2)
    add("--held-out", help="another file to hold out, instead of a share of the data")
    add("--held-out-pairs", type=positive, help="at most so many pairs held out")
    add("--lora", action="store_true", help="train adapters; no second copy as the reference")
    add("--rank", type=positive, default=8, help="of the adapters (default 8)")
    add("--epochs", type=positive_number, default=3.0, help="reward, dpo: default 3")
    add("--steps", type=positive, help="optimizer steps; overrides --epochs and --rollouts")
    add("--batch-size", type=positive, help="pairs, or responses, per step (default 8; 16)")
    add("--lr", type=positive_number, help="peak rate (default: by method and size)")
    add("--longest", type=positive, default=512, help="reward, dpo: tokens per prompt and answer")
    add("--beta", type=positive_number, default=0.1, help="dpo: how near the reference (.1)")
    add(
        "--label-smoothing",
        type=below_half,
        default=0.0,
        help="dpo: share of wrong labels (default 0)",
    )
    add("--variant", choices=["dpo", "ipo"], default="dpo")
    add("--reference-free", action="store_true", help="dpo without a reference")
    add("--reward", default="toy", help="toy, a reward model's folder, or package.module:function")
    add("--kl", type=not_negative_number, help="ppo, grpo: coefficient (default .03; .1)")
    add("--target-kl", type=positive_number, help="ppo: nats per answer, to which --kl is adapted")
    add("--kl-estimator", choices=["k1", "k3"], default="k1", help="ppo: in the reward")
    add("--clip", type=positive_number, default=0.2, help="ppo, grpo: of the ratio (.2)")
    add("--gae-lambda", type=share, default=0.95, help="ppo: default .95")
    add("--whiten-rewards", action="store_true", help="ppo: give them variance 1")
    add("--rollouts", type=positive, default=20, help="ppo, grpo: default 20")
    add("--rollout-rows", type=positive, default=32, help="responses in a rollout (default 32)")
    add("--rollout-epochs", type=positive, default=2, help="times it is learned from (default 2)")
    add(
        "--num-samples", type=positive, default=4, help="grpo: responses to each prompt (default 4)"
    )
    add("--value-model", help="ppo: a critic of its own, from a reward model's folder")
    add("--answer-tokens", type=positive, default=16, help="per answer, at most (default 16)")
    add("--compare", type=positive, default=50, help="held-out prompts to answer (default 50)")
    add("--answers", type=not_negative, default=3, help="of which are printed (default 3)")
    add(
        "--best-of",
        type=not_negative,
        default=4,
        help="answers per prompt without tuning (0: none)",
    )
    args = parser.parse_args()
    args.batch_size = args.batch_size or (8 if args.method in ("reward", "dpo") else 16)
    if args.shard and args.method in ("ppo", "grpo"):
        parser.error("--shard is for --method reward and dpo: answers are drawn from a whole model")
    if args.target_kl is not None and args.method != "ppo":
        parser.error(f"--target-kl is for --method ppo; {args.method} does not adapt --kl")
    if args.kl is None:
        args.kl = 0.1 if args.method == "grpo" else 0.03  # beside advantages of unit size
    return args


if __name__ == "__main__":
    run(main)
