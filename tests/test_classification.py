"""Classification: files, splits, batches, the last token, frozen layers, the report."""

import json
import logging
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, enlarge, random_ids, shared_data
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from gpt2mini import GPT2, Tokenizer
from gpt2mini.classification import class_logits, frozen, last_token_logits, predict
from gpt2mini.classification.frozen import (
    FrozenStream,
    LabeledBatches,
    PlainTexts,
    batch_logits,
    evaluate_classes,
    last_token_step,
)
from gpt2mini.classification.labeled import (
    LabeledTexts,
    balanced,
    pad_texts,
    read_labeled,
    stratified_split,
)
from gpt2mini.cli import classify, main
from gpt2mini.data.batching import batches_by_length, encode_texts, length_buckets
from gpt2mini.evaluation import classification_report
from gpt2mini.lora import add_lora
from gpt2mini.losses import IGNORED, last_token_loss
from gpt2mini.masking import last_token
from gpt2mini.model import TransformerBlock
from gpt2mini.training import Settings, adamw, train

PRECISION = 1e-5


def ragged(n: int, longest: int = 20, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=generator).tolist()
    return [torch.randint(TINY.vocab_size, (k,), generator=generator) for k in lengths]


@pytest.fixture
def classifier(own_model: GPT2) -> GPT2:
    own_model.out_head = nn.Linear(TINY.emb_dim, 3)
    return own_model


# ---- files


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


EXPECTED = LabeledTexts(
    ["see you at six", "WIN a prize, now", "é — 漢字"], [0, 1, 0], ["ham", "spam"]
)

FORMS = {
    "a.tsv": "ham\tsee you at six\nspam\tWIN a prize, now\n\nham\té — 漢字\n",
    "a.txt": "\ufeffham\tsee you at six\r\nspam\tWIN a prize, now\r\nham\té — 漢字",
    "a.csv": 'Text,id,Label\nsee you at six,1,ham\n"WIN a prize, now",2,spam\né — 漢字,3,ham\n',
    "a.jsonl": "\n".join(
        json.dumps({"label": label, "text": text})
        for label, text in (
            ("ham", "see you at six"),
            ("spam", "WIN a prize, now"),
            ("ham", "é — 漢字"),
        )
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_file_is_read_alike(tmp_path: Path, name: str) -> None:
    assert read_labeled(write(tmp_path / name, FORMS[name])) == EXPECTED


def test_a_header_of_lines_is_any_of_the_usual_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "Sentiment\tReview\nbad\tx\ngood\ty\n")
    assert read_labeled(path) == LabeledTexts(["x", "y"], [0, 1], ["bad", "good"])


def test_columns_without_a_name_do_no_harm(tmp_path: Path) -> None:
    path = write(tmp_path / "spam.csv", "v1,v2,,,\nham,x,,,\nspam,y,,,\n")  # as the SMS data are
    found = read_labeled(path, {"label": "v1", "text": "v2"})
    assert found == LabeledTexts(["x", "y"], [0, 1], ["ham", "spam"])


def test_labels_may_be_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"label": 1, "text": "x"}\n{"label": 0, "text": "y"}')
    assert read_labeled(path) == LabeledTexts(["x", "y"], [1, 0], ["0", "1"])


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.tsv", "", "no labeled text"),
        ("a.tsv", "ham\tx\nham\ty\n", "only the class 'ham'"),
        (
            "a.tsv",
            "".join(f"x{i}\tham\n" for i in range(20)),
            r"more different labels \(20\) than texts \(1\)",
        ),
        (
            "a.csv",
            "label,text\n" + "".join(f"x{i},t{i}\n" for i in range(20)),
            "20 classes in 20 t",
        ),
        ("a.tsv", "ham\tx\nspam y\n", "line 2: expected label<TAB>text, found 'spam y'"),
        ("a.tsv", b"ham\tx\nspam\ty\nham\t\xff\n", "line 3: not UTF-8"),
        ("a.csv", b"label,text\nham,x\nspam,\xff\n", "line 3: not UTF-8"),
        ("a.csv", "name,age\nx,1\n", "line 2: expected 'label' or 'class'.*found name, age"),
        ("a.csv", "label,text\nham,x\nspam\n", "line 3: expected the 2 of label, text"),
        ("a.csv", "label,text,text\nham,x,y\n", "two columns are called 'text'"),
        ("a.jsonl", '{"label": "a", "text": "x"}\n{"label": ', "line 2: not valid JSON"),
        ("a.jsonl", '["a", "x"]\n', "record 1: expected an object"),
    ],
)
def test_a_bad_file_is_refused_with_the_line(
    tmp_path: Path, name: str, contents: str | bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        read_labeled(write(tmp_path / name, contents))


def test_labels_that_are_the_same_number_are_one_class(tmp_path: Path) -> None:
    lines = ['{"label": 1, "text": "x"}', '{"label": 1.0, "text": "y"}', '{"label": 0, "text": ""}']
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"label": 0.5, "text": "z"}']))
    assert read_labeled(path) == LabeledTexts(["x", "y", "z"], [1, 1, 0], ["0.5", "1"])


@pytest.mark.parametrize("name", FORMS)
def test_the_end_of_a_file_s_name_may_be_in_capitals(tmp_path: Path, name: str) -> None:
    assert read_labeled(write(tmp_path / name.upper(), FORMS[name])) == EXPECTED


def test_a_header_of_tab_separated_lines_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "\ufeffLabel\tText\r\n" + FORMS["a.tsv"])
    assert read_labeled(path) == EXPECTED
    path = write(tmp_path / "a.tsv", FORMS["a.tsv"] + "label\ttext\n")
    assert read_labeled(path).class_names == ["ham", "label", "spam"]


def test_lines_without_named_columns_refuse_their_names(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", FORMS["a.tsv"])
    with pytest.raises(ValueError, match="its first line has no column 'stars', only ham, see"):
        read_labeled(path, {"label": "stars"})


def test_how_many_texts_are_empty_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.tsv", FORMS["a.tsv"] + "ham\t\nspam\t  \n")
    assert read_labeled(path) == EXPECTED
    assert "a.tsv: 2 of 5 texts are empty and were left out" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.tsv"):
        read_labeled(tmp_path / "nothing.tsv")


def test_the_sms_spam_collection() -> None:
    data = read_labeled(shared_data("sms-spam/SMSSpamCollection"))
    assert data.counts() == {"ham": 4827, "spam": 747}
    assert balanced(data, seed=0).counts() == {"ham": 747, "spam": 747}


# ---- choosing


def labeled(counts: list[int]) -> LabeledTexts:
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    return LabeledTexts(
        [f"text {i}" for i in range(len(labels))],
        labels,
        [f"class {i}" for i in range(len(counts))],
    )


@given(st.lists(st.integers(3, 60), min_size=2, max_size=6), st.integers(0, 99))
def test_a_split_is_stratified_disjoint_and_whole(counts: list[int], seed: int) -> None:
    data = labeled(counts)
    parts = stratified_split(data, (0.7, 0.1, 0.2), seed)
    texts = [text for part in parts for text in part.texts]
    assert sorted(texts) == sorted(data.texts)
    for part, share in zip(parts, (0.7, 0.1, 0.2), strict=True):
        for count, found in zip(counts, part.counts().values(), strict=True):
            assert found >= 1
            assert abs(found - share * count) <= 1.51  # two parts are rounded
    assert parts == stratified_split(data, (0.7, 0.1, 0.2), seed)


def test_a_class_with_one_text_keeps_it_for_training_and_the_user_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    training, validation, test = stratified_split(labeled([30, 1]), (0.7, 0.1, 0.2), seed=0)
    assert training.counts()["class 1"] == 1
    assert validation.counts()["class 1"] == test.counts()["class 1"] == 0
    assert "'class 1' has too few different texts (1)" in caplog.text


def test_too_few_texts_to_split_are_refused() -> None:
    with pytest.raises(ValueError, match="4 texts are too few"):
        stratified_split(labeled([2, 2]), (0.7, 0.1, 0.2), seed=0)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(1, 40))
def test_buckets_hold_every_text_once(lengths: list[int], batch_size: int) -> None:
    batches = length_buckets(lengths, batch_size, np.random.default_rng(0))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert max(map(len, batches)) <= batch_size


def test_buckets_waste_little_on_padding() -> None:
    lengths = np.random.default_rng(0).integers(5, 200, 2000).tolist()
    batches = length_buckets(lengths, 8, np.random.default_rng(1))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=100))
def test_batches_by_length_hold_every_text_once(lengths: list[int]) -> None:
    batches = batches_by_length(lengths, 64)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 64 for batch in batches)


@pytest.mark.parametrize("keep", ["head", "tail"])
def test_a_long_text_is_cut_with_a_notice(caplog: pytest.LogCaptureFixture, keep: str) -> None:
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    long = " word" * 5000
    ids = tokenizer.encode("start" + long + " end")
    with caplog.at_level(logging.WARNING):
        rows = encode_texts(["start" + long + " end", "short", ""], tokenizer, 100, keep)
    assert rows[0].tolist() == (ids[:100] if keep == "head" else ids[-100:])
    assert rows[2].tolist() == [tokenizer.eos_id]
    assert f"1 of 3 texts were longer than 100 tokens: their {keep} was kept" in caplog.text


@pytest.mark.parametrize("longest", [0, -3])
def test_texts_of_less_than_one_token_are_refused(longest: int) -> None:
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    with pytest.raises(ValueError, match=f"longest must be at least 1 token, not {longest}"):
        encode_texts(["one", "two"], tokenizer, longest)


# ---- the last token


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    left=st.integers(0, 4),
    pad_id=st.integers(0, TINY.vocab_size - 1),
)
def test_the_last_real_token_is_where_the_mask_says(
    lengths: list[int], left: int, pad_id: int
) -> None:
    width = max(lengths) + left + 2
    x = torch.full((len(lengths), width), pad_id)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        x[row, left : left + length] = torch.arange(length) + 1000
        mask[row, left : left + length] = 1
    assert last_token(x, mask).tolist() == [length + 999 for length in lengths]
    assert last_token(x, mask.bool())[:, None].shape == (len(lengths), 1)


def pad_left(
    rows: list[torch.Tensor], pad_id: int, extra: int
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows)) + extra
    ids = torch.stack([F.pad(row, (width - len(row), 0), value=pad_id) for row in rows])
    mask = torch.stack([F.pad(torch.ones(len(r)).long(), (width - len(r), 0)) for r in rows])
    return ids, mask


@pytest.mark.parametrize("pad_id", [0, TINY.vocab_size - 1])
def test_logits_do_not_change_with_padding_its_side_or_its_id(
    classifier: GPT2, pad_id: int
) -> None:
    rows = ragged(6)
    rows[2][0] = TINY.vocab_size - 1  # <|endoftext|> inside a text
    expected = torch.cat([classifier(row[None])[:, -1] for row in rows])
    right = pad_texts(rows, [0] * 6)
    assert right.attention_mask is not None
    ids = right.token_ids.masked_fill(right.attention_mask == 0, pad_id)
    assert_close(
        last_token_logits(classifier, ids, right.attention_mask), expected, atol=1e-4, rtol=0
    )
    ids, mask = pad_left(rows, pad_id, extra=3)
    assert_close(last_token_logits(classifier, ids, mask), expected, atol=1e-4, rtol=0)
    assert_close(class_logits(classifier, rows), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "numbers",
    [
        [1, 1, 1, 2, 2, 2, 2, 0, 0],
        [0, 0, 1, 1, 1, 1, 1, 1, 2],
        [3, 3, 1, 1, 0, 3, 3, 1, 0],
    ],
)
def test_the_last_token_sees_only_its_own_text(classifier: GPT2, numbers: list[int]) -> None:
    ids, mask = random_ids(2, 9), torch.tensor([numbers, [1] * 9])
    expected = last_token(classifier(ids, mask), mask)
    assert_close(last_token_logits(classifier, ids, mask), expected, atol=1e-4, rtol=0)


def test_a_row_of_padding_alone_gives_finite_logits(classifier: GPT2) -> None:
    ids, mask = random_ids(2, 9), torch.tensor([[0] * 9, [1] * 9])
    logits = last_token_logits(classifier, ids, mask)
    assert logits.isfinite().all()
    assert_close(logits[1:], classifier(ids[1:])[:, -1], atol=1e-4, rtol=0)


def test_without_padding_no_mask_is_needed(classifier: GPT2) -> None:
    ids = random_ids(3, 7)
    assert_close(last_token_logits(classifier, ids), classifier(ids)[:, -1], atol=1e-4, rtol=0)


def test_one_token_is_enough(classifier: GPT2) -> None:
    ids = random_ids(3, 1)
    assert_close(last_token_logits(classifier, ids), classifier(ids)[:, -1], atol=1e-4, rtol=0)


def test_a_row_of_padding_gives_finite_logits_and_gradients(classifier: GPT2) -> None:
    mask = torch.tensor([[0, 0, 0], [1, 1, 0]])
    logits = last_token_logits(classifier, random_ids(2, 3), mask)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in classifier.parameters())


def test_gradients_are_those_of_the_whole_forward_pass(classifier: GPT2) -> None:
    batch = pad_texts(ragged(5), [0, 1, 2, 1, 0])
    twin = deepcopy(classifier)
    loss_sum, _ = last_token_step(classifier, batch)
    loss_sum.backward()
    logits = twin(batch.token_ids, batch.attention_mask)
    expected, count = last_token_loss(logits, batch.labels, batch.attention_mask)
    expected.backward()
    assert int(count) == 5
    assert_close(loss_sum, expected, atol=PRECISION, rtol=PRECISION)
    for (name, found), other in zip(classifier.named_parameters(), twin.parameters(), strict=True):
        if found.grad is None:  # a bias of the last block's keys, which changes nothing
            assert name == f"trf_blocks.{TINY.n_layers - 1}.attn.key.bias"
            found.grad = torch.zeros_like(found)
        assert_close(found.grad, other.grad, atol=1e-3, rtol=1e-4)


def test_a_loop_that_knows_nothing_of_us_classifies(own_model: GPT2) -> None:
    """The published recipe's calls: every text padded to one length with an id, no mask, the last
    position of plain logits; freezing and the new head by the attributes' names."""
    for parameter in own_model.parameters():
        parameter.requires_grad = False
    own_model.out_head = torch.nn.Linear(in_features=own_model.config.emb_dim, out_features=2)
    for module in (own_model.trf_blocks[-1], own_model.final_norm):
        for parameter in module.parameters():
            parameter.requires_grad = True
    ids, labels = random_ids(8, 10), torch.arange(8) % 2
    loader = DataLoader(TensorDataset(ids, labels), batch_size=4)
    optimizer = torch.optim.AdamW(own_model.parameters(), lr=5e-3, weight_decay=0.1)

    def accuracy() -> float:
        own_model.eval()
        with torch.no_grad():
            hits = [own_model(x)[:, -1, :].argmax(dim=-1) == y for x, y in loader]
        return float(torch.cat(hits).float().mean())

    for _ in range(15):
        own_model.train()
        for input_batch, target_batch in loader:
            optimizer.zero_grad()
            logits = own_model(input_batch)[:, -1, :]
            F.cross_entropy(logits, target_batch).backward()
            optimizer.step()
    assert accuracy() == 1.0
    assert own_model.trf_blocks[0].get_parameter("attn.query.weight").grad is None


# ---- the loss


def test_the_loss_is_torch_s_at_the_last_real_token() -> None:
    logits, labels = torch.randn(3, 4, 5), torch.tensor([4, IGNORED, 0])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    loss_sum, count = last_token_loss(logits, labels, mask)
    expected = F.cross_entropy(
        torch.stack([logits[0, 1], logits[2, 2]]), torch.tensor([4, 0]), reduction="sum"
    )
    assert_close(loss_sum, expected)
    assert int(count) == 2


def test_only_ignored_labels_and_unknown_classes_are_refused() -> None:
    logits = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="no label to learn from"):
        last_token_loss(logits, torch.tensor([IGNORED, IGNORED]))
    with pytest.raises(ValueError, match="label 4 is none of 4 classes"):
        last_token_loss(logits, torch.tensor([0, 4]))


# ---- frozen layers


def freeze_all_but_the_last(model: GPT2, n_blocks: int) -> None:
    for parameter in model.parameters():
        parameter.requires_grad = False
    learning = [*model.trf_blocks[TINY.n_layers - n_blocks :], model.final_norm, model.out_head]
    for module in learning:
        module.requires_grad_(True)


@pytest.mark.parametrize("n_blocks", [0, 1, 2, 3])
def test_frozen_layers_change_no_loss_and_no_gradient(classifier: GPT2, n_blocks: int) -> None:
    freeze_all_but_the_last(classifier, n_blocks)
    rows, labels = ragged(7), [0, 1, 2, 0, 1, 2, 0]
    stream = FrozenStream(classifier, rows, labels, precision="fp32")
    assert stream.first_block == TINY.n_layers - n_blocks
    twin = deepcopy(classifier)
    loss_sum, count = last_token_step(classifier, stream.batch([4, 0, 6]))
    expected, _ = last_token_step(twin, PlainTexts(rows, labels).batch([4, 0, 6]))
    assert_close(loss_sum / count, expected / count, atol=PRECISION, rtol=PRECISION)
    loss_sum.backward()
    expected.backward()
    for found, other in zip(classifier.parameters(), twin.parameters(), strict=True):
        assert (found.grad is None) == (other.grad is None)
        if found.grad is not None and other.grad is not None:
            assert_close(found.grad, other.grad, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stream_that_is_too_large_for_memory_goes_to_a_file(
    classifier: GPT2, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    classifier.to(dtype)
    freeze_all_but_the_last(classifier, 1)
    rows = ragged(5)
    expected = FrozenStream(classifier, rows, [0] * 5)
    monkeypatch.setattr(frozen, "LARGEST_IN_MEMORY", 100)
    found = FrozenStream(classifier, rows, [0] * 5)
    assert torch.equal(found.values, expected.values)
    assert_close(found.batch([1, 3]).stream, expected.batch([1, 3]).stream, atol=0, rtol=0)


def test_nothing_below_the_first_learning_block_is_differentiated(classifier: GPT2) -> None:
    freeze_all_but_the_last(classifier, 1)
    stream = FrozenStream(classifier, ragged(4), [0, 1, 2, 0])
    batch = stream.batch([0, 1])
    assert not batch.stream.requires_grad and batch.stream.grad_fn is None
    optimizer = adamw(classifier, lr=1e-3)
    learning = sum(len(group["params"]) for group in optimizer.param_groups)
    assert learning == sum(p.requires_grad for p in classifier.parameters()) < 25


def test_what_changes_from_epoch_to_epoch_cannot_be_kept() -> None:
    model = GPT2(replace(TINY, drop_rate=0.1))
    with pytest.raises(ValueError, match="with dropout"):
        FrozenStream(model, ragged(2), [0, 1])


@pytest.mark.parametrize("method", ["last-block", "full", "lora"])
def test_the_loop_trains_by_every_method(classifier: GPT2, tmp_path: Path, method: str) -> None:
    """Texts whose class is which of three tokens they begin with."""
    torch.manual_seed(0)
    rows = ragged(60, longest=6)
    labels = [int(row[0]) % 3 for row in rows]
    for row, label in zip(rows, labels, strict=True):
        row[0] = label
    if method == "lora":
        add_lora(classifier, targets=("query", "value", "mlp_in"))
        classifier.out_head.requires_grad_(True)
    if method == "last-block":
        freeze_all_but_the_last(classifier, 1)
    data: FrozenStream | PlainTexts = PlainTexts(rows, labels)
    if method == "last-block":
        data = FrozenStream(classifier, rows, labels)
    settings = Settings(steps=60, schedule=lambda step: 1.0, progress=False, log_every=20)
    logs = train(
        classifier,
        LabeledBatches(data, 12, seed=0),
        [adamw(classifier, lr=5e-3)],
        settings,
        loss_function=last_token_step,
    )
    assert logs[-1]["loss"] < 0.5 * logs[0]["loss"]


def test_batches_are_a_function_of_the_seed() -> None:
    data = PlainTexts(ragged(30), [0] * 30)

    def epochs(seed: int) -> list[list[list[int]]]:
        batches = LabeledBatches(data, 4, seed)
        return [[batch.token_ids.tolist() for batch in batches] for _ in range(3)]

    assert epochs(0) == epochs(0)
    assert epochs(0) != epochs(1)
    assert [len(epoch) for epoch in epochs(0)] == [8, 8, 8]


# ---- predictions and the report


def classifier_of_text() -> tuple[GPT2, Tokenizer]:
    tokenizer = Tokenizer.from_pretrained("gpt2-nano")
    model = GPT2(replace(TINY, vocab_size=tokenizer.vocab_size))
    enlarge(model)
    model.out_head = nn.Linear(TINY.emb_dim, 2)
    return model, tokenizer


def test_predict_gives_names_and_probabilities() -> None:
    model, tokenizer = classifier_of_text()
    texts = ["Good morning.", "A much longer text, for the padding of the other.", ""]
    found = predict(model, tokenizer, texts, ["ham", "spam"])
    for prediction in found:
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        best = max(prediction.probabilities, key=lambda name: prediction.probabilities[name])
        assert prediction.class_name == best
    alone = predict(model, tokenizer, texts[:1], ["ham", "spam"])[0]
    assert alone.probabilities == pytest.approx(found[0].probabilities, abs=1e-5)
    with pytest.raises(ValueError, match="3 class names for a head of 2 outputs"):
        predict(model, tokenizer, texts, ["a", "b", "c"])
    assert predict(model, tokenizer, [], ["ham", "spam"]) == []
    with pytest.raises(ValueError, match="expected a list of texts, not one text"):
        predict(model, tokenizer, "hello", ["ham", "spam"])


@pytest.mark.parametrize("keep", ["head", "tail"])
def test_predict_reads_no_more_than_it_is_told(keep: str) -> None:
    model, tokenizer = classifier_of_text()
    ids = tokenizer.encode("one two three four five six")
    read = ids[:4] if keep == "head" else ids[-4:]
    logits = model(torch.tensor([read]))[0, -1]
    (found,) = predict(model, tokenizer, [tokenizer.decode(ids)], ["a", "b"], keep, longest=4)
    assert list(found.probabilities.values()) == pytest.approx(logits.softmax(0).tolist(), abs=1e-5)


def test_the_command_tests_as_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same columns of the file, the same end of each text, in the same precision."""
    rows = [f"{'AB'[i % 2]},{'word ' * 9}number {i}" for i in range(20)]
    path = write(tmp_path / "a.csv", "\n".join(["stars,label", *rows]))
    asked: list[tuple] = []

    def spy(model: GPT2, tokenizer: Tokenizer, texts: list[str], *others: Any) -> list:
        asked.append((*others, torch.is_autocast_enabled("cpu")))
        return predict(model, tokenizer, texts, *others)

    monkeypatch.setattr(classify, "predict", spy)
    flags = "--steps 1 --longest 8 --keep tail --dtype bf16 --device cpu --columns"
    columns = "label=stars,text=label"
    main(["classify", "--data", str(path), "--out", str(tmp_path), *flags.split(), columns])
    assert asked == [(["A", "B"], "tail", 8, True)]


def test_the_report_by_hand() -> None:
    report = classification_report([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 1], ["a", "b", "c"])
    assert report.confusion.tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    assert report.accuracy == pytest.approx(3 / 6)
    assert report.majority_baseline == pytest.approx(3 / 6)
    assert report.precision.tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert report.recall.tolist() == pytest.approx([2 / 3, 1 / 2, 0])
    assert report.f1.tolist() == pytest.approx([2 / 3, 2 / 5, 0])
    assert report.macro_f1 == pytest.approx((2 / 3 + 2 / 5) / 3)
    text = str(report)
    assert "accuracy 0.500 on 6 texts (always the most frequent class: 0.500)" in text
    assert "macro-F1 0.356" in text


labels = st.integers(0, 4)


@given(st.lists(st.tuples(labels, labels), min_size=1, max_size=30))
def test_macro_f1_counts_the_classes_present(pairs: list[tuple[int, int]]) -> None:
    """scikit-learn's definition, counted by hand: the labels of truth and predictions together."""
    truth, predicted = zip(*pairs, strict=True)
    report = classification_report(truth, predicted, ["a", "b", "c", "d", "e"])
    f1 = []
    for label in set(truth) | set(predicted):
        right = sum(t == p == label for t, p in pairs)
        f1.append(2 * right / (truth.count(label) + predicted.count(label)))
    assert report.macro_f1 == pytest.approx(sum(f1) / len(f1))


def test_a_class_that_the_test_set_lacks_does_not_lower_a_perfect_score() -> None:
    report = classification_report([0, 1, 1], [0, 1, 1], ["a", "b", "c"])
    assert report.macro_f1 == 1.0
    assert "macro-F1 1.000 (of the 2 classes present)" in str(report)


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [([], [], "0 predictions"), ([0], [0, 1], "2 predictions for 1"), ([2], [0], "0 to 1")],
)
def test_a_report_of_nonsense_is_refused(
    truth: list[int], predicted: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        classification_report(truth, predicted, ["a", "b"])


class Louder(TransformerBlock):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return 1.5 * super().forward(*args, **kwargs)


@pytest.mark.parametrize("part", ["trf_blocks.1", "trf_blocks.1.attn", "trf_blocks.1.mlp", "class"])
def test_hooks_and_classes_of_your_own_have_their_say_in_the_last_block(
    part: str, classifier: GPT2
) -> None:
    before = class_logits(classifier, ragged(3))
    if part == "class":
        classifier.trf_blocks[-1].__class__ = Louder
    else:
        classifier.get_submodule(part).register_forward_hook(lambda *args: 1.5 * args[2])
    ids = random_ids(2, 9)
    assert_close(last_token_logits(classifier, ids), classifier(ids)[:, -1])
    assert not torch.equal(class_logits(classifier, ragged(3)), before)


def change_first(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    """What one does with a hook on the first token; to all others the part does what it did."""
    return torch.cat([output[:, :1] + 5 * torch.arange(output.shape[-1]), output[:, 1:]], dim=1)


LAST_BLOCK = ["trf_blocks.2", "trf_blocks.2.attn", "trf_blocks.2.mlp.mlp_out"]


@pytest.mark.parametrize("part", [*LAST_BLOCK, "final_norm", "out_head", ""])
def test_a_hook_on_the_first_token_never_sees_the_last_in_its_place(
    part: str, classifier: GPT2
) -> None:
    for layer in (classifier.tok_emb, classifier.pos_emb, classifier.trf_blocks[0]):
        layer.requires_grad_(False)
    classifier.get_submodule(part).register_forward_hook(change_first)
    ids = random_ids(2, 9)
    frozen_stream = FrozenStream(classifier, list(ids), [0, 1], "fp32")
    with torch.no_grad():
        expected = classifier(ids)[:, -1]
        assert_close(last_token_logits(classifier, ids), expected)
        assert_close(batch_logits(classifier, frozen_stream.batch([0, 1])), expected)


def test_no_texts_are_refused(classifier: GPT2) -> None:
    with pytest.raises(ValueError, match="there are no texts to classify"):
        class_logits(classifier, [])
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        LabeledBatches(PlainTexts([], []), 2, seed=0)


def test_evaluating_a_copy_while_the_last_block_learns(classifier: GPT2) -> None:
    """What is to be computed again in backward is no part of the model."""
    data = PlainTexts(ragged(6), [0, 1] * 3)
    settings = Settings(2, lambda step: 1.0, precision="fp32", progress=False, evaluate_every=1)
    optimizer = torch.optim.SGD(classifier.parameters(), 0.01)
    rows = train(
        classifier,
        LabeledBatches(data, 3, seed=0),
        [optimizer],
        settings,
        last_token_step,
        evaluate=lambda: evaluate_classes(deepcopy(classifier), data)[0],
    )
    assert any("validation_loss" in row for row in rows)
