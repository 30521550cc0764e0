"""The tokenizer: the ids of `transformers`, nothing lost on the way back, damaged files refused."""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from conftest import shared_data
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from gpt2mini import Tokenizer
from gpt2mini.tokenizer import END_OF_TEXT, byte_characters, train_tokenizer

REPLACEMENT = "\ufffd"  # what Unicode puts for bytes that are not UTF-8
BYTES = 256  # of each there is a token
FAMILY = "👨\u200d👩\u200d👧\u200d👦"  # one emoji out of four, held together by zero-width joiners
WAVE = "👋🏽"  # an emoji and its skin tone

# Where byte-level BPE goes wrong if it goes wrong: at the borders of its word pattern.
FRAGMENTS = [
    *("'s", "'S", "'t", "'ll", "'LL", "'ve", "'re", "'d", "’s", "''", "'"),
    *(" ", "  ", "     ", "\t", "\n", "\n\n", "\r\n", "\r", "\v", "\f"),
    *("\u00a0", "\u3000", "\u2028", "\u0085", "\u200b", "\ufeff", "\u180e"),
    *("\x00", "\x1c", "\x1f", "\x7f", "\x9f", "\u202e"),
    *("0", "42", "٤٢", "४२", "④", "½", "Ⅻ", "９"),
    *("a", "Hello", "naïve", "e\u0301", "ﬁ", "ß", "İ", "x" * 40, "!" * 40, "-" * 13),
    *("中文", "こんにちは", "한국어", "العربية", "हिन्दी", "ไทย", "עִבְרִית"),
    *(FAMILY, WAVE, "🇩🇪", "\U0010ffff", "<|endoftext|", "<|", "|>"),
]

HARD_TEXT = f"""It's HE'S; they'll, THEY'LL, we've I'd you're can't don’t 'tis o'clock rock'n'roll
第一回　甄士隱夢幻識通靈　賈雨村風塵懷閨秀。她說：「你好，world！」共１２３頁。
السَّلَامُ عَلَيْكُمْ، كيف حالك؟ ٠١٢٣٤٥ क्षत्रिय नमस्ते दुनिया १२३। 안녕하세요 세계, ㄱㄴㄷ. ภาษาไทย
{FAMILY} {WAVE}🏳\ufe0f\u200d🌈 🇩🇪🇫🇷 Zu\u0308rich = Zürich, e\u0301\u0302\u0323 Z̸̢̛a̷l̶g̴o̵ ﷽ ½ Ⅻ ④ x²
\tt\t\t \tu  two   three    spaces \r\nCRLF\r\n\r\n\n\n  \n \u00a0NBSP\u00a0\u00a0wide\u3000\u3000 x
\x00\x01\x1b[0m\x1c\x1f\x7f\x85\u2028\u2029\u200b\ufeffno \uffff \U0010ffff  trailing   """
HARD_TEXT += "a" * 300 + "!" * 300 + "7" * 300 + " " * 300 + "中" * 300 + "\n" * 300 + "aA1!" * 80

ENGLISH = """Call me Ishmael. Some years ago - never mind how long precisely - having little or no
money in my purse, and nothing particular to interest me on shore, I thought I would sail about a
little and see the watery part of the world. It is a way I have of driving off the spleen."""

no_surrogates = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
hard_texts = st.lists(st.sampled_from(FRAGMENTS) | no_surrogates, max_size=12).map("".join)


@pytest.fixture(scope="module")
def genuine_folder() -> Path:
    """OpenAI's own encoder.json and vocab.bpe."""
    return shared_data("gpt2-bpe")


@pytest.fixture(scope="module")
def genuine_as_theirs(genuine_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two files under the names that Hugging Face gives them."""
    folder = tmp_path_factory.mktemp("theirs")
    shutil.copy(genuine_folder / "encoder.json", folder / "vocab.json")
    shutil.copy(genuine_folder / "vocab.bpe", folder / "merges.txt")
    return folder


@pytest.fixture(scope="module")
def genuine(genuine_folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(genuine_folder)


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A small vocabulary learned from the hard text and some English."""
    return train_tokenizer([HARD_TEXT, ENGLISH, *FRAGMENTS] * 2, vocab_size=800)


@pytest.fixture(scope="module")
def trained_folder(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    trained.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["genuine", "trained"])
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, GPT2Tokenizer]:
    """(ours, that of `transformers`) on the same vocabulary."""
    if request.param == "trained":
        folder = request.getfixturevalue("trained_folder")
        return request.getfixturevalue("trained"), GPT2Tokenizer.from_pretrained(folder)
    theirs = GPT2Tokenizer.from_pretrained(request.getfixturevalue("genuine_as_theirs"))
    return request.getfixturevalue("genuine"), theirs


def copy_of(folder: Path, tmp_path: Path, **changed: Any) -> Path:
    """The tokenizer folder copied, with some of its files' contents changed (stem -> contents)."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for stem, contents in changed.items():
        (path,) = tmp_path.glob(f"{stem}.*")
        if not isinstance(contents, bytes):
            contents = (contents if isinstance(contents, str) else json.dumps(contents)).encode()
        path.write_bytes(contents)
    return tmp_path


# Encoding


def test_ids_equal_those_of_transformers_on_a_hard_text(
    pair: tuple[Tokenizer, GPT2Tokenizer],
) -> None:
    ours, theirs = pair
    assert ours.encode(HARD_TEXT) == theirs.encode(HARD_TEXT)


@settings(max_examples=150)
@given(text=hard_texts)
def test_ids_equal_those_of_transformers_on_any_text(
    pair: tuple[Tokenizer, GPT2Tokenizer], text: str
) -> None:
    ours, theirs = pair
    assert ours.encode(text) == theirs.encode(text)


@settings(max_examples=150)
@given(text=hard_texts)
def test_decoding_gives_back_the_encoded_text(
    pair: tuple[Tokenizer, GPT2Tokenizer], text: str
) -> None:
    ours, _ = pair
    assert ours.decode(ours.encode(text)) == text


@given(text=hard_texts)
def test_ids_in_an_array_are_those_in_the_list(trained: Tokenizer, text: str) -> None:
    array = trained.encode_to_numpy(text)
    assert array.dtype == np.uint32
    assert array.tolist() == trained.encode(text)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc00\ud800"], ids=ascii)
@pytest.mark.parametrize("allow_special", [False, True])
def test_lone_surrogates_become_replacement_characters(
    trained: Tokenizer, text: str, allow_special: bool
) -> None:
    expected = "".join(REPLACEMENT if "\ud800" <= c <= "\udfff" else c for c in text)
    assert trained.decode(trained.encode(text, allow_special=allow_special)) == expected


def test_lone_surrogates_become_replacement_characters_in_an_array_too(trained: Tokenizer) -> None:
    assert trained.encode_to_numpy("a\ud800b").tolist() == trained.encode("a\ud800b")


@given(before=hard_texts, after=hard_texts)
def test_end_of_text_in_a_text_is_plain_text(trained: Tokenizer, before: str, after: str) -> None:
    ids = trained.encode(before + END_OF_TEXT + after)
    assert trained.eos_id not in ids
    assert trained.decode(ids) == before + END_OF_TEXT + after


@given(before=hard_texts, after=hard_texts)
def test_end_of_text_is_one_token_if_allowed(trained: Tokenizer, before: str, after: str) -> None:
    ids = trained.encode(before + END_OF_TEXT + after, allow_special=True)
    assert ids == [*trained.encode(before), trained.eos_id, *trained.encode(after)]


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "中" * 100_000,
        " " * 100_000,
        " " * 100_000 + "x",
        "!" * 200_000,
        "7" * 200_000,
    ],
    ids=["a", "Chinese", "spaces", "spaces and a letter", "punctuation", "digits"],
)
def test_a_very_long_run_survives_the_round_trip(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text)) == text


def test_a_million_spaces_are_encoded_or_refused(trained: Tokenizer) -> None:
    text = " " * 1_000_001 + "x"  # the word pattern's engine (fancy-regex) keeps 1,000,000 states
    try:
        ids = trained.encode(text)
    except ValueError:
        return  # anything else, such as the panic of a Rust library, is a crash
    assert trained.decode(ids) == text


# Decoding


@given(data=st.data())
def test_streamed_pieces_join_to_the_decoded_text(trained: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, trained.vocab_size - 1)))
    assert "".join(trained.decode_stream(ids)) == trained.decode(ids)


@given(text=hard_texts.filter(lambda text: REPLACEMENT not in text))
def test_streaming_shows_no_half_characters(trained: Tokenizer, text: str) -> None:
    assert all(REPLACEMENT not in piece for piece in trained.decode_stream(trained.encode(text)))


@given(text=hard_texts)
def test_streaming_shows_all_whole_characters_at_once(trained: Tokenizer, text: str) -> None:
    ids, shown, taken = trained.encode(text), "", 0

    def arriving() -> Iterator[int]:
        nonlocal taken
        for token_id in ids:
            # The decoder asks for a token: all whole characters of those before must be out.
            whole = b"".join(map(trained.token_bytes, ids[:taken])).decode(errors="ignore")
            assert shown == whole
            taken += 1
            yield token_id

    for piece in trained.decode_stream(arriving()):
        shown += piece
    assert shown == text


@pytest.mark.parametrize("decode", ["decode", "decode_stream"])
def test_half_a_character_at_the_end_becomes_a_replacement_character(
    trained: Tokenizer, decode: str
) -> None:
    ids = [*trained.encode("ok "), *trained.encode("\U0001f9ff")[:-1]]  # the emoji is not learned
    assert "".join(getattr(trained, decode)(ids)) == "ok " + REPLACEMENT


@pytest.mark.parametrize("wrong", [-1, 800, 2**32, 2**64, -(2**64)])
@pytest.mark.parametrize("decode", ["decode", "decode_stream"])
def test_an_id_outside_the_vocabulary_is_refused(
    trained: Tokenizer, wrong: int, decode: str
) -> None:
    assert trained.vocab_size == 800
    with pytest.raises(ValueError, match=f"{wrong} is not in the vocabulary of 800"):
        list(getattr(trained, decode)([0, wrong]))


def test_an_id_in_a_gap_of_the_vocabulary_is_refused(trained: Tokenizer) -> None:
    gap = trained.vocab[END_OF_TEXT]
    moved = Tokenizer({**trained.vocab, END_OF_TEXT: gap + 1}, trained.merges)
    assert moved.eos_id == gap + 1
    with pytest.raises(ValueError, match=f"{gap} is not in the vocabulary"):
        moved.decode([gap])


# Files


@pytest.mark.parametrize("kind", [AutoTokenizer, GPT2Tokenizer])
def test_a_saved_folder_opens_in_transformers_with_the_same_ids(
    trained: Tokenizer, trained_folder: Path, kind: Any
) -> None:
    theirs = kind.from_pretrained(trained_folder)
    assert theirs.encode(HARD_TEXT) == trained.encode(HARD_TEXT)
    assert theirs.eos_token_id == trained.eos_id


def test_a_saved_folder_loads_equal(trained: Tokenizer, trained_folder: Path) -> None:
    loaded = Tokenizer.from_pretrained(trained_folder)
    assert (loaded.vocab, loaded.merges) == (trained.vocab, trained.merges)
    assert (loaded.eos_id, loaded.vocab_size) == (trained.eos_id, trained.vocab_size)


def test_loading_and_encoding_open_no_socket(
    trained_folder: Path, socket_attempts: list[str]
) -> None:
    Tokenizer.from_pretrained(trained_folder).encode(HARD_TEXT)
    assert not socket_attempts


def test_openai_and_hugging_face_names_of_the_files_load_equal(
    trained: Tokenizer, trained_folder: Path, tmp_path: Path
) -> None:
    shutil.copy(trained_folder / "vocab.json", tmp_path / "encoder.json")
    shutil.copy(trained_folder / "merges.txt", tmp_path / "vocab.bpe")
    loaded = Tokenizer.from_pretrained(tmp_path)
    assert (loaded.vocab, loaded.merges) == (trained.vocab, trained.merges)


def test_the_genuine_vocabulary_has_the_published_size(genuine: Tokenizer) -> None:
    # Radford et al. 2019, section 2.2: a vocabulary of 50,257; <|endoftext|> is its last entry.
    assert (genuine.vocab_size, genuine.eos_id) == (50_257, 50_256)


@pytest.fixture
def single_file_folder(trained_folder: Path, tmp_path: Path) -> Path:
    """Only a tokenizer.json, as `transformers` writes it."""
    GPT2Tokenizer.from_pretrained(trained_folder).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "tokenizer.json":
            path.unlink()
    return tmp_path


def test_a_folder_with_only_tokenizer_json_loads_equal(
    trained: Tokenizer, single_file_folder: Path
) -> None:
    loaded = Tokenizer.from_pretrained(single_file_folder)
    assert (loaded.vocab, loaded.merges) == (trained.vocab, trained.merges)


def test_a_tokenizer_json_with_merges_as_strings_loads_equal(
    trained: Tokenizer, single_file_folder: Path
) -> None:
    path = single_file_folder / "tokenizer.json"  # merges were strings before tokenizers 0.20
    contents = json.loads(path.read_text("utf-8"))
    contents["model"]["merges"] = [f"{left} {right}" for left, right in trained.merges]
    path.write_text(json.dumps(contents), "utf-8")
    assert Tokenizer.from_pretrained(single_file_folder).merges == trained.merges


def bytes_alone() -> Tokenizer:
    pieces = [*byte_characters(), "<|endoftext|>"]
    return Tokenizer({piece: i for i, piece in enumerate(pieces)}, [])


@pytest.mark.parametrize("kept_in", ["tokenizer.json", "added_tokens.json"])
def test_added_tokens_of_a_published_folder_are_there(
    trained: Tokenizer, trained_folder: Path, tmp_path: Path, kept_in: str
) -> None:
    folder = copy_of(trained_folder, tmp_path)
    theirs = GPT2Tokenizer.from_pretrained(trained_folder)
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "theirs")
    if kept_in == "tokenizer.json":
        shutil.copyfile(tmp_path / "theirs" / kept_in, folder / kept_in)
    else:
        (folder / kept_in).write_text(json.dumps({"[PAD]": len(theirs) - 1}), "utf-8")
    loaded = Tokenizer.from_pretrained(folder)
    assert loaded.vocab_size == len(theirs) == trained.vocab_size + 1
    assert loaded.decode([len(theirs) - 1]) == "[PAD]"
    assert loaded.encode("a b") == trained.encode("a b")


@pytest.mark.parametrize(
    ("kept_in", "message"),
    [("tokenizer.json", "is damaged: expected an object"), ("added_tokens.json", "no list of")],
)
def test_a_damaged_list_of_added_tokens_is_named(
    trained_folder: Path, tmp_path: Path, kept_in: str, message: str
) -> None:
    folder = copy_of(trained_folder, tmp_path)
    (folder / kept_in).write_text("[1, 2]", "utf-8")
    with pytest.raises(ValueError, match=f"{kept_in} .*{message}"):
        Tokenizer.from_pretrained(folder)


def test_what_another_tokenizer_left_in_the_folder_goes(
    trained: Tokenizer, trained_folder: Path, tmp_path: Path
) -> None:
    GPT2Tokenizer.from_pretrained(trained_folder).save_pretrained(tmp_path)
    smaller = bytes_alone()
    smaller.save_pretrained(tmp_path)
    assert GPT2Tokenizer.from_pretrained(tmp_path)("the")["input_ids"] == smaller.encode("the")


def test_a_full_disk_leaves_the_tokenizer_that_was_there(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        if "merges" in path.name:
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    write = Path.write_text
    monkeypatch.setattr(Path, "write_text", full)
    smaller = bytes_alone()
    with pytest.raises(OSError, match="No space left"):
        smaller.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_windows_line_ends_in_the_merges_do_no_harm(
    trained: Tokenizer, trained_folder: Path, tmp_path: Path
) -> None:
    merges = (trained_folder / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    folder = copy_of(trained_folder, tmp_path, merges=merges)
    assert Tokenizer.from_pretrained(folder).merges == trained.merges


# Damaged files


def test_a_folder_without_tokenizer_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected vocab\.json and merges\.txt"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "contents", ["", '{"a": 0, ', b"\xff\xfe", [1, 2], {"a": "0"}, {"a": -1}, {"a": None}], ids=repr
)
def test_a_damaged_vocabulary_is_refused_by_name(
    trained_folder: Path, tmp_path: Path, contents: Any
) -> None:
    folder = copy_of(trained_folder, tmp_path, vocab=contents)
    with pytest.raises(ValueError, match=r"vocab\.json"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("contents", ["a b\na b c\n", "ab\n", b"\xff\xfe"], ids=repr)
def test_damaged_merges_are_refused_by_name(
    trained_folder: Path, tmp_path: Path, contents: Any
) -> None:
    folder = copy_of(trained_folder, tmp_path, merges=contents)
    with pytest.raises(ValueError, match=r"merges\.txt"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "contents",
    ["{", [], {"model": {"type": "Unigram", "vocab": [["a", 0.5]]}}, {"model": {"vocab": {}}}],
    ids=repr,
)
def test_a_foreign_tokenizer_json_is_refused(tmp_path: Path, contents: Any) -> None:
    text = contents if isinstance(contents, str) else json.dumps(contents)
    (tmp_path / "tokenizer.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)


def test_merges_of_another_vocabulary_are_refused(
    trained: Tokenizer, trained_folder: Path, tmp_path: Path
) -> None:
    other = train_tokenizer(["completely different words"] * 2, vocab_size=280)
    merges = "".join(f"{left} {right}\n" for left, right in other.merges)
    folder = copy_of(trained_folder, tmp_path, merges=merges)
    with pytest.raises(ValueError, match="do not belong together"):
        Tokenizer.from_pretrained(folder)


def test_merges_in_another_order_are_refused(trained: Tokenizer) -> None:
    with pytest.raises(ValueError, match="do not rise in the order of the merges"):
        Tokenizer(trained.vocab, trained.merges[::-1])


def merges_of(choices: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """Each number chooses a piece made before: any merges, of a text or of none."""
    pieces, merges = list("abc"), []
    for left, right in choices:
        pair = pieces[left % len(pieces)], pieces[right % len(pieces)]
        if "".join(pair) not in pieces:
            merges.append(pair)
            pieces.append("".join(pair))
    return merges


def vocabulary_of(merges: list[tuple[str, str]]) -> dict[str, int]:
    pieces = [*byte_characters(), *map("".join, merges), END_OF_TEXT]
    return {piece: token_id for token_id, piece in enumerate(pieces)}


a_piece = st.integers(0, 10**6)


@settings(max_examples=300, deadline=None)
@given(
    choices=st.lists(st.tuples(a_piece, a_piece), min_size=1, max_size=12),
    words=st.lists(st.text("abc", min_size=1, max_size=12), min_size=20, max_size=20),
)
def test_merges_that_tiktoken_would_read_otherwise_are_refused(
    choices: list[tuple[int, int]], words: list[str]
) -> None:
    """And no others: what is accepted has the ids of `tokenizers`, which joins listed pairs."""
    merges = merges_of(choices)
    vocab = vocabulary_of(merges)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    texts = [*words, *map("".join, merges)]
    expected = [theirs.encode(text).tokens for text in texts]
    try:
        ours = Tokenizer(vocab, merges)
    except ValueError as error:
        made = zip(merges, expected[len(words) :], strict=True)
        left, right = next(pair for pair, tokens in made if len(tokens) > 1)
        assert f"the merge of {left!r} with {right!r} never takes effect" in str(error)
    else:
        assert [[ours.decode([i]) for i in ours.encode(text)] for text in texts] == expected


def test_a_vocabulary_with_merges_of_another_text_appended_is_refused(trained: Tokenizer) -> None:
    other = train_tokenizer(["the merging of strange pieces then ended"] * 9, vocab_size=300)
    merges = [*trained.merges]
    for pair in other.merges:
        if "".join(pair) not in trained.vocab:
            merges.append(pair)
    with pytest.raises(ValueError, match=r"never takes effect: .*learn the vocabulary"):
        Tokenizer(vocabulary_of(merges), merges)


def test_a_vocabulary_without_end_of_text_is_refused(trained: Tokenizer) -> None:
    vocab = {token: i for token, i in trained.vocab.items() if token != END_OF_TEXT}
    with pytest.raises(ValueError, match=r"no <\|endoftext\|>"):
        Tokenizer(vocab, trained.merges)


def test_a_vocabulary_that_gives_an_id_twice_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(ValueError):
        Tokenizer({**trained.vocab, "!": trained.vocab['"']}, trained.merges)


def test_a_special_token_with_the_id_of_another_token_is_refused(trained: Tokenizer) -> None:
    with pytest.raises(ValueError):
        Tokenizer({**trained.vocab, END_OF_TEXT: 0}, trained.merges)


def test_merges_of_pieces_that_stand_for_no_bytes_are_refused(trained: Tokenizer) -> None:
    vocab = {**trained.vocab, "中文": trained.vocab_size}  # bytes print as Latin letters
    with pytest.raises(ValueError):
        Tokenizer(vocab, [*trained.merges, ("中", "文")])


# Training


def test_trained_ids_are_laid_out_as_openai_s(trained: Tokenizer) -> None:
    merged = [left + right for left, right in trained.merges]
    assert list(trained.vocab.values()) == list(range(800))
    assert list(trained.vocab)[BYTES:] == [*merged, END_OF_TEXT]
    singles = [trained.token_bytes(i) for i in range(BYTES)]
    assert set(singles) == {bytes([byte]) for byte in range(BYTES)}


def test_training_twice_learns_the_same(trained: Tokenizer) -> None:
    again = train_tokenizer(iter([HARD_TEXT, ENGLISH, *FRAGMENTS] * 2), vocab_size=800)
    assert again.merges == trained.merges


def test_the_smallest_vocabulary_encodes_bytes() -> None:
    tokenizer = train_tokenizer([ENGLISH], vocab_size=BYTES + 1)
    assert len(tokenizer.encode(HARD_TEXT)) == len(HARD_TEXT.encode())


def test_a_text_that_is_too_small_for_the_vocabulary_gives_a_smaller_one() -> None:
    tokenizer = train_tokenizer(["ab ab"], vocab_size=BYTES + 100)
    assert BYTES + 1 < tokenizer.vocab_size < BYTES + 100


@pytest.mark.parametrize("vocab_size", [BYTES, 0, -1])
def test_a_vocabulary_without_room_for_all_bytes_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size {vocab_size} is too small"):
        train_tokenizer([ENGLISH], vocab_size=vocab_size)


def test_training_without_the_tokenizers_package_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # makes `import tokenizers` fail
    with pytest.raises(ImportError, match=r"pip install 'gpt2mini\[tokenizer\]'"):
        train_tokenizer([ENGLISH], vocab_size=300)


@pytest.mark.parametrize("lines", [1000, 1, 0])
def test_a_merges_file_that_is_cut_off_is_refused(lines: int, tmp_path: Path) -> None:
    """Every word that is not merged any more would be spelled in bytes."""
    Tokenizer.from_pretrained("gpt2-nano").save_pretrained(tmp_path)
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")
    (tmp_path / "merges.txt").write_text("\n".join(merges[:lines]), encoding="utf-8")
    with pytest.raises(ValueError, match="come from no merge: the merges file is cut off"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.usefixtures("no_shape_checks")
@pytest.mark.parametrize("ids", [[1.0], [None]])
def test_ids_that_are_no_whole_numbers_are_refused_in_words(trained: Tokenizer, ids: list) -> None:
    with pytest.raises(TypeError, match="token ids are whole numbers, not "):
        trained.decode(ids)
