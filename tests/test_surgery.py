"""Changing the vocabulary of a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, random_ids
from torch import nn
from torch.testing import assert_close

from gpt2mini import GPT2
from gpt2mini.model import TiedHead
from gpt2mini.surgery import resize_vocab

ids = random_ids(2, 9)


def test_old_tokens_get_the_logits_that_they_had(own_model: GPT2) -> None:
    before = own_model(ids)
    resize_vocab(own_model, TINY.vocab_size + 5)
    assert_close(own_model(ids)[..., : TINY.vocab_size], before)


def test_new_tokens_get_the_mean_logit(own_model: GPT2) -> None:
    before = own_model(ids)
    resize_vocab(own_model, TINY.vocab_size + 5)
    new = own_model(ids)[..., TINY.vocab_size :]
    assert_close(new, before.mean(dim=2, keepdim=True).expand_as(new), atol=1e-4, rtol=0)


def test_the_tie_holds(own_model: GPT2) -> None:
    resize_vocab(own_model, TINY.vocab_size + 5)
    assert isinstance(own_model.out_head, TiedHead)
    own_model(torch.tensor([[TINY.vocab_size + 4]])).sum().backward()
    assert own_model.tok_emb.weight.grad is not None
    assert own_model.tok_emb.weight.grad.shape == (TINY.vocab_size + 5, TINY.emb_dim)


@pytest.mark.parametrize("change", [5, 0])
def test_it_is_kept_through_save_and_load(own_model: GPT2, tmp_path: Path, change: int) -> None:
    resize_vocab(own_model, TINY.vocab_size + change)
    own_model.save_pretrained(tmp_path)
    back = GPT2.from_pretrained(tmp_path)
    assert back.config == own_model.config
    assert_close(back(ids), own_model(ids), atol=0, rtol=0)


def test_the_end_of_text_stays_the_token_that_it_was(own_model: GPT2) -> None:
    resize_vocab(own_model, TINY.vocab_size + 5)
    assert own_model.config.eos_id == TINY.vocab_size - 1
    resize_vocab(own_model, TINY.vocab_size)
    assert own_model.config == TINY
    with pytest.raises(ValueError, match=r"would cut off <.endoftext.>, token 210"):
        resize_vocab(own_model, TINY.vocab_size - 1)


def test_a_head_of_its_own_goes_along(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    before = own_model(ids)
    resize_vocab(own_model, TINY.vocab_size + 1)
    after = own_model(ids)
    assert after.shape[2] == TINY.vocab_size + 1
    assert_close(after[..., :-1], before)


def test_a_head_that_was_tied_by_hand_stays_tied(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    own_model.out_head.weight = own_model.tok_emb.weight
    resize_vocab(own_model, TINY.vocab_size + 5)
    assert own_model.out_head.weight is own_model.tok_emb.weight
    assert own_model(ids).shape[2] == own_model.out_head.out_features == TINY.vocab_size + 5


def test_the_size_may_be_any_kind_of_integer(own_model: GPT2, tmp_path: Path) -> None:
    resize_vocab(own_model, np.int64(TINY.vocab_size + 5))
    own_model.save_pretrained(tmp_path)
    assert GPT2.from_pretrained(tmp_path).config.vocab_size == TINY.vocab_size + 5
    with pytest.raises(TypeError):
        resize_vocab(own_model, 300.5)  # type: ignore[arg-type]
    assert own_model(ids).shape[2] == own_model.config.vocab_size == TINY.vocab_size + 5


def test_a_head_of_classes_stays(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 2)
    before = own_model(ids)
    resize_vocab(own_model, TINY.vocab_size + 1)
    assert_close(own_model(ids), before)


def test_dtype_device_and_frozenness_stay_and_no_random_number_is_drawn(own_model: GPT2) -> None:
    own_model.bfloat16().tok_emb.weight.requires_grad = False
    before = torch.get_rng_state()
    resize_vocab(own_model, TINY.vocab_size + 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert own_model.tok_emb.weight.dtype == torch.bfloat16
    assert not own_model.tok_emb.weight.requires_grad
