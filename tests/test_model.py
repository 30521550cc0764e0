"""The architecture: right against two oracles, causal, tied, and easy to change from outside."""

import math
import pickle
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, enlarge, random_ids
from oracle import gpt2_logits
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import GPT2Config as TheirConfig
from transformers import GPT2LMHeadModel

from gpt2mini import GPT2
from gpt2mini.checkpoints.names import to_published
from gpt2mini.model import TiedHead

PRECISION = 1e-4  # what float32 leaves of logits of the size of 1 after different orders of sums
N_CLASSES = 2


@pytest.fixture(scope="module")
def token_ids() -> Tensor:
    return random_ids(2, 20)


@pytest.fixture(scope="module")
def their_model() -> GPT2LMHeadModel:
    """The tiny model's shape in `transformers`, with random weights of its own."""
    config = TheirConfig(
        vocab_size=TINY.vocab_size,
        n_positions=TINY.context_length,
        n_embd=TINY.emb_dim,
        n_head=TINY.n_heads,
        n_layer=TINY.n_layers,
        bos_token_id=0,
        eos_token_id=0,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config)
    enlarge(model, seed=1)
    return model.eval()


@pytest.fixture(scope="module")
def their_folder(their_model: GPT2LMHeadModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    their_model.save_pretrained(folder)
    return folder


def oracle_logits(model: GPT2, token_ids: Tensor, folder: Path) -> Tensor:
    """The NumPy forward of what the model writes to `folder`."""
    model.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    n_heads = model.config.n_heads
    rows = [gpt2_logits(row, weights, n_heads) for row in token_ids.numpy()]
    return torch.from_numpy(np.stack(rows)).float()


def next_token_loss(logits: Tensor, token_ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), token_ids[:, 1:].flatten())


# ---- against the oracles


def test_logits_are_those_of_the_numpy_forward(
    tiny_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    expected = oracle_logits(tiny_model, token_ids, tmp_path)
    assert_close(tiny_model(token_ids), expected, atol=PRECISION, rtol=0)


def test_an_untied_head_gives_the_logits_of_the_numpy_forward(
    own_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    expected = oracle_logits(own_model, token_ids, tmp_path)
    assert_close(own_model(token_ids), expected, atol=PRECISION, rtol=0)


def test_logits_are_those_of_the_numpy_forward_where_the_norms_epsilon_counts(
    own_model: GPT2, token_ids: Tensor, tmp_path: Path
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, TINY.vocab_size, bias=False)
    with torch.no_grad():  # what the first norm reads has a variance of about 1e-5, its epsilon
        own_model.tok_emb.weight *= 0.01
        own_model.pos_emb.weight *= 0.01
    expected = oracle_logits(own_model, token_ids, tmp_path)
    assert_close(own_model(token_ids), expected, atol=PRECISION, rtol=0)


def test_logits_are_those_of_transformers(
    their_model: GPT2LMHeadModel, their_folder: Path, token_ids: Tensor
) -> None:
    ours = GPT2.from_pretrained(their_folder)
    expected = their_model(token_ids).logits
    assert_close(ours(token_ids), expected, atol=PRECISION, rtol=0)


def test_gradients_are_those_of_transformers(
    their_model: GPT2LMHeadModel, their_folder: Path, token_ids: Tensor
) -> None:
    theirs, ours = deepcopy(their_model), GPT2.from_pretrained(their_folder)
    next_token_loss(theirs(token_ids).logits, token_ids).backward()
    next_token_loss(ours(token_ids), token_ids).backward()
    expected = {name: parameter.grad for name, parameter in theirs.transformer.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    found = to_published({n: g for n, g in gradients.items() if g is not None}, TINY)
    assert_close(found, expected, atol=PRECISION, rtol=0)


def test_the_oracles_would_notice_the_erf_form_of_gelu(
    tiny_model: GPT2, token_ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = oracle_logits(tiny_model, token_ids, tmp_path)
    gelu = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate: gelu(x, approximate="none"))
    assert (tiny_model(token_ids) - expected).abs().max() > 10 * PRECISION


# ---- the function


@pytest.mark.parametrize("changed", [1, 10, 19])
def test_a_later_token_changes_no_earlier_logit(
    tiny_model: GPT2, token_ids: Tensor, changed: int
) -> None:
    other_ids = token_ids.clone()
    other_ids[:, changed] = (other_ids[:, changed] + 1) % TINY.vocab_size
    before, after = tiny_model(token_ids), tiny_model(other_ids)
    assert_close(after[:, :changed], before[:, :changed], atol=1e-6, rtol=0)


def test_a_token_changes_every_later_logit(tiny_model: GPT2, token_ids: Tensor) -> None:
    other_ids = token_ids.clone()
    other_ids[:, 3] = (other_ids[:, 3] + 1) % TINY.vocab_size
    moved = (tiny_model(other_ids) - tiny_model(token_ids)).abs().amax(dim=2)  # (batch, tokens)
    assert (moved[:, 3:] > PRECISION).all()


def test_rows_of_a_batch_do_not_meet(tiny_model: GPT2, token_ids: Tensor) -> None:
    alone = torch.cat([tiny_model(row[None]) for row in token_ids])
    assert_close(tiny_model(token_ids), alone, atol=1e-5, rtol=0)


def test_the_head_on_the_hidden_states_is_the_forward(tiny_model: GPT2, token_ids: Tensor) -> None:
    by_hand = tiny_model.out_head(tiny_model.hidden_states(token_ids))
    assert torch.equal(tiny_model(token_ids), by_hand)


def test_train_and_eval_give_the_same_numbers(own_model: GPT2, token_ids: Tensor) -> None:
    assert own_model.config.drop_rate == 0
    evaluated = own_model.eval()(token_ids)
    assert torch.equal(own_model.train()(token_ids), evaluated)


def test_dropout_varies_in_training(token_ids: Tensor) -> None:
    model = GPT2(replace(TINY, drop_rate=0.5)).train()
    assert not torch.equal(model(token_ids), model(token_ids))


def test_dropout_is_off_in_eval(tiny_model: GPT2, token_ids: Tensor) -> None:
    model = GPT2(replace(TINY, drop_rate=0.5)).eval()
    model.load_state_dict(tiny_model.state_dict())
    assert torch.equal(model(token_ids), tiny_model(token_ids))


def test_the_full_context_fits(tiny_model: GPT2) -> None:
    ids = random_ids(1, TINY.context_length)
    assert tiny_model(ids).shape == (1, TINY.context_length, TINY.vocab_size)


def test_int32_ids_are_as_good_as_int64(tiny_model: GPT2, token_ids: Tensor) -> None:
    assert torch.equal(tiny_model(token_ids.int()), tiny_model(token_ids))


# ---- the initial weights


@pytest.fixture(scope="module")
def fresh_parameters() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(GPT2(TINY).named_parameters())


WRITES_TO_THE_STREAM = ("attn_out.weight", "mlp_out.weight")


def test_fresh_weights_have_a_deviation_of_a_fiftieth(
    fresh_parameters: dict[str, Tensor],
) -> None:
    for name, weight in fresh_parameters.items():
        if weight.ndim == 2 and not name.endswith(WRITES_TO_THE_STREAM):
            # 48 * 48 numbers or more: their deviation is known to 1.5%
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name


def test_fresh_projections_into_the_stream_are_smaller(
    fresh_parameters: dict[str, Tensor],
) -> None:
    expected = 0.02 / math.sqrt(2 * TINY.n_layers)  # Radford et al. 2019, section 2.3
    names = [name for name in fresh_parameters if name.endswith(WRITES_TO_THE_STREAM)]
    assert len(names) == 2 * TINY.n_layers
    for name in names:
        assert fresh_parameters[name].std().item() == pytest.approx(expected, rel=0.1), name


def test_fresh_biases_are_zero_and_norms_the_identity(
    fresh_parameters: dict[str, Tensor],
) -> None:
    for name, parameter in fresh_parameters.items():
        if parameter.ndim == 1:
            expected = "norm" in name and name.endswith("weight")
            assert (parameter == float(expected)).all(), name


def test_without_qkv_bias_the_other_biases_stay() -> None:
    names = dict(GPT2(replace(TINY, qkv_bias=False)).named_parameters())
    without = {name for name in dict(GPT2(TINY).named_parameters()) if name not in names}
    assert {name.rpartition("attn.")[2] for name in without} == {
        "query.bias",
        "key.bias",
        "value.bias",
    }


# ---- the tie between the output head and the token embedding


def assert_tied(model: GPT2) -> None:
    assert isinstance(model.out_head, TiedHead)
    assert model.out_head.weight is model.tok_emb.weight


def test_the_state_dict_has_one_key_for_the_tied_tensor(tiny_model: GPT2) -> None:
    assert not [name for name in tiny_model.state_dict() if name.startswith("out_head")]


def test_the_state_dict_can_be_saved_as_it_is(tiny_model: GPT2, tmp_path: Path) -> None:
    save_file(tiny_model.state_dict(), tmp_path / "state.safetensors")
    assert load_file(tmp_path / "state.safetensors").keys() == tiny_model.state_dict().keys()


def test_the_tie_survives_deepcopy(tiny_model: GPT2) -> None:
    copy = deepcopy(tiny_model)
    assert_tied(copy)
    assert copy.tok_emb.weight is not tiny_model.tok_emb.weight


def test_the_tie_survives_a_change_of_dtype(own_model: GPT2, token_ids: Tensor) -> None:
    assert_tied(own_model.to(torch.float64))
    assert own_model(token_ids).dtype == torch.float64


@pytest.mark.parametrize("assign", [False, True])
def test_the_tie_survives_load_state_dict(
    tiny_model: GPT2, token_ids: Tensor, assign: bool
) -> None:
    model = GPT2(TINY).eval()
    model.load_state_dict(tiny_model.state_dict(), assign=assign)
    assert_tied(model)
    assert torch.equal(model(token_ids), tiny_model(token_ids))


def test_the_tie_survives_pickling(tiny_model: GPT2, token_ids: Tensor) -> None:
    model = pickle.loads(pickle.dumps(tiny_model))
    assert_tied(model)
    assert torch.equal(model(token_ids), tiny_model(token_ids))


def test_the_tie_survives_to_empty(own_model: GPT2) -> None:
    assert_tied(own_model.to("meta").to_empty(device="cpu"))


# ---- another head, frozen layers


def test_another_head_is_a_plain_assignment(own_model: GPT2, token_ids: Tensor) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, N_CLASSES)
    assert own_model(token_ids).shape == (*token_ids.shape, N_CLASSES)


def test_another_head_unties(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, N_CLASSES)
    assert {"out_head.weight", "out_head.bias"} < own_model.state_dict().keys()


def test_another_head_leaves_the_hidden_states(
    own_model: GPT2, tiny_model: GPT2, token_ids: Tensor
) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, N_CLASSES)
    assert torch.equal(own_model.hidden_states(token_ids), tiny_model.hidden_states(token_ids))


def test_only_what_is_thawed_gets_a_gradient(own_model: GPT2, token_ids: Tensor) -> None:
    for parameter in own_model.parameters():
        parameter.requires_grad = False
    own_model.out_head = nn.Linear(TINY.emb_dim, N_CLASSES)
    for module in (own_model.trf_blocks[-1], own_model.final_norm):
        for parameter in module.parameters():
            parameter.requires_grad = True

    own_model(token_ids).square().mean().backward()

    thawed = (f"trf_blocks.{TINY.n_layers - 1}.", "final_norm.", "out_head.")
    for name, parameter in own_model.named_parameters():
        assert (parameter.grad is not None) == name.startswith(thawed), name
