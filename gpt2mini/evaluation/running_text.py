"""Perplexity tasks on a long text: WikiText, enwik8, text8, or a file of your own."""

import codecs
import math
from pathlib import Path

from gpt2mini.data.decoding import read_text
from gpt2mini.data.rows import is_file_of_records
from gpt2mini.evaluation.detokenizers import count_wikitext_tokens, detokenize_wikitext
from gpt2mini.evaluation.perplexity import Perplexity, exponential, perplexity
from gpt2mini.evaluation.table import PAPER, Options, Row
from gpt2mini.evaluation.windows import check_window
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer


def wikitext(
    model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str
) -> list[Row]:
    """Perplexity per original token: the nats of the de-tokenized text, divided by the number of
    tokens in the file, not of GPT-2's (Radford et al. 2019, section 3.1)."""
    text = beginning(read_plain(path), options.limit)
    found = measure(model, tokenizer, detokenize_wikitext(text), path, options)
    tokens = count_wikitext_tokens(text)
    value = exponential(found.nats / tokens)
    setting = f"{describe_window(model, options)}, de-tokenized, per original token"
    return [Row(task, "perplexity", value, tokens, "tokens", setting, PAPER[task])]


def wikitext_raw(
    model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str
) -> list[Row]:
    """Perplexity per token of GPT-2 as in the documentation of transformers, "Perplexity of
    fixed-length models": the raw file, its lines joined by blank ones, and no <|endoftext|> before
    the first token."""
    text = joined_lines(beginning(read_plain(path), options.limit))
    found = measure(model, tokenizer, text, path, options, score_first=False)
    setting = f"{describe_window(model, options)}, raw, per token of GPT-2"
    return [Row(task, "perplexity", found.per_token, found.tokens, "tokens", setting)]


def joined_lines(text: str) -> str:
    """What that page joins by two line ends: the rows of the data set `wikitext`, each a line with
    its end, or nothing for a blank one."""
    lines = text.removesuffix("\n").split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines)


def bits(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options, task: str) -> list[Row]:
    """Bits per byte (enwik8) or per character (text8) of the file as it is. The paper does not say
    which part it used; the usual test set is the last 5 MB."""
    text = beginning(read_bytes(path), options.limit)
    found = measure(model, tokenizer, text, path, options)
    setting = f"{describe_window(model, options)}, the file as it is"
    if task == "enwik8":
        value, count, unit = found.bits_per_byte, found.bytes, "byte"
    else:
        value, count, unit = found.nats / math.log(2) / len(text), len(text), "character"
    return [Row(task, f"bits per {unit}", value, count, f"{unit}s", setting, PAPER[task])]


def any_text(model: GPT2, tokenizer: Tokenizer, path: Path, options: Options) -> list[Row]:
    """Perplexity per token and word, bits per byte and character, of a file of your own."""
    text = beginning(read_plain(path), options.limit)
    found = measure(model, tokenizer, text, path, options)
    setting = describe_window(model, options)
    per_character = found.nats / math.log(2) / len(text)
    return [
        Row(path.name, metric, value, count, counted, setting)
        for metric, value, count, counted in (
            ("perplexity per token", found.per_token, found.tokens, "tokens"),
            ("perplexity per word", found.per_word, found.words, "words"),
            ("bits per byte", found.bits_per_byte, found.bytes, "bytes"),
            ("bits per character", per_character, len(text), "characters"),
        )
    ]


def measure(
    model: GPT2,
    tokenizer: Tokenizer,
    text: str,
    path: Path,
    options: Options,
    score_first: bool = True,
) -> Perplexity:
    check_text(text, path)
    return perplexity(
        model,
        tokenizer,
        text,
        options.context_length,
        options.stride,
        options.batch_size,
        score_first,
        precision=options.precision,
        progress=options.progress,
    )


def check_text_file(path: Path) -> None:
    """Raise FileNotFoundError or ValueError for a file of your own that cannot be measured: before
    long work, not after."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to measure")
    check_text(read_plain(path), path)


def check_text(text: str, path: Path) -> None:
    if not text.strip():
        raise ValueError(f"there is no text in {path}")


def describe_window(model: GPT2, options: Options) -> str:
    length = check_window(model, options.context_length, options.stride)
    windows = "rolling windows" if options.stride is None else f"stride {options.stride}"
    return f"context {length}, {windows}"


def read_plain(path: Path) -> str:
    """The characters of a text in any encoding and with any line ends that training reads."""
    if is_file_of_records(path):
        raise ValueError(f"{path} holds records: write the texts to measure to a .txt file")
    return read_text(path)


def read_bytes(path: Path) -> str:
    """The UTF-8 text of a file as it is, whose bytes are counted. An incomplete character at the
    end, as in files cut after a number of bytes, is dropped."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(path.read_bytes())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None


def beginning(text: str, limit: int | None) -> str:
    """The first `limit` thousand characters, up to the end of a line."""
    if limit is None or len(text) <= 1000 * limit:
        return text
    end = text.find("\n", 1000 * limit, 1000 * limit + 10_000) + 1
    return text[: end or 1000 * limit]
