"""Let a model continue a text, word by word as it thinks of them.

python examples/generate.py
python examples/generate.py --prompt "It was a dark night" --temperature 0.7 --num-samples 3
python examples/generate.py --model gpt2 --prompt - < prompt.txt
python examples/generate.py --interactive
python examples/generate.py --adapter runs/finetune_lora/best
python examples/generate.py --model gpt2 --quantize int8
"""

import argparse
import sys
import time

import torch
from flags import common_flags, positive, run

from gpt2mini import GPT2, Tokenizer
from gpt2mini.device import pick_device
from gpt2mini.generation import stream
from gpt2mini.lora import load_adapter, merge_lora


def main() -> None:
    args = parse_arguments()
    device = pick_device(args.device)
    tokenizer = Tokenizer.from_pretrained(args.model)
    model = GPT2.from_pretrained(args.model, device=device)
    if args.adapter:
        load_adapter(model, args.adapter)
        merge_lora(model)  # as fast as without one, and ready for --quantize
    if args.quantize:
        model.quantize(args.quantize)
    generator = torch.Generator(device).manual_seed(args.seed)
    if args.interactive:
        print("Begin a text; the model goes on. An empty line ends.", file=sys.stderr)
        while prompt := read_line():
            try:
                continue_text(model, tokenizer, prompt, args, generator)
            except ValueError as error:  # a prompt that is too long, say
                print(f"error: {error}", file=sys.stderr)
        return
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {number + 1} of {args.num_samples}")
        continue_text(model, tokenizer, prompt, args, generator)


def continue_text(
    model: GPT2,
    tokenizer: Tokenizer,
    prompt: str,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    pieces = stream(
        model,
        tokenizer,
        prompt,
        args.max_new_tokens,
        stop_strings=args.stop,
        generator=generator,
        overflow=args.overflow,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
        no_repeat_ngram_size=args.no_repeat_ngram_size,
    )
    began, text = time.perf_counter(), ""
    for piece in pieces:
        print(piece if text else prompt + piece, end="", flush=True)
        text += piece
    print("" if text else prompt)
    tokens, seconds = len(tokenizer.encode(text)), time.perf_counter() - began
    print(f"[{tokens} tokens, {tokens / seconds:.0f} a second]", file=sys.stderr)


def read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def parse_arguments() -> argparse.Namespace:
    parser = common_flags(__doc__)
    parser.add_argument("--model", default="gpt2-nano", help="folder or name (default gpt2-nano)")
    parser.add_argument("--adapter", help="folder of an adapter that was trained on --model")
    parser.add_argument(
        "--quantize", choices=["int8", "fp16", "bf16"], help="weights in fewer bits: faster"
    )
    parser.add_argument(
        "--prompt", default="The old man looked at", help="text to continue; - reads stdin"
    )
    parser.add_argument(
        "--interactive", action="store_true", help="ask for prompts, one after another"
    )
    parser.add_argument("--max-new-tokens", type=int, default=120)
    parser.add_argument("--num-samples", type=positive, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, help="choose among so many (default 50)")
    parser.add_argument(
        "--top-p", type=float, help="choose among the likeliest that add up to this"
    )
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--no-repeat-ngram-size", type=int, default=0)
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text (repeatable)"
    )
    parser.add_argument(
        "--overflow", choices=["error", "slide"], default="error", help="past the context"
    )
    return parser.parse_args()


if __name__ == "__main__":
    run(main)
