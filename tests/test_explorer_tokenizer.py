"""The tokenizer and the sampling of the explorer page, beside those of the package."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from explorer_engine import Engine, numbers
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpt2mini import Tokenizer
from gpt2mini.inspection.explorer.tokenizer_data import pack_tokenizer
from gpt2mini.inspection.lens import whole_characters
from gpt2mini.sampling import divide_by_temperature, keep_top_k, keep_top_p

HARD = [
    *("", "a", " ", "  ", "don't stop", "I'll 12345 x²", "'s 'S 'LL '", "Hello\n\n  world \t!"),
    *("老人看着大海🐙", "naïve café ÅÄÖ", "a   b", "\u2003x", "...!!! 3.14", "ﬁ ½ Ⅷ ٣"),
    *("<|endoftext|> hi", "a<|endoftext|>", "e\u0301", "\x00\x07\x1f", "x" * 300, " " * 300),
    *("\u0085 a\u0085b", "a \u0085\u0085 b", "\ufeff a \ufeff", "\u180e \u200b \u200d", "\u3000 a"),
    *("\r\n\r\n a", "\u2028a\u2029", "\xa0a\xa0\xa0b"),
    *("👩‍👩‍👧‍👦 👍🏽", "🇩🇪", "נקודה. שלום", "مرحبا بالعالم", "สวัสดี"),
    *("नमस्ते दुनिया", "Привет, мир", "Γειά σου", "한국어 단어", "\U0001d7d8\U0001d5d4 \U00010400"),
    *("a\ud800b", "\udfff", "\ud83d \udc19", "x\n", "\n x", "  \n  x", "a\u0300\u0301 b", "١٢٣"),
    *("\t\t\tx", "\ufdfa \u1e9e ŉ", "gattaca" * 300, "aaabaaab" * 40, "heretherehere" * 40),
]  # fmt: skip
# Characters that Unicode does not have yet are left out: a browser may know more of them.
CHARACTERS = st.one_of(
    st.characters(exclude_categories=["Cn", "Cs"]),
    st.sampled_from(" \n\t'.,019aAzZéß\u0085\ufeff\u2003老🐙\u0301"),
    st.sampled_from(["'s", " 't", "ll", "<|endoftext|>", "[PAD]", "<name>", "  ", "zqz", " and"]),
)


def texts(n: int) -> list[str]:
    """The same ones in every run."""
    found: list[str] = []

    @settings(
        max_examples=n, derandomize=True, database=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(st.lists(CHARACTERS, max_size=20).map("".join))
    def collect(text: str) -> None:
        found.append(text)

    collect()
    return found


def assert_same_ids(tokenizer: Tokenizer, texts: list[str], folder: Path) -> None:
    (found,) = Engine(tokenizer=tokenizer).run(folder, {"call": "encode", "texts": texts})
    for text, ids in zip(texts, found, strict=True):
        assert ids == tokenizer.encode(text), ascii(text)


@pytest.fixture(scope="module")
def nano() -> Tokenizer:
    return Tokenizer.from_pretrained("gpt2-nano")


@pytest.fixture
def with_added(nano: Tokenizer, tmp_path: Path) -> Tokenizer:
    """Added tokens of all kinds, and a space before every text."""
    folder = tmp_path / "added"
    nano.save_pretrained(folder)
    added: dict[str, dict[str, Any]] = {
        "8191": {"content": "<|endoftext|>", "special": True},
        "8192": {"content": "<name>", "lstrip": True},
        "8193": {"content": "[PAD]", "rstrip": True, "normalized": False},
        "8194": {"content": "zqz", "single_word": True},
        "8195": {"content": "[PAD][PAD]", "normalized": False},
        "8196": {"content": "<|user|>", "special": True},
        "8197": {"content": "a.b*c", "lstrip": True, "rstrip": True},
    }
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    flags: dict[str, Any] = dict.fromkeys(names, False)
    decoder = {i: {**flags, **token} for i, token in added.items()}
    config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "added_tokens_decoder": decoder}
    config |= {"add_prefix_space": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


# ---- encoding


def test_ids_of_texts_of_many_scripts(nano: Tokenizer, tmp_path: Path) -> None:
    assert_same_ids(nano, HARD + texts(1000), tmp_path)


def test_ids_with_added_tokens(with_added: Tokenizer, tmp_path: Path) -> None:
    hard = [
        *("my  <name>  is", "<name><name>", "[PAD]  x [PAD][PAD][PAD]", "zqz a zqz, _zqz zqz"),
        *("<|user|>hi<|endoftext|>", " a.b*c ", "\u0085<name>\u0085", "[PAD]\u3000\n<name>"),
        *("azqz", "zqz\u0301", "zqz\u200dzqz", "٣zqz", "[PAD]<name> <name>", "<name>zqz"),
    ]  # fmt: skip
    assert_same_ids(with_added, hard + HARD + texts(400), tmp_path)


def test_ids_of_a_vocabulary_that_is_not_in_the_order_of_its_bytes(
    nano: Tokenizer, tmp_path: Path
) -> None:
    """Byte tokens after the merges, and gaps between the ids."""
    order = sorted(nano.vocab, key=lambda piece: (len(piece) == 1, nano.vocab[piece]))
    vocab = {piece: 2 * i for i, piece in enumerate(order)}
    assert_same_ids(Tokenizer(vocab, nano.merges), HARD + texts(100), tmp_path)


def test_decoding_labels_and_groups(nano: Tokenizer, tmp_path: Path) -> None:
    ids = [nano.encode(text) for text in [*HARD, *texts(200)]]
    cut = [row[1:-1] for row in ids]  # begins and ends inside characters
    decoded, labels, groups = Engine(tokenizer=nano).run(
        tmp_path,
        {"call": "decode", "texts": ids + cut},
        {"call": "labels", "ids": [*nano.encode(" a\n\t\x07ä\u200b"), *nano.encode("老"), 8191]},
        {"call": "groups", "texts": ids + cut},
    )
    assert decoded == [nano.decode(row) for row in ids + cut]
    assert labels[:3] == ["␣a", "⏎", "\\t"] and labels[-1] == "<|endoftext|>"
    assert {"\\x07", "\\xe2"} <= {*labels} or "\\u200b" in labels
    for row, found in zip(ids + cut, groups, strict=True):
        right = [piece.token_ids for piece in whole_characters(nano, row, [0.0] * len(row))]
        assert [[row[t] for t in group["tokens"]] for group in found] == right
        assert [t for group in found for t in group["tokens"]] == list(range(len(row)))


def test_the_text_of_a_group_is_the_character(nano: Tokenizer, tmp_path: Path) -> None:
    ids = nano.encode("老人 🐙\n")
    (groups,) = Engine(tokenizer=nano).run(tmp_path, {"call": "groups", "texts": [ids, ids[:1]]})
    assert "".join(group["text"] for group in groups[0]) == "老人␣🐙⏎"
    assert groups[1][0]["text"].startswith("\\x")


class Shouting(Tokenizer):
    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        return super().encode(text.upper(), allow_special)


def test_a_tokenizer_that_the_page_cannot_follow_is_refused(nano: Tokenizer) -> None:
    own = Shouting(nano.vocab, nano.merges, nano.settings)
    with pytest.raises(ValueError, match=r"cannot follow this tokenizer: its encode is not that"):
        pack_tokenizer(own)


def test_the_same_tokenizer_gives_the_same_bytes(nano: Tokenizer) -> None:
    assert pack_tokenizer(nano) == pack_tokenizer(Tokenizer.from_pretrained("gpt2-nano"))


# ---- sampling

RULES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6, "topK": 5},
    {"topP": 0.6},
    {"temperature": 0.5, "topK": 9, "topP": 0.8},
    {"topK": 1},
    {"topK": 1000},
    {"topP": 1e-9},
    {"temperature": 1e-8},
    {"temperature": 0, "topK": 3, "topP": 0.5},
]


def expected(
    logits: torch.Tensor, temperature: float = 1, topK: int = 0, topP: float = 1
) -> torch.Tensor:
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    rows = divide_by_temperature(logits[None], temperature)
    rows = keep_top_k(rows, topK) if topK else rows
    return keep_top_p(rows, topP).softmax(dim=1)[0]


def test_distributions_are_those_of_sampling(tmp_path: Path) -> None:
    logits = 3 * torch.randn(57, generator=torch.Generator().manual_seed(0))
    logits[[4, 9]] = -torch.inf  # forbidden
    logits[[20, 21]] = logits.amax() - 1  # as likely as each other
    calls = [{"call": "distribution", "logits": numbers(logits), **rules} for rules in RULES]
    for rules, found in zip(RULES, Engine().run(tmp_path, *calls), strict=True):
        torch.testing.assert_close(found, expected(logits, **rules), atol=1e-6, rtol=1e-4)


def test_draws_follow_the_distribution_and_the_seed(tmp_path: Path) -> None:
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -1.0])
    call = {"call": "draws", "logits": numbers(logits), "n": 20000, "seed": 7, "topK": 3}
    draws, again, other = Engine().run(tmp_path, call, call, {**call, "seed": 8})
    assert draws == again != other
    shares = torch.tensor([Counter(draws)[i] / 20000 for i in range(5)])
    torch.testing.assert_close(shares, expected(logits, topK=3), atol=0.02, rtol=0)
