"""Text <-> token ids: GPT-2's byte-level byte-pair encoding, run by tiktoken on the model's own
files.

A text is split into words, each word into UTF-8 bytes, and neighboring bytes are merged as long as
the vocabulary has the merged piece, the earliest learned first. All 256 bytes are tokens, so any
text can be encoded. Added tokens, such as <|endoftext|> and chat tokens, are found before that.
"""

import codecs
import json
import operator
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from gpt2mini.added_tokens import AddedTokens
from gpt2mini.files import local_path, text_writer, write_together
from gpt2mini.merges import check_merges_agree
from gpt2mini.special_tokens import END_OF_TEXT
from gpt2mini.tokenizer_files import (
    CHAT_TEMPLATES,
    TOKENIZER_FILES,
    TokenizerSettings,
    default_settings,
    read_tokenizer_files,
)

# How OpenAI's encoder.py splits text into words before merging (its quirks are part of the model).
WORD_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


class Tokenizer:
    """Encodes and decodes. Make one with `Tokenizer.from_pretrained(name_or_folder)`.

    `eos_id` ends a text, `bos_id` begins one, `pad_id` fills batches, as the folder's files say
    (None: they name no such token). `vocab` has the ids of all tokens; `vocab_size` is the largest
    of them and 1.
    """

    def __init__(
        self,
        vocab: dict[str, int],
        merges: list[tuple[str, str]],
        settings: TokenizerSettings | None = None,
    ) -> None:
        """vocab: printable form of every token -> id. merges: pairs of printable forms, in the
        order learned. settings: added tokens and so on, by default only <|endoftext|>.

        Raises ValueError if they do not belong together.
        """
        settings = settings or default_settings(vocab, merges)
        self.vocab = vocab | {token.content: token.id for token in settings.added_tokens}
        self.merges = merges
        self.settings = settings
        self.added_tokens = AddedTokens(settings.added_tokens)
        byte_pieces, others = mergeable_ranks(self.vocab, merges)
        if not any(t.content == END_OF_TEXT and t.special for t in settings.added_tokens):
            raise ValueError(f"the vocabulary has no {END_OF_TEXT}: this is not a GPT-2 tokenizer")
        self.bos_id, self.pad_id = self.named_id("bos_token"), self.named_id("pad_token")
        self.eos_id = self.vocab[settings.names.get("eos_token", END_OF_TEXT)]
        self.vocab_size = max(self.vocab.values()) + 1
        self.encoding = tiktoken.Encoding(
            "gpt2mini", pat_str=WORD_PATTERN, mergeable_ranks=byte_pieces, special_tokens=others
        )

    def named_id(self, name: str) -> int | None:
        """The id of the token that the folder's files call "pad_token", say."""
        token = self.settings.names.get(name)
        return None if token is None else self.vocab[token]

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder, or of a bundled or published model given by its name.

        Its ids are those of `transformers`. Raises ValueError for a field of its files that could
        change them and is not obeyed; `tokenizer_fields.py` lists all fields.
        """
        from gpt2mini.checkpoints.hub import find_model

        return cls(*read_tokenizer_files(find_model(name_or_folder, weights=False)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the files that were read, or else vocab.json, merges.txt and
        tokenizer_config.json: all of them or none. Other files of a tokenizer that lay in the
        folder are removed."""
        from gpt2mini.checkpoints.tokenizer_config import complete_tokenizer_config

        folder = local_path(folder)
        files = {folder / name: text for name, text in self.settings.files.items()}
        for parent in {path.parent for path in files}:
            parent.mkdir(parents=True, exist_ok=True)
        write_together({path: text_writer(text) for path, text in files.items()})
        for path in [*(folder / name for name in TOKENIZER_FILES), *folder.glob(CHAT_TEMPLATES)]:
            if path not in files:
                path.unlink(missing_ok=True)
        complete_tokenizer_config(folder)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The token ids of a text; nothing is put before or after it.

        Special tokens in it, such as `<|endoftext|>`, are plain text unless `allow_special`; added
        tokens that are not special are always found. These are the ids of `transformers` with
        `add_special_tokens=False` and `split_special_tokens=not allow_special`. Half of a surrogate
        pair, which UTF-8 cannot hold, becomes U+FFFD. Raises TypeError for anything but one text.
        """
        ids: list[int] = []
        with refusing_endless_white_space():
            for part in self.parts(text, allow_special):
                ids += [part] if isinstance(part, int) else self.encoding.encode_ordinary(part)
        return ids

    def encode_to_numpy(self, text: str, allow_special: bool = False) -> np.ndarray:
        """As `encode`, into a uint32 array, without holding Python's lock: threads run in
        parallel."""
        arrays = [np.empty(0, np.uint32)]
        with refusing_endless_white_space():
            for part in self.parts(text, allow_special):
                if isinstance(part, int):
                    arrays.append(np.array([part], np.uint32))
                else:
                    arrays.append(self.encode_words(part))
        return np.concatenate(arrays)

    def encode_words(self, text: str) -> np.ndarray:
        encode = partial(self.encoding.encode_to_numpy, disallowed_special=())
        try:
            return encode(text)
        except UnicodeEncodeError:  # half a surrogate pair, which `encode` replaces too
            return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))

    def parts(self, text: str, allow_special: bool) -> Iterator[str | int]:
        """The ids of added tokens, and the texts between them, which begin with a space if the
        folder's files say so."""
        check_is_text(text)
        for part in self.added_tokens.split(text, allow_special):
            if self.settings.add_prefix_space and isinstance(part, str):
                part = part if part.startswith(" ") else " " + part
            yield part

    def decode(self, ids: Iterable[int] | int) -> str:
        """The text of the token ids of one text; bytes that are not UTF-8 (half a character) become
        U+FFFD.

        Raises TypeError for ids of several texts (2-D), or numbers that are not whole.
        """
        text = b"".join(map(self.token_bytes, one_text(ids)))
        return text.decode("utf-8", errors="replace")

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
            return self.encoding.decode_single_token_bytes(operator.index(token_id))
        except TypeError:
            raise TypeError(f"token ids are whole numbers, not {token_id!r}") from None
        except (KeyError, OverflowError):
            raise ValueError(
                f"token id {token_id} is not in the vocabulary of {self.vocab_size}: "
                "do the tokenizer and the model belong together?"
            ) from None

    def missing_ids(self, vocab_size: int) -> list[int]:
        """The ids below `vocab_size` for which there is no token: vocabularies of models are often
        padded, as 50257 to 50304."""
        return sorted(set(range(vocab_size)) - set(self.vocab.values()))


def check_is_text(text: Any) -> None:
    if not isinstance(text, str):
        several = ": for several texts, [tokenizer.encode(text) for text in texts]"
        raise TypeError(
            f"encode takes one text, a str, not a {type(text).__name__}"
            + (several if isinstance(text, list | tuple) else "")
        )


def one_text(ids: Any) -> Iterable[Any]:
    """Token ids as a sequence: a tensor's or an array's numbers, one id alone."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    ids = [ids] if isinstance(ids, int) else ids
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise TypeError(f"decode takes token ids, not a {type(ids).__name__}")
    ids = list(ids)
    if any(isinstance(i, Sequence) or np.ndim(i) for i in ids):
        raise TypeError(
            "decode takes the ids of one text, and these are of several (2-D): "
            "[tokenizer.decode(row) for row in ids]"
        )
    return ids


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
    check_merges_agree(merges)
    pieces = {bytes(byte_of[character] for character in piece): vocab[piece] for piece in known}
    ordinary = set(known)
    specials = {token: token_id for token, token_id in vocab.items() if token not in ordinary}
    if lost := [token for token in specials if SPACE in token]:
        raise ValueError(
            f"{len(lost)} words of the vocabulary, {lost[0]!r} first, come from no merge: the "
            "merges file is cut off, or not the vocabulary's"
        )
    return pieces, specials


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
    pairs = json.loads(learner.to_str())["model"]["merges"]
    merges = [
        (left, right) for left, right in (p.split(" ") if isinstance(p, str) else p for p in pairs)
    ]
    pieces = [*byte_characters(), *(left + right for left, right in merges), END_OF_TEXT]
    return Tokenizer({piece: token_id for token_id, piece in enumerate(pieces)}, merges)
