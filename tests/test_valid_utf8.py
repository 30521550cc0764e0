"""Text without broken characters: any model, any seed, any cut decodes strictly."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete, generate
from gpt2mini.generation import stream
from gpt2mini.tokenizer import END_OF_TEXT, byte_characters, train_tokenizer
from gpt2mini.valid_utf8 import UTF8, WHOLE, TextStates, ValidUTF8, states_after

TEXT = "The cat. ¿Qué? 你好，世界! 👋🏽👨\u200d👩 שלום नमस्ते 한국어 " * 3
CASES = st.tuples(
    st.integers(0, 2**31),  # seed
    st.integers(1, 12),  # new tokens
    st.sampled_from([0.0, 0.7, 1.0, 5.0]),  # temperature
    st.sampled_from([None, 1, 5]),  # top-k
    st.sampled_from([None, 0.3, 0.9]),  # top-p
)


def bytes_alone() -> Tokenizer:
    """Every character outside of ASCII is several tokens."""
    pieces = [*byte_characters(), END_OF_TEXT]
    return Tokenizer({piece: i for i, piece in enumerate(pieces)}, [])


@pytest.fixture(scope="module", params=["bytes", "trained", "padded"])
def pair(request: pytest.FixtureRequest) -> tuple[GPT2, Tokenizer]:
    """(a random model whose choices are as good as uniform, its tokenizer)."""
    tokenizer = bytes_alone() if request.param == "bytes" else train_tokenizer([TEXT], 330)
    size = tokenizer.vocab_size + (30 if request.param == "padded" else 0)
    torch.manual_seed(0)
    model = GPT2(GPT2Config(size, context_length=32, emb_dim=16, n_heads=2, n_layers=1))
    return model.eval(), tokenizer


@settings(max_examples=15)
@given(case=CASES)
def test_any_text_decodes_strictly(pair: tuple[GPT2, Tokenizer], case: tuple) -> None:
    model, tokenizer = pair
    seed, new, temperature, top_k, top_p = case
    rule = ValidUTF8(tokenizer, model.config.vocab_size)
    ids = torch.tensor([tokenizer.encode("The")] * 3)
    out = generate(
        *(model, ids, new),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=seed,
        stop_ids=tokenizer.eos_id,
        valid_utf8=rule,
    )
    for row, real in zip(out.token_ids, out.attention_mask, strict=True):
        b"".join(map(tokenizer.token_bytes, row[real].tolist())).decode("utf-8", errors="strict")


@given(seed=st.integers(0, 2**31), stop=st.integers(0, 255))
def test_a_stop_token_comes_between_characters(seed: int, stop: int) -> None:
    tokenizer = bytes_alone()
    torch.manual_seed(0)
    model = GPT2(GPT2Config(257, context_length=32, emb_dim=16, n_heads=2, n_layers=1)).eval()
    text = complete(model, tokenizer, "x", 20, generator=seed, stop_ids=stop, valid_utf8=True)
    assert "\ufffd" not in text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def test_without_the_rule_the_same_texts_are_broken() -> None:
    """Or the tests above would say little."""
    tokenizer = bytes_alone()
    torch.manual_seed(0)
    model = GPT2(GPT2Config(257, context_length=32, emb_dim=16, n_heads=2, n_layers=1)).eval()
    broken = "".join(stream(model, tokenizer, "x", 20, generator=0))
    whole = "".join(stream(model, tokenizer, "x", 20, generator=0, valid_utf8=True))
    assert "\ufffd" in broken
    assert "\ufffd" not in whole and whole.encode().decode() == whole


def test_a_prompt_that_ends_inside_of_a_character_is_continued() -> None:
    tokenizer = bytes_alone()
    torch.manual_seed(0)
    model = GPT2(GPT2Config(257, context_length=32, emb_dim=16, n_heads=2, n_layers=1)).eval()
    prompts = [b"a\xe4\xbd", b"\xf0\x9f\x91", b"\xff\xe2\x82"]  # each lacks one byte
    ids = torch.tensor(
        [
            [
                tokenizer.vocab[c]
                for byte in prompt
                for c, b in byte_characters().items()
                if b == byte
            ]
            for prompt in prompts
        ]
    )
    out = generate(model, ids, 5, valid_utf8=ValidUTF8(tokenizer, 257), generator=0)
    assert all(0x80 <= tokenizer.token_bytes(int(i))[0] <= 0xBF for i in out.token_ids[:, 3])


@pytest.mark.parametrize("tokens_left", [3, 32767, 32768, 65536, 10**6])
def test_many_tokens_may_follow(tokens_left: int) -> None:
    tokenizer = Tokenizer({**byte_characters(), END_OF_TEXT: 256}, [])  # the id of a byte is it
    ids = torch.tensor([tokenizer.encode("日")])
    rule = ValidUTF8(tokenizer, 257)
    states = TextStates(rule, ids[:, :1], torch.ones(1, 1, dtype=torch.bool), torch.tensor([256]))
    allowed = states.forbid_broken(torch.zeros(1, 257), tokens_left)[0].isfinite()
    assert allowed.nonzero()[:, 0].tolist() == list(range(0x80, 0xC0))


def test_the_automaton_reads_what_python_decodes() -> None:
    """All pairs of a first and a second byte, and every character's bytes."""
    pairs = [bytes([first, second]) for first in range(256) for second in range(256)]
    after = states_after(pairs)[WHOLE]
    for pair, state in zip(pairs, after, strict=True):
        try:
            pair.decode("utf-8")
        except UnicodeDecodeError as error:
            continues = error.reason == "unexpected end of data"
            assert (state not in (WHOLE, 8)) == continues, pair
        else:
            assert state == WHOLE, pair
    characters = [chr(c).encode() for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
    assert (states_after(characters)[WHOLE] == WHOLE).all()
    halves = [f"{chr(c)}".encode("utf-8", "surrogatepass") for c in range(0xD800, 0xE000)]
    assert (states_after(halves) == len(UTF8) - 1).all()
