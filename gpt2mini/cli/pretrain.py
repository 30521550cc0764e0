"""Make a GPT-2 from nothing but text: learn a vocabulary, then pretrain a model on it.

    python examples/pretrain.py                            # a minute, on the bundled sample
    python examples/pretrain.py --data books/ --out runs/nano --steps 5000

`weights/gpt2-nano` was made by this script; its README has the commands. A deep model costs more
per step and learns little more at first, so gpt2-nano began shallow: `--init-from FOLDER` starts
from an earlier model and, where `--layers` asks for more blocks than it has, grows it without
changing its outputs.
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from flags import (
    SAMPLE_TEXT,
    draw_losses,
    exit_unless_rank_zero,
    keeping,
    not_negative,
    not_negative_number,
    positive,
    positive_number,
    run,
    run_folder,
    shard_if_asked,
    sharding_flag,
    share,
    shorten,
    training_flags,
    write_summary,
)

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete
from gpt2mini.checks import check_predicts_tokens
from gpt2mini.data.corpus import TokenFile, hold_out, read_pieces, text_files, tokenize_files
from gpt2mini.data.text import TokenBatches, sequential_batches
from gpt2mini.device import pick_device
from gpt2mini.model import TiedHead
from gpt2mini.tokenizer import train_tokenizer
from gpt2mini.training import Settings, evaluate_loss, muon_and_adamw, train, warmup_stable_decay
from gpt2mini.training.distributed import get_rank, rank_zero_first, save_whole


def main() -> None:
    args = parse_arguments()
    out = run_folder(args)
    torch.manual_seed(args.seed)
    device = pick_device(args.device)

    files = text_files(args.data)
    with rank_zero_first():
        tokenizer = get_tokenizer(args, files)
        corpus = tokenize_files(files, tokenizer, out / "tokens")
    training, validation = hold_out(
        corpus.documents(args.fraction, args.seed), args.validation_share, args.seed
    )
    model = get_model(args, tokenizer).to(device)
    parameters = sum(p.numel() for p in model.parameters())
    shard_if_asked(args, model)
    print(
        f"{parameters:,} parameters, {tokenizer.vocab_size:,} kinds of token; "
        f"{sum(map(len, training)):,} tokens to learn from, on {device}"
    )

    batches = TokenBatches(
        corpus.tokens,
        training,
        args.batch_size,
        args.sequence_length or model.config.context_length,
        args.seed,
    )
    settings = Settings(
        steps=args.steps,
        schedule=partial(
            warmup_stable_decay,
            steps=args.steps,
            warmup_steps=args.warmup_steps,
            decay_share=args.decay_share,
        ),
        accumulate=args.accumulate,
        precision=args.dtype,
        evaluate_every=args.evaluate_every,
        **keeping(args),
    )
    held_out = shorten(validation, args.validation_tokens)
    rows = train(
        model,
        batches,
        muon_and_adamw(model, lr=args.lr, adamw_lr=args.adamw_lr, weight_decay=args.weight_decay),
        settings,
        evaluate=lambda: validation_loss(model, corpus, held_out, args.batch_size, args.dtype),
        out=out,
        resume=args.resume,
    )

    save_whole(GPT2.save_pretrained, model, out / "final")
    exit_unless_rank_zero()
    model = GPT2.from_pretrained(out / "final", device=device)
    tokenizer.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "best")
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    bits = losses[-1] / math.log(2) / bytes_per_token(tokenizer, corpus, held_out)
    generator = torch.Generator(device).manual_seed(args.seed)
    sample = complete(
        model, tokenizer, "The ", 100, top_k=50, generator=generator, overflow="slide"
    )
    print(f"\n{sample}\n")
    print(f"validation loss {losses[0]:.3f} -> {losses[-1]:.3f} nats a token")
    print(f"{bits:.3f} bits a byte on {len(held_out)} documents held out")
    write_summary(
        out,
        {
            "parameters": parameters,
            "steps": rows[-1]["step"],
            "validation_loss": losses[-1],
            "bits_per_byte": bits,
            "sample": sample,
        },
    )
    draw_losses(out, f"Pretraining on {Path(args.data).name}")
    print(f"model: {out / 'final'}   (python examples/generate.py --model {out / 'final'})")


def get_tokenizer(args: argparse.Namespace, files: list[Path]) -> Tokenizer:
    """The vocabulary of an earlier model or of this run, or a new one learned from the text."""
    folder = Path(args.init_from or Path(args.out) / "tokenizer")
    if args.init_from or (args.resume and folder.is_dir()) or get_rank() > 0:
        return Tokenizer.from_pretrained(folder)
    pieces = (piece for file in files for piece, _ in read_pieces(file))
    tokenizer = train_tokenizer(pieces, args.vocab_size, show_progress=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def get_model(args: argparse.Namespace, tokenizer: Tokenizer) -> GPT2:
    if args.init_from:
        model = GPT2.from_pretrained(args.init_from)
        check_predicts_tokens(model)
        return grow_depth(model, args.layers)
    return GPT2(
        GPT2Config(
            vocab_size=tokenizer.vocab_size,
            context_length=args.context_length,
            emb_dim=args.emb_dim,
            n_heads=args.heads,
            n_layers=args.layers,
        )
    )


def grow_depth(model: GPT2, n_layers: int) -> GPT2:
    """A deeper model that computes exactly the same, ready to learn more.

    Each block is followed by copies of itself whose two projections into the residual stream are
    zero: they add nothing yet, and their first gradient step changes that.
    """
    old = list(model.trf_blocks)
    if n_layers == len(old):
        return model
    if n_layers % len(old):
        raise ValueError(
            f"a model of {len(old)} blocks can grow to a multiple of that, not to {n_layers}"
        )
    grown = GPT2(GPT2Config(**{**vars(model.config), "n_layers": n_layers}))
    for name in ("tok_emb", "pos_emb", "final_norm"):
        getattr(grown, name).load_state_dict(getattr(model, name).state_dict())
    if not isinstance(model.out_head, TiedHead):
        grown.out_head = model.out_head
    copies = n_layers // len(old)
    for i, block in enumerate(grown.trf_blocks):
        block.load_state_dict(old[i // copies].state_dict())
        if i % copies:
            for name in ("attn.attn_out", "mlp.mlp_out"):
                for parameter in block.get_submodule(name).parameters():
                    torch.nn.init.zeros_(parameter)
    return grown


def validation_loss(
    model: GPT2, corpus: TokenFile, documents: list[range], batch_size: int, precision: str
) -> float:
    batches = sequential_batches(corpus.tokens, documents, batch_size, model.config.context_length)
    return evaluate_loss(model, batches, precision=precision)


def bytes_per_token(tokenizer: Tokenizer, corpus: TokenFile, documents: list[range]) -> float:
    """Mean length of the predicted tokens; it turns a loss per token into one per byte."""
    targets = [
        int(i) for document in documents for i in corpus.tokens[document.start + 1 : document.stop]
    ]
    return sum(len(tokenizer.token_bytes(i)) for i in targets if i != tokenizer.eos_id) / len(
        targets
    )


def parse_arguments() -> argparse.Namespace:
    parser = training_flags(__doc__, out="runs/pretrain")
    sharding_flag(parser)
    parser.set_defaults(save_every=200)
    parser.add_argument("--data", default=SAMPLE_TEXT, help="a text file or a folder of .txt files")
    parser.add_argument("--init-from", help="start from this model folder, not from random weights")
    parser.add_argument(
        "--fraction", type=float, default=1.0, help="seeded share of the text to use"
    )
    parser.add_argument("--validation-share", type=float, default=0.015, help="share held out")
    parser.add_argument(
        "--validation-tokens", type=positive, default=65536, help="of these, so many scored"
    )
    # the model
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--context-length", type=int, default=512)
    parser.add_argument("--emb-dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12)
    # the training
    parser.add_argument("--steps", type=positive, default=40)
    parser.add_argument("--batch-size", type=positive, default=4, help="windows per micro-batch")
    parser.add_argument("--accumulate", type=positive, default=1, help="micro-batches per step")
    parser.add_argument(
        "--sequence-length", type=positive, help="tokens per window; default: the context"
    )
    parser.add_argument(
        "--lr", type=positive_number, default=0.02, help="Muon, for the matrices of the blocks"
    )
    parser.add_argument(
        "--adamw-lr", type=positive_number, default=0.003, help="AdamW, for all the rest"
    )
    parser.add_argument("--weight-decay", type=not_negative_number, default=0.01)
    parser.add_argument("--warmup-steps", type=not_negative, default=20)
    parser.add_argument(
        "--decay-share", type=share, default=0.3, help="steps in which the rate falls"
    )
    parser.add_argument("--evaluate-every", type=not_negative, default=200)
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
