"""Text <-> token ids: GPT-2's byte-level byte-pair encoding, run by tiktoken on the model's own
files.

A text is split into words, each word into UTF-8 bytes, and neighboring bytes are merged as long as
the vocabulary has the merged piece, the earliest learned first. All 256 bytes are tokens, so any
text can be encoded. Files come in three forms with one meaning: OpenAI's (`encoder.json`,
`vocab.bpe`), Hugging Face's (`vocab.json`, `merges.txt`) and its newer single `tokenizer.json`.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt2mini.files import as_json, local_path, read_json, text_writer, write_together

END_OF_TEXT = "<|endoftext|>"

# How OpenAI's encoder.py splits text into words before merging (its quirks are part of the model).
WORD_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Encodes and decodes. Make one with `Tokenizer.from_pretrained(name_or_folder)`."""

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]]) -> None:
        """vocab: printable form of every token -> id. merges: pairs of printable forms, in the
        order learned.

        Raises ValueError if the two do not belong together.
        """
        self.vocab = vocab
        self.merges = merges
        byte_pieces, specials = mergeable_ranks(vocab, merges)
        if END_OF_TEXT not in specials:
            raise ValueError(f"the vocabulary has no {END_OF_TEXT}: this is not a GPT-2 tokenizer")
        self.eos_id = specials[END_OF_TEXT]
        self.vocab_size = max(vocab.values()) + 1
        self.encoding = tiktoken.Encoding(
            "gpt2mini", pat_str=WORD_PATTERN, mergeable_ranks=byte_pieces, special_tokens=specials
        )

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder, or of a bundled or published model given by its name."""
        from gpt2mini.checkpoints.hub import find_model

        return cls(*read_tokenizer_files(find_model(name_or_folder, weights=False)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write vocab.json, merges.txt and tokenizer_config.json, as `transformers` reads them: all
        of them or none. Other files of a tokenizer that lay in the folder are removed."""
        from gpt2mini.checkpoints.tokenizer_config import complete_tokenizer_config

        folder = local_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        merges = "".join(f"{left} {right}\n" for left, right in self.merges)
        names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        config = {"tokenizer_class": "GPT2Tokenizer", **names}
        write_together(
            {
                folder / "vocab.json": text_writer(as_json(self.vocab)),
                folder / "merges.txt": text_writer("#version: 0.2\n" + merges),
                folder / "tokenizer_config.json": text_writer(as_json(config)),
            }
        )
        for name in ("tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
            (folder / name).unlink(missing_ok=True)  # transformers would prefer them
        complete_tokenizer_config(folder)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of a text. `<|endoftext|>` in it is plain text unless `allow_special`.

        Half of a surrogate pair, which UTF-8 cannot hold, becomes U+FFFD.
        """
        allowed = {END_OF_TEXT} if allow_special else set()
        with refusing_endless_white_space():
            return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """As `encode`, into a uint32 array, without holding Python's lock: threads run in
        parallel."""
        encode = partial(
            self.encoding.encode_to_numpy,
            allowed_special={END_OF_TEXT} if allow_special else set(),
            disallowed_special=(),
        )
        with refusing_endless_white_space():
            try:
                return encode(text)
            except UnicodeEncodeError:  # half a surrogate pair, which `encode` replaces too
                return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text piece by piece as ids arrive. A character split over several tokens waits for its
        last."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token_id in ids:
            if piece := decoder.decode(self.token_bytes(token_id)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; they need not be whole characters."""
        try:
            return self.encoding.decode_single_token_bytes(int(token_id))
        except (KeyError, OverflowError):
            raise ValueError(
                f"token id {token_id} is not in the vocabulary of {self.vocab_size}: "
                "do the tokenizer and the model belong together?"
            ) from None


@contextmanager
def refusing_endless_white_space() -> Iterator[None]:
    """Turn the panic of tiktoken's pattern engine, which keeps 1,000,000 states, into a
    ValueError."""
    try:
        yield
    except BaseException as error:  # a Rust panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            "the text cannot be split into words: it has a run of a million white-space characters"
        ) from None


SPACE = "\u0120"  # its stand-in, with which most words of a vocabulary begin and no special token


def byte_characters() -> dict[str, int]:
    """OpenAI's printable stand-in for each byte (encoder.py, `bytes_to_unicode`): character ->
    byte.

    Bytes that print in Latin-1 stand for themselves; the others take the characters from 256 on.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + i): byte for i, byte in enumerate(others)
    }


def mergeable_ranks(
    vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tuple[dict[bytes, int], dict[str, int]]:
    """Split the vocabulary into byte pieces (bytes -> id, as tiktoken wants them) and special
    tokens.

    tiktoken merges the piece of the lowest id first, so ids must rise in the order of the merges.
    """
    byte_of = byte_characters()
    known = [*byte_of, *(left + right for left, right in merges)]
    if missing := [piece for piece in known if piece not in vocab]:
        raise ValueError(
            f"{len(missing)} bytes or merges have no entry in the vocabulary, "
            f"{missing[0]!r} first: the vocabulary and merges files do not belong together"
        )
    if strange := [piece for piece in known if not byte_of.keys() >= set(piece)]:
        raise ValueError(f"the merged piece {strange[0]!r} has characters that stand for no byte")
    if len(set(vocab.values())) < len(vocab):
        raise ValueError("the vocabulary gives one id to several tokens")
    merge_ids = [vocab[left + right] for left, right in merges]
    if merge_ids != sorted(set(merge_ids)):
        raise ValueError(
            "the ids of the merged pieces do not rise in the order of the merges; GPT-2's do"
        )
    pieces = {bytes(byte_of[character] for character in piece): vocab[piece] for piece in known}
    ordinary = set(known)
    specials = {token: token_id for token, token_id in vocab.items() if token not in ordinary}
    if lost := [token for token in specials if SPACE in token]:
        raise ValueError(
            f"{len(lost)} words of the vocabulary, {lost[0]!r} first, come from no merge: the "
            "merges file is cut off, or not the vocabulary's"
        )
    return pieces, specials


def read_tokenizer_files(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocab, merges) from whichever of the three forms the folder has."""
    for vocab_name, merges_name in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            vocab = read_json(folder / vocab_name)
            try:
                lines = (folder / merges_name).read_text(encoding="utf-8").split("\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{folder / merges_name} is not UTF-8 text: {error}") from None
            pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
            if isinstance(vocab, dict):
                vocab = read_added_tokens(folder) | vocab
            break
    else:
        if not (folder / "tokenizer.json").is_file():
            raise FileNotFoundError(
                f"{folder} has no tokenizer files: expected vocab.json and merges.txt, "
                "or OpenAI's encoder.json and vocab.bpe, or tokenizer.json"
            )
        vocab_name = merges_name = "tokenizer.json"
        contents = read_json(folder / "tokenizer.json")
        vocab, pairs = parse_tokenizer_json(contents)
    wrong = [pair for pair in pairs if len(pair) != 2]
    if (
        wrong
        or not isinstance(vocab, dict)
        or not all(type(i) is int and i >= 0 for i in vocab.values())
    ):
        raise ValueError(
            f"{folder / (merges_name if wrong else vocab_name)} is damaged: expected "
            + (f"two pieces a line, found {wrong[0]}" if wrong else "an object of token -> id")
        )
    return vocab, [(left, right) for left, right in pairs]


def read_added_tokens(folder: Path) -> dict[str, Any]:
    """Tokens that were added to a published vocabulary, such as [PAD], which `transformers` keeps
    in a file apart: token -> id."""
    for name, tokens_of in (("tokenizer.json", added_tokens), ("added_tokens.json", dict)):
        if (folder / name).is_file():
            try:
                return tokens_of(read_json(folder / name))
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / name} holds no list of tokens: {error!r}") from None
    return {}


def parse_tokenizer_json(contents: Any) -> tuple[Any, list[list[str]]]:
    """(vocab, merge pairs) of Hugging Face's tokenizer.json; its special tokens stand in a list
    apart."""
    try:
        vocab = dict(contents["model"]["vocab"])
        vocab |= added_tokens(contents)
        pairs = [
            pair.split(" ") if isinstance(pair, str) else pair
            for pair in contents["model"]["merges"]
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"tokenizer.json is not a byte-pair encoding as GPT-2's: {error!r}"
        ) from None
    return vocab, pairs


def added_tokens(contents: Any) -> dict[str, Any]:
    """The special tokens of Hugging Face's tokenizer.json: token -> id."""
    return {added["content"]: added["id"] for added in contents.get("added_tokens", [])}


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, show_progress: bool = False
) -> Tokenizer:
    """Learn a new vocabulary from texts (the work is done by the `tokenizers` package).

    The ids are laid out as OpenAI's: 256 bytes, then the merges as learned, then <|endoftext|>.
    """
    try:
        import tokenizers
    except ImportError:
        raise ImportError(
            "training a vocabulary needs the tokenizers package: pip install 'gpt2mini[tokenizer]'"
        ) from None
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: 256 bytes and {END_OF_TEXT} are 257"
        )
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = byte_level(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=byte_level.alphabet(),
        show_progress=show_progress,
    )
    learner.train_from_iterator(texts, trainer)
    _, pairs = parse_tokenizer_json(json.loads(learner.to_str()))
    merges = [(left, right) for left, right in pairs]
    pieces = [*byte_characters(), *(left + right for left, right in merges), END_OF_TEXT]
    return Tokenizer({piece: token_id for token_id, piece in enumerate(pieces)}, merges)
