"""Fine-tune a model on any text, and hear the difference.

    python examples/finetune_text.py                                # a minute, on a bundled sample
    python examples/finetune_text.py --data novel.txt --epochs 3
    python examples/finetune_text.py --model gpt2 --data books/ --fraction 0.01

Prints the model's continuation of the same prompt before and after, the perplexity of text that it
was not trained on, and what it has forgotten of general prose. Writes metrics.jsonl, summary.json,
loss.png and the tuned model to --out.
"""

import argparse
import math
import time
from functools import partial
from pathlib import Path

import torch
from flags import (
    SAMPLE_TEXT,
    draw_losses,
    exit_unless_rank_zero,
    is_small,
    keeping,
    not_negative_number,
    positive,
    positive_number,
    report_forgetting,
    run,
    run_folder,
    shard_if_asked,
    sharding_flag,
    shorten,
    training_flags,
    write_summary,
)

from gpt2mini import GPT2, Tokenizer, complete
from gpt2mini.data.corpus import hold_out, text_files, tokenize_files
from gpt2mini.data.text import TokenBatches, sequential_batches
from gpt2mini.device import pick_device
from gpt2mini.training import Settings, adamw, cosine, evaluate_loss, train
from gpt2mini.training.distributed import get_world_size, rank_zero_first


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    with rank_zero_first():
        corpus = tokenize_files(text_files(args.data), tokenizer, out / "tokens")
    documents = corpus.documents(args.fraction, args.seed)
    training, validation = hold_out(documents, args.validation_share, args.seed)
    window = min(args.sequence_length, model.config.context_length)
    batches = TokenBatches(corpus.tokens, training, args.batch_size, window, args.seed)
    batches_per_step = args.accumulate * get_world_size()
    steps = args.steps or math.ceil(args.epochs * batches.batches_per_epoch / batches_per_step)
    print(
        f"{sum(map(len, training)):,} tokens to learn from, "
        f"{sum(map(len, validation)):,} held out; {steps} steps of "
        f"{batches_per_step * args.batch_size} x {batches.context_length} tokens "
        f"on {device}"
    )

    def validate() -> float:
        documents = shorten(validation, args.validation_tokens)
        windows = sequential_batches(corpus.tokens, documents, args.batch_size, window)
        return evaluate_loss(model, windows, precision=args.dtype)

    def sample() -> str:
        return complete(
            model,
            tokenizer,
            prompt,
            args.sample_tokens,
            temperature=0.8,
            top_k=50,
            generator=torch.Generator(device).manual_seed(args.seed),
            overflow="slide",
        )

    prompt = args.prompt or tokenizer.decode(corpus.tokens[validation[0]][:8].tolist())
    before = sample()
    print(f"\n--- before, from {prompt!r}\n{before}\n")

    settings = Settings(
        steps=steps,
        schedule=partial(cosine, steps=steps, warmup_steps=max(1, steps // 10)),
        accumulate=args.accumulate,
        precision=args.dtype,
        log_every=max(1, min(10, steps // 20)),
        evaluate_every=max(1, steps // 5),
        **keeping(args),
    )
    began = time.perf_counter()
    shard_if_asked(args, model)
    lr = args.lr or (5e-4 if is_small(model) else 5e-5)
    optimizer = adamw(model, lr=lr, weight_decay=args.weight_decay)
    rows = train(
        model, batches, [optimizer], settings, evaluate=validate, out=out, resume=args.resume
    )
    exit_unless_rank_zero()
    seconds = time.perf_counter() - began

    tokenizer.save_pretrained(out / "best")
    model = GPT2.from_pretrained(out / "best", device=device)  # the lowest validation loss
    after = sample()
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    first, best = math.exp(losses[0]), math.exp(min(losses))
    print(f"\n--- after\n{after}\n")
    print(
        f"validation loss {losses[0]:.3f} -> {min(losses):.3f} "
        f"(perplexity {first:.1f} -> {best:.1f})"
    )
    if not losses[-1] <= min(losses) + 0.01:  # nor is NaN
        print(f"(it had risen again to {losses[-1]:.3f} at the end: fewer epochs would do)")
    base = GPT2.from_pretrained(args.model, device=device)
    ends = [(document.start, min(document.stop, document.start + 5000)) for document in validation]
    texts = [tokenizer.decode(corpus.tokens[start:end].tolist()) for start, end in ends[:20]]
    held_out = "\n\n".join(texts)
    forgotten = report_forgetting(base, model, tokenizer, held_out)
    write_summary(
        out,
        {
            "model": str(args.model),
            "data": str(args.data),
            "steps": rows[-1]["step"],
            "seconds": round(seconds, 1),
            "validation_loss_before": losses[0],
            "validation_loss_after": min(losses),
            "perplexity_before": first,
            "perplexity_after": best,
            "forgetting": forgotten,
            "prompt": prompt,
            "sample_before": before,
            "sample_after": after,
        },
    )
    draw_losses(out, f"Fine-tuning {args.model} on {Path(args.data).name}")
    print(f"tuned model: {out / 'best'}   (python examples/generate.py --model {out / 'best'})")


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/finetune_text")
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    parser.add_argument("--data", default=SAMPLE_TEXT, help="a text file or a folder of .txt files")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="seeded share of the text to use"
    )
    parser.add_argument(
        "--validation-share", type=float, default=0.1, help="share that is held out"
    )
    parser.add_argument(
        "--validation-tokens", type=positive, default=65536, help="of these, so many scored"
    )
    parser.add_argument(
        "--epochs", type=positive_number, default=5.0, help="times through the text (default 5)"
    )
    parser.add_argument("--steps", type=positive, help="optimizer steps; overrides --epochs")
    parser.add_argument(
        "--batch-size", type=positive, default=4, help="windows per micro-batch (default 4)"
    )
    parser.add_argument(
        "--accumulate", type=positive, default=1, help="micro-batches per step (default 1)"
    )
    parser.add_argument(
        "--sequence-length", type=positive, default=256, help="tokens per window (default 256)"
    )
    parser.add_argument(
        "--lr", type=positive_number, help="peak rate (default 5e-4; from 50M parameters 5e-5)"
    )
    parser.add_argument("--weight-decay", type=not_negative_number, default=0.1)
    sharding_flag(parser)
    parser.add_argument("--prompt", help="text to continue (default: the first words held out)")
    parser.add_argument(
        "--sample-tokens", type=positive, default=80, help="length of the two samples"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
