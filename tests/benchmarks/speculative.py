"""Speculative decoding: gpt2mini with and without drafts, beside transformers' assisted generation.

    python tests/benchmarks/speculative.py                          # gpt2-nano, greedy
    python tests/benchmarks/speculative.py --temperature 0.8
    python tests/benchmarks/speculative.py --size gpt2-xl --draft-size gpt2 --tokens 24 --repeats 1

All continue the same prompt, a part of the bundled text, in one process with pinned threads; they
take turns, each warms up, and the median of its runs counts. The drafts, always of as many tokens,
are looked up in the text, or made by the model's own first blocks, or by a model of `--draft-size`;
the peer's are looked up, or made by the same blocks. Other sizes than gpt2-nano have random
weights, whose drafts are hardly ever right: their rows show what a wrong draft costs, and `the
model itself` what checking a draft gains that is always right, its own cost included.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from measuring import add_machine_flags, as_transformers, machine, model_of_size, seconds_of

from gpt2mini import GPT2, Tokenizer, generate
from gpt2mini.data.samples import sample
from gpt2mini.surgery import first_blocks

Run = Callable[[], float | None]  # writes the text; the share of the drafts that was accepted


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    model = model_of_size(args.size).to(args.device)
    text = sample("general.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_pretrained("gpt2-nano").encode(text)[: args.prompt_tokens]
    prompt = torch.tensor([ids], device=args.device)
    runs = our_runs(model, prompt, args) | their_runs(model, prompt, args)
    print(f"{args.size}, {args.tokens} tokens, temperature {args.temperature}, {machine(args)}")
    print(f"{'':36}{'tokens/s':>10}{'x plain':>9}{'accepted':>10}")
    speeds = measured(runs, args)
    for name, speed in speeds.items():
        plain = speeds["transformers" if name.startswith("transformers") else "gpt2mini"]
        rate = runs[name]()
        accepted = "" if rate is None else f"{rate:.0%}"
        print(f"{name:36}{speed:>10.1f}{speed / plain:>9.2f}{accepted:>10}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="gpt2-nano", help="gpt2, gpt2-medium, ...")
    parser.add_argument("--draft-size", help="of a second model, for a row of its own")
    parser.add_argument("--tokens", type=int, default=128, help="written in each run")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each")
    add_machine_flags(parser)
    return parser.parse_args()


def measured(runs: dict[str, Run], args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second, the median of runs that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats + 1):
        for name, run in runs.items():
            taken = seconds_of(run, args.device)
            if repeat:  # the first one warms up
                seconds[name].append(taken)
    return {name: args.tokens / statistics.median(taken) for name, taken in seconds.items()}


def our_runs(model: GPT2, prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, Run]:
    def run(**drafting: object) -> Run:
        def write() -> float | None:
            options = {"temperature": args.temperature, "generator": 0, **drafting}
            out = generate(model, prompt, args.tokens, **options)
            return out.drafts.rate if drafting else None

        return write

    drafts = {"draft_tokens": args.draft_tokens}
    runs = {"gpt2mini": run(), "gpt2mini, lookup of 3": run(lookup=3, **drafts)}
    layers = len(model.trf_blocks)
    for n_blocks in block_counts(model):
        name = f"gpt2mini, first {n_blocks} of {layers} blocks"
        runs[name] = run(draft=first_blocks(model, n_blocks), **drafts)
    if args.draft_size:
        runs[f"gpt2mini, {args.draft_size}"] = run(draft=model_of_size(args.draft_size), **drafts)
    if layers > 12:
        return runs
    return runs | {"gpt2mini, the model itself": run(draft=model, **drafts)}


def block_counts(model: GPT2) -> list[int]:
    """How many of the model's first blocks make a draft: a quarter, and half."""
    layers = len(model.trf_blocks)
    return sorted({max(1, layers // 4), max(1, layers // 2)})


def their_runs(model: GPT2, prompt: torch.Tensor, args: argparse.Namespace) -> dict[str, Run]:
    theirs = as_transformers(model, args.device)
    sampling = {"do_sample": args.temperature > 0, "pad_token_id": 0}
    if args.temperature > 0:
        sampling |= {"temperature": args.temperature, "top_k": 0}
    new = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}

    def run(**drafting: object) -> Run:
        def write() -> None:
            theirs.generate(prompt, **new, **sampling, **drafting)

        return write

    lookup = {"prompt_lookup_num_tokens": args.draft_tokens, "max_matching_ngram_size": 3}
    runs = {"transformers": run(), "transformers, prompt lookup": run(**lookup)}
    for n_blocks in block_counts(model):
        assistant = as_transformers(first_blocks(model, n_blocks), args.device)
        settings = assistant.generation_config
        settings.num_assistant_tokens = args.draft_tokens
        settings.num_assistant_tokens_schedule = "constant"
        settings.assistant_confidence_threshold = 0.0  # no draft ends before that many
        name = f"transformers, first {n_blocks} of {len(model.trf_blocks)} blocks"
        runs[name] = run(assistant_model=assistant)
    return runs


if __name__ == "__main__":
    main()
