"""Continue a text, token by token as the model draws them.

Examples:
  gpt2mini generate
  gpt2mini generate --prompt "It was a dark night" --temperature 0.7 --num-samples 3
  gpt2mini generate --prompt "The ship" --prompt "The sea" --top-k 0
  gpt2mini generate --prompt ""
  gpt2mini generate --model gpt2 --prompt - < prompt.txt
  gpt2mini generate --interactive
  gpt2mini generate --adapter runs/finetune/best
  gpt2mini generate --model gpt2 --quantize int8
  gpt2mini generate --model gpt2-xl --draft gpt2
  gpt2mini generate --lookup 3
"""

import sys
import time
from dataclasses import dataclass, field
from typing import Literal

import torch
from tyro.conf import UseAppendAction

from gpt2mini import GPT2, Tokenizer
from gpt2mini.cli import models, options
from gpt2mini.device import pick_device
from gpt2mini.generation import Sampling, stream
from gpt2mini.responses import DraftCounts

PROMPT = "The old man looked at"
SHOWN = 500  # characters of a prompt that are printed in a terminal


@dataclass(frozen=True)
class DraftFlags:
    """Speculative decoding: the same text, or distribution of texts, in less time."""

    draft: str | None = None  # a smaller model of the same vocabulary, which guesses tokens
    lookup: options.CountOrZero = 0  # or guess what followed the last tokens before; 0: off
    draft_tokens: options.Count = 4  # tokens that are guessed at once


@dataclass(frozen=True)
class Flags:
    model: str = "gpt2-nano"  # a model's folder or name
    adapter: str | None = None  # folder of an adapter that was trained on --model
    quantize: Literal["int8", "int4", "fp16", "bf16"] | None = None  # in fewer bits: faster
    # text to continue, "The old man looked at" without it; may be given repeatedly; - reads stdin,
    # without its last line break; an empty one begins a text
    prompt: UseAppendAction[tuple[str, ...]] = ()
    allow_special: bool = False  # special tokens in prompts, as <|user|>, are tokens and not text
    interactive: bool = False  # ask for prompts, one after another
    max_new_tokens: options.Count = 120  # length of a continuation, at most
    num_samples: options.Count = 1  # continuations of the prompt
    stop: UseAppendAction[tuple[str, ...]] = ()  # end before this text; may be given repeatedly
    overflow: Literal["error", "slide"] = "error"  # when the text grows past the context
    valid_utf8: bool = False  # only whole characters: for scripts that come out with broken ones
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8, top_k=50))
    drafts: DraftFlags = options.group(DraftFlags, "--draft", "--lookup", but=["draft", "lookup"])
    computing: options.Computing = options.group(options.Computing)

    @property
    def conditions(self) -> set[str]:
        draft, lookup = self.drafts.draft, self.drafts.lookup
        return ({"--draft"} if draft else set()) | ({"--lookup"} if lookup else set())


@dataclass(frozen=True)
class Writer:
    """What continues a text."""

    model: GPT2
    tokenizer: Tokenizer
    draft: GPT2 | None
    flags: Flags
    generator: torch.Generator


def run(flags: Flags) -> None:
    if flags.interactive and (flags.prompt or flags.num_samples > 1):
        raise ValueError(
            "--interactive asks for prompts and continues each once: leave out --prompt and "
            "--num-samples"
        )
    device = pick_device(flags.computing.device)
    model, tokenizer = models.load(flags.model, flags.adapter, device)
    if flags.quantize:
        model.quantize(flags.quantize)
    generator = torch.Generator(device).manual_seed(flags.computing.seed)
    draft = GPT2.from_pretrained(flags.drafts.draft, device=device) if flags.drafts.draft else None
    writer = Writer(model, tokenizer, draft, flags, generator)
    if flags.interactive:
        talk(writer)
        return
    prompts = [read_stdin() if p == "-" else p for p in flags.prompt or (PROMPT,)]
    runs = [(prompt, sample) for prompt in prompts for sample in range(flags.num_samples)]
    for number, (prompt, sample) in enumerate(runs):
        if len(runs) > 1:
            print(heading(number // flags.num_samples, len(prompts), sample, flags.num_samples))
        continue_text(writer, prompt)


def heading(prompt: int, prompts: int, sample: int, samples: int) -> str:
    parts = [("prompt", prompt, prompts), ("sample", sample, samples)]
    return "--- " + ", ".join(f"{kind} {i + 1} of {n}" for kind, i, n in parts if n > 1)


def read_stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")  # which editors and `echo` put at the end
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the prompt on standard input is not {sys.stdin.encoding} text ({error}): save it in "
            "that encoding"
        ) from None


def shortened(prompt: str) -> str:
    """The end of a long prompt in a terminal, where nobody reads the rest again; a file or another
    program gets all of it."""
    if len(prompt) <= SHOWN or not sys.stdout.isatty():
        return prompt
    end = prompt[-SHOWN:]
    return "[...] " + (end.partition(" ")[2] or end)  # from the next word on, if there is one


def talk(writer: Writer) -> None:
    print("Begin a text; the model goes on. An empty line ends.", file=sys.stderr)
    while prompt := read_line():
        try:
            continue_text(writer, prompt)
        except ValueError as error:  # a prompt that is too long, say
            print(f"error: {error}", file=sys.stderr)


def read_line() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def continue_text(writer: Writer, prompt: str) -> None:
    if prompt.endswith(" "):
        print("note: the prompt ends in a space, but GPT-2's words begin with one", file=sys.stderr)
    flags, tokenizer, counts = writer.flags, writer.tokenizer, DraftCounts()
    pieces = stream(
        writer.model,
        tokenizer,
        prompt,
        flags.max_new_tokens,
        stop_strings=flags.stop,
        generator=writer.generator,
        overflow=flags.overflow,
        valid_utf8=flags.valid_utf8,
        allow_special=flags.allow_special,
        draft=writer.draft,
        lookup=flags.drafts.lookup,
        draft_tokens=flags.drafts.draft_tokens,
        counts=counts,
        **vars(flags.sampling),
    )
    began, text, shown = time.perf_counter(), "", shortened(prompt)
    for piece in pieces:
        print(piece if text else shown + piece, end="", flush=True)
        text += piece
    print("" if text else shown)
    tokens, seconds = len(tokenizer.encode(text)), time.perf_counter() - began
    accepted = f", {counts.rate:.0%} of {counts.drafted} guesses accepted" if counts.drafted else ""
    print(f"[{tokens} tokens, {tokens / seconds:.0f} a second{accepted}]", file=sys.stderr)
