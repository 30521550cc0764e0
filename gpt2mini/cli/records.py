"""Teach a model to answer: supervised fine-tuning on prompts and completions.

    python examples/finetune_instructions.py                # two minutes, on bundled questions
    python examples/finetune_instructions.py --model gpt2 --data instructions.json --template alpaca
    python examples/finetune_instructions.py --data hf:owner/name:train --columns prompt=question

The data are JSONL, JSON or CSV with prompt and completion (or instruction, input and output). The
loss counts the completion and the <|endoftext|> behind it, so that the tuned model stops by itself;
short examples share a row, and none sees another. Writes metrics.jsonl, summary.json, loss.png and
the tuned model with the lowest validation loss to --out.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from flags import (
    SAMPLE_EXCHANGES,
    answer,
    draw_losses,
    exit_unless_rank_zero,
    is_small,
    keeping,
    not_negative,
    positive,
    positive_number,
    print_answers,
    read_and_split,
    record_flags,
    report_forgetting,
    run,
    run_folder,
    shard_if_asked,
    sharding_flag,
    training_flags,
    write_summary,
)

from gpt2mini import GPT2, Tokenizer
from gpt2mini.data.instructions import (
    Exchange,
    ExchangeBatches,
    encode_exchanges,
    read_exchanges,
)
from gpt2mini.device import pick_device
from gpt2mini.training import Settings, adamw, cosine, evaluate_loss, train
from gpt2mini.training.distributed import get_world_size

OUTSIDE = ["It was a dark and stormy night, and", "My dear Mrs. Brown,\n\nI have been"]


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    training, held_out = read_and_split(args, read_exchanges)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    longest = min(args.longest, model.config.context_length)

    def batches_of(part: list[Exchange]) -> ExchangeBatches:
        encoded = encode_exchanges(part, tokenizer, longest)
        return ExchangeBatches(
            encoded, args.batch_size, args.seed, args.train_on, not args.no_packing, longest
        )

    batches, validation = batches_of(training), batches_of(held_out)
    steps = args.steps or math.ceil(args.epochs * batches.batches_per_epoch / get_world_size())
    print(
        f"{len(training)} examples to learn from, in {len(batches.rows)} rows of at most {longest} "
        f"tokens ({batches.padding_share:.1%} of each batch is padding); {len(held_out)} held out\n"
        f"{steps} steps on {device}; the loss counts the "
        f"{'completion' if args.train_on == 'completion' else 'prompt and the completion'}"
    )

    def validate() -> float:
        return evaluate_loss(model, validation.in_order(), precision=args.dtype)

    prompts = [one.prompt for one in held_out[: args.answers]] + OUTSIDE
    answers_before = [answer(model, tokenizer, prompt, args) for prompt in prompts]
    settings = Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        precision=args.dtype,
        log_every=max(1, steps // 20),
        evaluate_every=max(1, steps // 5),
        **keeping(args),
    )
    began = time.perf_counter()
    lr = args.lr or (5e-4 if is_small(model) else 5e-5)
    shard_if_asked(args, model)
    optimizer = adamw(model, lr=lr)
    rows = train(
        model, batches, [optimizer], settings, evaluate=validate, out=out, resume=args.resume
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began

    tokenizer.save_pretrained(out / "best")
    model = GPT2.from_pretrained(out / "best", device=device)  # the lowest validation loss
    answers_after = [answer(model, tokenizer, prompt, args) for prompt in prompts]
    n = len(prompts) - len(OUTSIDE)
    print(f"\n=== {n} prompts held out")
    print_answers(prompts[:n], answers_before[:n], answers_after[:n])
    print("=== outside the format: what has the tuning left alone?")
    print_answers(prompts[n:], answers_before[n:], answers_after[n:])
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    first, best = math.exp(losses[0]), math.exp(min(losses))
    ended = sum(ended for _, ended in answers_after[:n])
    print(
        f"validation loss {losses[0]:.3f} -> {min(losses):.3f} nats per token of the completions "
        f"(perplexity {first:.1f} -> {best:.1f}); {ended} of {n} answers ended by themselves"
    )
    base = GPT2.from_pretrained(args.model, device=device)
    held_out_text = "\n\n".join(one.prompt + one.completion for one in held_out)
    forgotten = report_forgetting(base, model, tokenizer, held_out_text)
    write_summary(
        out,
        {
            "model": str(args.model),
            "data": str(args.data),
            "steps": rows[-1]["step"],
            "seconds": round(seconds, 1),
            "padding_share": batches.padding_share,
            "validation_loss_before": losses[0],
            "validation_loss_after": min(losses),
            "answers_that_ended": ended,
            "forgetting": forgotten,
            "prompts": prompts,
            "answers_before": [text for text, _ in answers_before],
            "answers_after": [text for text, _ in answers_after],
        },
    )
    draw_losses(out, f"Instructions from {Path(args.data).name}")
    print(f"tuned model: {out / 'best'}   (python examples/generate.py --model {out / 'best'})")


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/finetune_instructions")
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    sharding_flag(parser)
    record_flags(parser, SAMPLE_EXCHANGES, held_out=0.1)
    parser.add_argument("--train-on", choices=["completion", "all"], default="completion")
    parser.add_argument("--no-packing", action="store_true", help="a row for each example")
    parser.add_argument("--longest", type=positive, default=512, help="tokens per row, at most")
    parser.add_argument("--epochs", type=positive_number, default=4.0, help="default 4")
    parser.add_argument("--steps", type=positive, help="optimizer steps; overrides --epochs")
    parser.add_argument("--batch-size", type=positive, default=1, help="rows per step (default 1)")
    parser.add_argument(
        "--lr", type=positive_number, help="peak rate (default 5e-4; 5e-5 from 50M on)"
    )
    parser.add_argument(
        "--answers", type=not_negative, default=3, help="held-out prompts to answer"
    )
    parser.add_argument("--answer-tokens", type=positive, default=60, help="at most (default 60)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
