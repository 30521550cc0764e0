"""Tokenizing a large corpus beside one-process tiktoken: speed and memory, and training on it.

    python tests/benchmarks/tokenizing.py --data english/ chinese/                # 200 MB
    python tests/benchmarks/tokenizing.py --data books/ --megabytes 40 --tokenizer models/gpt2

The corpus is made of the .txt files in the folders of --data: cut into documents of some thousand
characters, which are shuffled and repeated until there are --megabytes of them, in files of 10 MB.
Both write token ids to disk, 16 bits each if the vocabulary allows; tiktoken as most people run it,
file by file and document by document in one process. Each has a process of its own; time and memory
begin when the tokenizer has been loaded. A third process prepares the corpus for gpt2-nano and
trains it for three steps: its memory is what it needs beyond the model, gradients included.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from measuring import measure_in_own_process, start_measuring_memory

from gpt2mini import GPT2, Tokenizer
from gpt2mini.data.corpus import hold_out, text_files, tokenize_files
from gpt2mini.data.text import TokenBatches
from gpt2mini.tokenizer import END_OF_TEXT

FILE_BYTES = 10_000_000


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    if args.worker:
        workers = {"tiktoken": theirs, "gpt2mini": ours, "training": train_nano}
        print(json.dumps(workers[args.worker](args)))
    else:
        compare(sys.argv[1:])


def compare(arguments: Sequence[str]) -> dict[str, dict[str, float]]:
    """Make the corpus; measure and print. {worker: figures}"""
    args = parse_arguments(arguments)
    results = {}
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        n_bytes, n_documents = write_corpus(args, Path(folder))
        print(
            f"{n_bytes / 1e6:.0f} MB in {n_documents:,} documents, vocabulary of {args.tokenizer}, "
            f"{core_count()} cores"
        )
        print(f"{'':16}{'MB/s':>8}{'million tokens':>16}{'peak GB':>10}", flush=True)
        for worker in ("tiktoken", "gpt2mini", "training"):
            if worker == "training" and args.no_training:
                continue
            found = measure_in_own_process(__file__, [*arguments, "--corpus", folder], worker)
            results[worker] = {**found, "speed": n_bytes / 1e6 / found["seconds"]}
            print(
                f"{worker:16}{results[worker]['speed']:8.1f}{found['tokens'] / 1e6:16.1f}"
                f"{found['peak'] / 1e9:10.2f}",
                flush=True,
            )
    ratio = results["gpt2mini"]["speed"] / results["tiktoken"]["speed"]
    print(f"gpt2mini / one-process tiktoken: speed {ratio:.2f} x on {core_count()} cores")
    return results


def core_count() -> int:
    return os.cpu_count() or 1


# ---- the corpus


def write_corpus(args: argparse.Namespace, folder: Path) -> tuple[int, int]:
    """(bytes, documents) written, in files of FILE_BYTES."""
    written, count, part = 0, 0, bytearray()
    for document in shuffled_documents(args):
        part += (document + END_OF_TEXT).encode()
        count += 1
        full = written + len(part) >= args.megabytes * 1_000_000
        if full or len(part) >= FILE_BYTES:
            (folder / f"{written:012}.txt").write_bytes(part)
            written, part = written + len(part), bytearray()
        if full:
            break
    return written, count


def shuffled_documents(args: argparse.Namespace) -> Iterator[str]:
    """Without end, in a new order each time round."""
    size = args.document_characters
    documents = []
    for path in [file for folder in args.data for file in text_files(folder)]:
        text = path.read_text(encoding="utf-8")
        documents += [text[start : start + size] for start in range(0, len(text), size)]
    generator = random.Random(0)
    while True:
        generator.shuffle(documents)
        yield from documents


# ---- the workers


def theirs(args: argparse.Namespace) -> dict[str, float]:
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    encoding, eos_id = tokenizer.encoding, tokenizer.eos_id
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    peak = start_measuring_memory()
    began = time.perf_counter()
    total = 0
    with (args.corpus / "tokens.bin").open("wb") as output:
        for path in text_files(args.corpus):
            ids: list[int] = []
            for document in path.read_text(encoding="utf-8").split(END_OF_TEXT):
                if document:
                    ids += [*encoding.encode_ordinary(document), eos_id]
            np.array(ids, dtype).tofile(output)
            total += len(ids)
    return {"seconds": time.perf_counter() - began, "tokens": total, "peak": peak()}


def ours(args: argparse.Namespace) -> dict[str, float]:
    tokenizer = Tokenizer.from_pretrained(args.tokenizer)
    files = text_files(args.corpus)
    peak = start_measuring_memory()
    began = time.perf_counter()
    found = tokenize_files(files, tokenizer, args.corpus / "tokens", progress=False)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "tokens": len(found.tokens), "peak": peak()}


def train_nano(args: argparse.Namespace) -> dict[str, float]:
    from gpt2mini.training import Settings, adamw, train

    model, tokenizer = GPT2.from_pretrained("gpt2-nano"), Tokenizer.from_pretrained("gpt2-nano")
    peak = start_measuring_memory()
    began = time.perf_counter()
    corpus = tokenize_files(text_files(args.corpus), tokenizer, args.corpus / "nano", False)
    seconds = time.perf_counter() - began
    training, _ = hold_out(corpus.documents(), share=0.05, seed=0)
    batches = TokenBatches(corpus.tokens, training, 4, model.config.context_length, seed=0)
    settings = Settings(steps=3, schedule=lambda step: 1.0, progress=False)
    train(model, batches, [adamw(model, lr=1e-4)], settings)
    return {"seconds": seconds, "tokens": len(corpus.tokens), "peak": peak()}


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, nargs="+", required=True, help="folders of .txt files, or such files"
    )
    parser.add_argument("--megabytes", type=float, default=200, help="default 200")
    parser.add_argument("--document-characters", type=int, default=4000, help="default 4000")
    parser.add_argument(
        "--tokenizer", default="gpt2-nano", help="name or folder (default: gpt2-nano)"
    )
    parser.add_argument("--no-training", action="store_true", help="leave out the third process")
    parser.add_argument("--scratch", help="where to make the temporary folder")
    parser.add_argument("--corpus", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
