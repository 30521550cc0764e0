"""Teach a model a way of answering with LoRA: a fraction of the weights learns beside the rest.

    python examples/finetune_lora.py                         # a minute, on bundled questions
    python examples/finetune_lora.py --model gpt2 --data dialogues.jsonl --targets query key value
    python examples/finetune_lora.py --data answers.jsonl --template "Question: {prompt} Answer: "

The data are JSONL, JSON or CSV with prompt and completion (or instruction, input and output), or
dialogues ({"chosen": "...\\n\\nAssistant: ..."}), whose last answer is learned. Writes
metrics.jsonl, summary.json, loss.png and the adapter with the lowest validation loss, in PEFT's
format, to --out.
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
    ExchangeBatches,
    encode_exchanges,
    read_exchanges,
)
from gpt2mini.device import pick_device
from gpt2mini.lora import TARGETS, add_lora, load_adapter, save_adapter
from gpt2mini.training import Settings, adamw, cosine, evaluate_loss, train
from gpt2mini.training.distributed import get_world_size


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    training, held_out = read_and_split(args, read_exchanges)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    longest = min(args.longest, model.config.context_length)
    batches, validation = (
        ExchangeBatches(encode_exchanges(part, tokenizer, longest), args.batch_size, args.seed)
        for part in (training, held_out)
    )

    add_lora(model, args.rank, args.alpha or 2 * args.rank, args.dropout, args.targets)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    steps = args.steps or math.ceil(args.epochs * batches.batches_per_epoch / get_world_size())
    print(
        f"{len(training)} exchanges to learn from, {len(held_out)} held out; {steps} steps on "
        f"{device}\n{learning:,} of {total:,} parameters learn: {learning / total:.2%} "
        f"(rank {args.rank}, {', '.join(args.targets)})"
    )

    def validate() -> float:
        return evaluate_loss(model, validation.in_order(), precision=args.dtype)

    prompts = [one.prompt for one in held_out[: args.answers]]
    answers_before = [answer(model, tokenizer, prompt, args) for prompt in prompts]

    settings = Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        precision=args.dtype,
        log_every=args.log_every or max(1, steps // 20),
        evaluate_every=max(1, steps // 5),
        **keeping(args),
    )
    began = time.perf_counter()
    shard_if_asked(args, model)
    rows = train(
        model,
        batches,
        [adamw(model, lr=args.lr, weight_decay=0.0)],
        settings,
        evaluate=validate,
        out=out,
        save=partial(save_adapter, replace=True),
        resume=args.resume,
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began
    print_losses(rows)

    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    base_loss, tuned_loss = losses[0], min(losses)  # at first the adapters add exactly nothing
    model = GPT2.from_pretrained(args.model, device=device)  # and the adapter as it was saved
    load_adapter(model, out / "best")
    answers_after = [answer(model, tokenizer, prompt, args) for prompt in prompts]
    print_answers(prompts, answers_before, answers_after)
    size = sum(file.stat().st_size for file in (out / "best").iterdir())
    print(
        f"validation loss: base {base_loss:.3f}, tuned {tuned_loss:.3f} nats per token of the "
        f"answers (perplexity {math.exp(base_loss):.1f} -> {math.exp(tuned_loss):.1f})"
    )
    held_out_text = "\n\n".join(one.prompt + one.completion for one in held_out)
    forgotten = report_forgetting(None, model, tokenizer, held_out_text)  # None: adapters off
    write_summary(
        out,
        {
            "model": str(args.model),
            "data": str(args.data),
            "steps": rows[-1]["step"],
            "seconds": round(seconds, 1),
            "trainable_parameters": learning,
            "trainable_share": learning / total,
            "validation_loss_base": base_loss,
            "validation_loss_tuned": tuned_loss,
            "adapter_bytes": size,
            "forgetting": forgotten,
            "prompts": prompts,
            "answers_before": [text for text, _ in answers_before],
            "answers_after": [text for text, _ in answers_after],
        },
    )
    draw_losses(out, f"LoRA on {Path(args.data).name}", unit="nats per token of the answers")
    print(f"adapter: {out / 'best'}, {size / 1e6:.2f} MB, in PEFT's format")


def print_losses(rows: list[dict]) -> None:
    """Training loss, averaged over the steps between two lines, and the validation loss."""
    print("\n step   loss since the last line   validation loss")
    validation = {row["step"]: row["validation_loss"] for row in rows if "validation_loss" in row}
    for row in rows:
        if "loss" in row:
            found = validation.get(row["step"])
            print(f"{row['step']:5}   {row['loss']:24.3f}   {f'{found:.3f}' if found else '':>15}")


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/finetune_lora")
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    sharding_flag(parser)
    record_flags(parser, SAMPLE_EXCHANGES, held_out=0.1)
    parser.add_argument(
        "--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS), help="default: all"
    )
    parser.add_argument("--rank", type=positive, default=8, help="default 8")
    parser.add_argument("--alpha", type=positive_number, help="default: twice the rank")
    parser.add_argument("--dropout", type=float, default=0.0, help="on the adapters' input")
    parser.add_argument("--epochs", type=positive_number, default=5.0, help="default 5")
    parser.add_argument("--steps", type=positive, help="optimizer steps; overrides --epochs")
    parser.add_argument(
        "--batch-size", type=positive, default=8, help="exchanges per step (default 8)"
    )
    parser.add_argument(
        "--longest", type=positive, default=512, help="tokens per exchange, at most"
    )
    parser.add_argument("--lr", type=positive_number, default=2e-3, help="peak rate (default 2e-3)")
    parser.add_argument("--log-every", type=positive, help="steps whose losses make one line")
    parser.add_argument(
        "--answers", type=not_negative, default=3, help="held-out prompts to answer"
    )
    parser.add_argument("--answer-tokens", type=positive, default=60, help="at most (default 60)")
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
