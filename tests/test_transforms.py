"""torch's compilers, exporters and function transforms: each takes the model and agrees with it."""

import copy
import inspect
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, enlarge, random_ids
from safetensors import safe_open
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn import functional as F
from torch.optim import SGD

from gpt2mini import GPT2, generate
from gpt2mini.cache import KeyValueCache
from gpt2mini.checks import holds
from gpt2mini.classification import last_token_logits
from gpt2mini.data.text import Batch
from gpt2mini.losses import chunked_next_token_loss, last_token_loss, next_token_loss
from gpt2mini.model import MultiHeadAttention, TiedHead, TransformerBlock
from gpt2mini.training import Settings, train
from gpt2mini.training.checkpoints import RunCheckpoints
from gpt2mini.training.memory import compiled_blocks

pytestmark = pytest.mark.filterwarnings("ignore")  # the compilers and exporters warn of themselves

Call = Callable[..., Tensor]
Transform = Callable[[nn.Module], Call]
SMALL = replace(TINY, n_layers=2)
assert_close = partial(torch.testing.assert_close, atol=2e-5, rtol=2e-5)

# Called in turn with one transformed model: a second and a third length, one text and several.
SHAPES = [(2, 9), (3, 24), (2, 40), (1, 5)]


def padded(batch: int, tokens: int) -> Tensor:
    """A mask whose rows are padded on the left, each by another number of tokens."""
    padding = torch.arange(batch)[:, None] % max(tokens - 1, 1)
    return (torch.arange(tokens) >= padding).long()


@pytest.fixture(scope="module")
def tiny_model() -> GPT2:
    """Of two blocks, which take less time to compile than three."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPT2(SMALL)
    enlarge(model)
    return model.eval()


@pytest.fixture
def own_model(tiny_model: GPT2) -> GPT2:
    """A copy that a test may change."""
    return copy.deepcopy(tiny_model)


@pytest.fixture(autouse=True, scope="module")
def no_decorators() -> Iterator[None]:
    """What users have: functions without the shape checks of the tests, through which a compiler
    would trace at each call."""
    with pytest.MonkeyPatch.context() as patch:
        names = [name for name in sys.modules if name.startswith("gpt2mini")]
        for module in [sys.modules[name] for name in (__name__, *names)]:
            for owner in [module, *filter(inspect.isclass, vars(module).values())]:
                for name, value in list(vars(owner).items()):
                    if is_decorated(value):
                        patch.setattr(owner, name, inspect.unwrap(value))
                    elif isinstance(value, property) and value.fget and is_decorated(value.fget):
                        patch.setattr(owner, name, property(inspect.unwrap(value.fget), value.fset))
        yield


def is_decorated(value: object) -> bool:
    return inspect.isfunction(value) and "jaxtyping" in value.__code__.co_filename


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


# ---- calls of any shape


def compiled(**options: Any) -> Transform:
    def transform(model: nn.Module) -> Call:
        return torch.compile(model, **{"backend": "eager", **options})

    return transform


def exported(**options: Any) -> Transform:
    """`torch.export` of (2, 9) token ids with a batch and a length that vary, also with a mask."""

    def transform(model: nn.Module) -> Call:
        sizes, programs = {0: Dim.AUTO, 1: Dim.AUTO}, {}
        for arguments in ((random_ids(2, 9),), (random_ids(2, 9), padded(2, 9))):
            dynamic = tuple(sizes for _ in arguments)
            program = export(model, arguments, dynamic_shapes=dynamic, **options)
            programs[len(arguments)] = program.module()
        return lambda *arguments: programs[len(arguments)](*arguments)

    return transform


def through_onnx(model: nn.Module) -> Call:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    sessions = {}
    for arguments in ((random_ids(2, 9),), (random_ids(2, 9), padded(2, 9))):
        names = ["token_ids", "attention_mask"][: len(arguments)]
        program = torch.onnx.export(
            model,
            arguments,
            input_names=names,
            dynamic_shapes=tuple({0: Dim.AUTO, 1: Dim.AUTO} for _ in arguments),
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        written = program.model_proto.SerializeToString()
        sessions[len(arguments)] = names, onnxruntime.InferenceSession(written)

    def call(*arguments: Tensor) -> Tensor:
        names, session = sessions[len(arguments)]
        inputs = {name: x.numpy() for name, x in zip(names, arguments, strict=True)}
        return torch.from_numpy(session.run(None, inputs)[0])

    return call


def traced(model: nn.Module) -> Call:
    of_ids = torch.jit.trace(model, (random_ids(2, 9),))
    of_both = torch.jit.trace(model, (random_ids(2, 9), padded(2, 9)))
    return lambda *arguments: (of_ids if len(arguments) == 1 else of_both)(*arguments)


def with_functional_call(model: nn.Module) -> Call:
    """The weights come from outside; the model itself has others."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    other = enlarge(copy.deepcopy(model), seed=3)
    return lambda *arguments: functional_call(other, weights, arguments)


def over_inputs(model: nn.Module) -> Call:
    """`vmap` over the texts of the batch."""

    def call(*arguments: Tensor) -> Tensor:
        return vmap(lambda *row: model(*(x[None] for x in row))[0])(*arguments)

    return call


def replicated(model: nn.Module) -> Call:
    """What `nn.DataParallel` does for each GPU, with weights of their own. The first model's
    weights are spoiled: nothing may still read them."""
    model = copy.deepcopy(model)
    replicas = {part: part._replicate_for_data_parallel() for part in model.modules()}
    for part, replica in replicas.items():
        for name, child in part.named_children():
            setattr(replica, name, replicas[child])
        for name, parameter in part.named_parameters(recurse=False):
            setattr(replica, name, parameter.detach().clone())
    enlarge(model, seed=3)
    return replicas[model]


def in_inference_mode(model: nn.Module) -> Call:
    def call(*arguments: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(*arguments)

    return call


def saved_whole(model: nn.Module) -> Call:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ANY_SHAPE: dict[str, Transform] = {
    "compile": compiled(),
    "compile, whole graph": compiled(fullgraph=True),
    "compile, whole graph, dynamic": compiled(fullgraph=True, dynamic=True, backend="aot_eager"),
    "export": exported(),
    "export, strict": exported(strict=True),
    "jit.trace": traced,
    "functional_call": with_functional_call,
    "vmap": over_inputs,
    "inference_mode": in_inference_mode,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
    "DataParallel's replica": replicated,
    "DataParallel": nn.DataParallel,
    "ONNX": through_onnx,
}


@torch.no_grad()
@pytest.mark.parametrize("transform", ANY_SHAPE.values(), ids=ANY_SHAPE)
def test_a_transformed_model_gives_the_logits_of_the_model(
    tiny_model: GPT2, transform: Transform
) -> None:
    call = transform(tiny_model)
    for shape in SHAPES:
        ids, mask = random_ids(*shape, seed=sum(shape)), padded(*shape)
        assert_close(call(ids), tiny_model(ids))
        assert_close(call(ids, mask), tiny_model(ids, mask))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@torch.no_grad()
def test_the_compiler_of_torch_gives_the_logits_of_the_model(tiny_model: GPT2) -> None:
    call = torch.compile(tiny_model, fullgraph=True, dynamic=True)
    for shape in SHAPES[:2]:
        ids = random_ids(*shape)
        assert_close(call(ids), tiny_model(ids))


def test_a_length_of_one_can_be_exported_too(tiny_model: GPT2) -> None:
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=1, max=TINY.context_length)}
    program = export(tiny_model, (random_ids(2, 9),), dynamic_shapes=(sizes,)).module()
    for shape in ((1, 1), (3, 1), (1, 7), (2, TINY.context_length)):
        assert_close(program(random_ids(*shape)), tiny_model(random_ids(*shape)))


def test_an_exported_program_of_one_shape(tiny_model: GPT2) -> None:
    for arguments in ((random_ids(2, 9),), (random_ids(2, 9), padded(2, 9))):
        found = export(tiny_model, arguments).module()(*arguments)
        assert_close(found, tiny_model(*arguments))


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_six_lengths_take_two_graphs_without_a_break(tiny_model: GPT2, masked: bool) -> None:
    """The first length is compiled as it is, the second for all lengths."""
    graphs = []

    def count(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    call = torch.compile(tiny_model, backend=count)
    for tokens in (9, 12, 20, 31, 40, 64):
        call(random_ids(2, tokens), *([padded(2, tokens)] if masked else []))
    assert len(graphs) == 2
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0


def test_compiled_blocks_of_six_lengths_have_no_break(tiny_model: GPT2) -> None:
    with compiled_blocks(tiny_model):
        for block in tiny_model.trf_blocks:
            block.compile(backend="eager")  # the same without a C++ compiler
        for tokens in (9, 12, 20, 31, 40, 64):
            tiny_model(random_ids(2, tokens)).sum().backward()
    tiny_model.zero_grad(set_to_none=True)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# ---- inputs in place of token ids


class PlainAttention(MultiHeadAttention):
    def forward(  # type: ignore[override]  # by somebody who knows nothing of `last_only`
        self, x: Tensor, attn_mask: Any = None, cache: Any = None
    ) -> Tensor:
        return super().forward(x, attn_mask, cache)


class PlainBlock(TransformerBlock):
    def forward(  # type: ignore[override]  # the same
        self, x: Tensor, attn_mask: Any = None, cache: Any = None
    ) -> Tensor:
        return super().forward(x, attn_mask, cache)


@pytest.mark.parametrize("part", ["block", "attention"])
@pytest.mark.parametrize("compile", ["model", "blocks"])
def test_compiled_parts_of_your_own_generate_and_classify(
    part: str, compile: str, own_model: GPT2
) -> None:
    last = own_model.trf_blocks[-1]
    if part == "block":
        last.__class__ = PlainBlock
    else:
        last.get_submodule("attn").__class__ = PlainAttention
    ids, model = random_ids(2, 9), own_model
    expected = generate(model, ids, 4, temperature=0).token_ids
    if compile == "model":
        model = torch.compile(own_model, backend="eager")  # type: ignore[assignment]
    else:
        last.compile(backend="eager")
    assert torch.equal(generate(model, ids, 4, temperature=0).token_ids, expected)
    with torch.no_grad():
        assert_close(last_token_logits(model, ids), model(ids)[:, -1])


def of_vectors(model: GPT2) -> Call:
    """The model as a function of the tokens' vectors."""
    return lambda ids, mask=None: model(None, mask, inputs_embeds=model.tok_emb(ids))


@torch.no_grad()
def test_vectors_in_place_of_token_ids(tiny_model: GPT2) -> None:
    ids, mask = random_ids(3, 12), padded(3, 12)
    found, expected = of_vectors(tiny_model), tiny_model
    assert torch.equal(found(ids), expected(ids))
    assert torch.equal(found(ids, mask), expected(ids, mask))
    vectors = tiny_model.tok_emb(ids)
    assert torch.equal(tiny_model(inputs_embeds=vectors), tiny_model(ids))
    hidden = tiny_model.hidden_states(inputs_embeds=vectors, last_only=True)
    assert torch.equal(hidden, tiny_model.hidden_states(ids, last_only=True))
    compile = torch.compile(of_vectors(tiny_model), backend="eager", fullgraph=True)
    assert_close(compile(ids), expected(ids))


@torch.no_grad()
def test_vectors_then_token_ids_with_a_cache(tiny_model: GPT2) -> None:
    """A soft prompt, continued by tokens."""
    ids = random_ids(2, 10)
    cache = KeyValueCache(SMALL, 2, 10)
    tiny_model(inputs_embeds=tiny_model.tok_emb(ids[:, :6]), cache=cache)
    assert_close(tiny_model(ids[:, 6:], cache=cache), tiny_model(ids)[:, 6:])


def test_gradients_reach_the_vectors(tiny_model: GPT2) -> None:
    """Against a finite difference."""
    model = copy.deepcopy(tiny_model).double()
    vectors = model.tok_emb(random_ids(1, 5)).detach().requires_grad_()
    direction = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(0)).double()

    def score(x: Tensor) -> Tensor:
        return model(inputs_embeds=x).log_softmax(-1)[0, -1, 7]

    (gradient,) = torch.autograd.grad(score(vectors), vectors)
    step = 1e-5
    with torch.no_grad():
        change = score(vectors + step * direction) - score(vectors - step * direction)
    assert_close((gradient * direction).sum(), change / (2 * step), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give token_ids, inputs_embeds or stream"),
        ({"token_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, 48)}, "only one"),
        ({"inputs_embeds": torch.zeros(1, 3, 47)}, r"shape \(batch, tokens, 48\)"),
        ({"inputs_embeds": torch.zeros(3, 48)}, r"shape \(batch, tokens, 48\)"),
        ({"inputs_embeds": torch.zeros(1, 3, 48).long()}, "token ids are token_ids"),
        ({"inputs_embeds": torch.zeros(1, 65, 48)}, "65 tokens do not fit the context of 64"),
    ],
)
def test_a_start_that_is_none_or_two_is_refused(
    tiny_model: GPT2, arguments: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


# ---- losses and gradients


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    loss_sum, count = next_token_loss(model(ids), ids)
    return loss_sum / count


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_gradients_of_each_text_by_vmap(tiny_model: GPT2) -> None:
    """Per-sample gradients, as differential privacy and influence functions need them."""
    ids = random_ids(3, 11)

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        loss_sum, count = next_token_loss(
            functional_call(tiny_model, weights, (row[None],)), row[None]
        )
        return loss_sum / count

    found = vmap(grad(loss), in_dims=(None, 0))(weights_of(tiny_model), ids)
    for number, row in enumerate(ids):
        parameters = dict(tiny_model.named_parameters())
        own = torch.autograd.grad(loss_of(tiny_model, row[None]), list(parameters.values()))
        for name, gradient in zip(parameters, own, strict=True):
            assert_close(found[name][number], gradient)


def test_an_ensemble_by_vmap(tiny_model: GPT2) -> None:
    """One call of several models of one shape, stacked."""
    models = [tiny_model, enlarge(copy.deepcopy(tiny_model), seed=5)]
    weights, buffers = stack_module_state(models)
    ids = random_ids(2, 8)
    found = vmap(lambda w, b: functional_call(tiny_model, (w, b), (ids,)))(weights, buffers)
    assert_close(found, torch.stack([model(ids) for model in models]))


def test_the_jacobian_of_the_logits(tiny_model: GPT2) -> None:
    vectors = tiny_model.tok_emb(random_ids(1, 4)).detach()
    found = jacrev(lambda x: tiny_model(inputs_embeds=x)[0, -1])(vectors)
    x = vectors.clone().requires_grad_()
    (own,) = torch.autograd.grad(tiny_model(inputs_embeds=x)[0, -1, 5], x)
    assert_close(found[5], own)


LOSSES: dict[str, Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "next token": lambda model, ids, labels: next_token_loss(model(ids), labels),
    "last token": lambda model, ids, labels: last_token_loss(model(ids), labels[:, -1]),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_compiled_loss_and_its_gradients(tiny_model: GPT2, loss: Callable) -> None:
    call = torch.compile(loss, backend="aot_eager", fullgraph=True)
    parameters = list(tiny_model.parameters())
    for tokens in (8, 13):
        ids = random_ids(3, tokens)
        labels = ids.clone()
        labels[0, :4] = -100
        found, expected = call(tiny_model, ids, labels), loss(tiny_model, ids, labels)
        assert_close(found, expected)
        ours, theirs = (torch.autograd.grad(x[0], parameters) for x in (found, expected))
        assert_close(ours, theirs, atol=2e-4, rtol=2e-4)


def test_the_chunked_loss_of_compiled_hidden_states(tiny_model: GPT2) -> None:
    hidden_states = torch.compile(tiny_model.hidden_states, backend="aot_eager", fullgraph=True)
    for tokens in (8, 13):
        ids = random_ids(3, tokens)
        found = chunked_next_token_loss(hidden_states(ids), tiny_model.out_head, ids)
        assert_close(found, next_token_loss(tiny_model(ids), ids))
        found[0].backward()
    tiny_model.zero_grad(set_to_none=True)


def test_training_of_a_compiled_model_leaves_files_of_the_model(
    own_model: GPT2, tmp_path: Path
) -> None:
    """`torch.compile` calls the parameters otherwise; the run goes on without it all the same."""
    other, ids = copy.deepcopy(own_model), random_ids(2, 16)
    compiled: Any = torch.compile(own_model, backend="eager")
    losses = iter([3.0, 2.0, 1.0])
    for model, steps in ((compiled, 1), (other, 2)):
        arguments = ([Batch(ids, ids)], [SGD(model.parameters(), 0.1)])
        settings = Settings(steps, schedule=lambda step: 1.0, save_every=1, progress=False)
        evaluate = partial(next, losses)
        train(model, *arguments, settings, evaluate=evaluate, out=tmp_path, resume=steps == 2)
        if model is compiled:
            with safe_open(tmp_path / "best" / "model.safetensors", "pt") as file:
                assert not any("_orig_mod" in name for name in file.keys())  # noqa: SIM118
            assert_close(GPT2.from_pretrained(tmp_path / "best")(ids), own_model.eval()(ids))
    assert next(iter(RunCheckpoints(tmp_path / "checkpoints").all())).name == "step-00000002"


# ---- cached steps


def cached_logits(call: Call, ids: Tensor, mask: Tensor | None, first: int) -> Tensor:
    """The logits of a text read in steps: `first` tokens, then one at a time."""
    cache = KeyValueCache(SMALL, *ids.shape)
    found = [call(ids[:, :first], None if mask is None else mask[:, :first], None, cache)]
    found += [call(ids[:, i : i + 1], None, None, cache) for i in range(first, ids.shape[1])]
    return torch.cat(found, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "compile",
        "compile, whole graph, dynamic",
        "inference_mode",
        "deepcopy",
        "functional_call",
        "DataParallel's replica",
    ],
)
def test_cached_steps_of_a_transformed_model(tiny_model: GPT2, name: str, masked: bool) -> None:
    ids, mask = random_ids(2, 20), padded(2, 20) if masked else None
    found = cached_logits(ANY_SHAPE[name](tiny_model), ids, mask, first=6)
    assert_close(found, tiny_model(ids, mask))


def test_backward_through_cached_chunks(tiny_model: GPT2) -> None:
    """Gradients of a text read in three chunks are those of the text."""
    ids = random_ids(2, 15)
    model = copy.deepcopy(tiny_model)
    cache = KeyValueCache(SMALL, 2, 15)
    chunks = [model(ids[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 15))]
    torch.cat(chunks, dim=1).log_softmax(-1).square().sum().backward()
    whole = copy.deepcopy(tiny_model)
    whole(ids).log_softmax(-1).square().sum().backward()
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, atol=1e-1, rtol=1e-4)


def test_a_cache_filled_under_autograd_serves_generation(tiny_model: GPT2) -> None:
    """The reverse too: a frozen prefix, then tokens that learn."""
    ids = random_ids(2, 12)
    cache = KeyValueCache(SMALL, 2, 12)
    tiny_model(ids[:, :4], cache=cache)
    with torch.no_grad():
        tiny_model(ids[:, 4:8], cache=cache)
    last = tiny_model(ids[:, 8:], cache=cache)
    assert_close(last, tiny_model(ids)[:, 8:])
    last.sum().backward()
    tiny_model.zero_grad(set_to_none=True)


# ---- tensors without values


@pytest.mark.parametrize("masked", [False, True])
def test_shapes_on_the_meta_device(masked: bool) -> None:
    with torch.device("meta"):
        model = GPT2(SMALL)
        ids = torch.zeros(2, 9, dtype=torch.long)
        mask = torch.ones(2, 9, dtype=torch.long) if masked else None
        logits = model(ids, mask)
        assert logits.shape == (2, 9, TINY.vocab_size) and logits.is_meta
        loss_sum, count = next_token_loss(logits, ids)
        assert loss_sum.shape == count.shape == ()
        cache = KeyValueCache(SMALL, 2, 12, device="meta")
        model(ids, mask, cache=cache)
        assert model(ids[:, :1], cache=cache).shape == (2, 1, TINY.vocab_size)
        positions = torch.zeros(2, 9, dtype=torch.long)
        assert model(ids, position_ids=positions).is_meta


@pytest.mark.parametrize("masked", [False, True])
def test_fake_tensors(masked: bool) -> None:
    """How torch plans memory: shapes, without the numbers."""
    with FakeTensorMode():
        model = GPT2(SMALL)
        ids = torch.zeros(2, 9, dtype=torch.long)
        mask = torch.ones(2, 9, dtype=torch.long) if masked else None
        loss_sum, _ = next_token_loss(model(ids, mask), ids)
        loss_sum.backward()
        assert model.tok_emb.weight.grad is not None
        cache = KeyValueCache(SMALL, 2, 12)
        with torch.no_grad():
            model(ids, mask, cache=cache)
            assert model(ids[:, :1], cache=cache).shape == (2, 1, TINY.vocab_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tiny_model: GPT2, dtype: torch.dtype) -> None:
    ids, mask = random_ids(2, 12), padded(2, 12)
    expected = tiny_model(ids, mask).log_softmax(-1)
    with torch.autocast("cpu", dtype):
        plain = tiny_model(ids, mask)
        whole = torch.compile(tiny_model, backend="eager", fullgraph=True)(ids, mask)
        loss_sum, _ = next_token_loss(plain, ids)
    assert plain.dtype == dtype and loss_sum.dtype == torch.float32
    assert_close(whole, plain)
    difference = (plain.float().log_softmax(-1) - expected).abs().mean()
    assert difference < 0.2


# ---- what is refused


@pytest.mark.parametrize("wrong", [-1, TINY.vocab_size])
def test_a_compiled_model_names_an_id_outside_its_vocabulary(tiny_model: GPT2, wrong: int) -> None:
    call = torch.compile(tiny_model, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="outside the vocabulary of 211"):
        call(torch.tensor([[1, wrong, 3]]))


def test_values_are_read_where_there_are_any() -> None:
    assert holds(torch.tensor(True)) and not holds(torch.tensor(False))
    assert not holds(torch.ones(3, device="meta").any())
    with FakeTensorMode():
        assert not holds(torch.ones(3).any())

    def check_inside(x: Tensor) -> Tensor:
        assert not holds(x > 0)
        return x

    vmap(check_inside)(torch.ones(3))


def test_a_model_of_a_dict_is_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"GPT2\(GPT2Config\(\*\*settings\)\)"):
        GPT2({"n_layers": 2})  # type: ignore[arg-type]


# ---- the tie


def test_the_head_follows_an_embedding_assigned_later(own_model: GPT2, tmp_path: Path) -> None:
    own_model.tok_emb = nn.Embedding(TINY.vocab_size, TINY.emb_dim)
    assert isinstance(own_model.out_head, TiedHead)
    assert own_model.out_head.weight is own_model.tok_emb.weight
    assert [name for name in own_model.state_dict() if "out_head" in name] == []
    ids = random_ids(1, 6)
    expected = F.linear(own_model.hidden_states(ids), own_model.tok_emb.weight)
    assert torch.equal(own_model(ids), expected)
    own_model(ids).sum().backward()
    assert all(p.grad is not None for p in own_model.parameters())
    own_model.save_pretrained(tmp_path)
    assert_close(GPT2.from_pretrained(tmp_path)(ids), expected)


@pytest.mark.parametrize(
    "assign",
    [
        lambda model, new: model.add_module("tok_emb", new),
        lambda model, new: model._modules.update(tok_emb=new),
        lambda model, new: setattr(model.tok_emb, "weight", new.weight),
        lambda model, new: model.register_module("tok_emb", new),
    ],
)
def test_the_head_follows_however_the_embedding_is_replaced(
    own_model: GPT2, assign: Callable[[GPT2, nn.Embedding], object]
) -> None:
    assign(own_model, nn.Embedding(TINY.vocab_size, TINY.emb_dim))
    for model in (own_model, copy.deepcopy(own_model), pickle.loads(pickle.dumps(own_model))):
        assert model.out_head.weight is model.tok_emb.weight


def test_a_head_of_your_own_is_left_alone(own_model: GPT2) -> None:
    own_model.out_head = nn.Linear(TINY.emb_dim, 2)
    own_model.tok_emb = nn.Embedding(TINY.vocab_size, TINY.emb_dim)
    assert own_model(random_ids(1, 4)).shape == (1, 4, 2)
    own_model.out_head = TiedHead(own_model.tok_emb)
    assert own_model(random_ids(1, 4)).shape == (1, 4, TINY.vocab_size)


def test_hooks_of_the_tied_head_stay(own_model: GPT2) -> None:
    seen: list[Tensor] = []
    own_model.out_head.register_forward_hook(lambda part, args, output: seen.append(output))
    own_model.tok_emb = nn.Embedding(TINY.vocab_size, TINY.emb_dim)
    logits = own_model(random_ids(1, 4))
    assert len(seen) == 1 and seen[0] is logits


def test_a_head_that_is_no_module_is_refused(own_model: GPT2) -> None:
    with pytest.raises(TypeError):
        own_model.out_head = "none"  # type: ignore[assignment]
