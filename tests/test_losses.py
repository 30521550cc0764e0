"""The next-token losses: three forms give one number, however the work is cut into pieces."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conftest import TINY, enlarge, random_ids
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from gpt2mini import GPT2, GPT2Config
from gpt2mini.checks import check_in_vocabulary
from gpt2mini.data.text import Batch, pad_batch
from gpt2mini.losses import (
    IGNORED,
    check_labels_not_shifted,
    chunked_next_token_loss,
    dpo_loss,
    hidden_states_and_head,
    kl_from_samples,
    last_token_loss,
    next_token_loss,
    pairwise_reward_loss,
    sequence_logprobs,
)
from gpt2mini.model import TiedHead

EMB, VOCAB = 6, 11
SCALE = 0.37  # what the sum is multiplied by before backward: a gradient of 1 could hide a mistake
# Relative to the largest entry: sums of some dozen terms in another order; bfloat16 has 8 bits.
PRECISION = {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 2 * 2.0**-8}

chunk_sizes = pytest.mark.parametrize("chunk_size", [1, 7, 10_000, None])
head_kinds = pytest.mark.parametrize("kind", ["tied", "with bias", "without bias"])
seeds = st.integers(0, 1000)


def make_head(kind: str, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> Any:
    torch.manual_seed(0)
    if kind == "tied":
        return TiedHead(nn.Embedding(vocab, EMB, dtype=dtype))
    return nn.Linear(EMB, vocab, bias=kind == "with bias", dtype=dtype)


def make_hidden(labels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*labels.shape, EMB, generator=generator, dtype=dtype, requires_grad=True)


def make_labels(batch: int, tokens: int, ignored_share: float = 0.0, seed: int = 0) -> Tensor:
    """Random ids, a share of them IGNORED at random; the last of all is to be learned."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(VOCAB, (batch, tokens), generator=generator)
    labels[torch.rand(batch, tokens, generator=generator) < ignored_share] = IGNORED
    labels[-1, -1] = VOCAB - 1
    return labels


def parameters_of(head: Any) -> list[Tensor]:
    return [p for p in (head.weight, head.bias) if p is not None]


def value_and_gradients(
    loss: Callable[..., tuple[Tensor, Tensor]], hidden: Tensor, head: nn.Module, labels: Tensor
) -> list[Tensor]:
    """The loss, then its gradients by hidden, weight and bias where these ask for one."""
    inputs = [t for t in (hidden, *parameters_of(head)) if t.requires_grad]
    loss_sum, _ = loss(hidden, head, labels)
    return [loss_sum.detach(), *torch.autograd.grad(SCALE * loss_sum, inputs)]


def dense(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    return next_token_loss(head(hidden), labels)


def chunked(chunk_size: int | None) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda hidden, head, labels: chunked_next_token_loss(hidden, head, labels, chunk_size)


def loop_over_positions(hidden: Tensor, head: nn.Module, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: minus the log-probability of each token to be learned, one after another."""
    terms = []
    for row_logits, row_labels in zip(head(hidden).double(), labels, strict=True):
        for position in range(len(row_labels) - 1):
            if row_labels[position + 1] != IGNORED:
                probabilities = row_logits[position].exp() / row_logits[position].exp().sum()
                terms.append(-probabilities[row_labels[position + 1]].log())
    return torch.stack(terms).sum(), torch.tensor(len(terms))


def assert_near(found: list[Tensor], expected: list[Tensor], precision: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        largest = theirs.abs().max().item()
        assert_close(ours.double(), theirs.double(), atol=precision * largest, rtol=0)


# The textbook form


@given(batch=st.integers(1, 3), tokens=st.integers(2, 9), ignored_share=st.floats(0, 1), seed=seeds)
def test_the_loss_is_that_of_a_loop_over_positions(
    batch: int, tokens: int, ignored_share: float, seed: int
) -> None:
    labels = make_labels(batch, tokens, ignored_share, seed)
    hidden, head = make_hidden(labels), make_head("with bias")
    found, expected = dense(hidden, head, labels), loop_over_positions(hidden, head, labels)
    assert_near([found[0]], [expected[0]], PRECISION[torch.float32])
    assert found[1] == expected[1]


def test_float64_logits_keep_their_precision() -> None:
    labels = make_labels(3, 9)
    hidden, head = make_hidden(labels, torch.float64), make_head("with bias", torch.float64)
    found, expected = dense(hidden, head, labels), loop_over_positions(hidden, head, labels)
    assert_near([found[0]], [expected[0]], PRECISION[torch.float64])


def test_bfloat16_logits_are_summed_in_float32() -> None:
    labels = make_labels(3, 9)
    hidden, head = make_hidden(labels, torch.bfloat16), make_head("tied", torch.bfloat16)
    found, expected = dense(hidden, head, labels), loop_over_positions(hidden, head, labels)
    assert_near([found[0]], [expected[0]], PRECISION[torch.float32])


def test_logits_of_the_last_position_and_of_ignored_targets_do_not_count() -> None:
    labels = make_labels(2, 8, ignored_share=0.5)
    logits = torch.randn(2, 8, VOCAB, requires_grad=True)
    next_token_loss(logits, labels)[0].backward()
    asked = torch.cat([labels[:, 1:] != IGNORED, torch.zeros(2, 1, dtype=torch.bool)], dim=1)
    assert logits.grad is not None
    assert_close(logits.grad.abs().sum(dim=2) > 0, asked)


# The chunked form


@chunk_sizes
@head_kinds
@pytest.mark.parametrize("ignored_share", [0.0, 0.5, 0.95])
def test_chunked_value_and_gradients_are_those_of_the_dense_form(
    chunk_size: int | None, kind: str, ignored_share: float
) -> None:
    labels = make_labels(3, 9, ignored_share)
    hidden, head = make_hidden(labels), make_head(kind)
    found = value_and_gradients(chunked(chunk_size), hidden, head, labels)
    expected = value_and_gradients(dense, hidden, head, labels)
    assert_near(found, expected, PRECISION[torch.float32])
    assert chunked(chunk_size)(hidden, head, labels)[1] == dense(hidden, head, labels)[1]


@chunk_sizes
def test_chunked_value_and_gradients_keep_float64(chunk_size: int | None) -> None:
    labels = make_labels(3, 9, ignored_share=0.3)
    hidden, head = make_hidden(labels, torch.float64), make_head("with bias", torch.float64)
    found = value_and_gradients(chunked(chunk_size), hidden, head, labels)
    expected = value_and_gradients(loop_over_positions, hidden, head, labels)
    assert_near(found, expected, PRECISION[torch.float64])


def test_chunked_gradients_are_those_of_finite_differences() -> None:
    labels = make_labels(2, 5, ignored_share=0.3)
    hidden, head = make_hidden(labels, torch.float64), make_head("with bias", torch.float64)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        del head.weight, head.bias  # parameters, in whose place any tensor may then stand
        head.weight, head.bias = weight, bias
        return chunked_next_token_loss(hidden, head, labels, chunk_size=3)[0]

    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_chunked_second_derivatives_are_refused_or_right() -> None:
    labels = make_labels(2, 5)
    hidden, head = make_hidden(labels), make_head("tied")

    def second(loss: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        squared = loss(hidden, head, labels)[0] ** 2  # so that the gradient depends on the loss
        (first,) = torch.autograd.grad(squared, hidden, create_graph=True)
        return torch.autograd.grad(first.square().sum(), hidden)[0]

    expected = second(dense)
    try:
        found = second(chunked(3))
    except RuntimeError:
        return
    assert_near([found], [expected], PRECISION[torch.float32])


@pytest.mark.parametrize("scale", [1.0, SCALE])
def test_going_backward_again_adds_the_same_gradients_again(scale: float) -> None:
    labels = make_labels(3, 9)
    hidden, head = make_hidden(labels), make_head("with bias")
    inputs = [hidden, *parameters_of(head)]
    loss_sum = scale * chunked(4)(hidden, head, labels)[0]
    found = torch.autograd.grad(loss_sum, inputs, retain_graph=True)
    once = [gradient.clone() for gradient in found]
    for _ in range(3):
        loss_sum.backward(retain_graph=True)
    assert_near(
        [t.grad for t in inputs if t.grad is not None],
        [3 * g for g in once],
        PRECISION[torch.float32],
    )


@chunk_sizes
@pytest.mark.parametrize("kind", ["tied", "with bias"])
def test_chunked_under_autocast_is_the_float32_loss_within_bfloat16(
    chunk_size: int | None, kind: str
) -> None:
    labels = make_labels(3, 30, ignored_share=0.3)
    hidden, head = make_hidden(labels), make_head(kind)
    expected = value_and_gradients(dense, hidden, head, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(chunked(chunk_size), hidden, head, labels)
    assert_near(found, expected, PRECISION[torch.bfloat16])


def test_chunked_under_autocast_gives_gradients_in_the_dtypes_of_the_parameters() -> None:
    labels = make_labels(3, 9)
    hidden, head = make_hidden(labels), make_head("with bias")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(chunked(2), hidden, head, labels)
    assert {tensor.dtype for tensor in found} == {torch.float32}


def test_many_chunks_of_bfloat16_weights_are_as_exact_as_one() -> None:
    labels = make_labels(4, 50)  # 196 targets in 49 chunks: about what 4 x 1024 tokens get
    hidden, head = make_hidden(labels, torch.bfloat16), make_head("with bias", torch.bfloat16)
    exact = value_and_gradients(
        dense, hidden.detach().double().requires_grad_(), head.double(), labels
    )
    head.bfloat16()
    for one, many, expected in zip(
        value_and_gradients(chunked(None), hidden, head, labels),
        value_and_gradients(chunked(4), hidden, head, labels),
        exact,
        strict=True,
    ):
        assert (many - expected).abs().max() <= 2 * (one - expected).abs().max()


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias"])
def test_frozen_inputs_get_no_gradient_and_the_others_the_right_one(frozen: str) -> None:
    labels = make_labels(3, 9, ignored_share=0.3)
    hidden, head = make_hidden(labels), make_head("with bias")
    inputs = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name not in frozen)
    expected = value_and_gradients(dense, hidden, head, labels)
    found = value_and_gradients(chunked(4), hidden, head, labels)
    assert_near(found, expected, PRECISION[torch.float32])
    chunked(4)(hidden, head, labels)[0].backward()
    assert all((inputs[name].grad is None) == (name in frozen) for name in inputs)


@pytest.mark.parametrize("without_gradients", [torch.no_grad, torch.inference_mode])
def test_the_chunked_value_is_the_same_without_gradients(without_gradients: Any) -> None:
    labels = make_labels(3, 9)
    hidden, head = make_hidden(labels), make_head("with bias")
    expected = chunked(4)(hidden, head, labels)[0].detach()
    with without_gradients():
        found = chunked(4)(hidden, head, labels)[0]
    assert not found.requires_grad
    assert_close(found, expected, rtol=0, atol=0)


def test_the_chunked_form_changes_none_of_its_inputs() -> None:
    labels = make_labels(3, 9, ignored_share=0.3)
    hidden, head = make_hidden(labels), make_head("with bias")
    inputs = [hidden, head.weight, head.bias, labels]
    before = [tensor.detach().clone() for tensor in inputs]
    value_and_gradients(chunked(4), hidden, head, labels)
    assert all(torch.equal(now, then) for now, then in zip(inputs, before, strict=True))


# Heads that are not linear


class Capped(nn.Linear):
    """Multiplies, and then does something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 3 * (super().forward(input) / 3).tanh()


def linear_with_hook() -> nn.Module:
    head = nn.Linear(EMB, VOCAB)
    head.register_forward_hook(lambda module, arguments, output: 2 * output)
    return head


OTHER_HEADS: dict[str, Callable[[], nn.Module]] = {
    "Sequential of one": lambda: nn.Sequential(nn.Linear(EMB, VOCAB)),
    "norm first": lambda: nn.Sequential(nn.LayerNorm(EMB), nn.Linear(EMB, VOCAB)),
    "MLP": lambda: nn.Sequential(nn.Linear(EMB, 5), nn.GELU(), nn.Linear(5, VOCAB)),
    "subclass": lambda: Capped(EMB, VOCAB),
    "hook": linear_with_hook,
}
other_heads = pytest.mark.parametrize("kind", OTHER_HEADS)


@chunk_sizes
@other_heads
def test_any_head_has_the_value_and_gradients_of_the_dense_form(
    kind: str, chunk_size: int | None
) -> None:
    torch.manual_seed(0)
    labels, head = make_labels(3, 9, ignored_share=0.3), OTHER_HEADS[kind]()
    hidden = make_hidden(labels)
    inputs = [hidden, *head.parameters()]
    losses = [chunked(chunk_size)(hidden, head, labels), dense(hidden, head, labels)]
    found, expected = (
        [loss_sum.detach(), *torch.autograd.grad(SCALE * loss_sum, inputs)]
        for loss_sum, _ in losses
    )
    assert_near(found, expected, PRECISION[torch.float32])


def test_an_edited_tied_head_is_not_passed_over(own_model: GPT2) -> None:
    """`TiedHead.forward` as someone may edit it."""
    ids = random_ids(2, 9)

    class ScaledTiedHead(TiedHead):
        def forward(self, hidden: Tensor) -> Tensor:
            return nn.functional.linear(hidden, 0.5 * self.weight) + 0

    own_model.out_head = ScaledTiedHead(own_model.tok_emb)
    expected = next_token_loss(own_model(ids), ids)[0]
    found = chunked_next_token_loss(own_model.hidden_states(ids), own_model.out_head, ids)[0]
    assert_close(found, expected)


def test_dropout_in_a_head_is_the_same_in_backward() -> None:
    """Computed again there, it has to drop the same."""
    labels = make_labels(3, 9)
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(EMB, VOCAB), nn.Identity())
    hidden = make_hidden(labels, torch.float64)
    head.double()

    def loss(hidden: Tensor) -> Tensor:
        torch.manual_seed(0)
        return chunked_next_token_loss(hidden, head, labels, chunk_size=4)[0]

    assert torch.autograd.gradcheck(loss, (hidden,))


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else (result,):
            if isinstance(output, Tensor):
                numbers = output.untyped_storage().nbytes() // output.element_size()
                self.elements = max(self.elements, numbers)
        return result


def largest_tensor(loss: Callable[..., tuple[Tensor, Tensor]], labels: Tensor, vocab: int) -> int:
    hidden, head = make_hidden(labels), make_head("tied", vocab=vocab)
    with LargestTensor() as largest:
        value_and_gradients(loss, hidden, head, labels)
    return largest.elements


def test_the_chunked_form_holds_few_logits_at_a_time() -> None:
    labels, vocab = make_labels(2, 257), 50_257  # 512 targets of GPT-2's vocabulary
    assert largest_tensor(dense, labels, vocab) >= 512 * vocab  # the recorder does record
    assert largest_tensor(chunked(None), labels, vocab) == 256 * vocab  # logits: 51 MB in float32


def test_ignored_positions_cost_no_logits() -> None:
    labels, vocab = torch.full((2, 129), IGNORED), 5000
    labels[:, -2] = 1  # two targets; the weight itself has EMB columns
    assert largest_tensor(chunked(None), labels, vocab) <= EMB * vocab


@pytest.mark.parametrize("kind", ["norm first", "subclass"])
def test_the_logits_of_any_head_exist_a_few_at_a_time(kind: str) -> None:
    torch.manual_seed(0)
    labels, head = make_labels(2, 513), OTHER_HEADS[kind]()
    hidden = make_hidden(labels)
    with LargestTensor() as largest:
        chunked(128)(hidden, head, labels)[0].backward()
    assert largest.elements < 1024 * VOCAB


# Both forms


@pytest.mark.parametrize("loss", [dense, chunked(None)], ids=["dense", "chunked"])
@pytest.mark.parametrize(
    "labels",
    [torch.full((2, 5), IGNORED), torch.tensor([[3, IGNORED, IGNORED]]), torch.ones(3, 1).long()],
    ids=["all ignored", "only the first token, which nothing predicts", "one token a row"],
)
def test_labels_with_nothing_to_learn_are_refused(loss: Any, labels: Tensor) -> None:
    with pytest.raises(ValueError, match="no label to learn from"):
        loss(make_hidden(labels), make_head("tied"), labels)


@pytest.mark.parametrize("loss", [dense, chunked(None)], ids=["dense", "chunked"])
@pytest.mark.parametrize("kind", ["tied", "with bias"])
@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_labels_outside_the_vocabulary_are_refused(loss: Any, kind: str, wrong: int) -> None:
    labels = torch.tensor([[1, IGNORED, wrong, VOCAB - 1]])
    message = rf"label {wrong} is outside the vocabulary of 11 \(0 to 10\).*-100, not -1"
    with pytest.raises(ValueError, match=message):
        loss(make_hidden(labels), make_head(kind), labels)


@pytest.mark.parametrize("loss", [dense, chunked(None)], ids=["dense", "chunked"])
def test_the_first_and_the_last_token_of_the_vocabulary_are_labels(loss: Any) -> None:
    labels = torch.tensor([[IGNORED, 0, IGNORED, VOCAB - 1]])
    assert loss(make_hidden(labels), make_head("tied"), labels)[1] == 2


@pytest.mark.usefixtures("no_shape_checks")
def test_checking_the_labels_breaks_no_compiled_graph() -> None:
    torch.compile(check_in_vocabulary, backend="eager", fullgraph=True)(make_labels(3, 9), VOCAB)


def flat(gradients: Iterable[Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def model_loss(model: GPT2, batch: Batch) -> tuple[Tensor, Tensor]:
    hidden = model.hidden_states(batch.token_ids, batch.attention_mask)
    return chunked_next_token_loss(hidden, model.out_head, batch.labels, chunk_size=5)


@pytest.mark.parametrize("lengths", [[[3], [12], [7]], [[9, 4], [2, 2], [11, 5]]], ids=repr)
def test_ragged_micro_batches_add_up_to_one_padded_batch(
    own_model: GPT2, lengths: list[list[int]]
) -> None:
    model = own_model.double()
    batches = [[random_ids(n, seed=n) for n in rows] for rows in lengths]
    whole_sum, whole_count = model_loss(model, pad_batch([row for rows in batches for row in rows]))
    whole = torch.autograd.grad(whole_sum, list(model.parameters()))
    parts = [model_loss(model, pad_batch(rows)) for rows in batches]
    parts_sum = torch.stack([loss_sum for loss_sum, _ in parts]).sum()
    found = torch.autograd.grad(parts_sum, list(model.parameters()))
    assert sum(int(count) for _, count in parts) == whole_count
    assert_near([parts_sum.detach()], [whole_sum.detach()], 1e-6)
    # One vector, since the gradient of the key biases is zero: there is nothing to be relative to.
    assert_near([flat(found)], [flat(whole)], 1e-6)


# The model's own forward, whatever it does with the logits


class SoftCapped(GPT2):
    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return 3 * (super().forward(*arguments, **options) / 3).tanh()


class Scaled(GPT2):
    """By a learned scale, which at first changes nothing."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return super().forward(*arguments, **options) * self.scale


class Barred(GPT2):
    """Changes logits in place."""

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        logits = super().forward(*arguments, **options)
        logits[..., 7] = -5.0
        return logits


def with_own_forward() -> GPT2:
    model, plain = GPT2(TINY), GPT2.forward
    vars(model)["forward"] = lambda *a, **k: (
        plain(model, *a, **k) + 0.1 * model.tok_emb.weight[:, 0]
    )
    return model


def with_hook(change: Callable[[Tensor], Tensor | None], name: str = "") -> Callable[[], GPT2]:
    def build() -> GPT2:
        model = GPT2(TINY)
        hook = lambda module, arguments, output: change(output)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
        return model

    return build


def with_head(make: Callable[[], nn.Module]) -> Callable[[], GPT2]:
    def build() -> GPT2:
        model = GPT2(TINY)
        model.out_head = make()
        return model

    return build


@torch.no_grad()
def look(output: Tensor) -> None:
    assert output.max() > output.min()


MODELS: dict[str, Callable[[], GPT2]] = {
    "plain": lambda: GPT2(TINY),
    "soft-capped by a subclass": lambda: SoftCapped(TINY),
    "learned scale": lambda: Scaled(TINY),
    "changed in place": lambda: Barred(TINY),
    "own forward": with_own_forward,
    "hook that changes": with_hook(lambda output: 2 * output),
    "hook that changes in place": with_hook(lambda output: output.mul_(2)),
    "hook that looks without gradients": with_hook(look),
    "hook on the head": with_hook(lambda output: output + 0.1 * output.square(), "out_head"),
    "hook on the last norm": with_hook(lambda output: 2 * output, "final_norm"),
    "head with bias": with_head(lambda: nn.Linear(TINY.emb_dim, TINY.vocab_size)),
    "head of two layers": with_head(
        lambda: nn.Sequential(nn.Linear(TINY.emb_dim, 5), nn.GELU(), nn.Linear(5, TINY.vocab_size))
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_the_loss_is_that_of_the_model_s_own_logits(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]().train(training)
    enlarge(model)
    batch = pad_batch([random_ids(12), random_ids(9, seed=1)])
    parameters = list(model.parameters())
    labels = batch.labels
    expected, _ = next_token_loss(model(batch.token_ids, batch.attention_mask), labels)
    hidden, head = hidden_states_and_head(model, batch.token_ids, batch.attention_mask)
    found, _ = chunked_next_token_loss(hidden, head, labels, chunk_size=5)
    assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert_near(
        [flat(torch.autograd.grad(found, parameters))],
        [flat(torch.autograd.grad(expected, parameters))],
        1e-5,
    )
    again = model(batch.token_ids, batch.attention_mask)  # the model has its own head back
    assert type(again) is Tensor
    assert_close(next_token_loss(again, labels)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_log_probabilities_are_those_of_the_model_s_own_logits(kind: str) -> None:
    torch.manual_seed(0)
    model = MODELS[kind]()
    ids, response = random_ids(2, 9), torch.arange(9).expand(2, 9) > 3
    logprobs = model(ids)[:, :-1].log_softmax(dim=2).gather(2, ids[:, 1:, None])[..., 0]
    expected = (logprobs * response[:, 1:]).sum(dim=1)
    found, _ = sequence_logprobs(model, ids, None, response)
    assert_close(found, expected, rtol=1e-5, atol=1e-4)
    inputs = list(model.parameters())
    both = (flat(torch.autograd.grad((found**2).sum(), inputs)) for found in (found, expected))
    assert_near([next(both)], [next(both)], 1e-5)


def test_a_plain_model_s_logits_never_exist(own_model: GPT2) -> None:
    ids = random_ids(8, 64)
    with LargestTensor() as largest:
        hidden, head = hidden_states_and_head(own_model, ids)
        chunked_next_token_loss(hidden, head, ids, chunk_size=8)[0].backward()
    assert largest.elements < 8 * 64 * TINY.vocab_size


def test_the_head_is_back_after_an_error(own_model: GPT2) -> None:
    with pytest.raises(ValueError, match="outside the vocabulary"):
        hidden_states_and_head(own_model, torch.full((1, 3), TINY.vocab_size))
    assert type(own_model(random_ids(1, 3))) is Tensor


# Labels that are shifted already


def masked(labels: Tensor, prompt_tokens: int) -> Tensor:
    """The labels with the first tokens of every row ignored, as for a prompt."""
    return torch.cat(
        [torch.full_like(labels[:, :prompt_tokens], IGNORED), labels[:, prompt_tokens:]], 1
    )


@given(
    batch=st.integers(1, 3),
    tokens=st.integers(3, 9),
    last=st.sampled_from([IGNORED, 0]),
    prompt=st.integers(0, 1),
    seed=seeds,
)
def test_shifted_labels_are_refused(
    batch: int, tokens: int, last: int, prompt: int, seed: int
) -> None:
    ids = random_ids(batch, tokens, seed=seed)
    shifted = torch.cat([ids[:, 1:], torch.full((batch, 1), last)], dim=1)
    assume(not torch.equal(ids[:, prompt:-1], ids[:, prompt + 1 :]))  # not of one repeated token
    with pytest.raises(ValueError, match="already shifted"):
        check_labels_not_shifted(ids, masked(shifted, prompt))


@given(batch=st.integers(1, 3), tokens=st.integers(1, 9), prompt=st.integers(0, 9), seed=seeds)
def test_right_labels_pass(batch: int, tokens: int, prompt: int, seed: int) -> None:
    ids = random_ids(batch, tokens, seed=seed)
    check_labels_not_shifted(ids, masked(ids, prompt))


@given(tokens=st.integers(1, 9), prompt=st.integers(0, 9))
def test_right_labels_of_one_repeated_token_pass(tokens: int, prompt: int) -> None:
    ids = torch.full((2, tokens), TINY.vocab_size - 1)
    check_labels_not_shifted(ids, masked(ids, prompt))


def test_right_labels_of_padded_rows_pass() -> None:
    batch = pad_batch([random_ids(9), random_ids(4, seed=1)])
    check_labels_not_shifted(batch.token_ids, batch.labels)


def test_shifted_labels_of_padded_rows_are_refused() -> None:
    batch = pad_batch([random_ids(9), random_ids(4, seed=1)])
    shifted = torch.cat([batch.labels[:, 1:], torch.full((2, 1), IGNORED)], dim=1)
    with pytest.raises(ValueError, match="already shifted"):
        check_labels_not_shifted(batch.token_ids, shifted)


def test_kl_of_samples_is_never_negative() -> None:
    logprobs = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    assert (kl_from_samples(logprobs, torch.zeros_like(logprobs)) >= 0).all()


def test_ids_of_32_bits_are_learned_from(own_model: GPT2) -> None:
    ids = random_ids(2, 9)
    expected = next_token_loss(own_model(ids), ids)[0]
    found = next_token_loss(own_model(ids.int()), ids.int())[0]
    assert torch.equal(found, expected)


def test_half_a_reference_is_refused() -> None:
    two = torch.tensor([-1.0, -2.0])
    with pytest.raises(ValueError, match="of both answers, or of neither"):
        dpo_loss(two, two, reference_chosen=two)


@pytest.mark.usefixtures("no_shape_checks")
def test_labels_of_another_shape_are_refused(own_model: GPT2) -> None:
    """Shifted by the reader, as other libraries ask it; by half of them, perhaps."""
    ids = random_ids(2, 9)
    with pytest.raises(ValueError, match=r"labels must have the shape \(2, 9\), not \(2, 8\)"):
        next_token_loss(own_model(ids), ids[:, 1:])
    with pytest.raises(ValueError, match=r"of the last token alone, logits\[:, None\]"):
        last_token_loss(own_model(ids)[:, -1], torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"labels must have the shape \(2,\), not \(3,\)"):
        last_token_loss(own_model(ids), torch.tensor([0, 1, 1]))


@pytest.mark.usefixtures("no_shape_checks")
def test_rewards_are_not_stretched_to_fit() -> None:
    """A head gives (pairs, 1), which torch would subtract from (pairs) to a square."""
    column, two = torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 5.0])
    for chosen, rejected in ((column, two), (two, column), (two, two[:1])):
        with pytest.raises(ValueError, match="must have the shape"):
            pairwise_reward_loss(chosen, rejected)
        with pytest.raises(ValueError, match="must have the shape"):
            dpo_loss(chosen, rejected, two, two)
    with pytest.raises(ValueError, match="reference's log-probabilities must have the shape"):
        dpo_loss(two, two, column, column)
