"""Every path through the library beside plain loops over `model(token_ids)`, for any model.

`failures(model)` runs them all. It holds for a changed model as it does for GPT-2: whatever the
model computes, generation, training, classification, evaluation and inspection compute the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from conftest import enlarge
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from gpt2mini import GPT2, GPT2Config, Tokenizer, complete, generate
from gpt2mini.classification import class_logits, last_token_logits
from gpt2mini.classification.frozen import last_token_step, texts_to_train_on
from gpt2mini.data.text import Batch
from gpt2mini.evaluation import forgetting, perplexity
from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.generation import stream
from gpt2mini.inspection import logit_lens, patched, trace
from gpt2mini.losses import next_token_loss, token_logprobs
from gpt2mini.preferences.ppo import ActorCritic
from gpt2mini.quantize import with_rounded_weights
from gpt2mini.tokenizer import train_tokenizer
from gpt2mini.training import activation_checkpointing, next_token_step, recompute_activations
from gpt2mini.training.attention import Bfloat16CPUAttention
from gpt2mini.training.frozen_weights import frozen_weights_cast_once

# Small, but with every number its own; 32 columns, so that int8's kernel takes the matrices.
CONFIG = GPT2Config(vocab_size=257, context_length=72, emb_dim=32, n_heads=4, n_layers=3)
NEW_TOKENS = 24
TEXT = "A change of one line in model.py is in force wherever the model is used."
TOLERANCE = 1e-4
# Of the spread: kernels round activations too; weights are rounded on both sides.
ROUNDING = {"int8": 0.05, "int4": 0.05, "bf16": 0.05, "fp16": 0.002}

Check = Callable[[GPT2], None]
CHECKS: dict[str, Check] = {}


def path(name: str) -> Callable[[Check], Check]:
    """Enter a check under the name that failures are reported with."""

    def enter(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return enter


def failures(model: GPT2, compiled: bool = False) -> list[str]:
    """'path: what was wrong' for each path that does not agree with `model(token_ids)`."""
    found = []
    for name, check in CHECKS.items():
        if name == "torch.compile" and not compiled:
            continue
        try:
            check(deepcopy(model))
        except Exception as error:  # a crash is a failure of its path, and the next is still run
            message = " ".join(str(error).split())
            found.append(f"{name}: {type(error).__name__}: {message[:300]}")
    return found


# ---- the model itself, called plainly


def model_with(state_dict: dict[str, Tensor], kind: type[GPT2] = GPT2) -> GPT2:
    """A model with these weights. Parameters that they lack are random, and not small."""
    torch.manual_seed(0)
    model = kind(CONFIG)
    enlarge(model)
    model.load_state_dict(state_dict, strict=False)
    return model.eval()


@torch.no_grad()
def logits_of(model: GPT2, ids: Sequence[int] | Tensor) -> Tensor:
    """(tokens, vocab), of one text by itself."""
    return model(torch.as_tensor(ids)[None])[0]


def greedy(model: GPT2, ids: Sequence[int], new_tokens: int) -> list[int]:
    """Prompt and continuation, without a cache. A text that has outgrown the context goes on from
    the newer half of what the model can read."""
    ids, start, context = list(ids), 0, model.config.context_length
    for _ in range(new_tokens):
        if len(ids) - start > context:
            start = len(ids) - context // 2
        ids.append(int(logits_of(model, ids[start:])[-1].argmax()))
    return ids


def texts() -> list[list[int]]:
    """Token ids of texts of different lengths."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(256, (length,), generator=generator).tolist() for length in (4, 11, 16, 9)
    ]


def padded(rows: Sequence[Sequence[int]], side: str) -> tuple[Tensor, Tensor]:
    """(token ids, attention mask), (batch, tokens) both. The padding holds ids that mean
    something."""
    tokens = max(map(len, rows))
    ids = torch.full((len(rows), tokens), 7)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(tokens - len(row), tokens)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def assert_close(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Relative to the largest number, where that is above 1."""
    assert found.shape == expected.shape, (
        f"{what}: {tuple(found.shape)}, not {tuple(expected.shape)}"
    )
    scale = max(1.0, float(expected.abs().max()))
    difference = float((found - expected).abs().max()) / scale
    assert difference <= tolerance, f"{what} differ by {difference:.2g}"


@cache
def tokenizer() -> Tokenizer:
    """Bytes, and <|endoftext|>."""
    return train_tokenizer([], 257)


# ---- generation


@path("generate, greedy")
def check_greedy(model: GPT2) -> None:
    prompt = texts()[1]
    expected = greedy(model, prompt, NEW_TOKENS)
    out = generate(model, torch.tensor([prompt]), NEW_TOKENS, temperature=0)
    assert out.token_ids[0].tolist() == expected, "another text"


@path("generate, logprobs")
def check_logprobs(model: GPT2) -> None:
    prompt = torch.tensor([texts()[1]])
    generator = torch.Generator().manual_seed(0)
    out = generate(model, prompt, NEW_TOKENS, num_samples=2, generator=generator)
    for row, logprobs in zip(out.token_ids, out.logprobs, strict=True):
        assert_close(logprobs[-NEW_TOKENS:], logprobs_of(model, row)[-NEW_TOKENS:], "logprobs")


def logprobs_of(model: GPT2, ids: Tensor) -> Tensor:
    """log p of each token but the first, (tokens - 1)."""
    return logits_of(model, ids)[:-1].log_softmax(dim=1).gather(1, ids[1:, None])[:, 0]


@path("generate, ragged batch")
def check_ragged(model: GPT2) -> None:
    expected = [greedy(model, prompt, 8) for prompt in texts()]
    for side in ("left", "right"):
        ids, mask = padded(texts(), side)
        out = generate(model, ids, 8, mask, temperature=0)
        for row, alone in enumerate(expected):
            found = out.token_ids[row][out.attention_mask[row]]
            assert found.tolist() == alone, f"another text in row {row}, padded on the {side}"
            logprobs = logprobs_of(model, found)[-8:]
            assert_close(out.logprobs[row, -8:], logprobs, f"logprobs, padded on the {side},")


@path("generate, sliding")
def check_sliding(model: GPT2) -> None:
    prompts = [(4 * texts()[2])[:62], (3 * texts()[1])[:25]]  # one grows beyond the context of 72
    ids, mask = padded(prompts, "left")
    out = generate(model, ids, 20, mask, temperature=0, overflow="slide")
    for row, prompt in enumerate(prompts):
        found = out.token_ids[row][out.attention_mask[row]]
        assert found.tolist() == greedy(model, prompt, 20), f"another text in row {row}"


@path("generate, speculative")
def check_speculative(model: GPT2) -> None:
    """Texts that grow at different speeds, with a draft that the change has not reached and with
    lookup in a text that repeats itself."""
    prompts = [texts()[1], 2 * texts()[2][:15]]
    ids, mask = padded(prompts, "left")
    draft = GPT2(CONFIG).eval()
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    for drafting in ({"draft": model}, {"draft": draft}, {"lookup": 2}):
        out = generate(model, ids, 12, mask, temperature=0, **drafting)
        for row, alone in enumerate(expected):
            found = out.token_ids[row][out.attention_mask[row]]
            assert found.tolist() == alone, f"another text, by {[*drafting]}"


@path("stream and complete")
def check_text(model: GPT2) -> None:
    prompt = TEXT[:20]
    ids = tokenizer().encode(prompt)
    new = greedy(model, ids, 12)[len(ids) :]
    new = new[: new.index(tokenizer().eos_id)] if tokenizer().eos_id in new else new
    expected = "".join(tokenizer().decode_stream(new))
    assert complete(model, tokenizer(), prompt, 12, temperature=0) == prompt + expected, "complete"
    assert "".join(stream(model, tokenizer(), prompt, 12, temperature=0)) == expected, "stream"


# ---- classification


@path("last_token_logits")
def check_last_token(model: GPT2) -> None:
    expected = torch.stack([logits_of(model, row)[-1] for row in texts()])
    with torch.no_grad():
        for side in ("left", "right"):
            found = last_token_logits(model, *padded(texts(), side))
            assert_close(found, expected, f"logits, padded on the {side},")
        same_length = torch.tensor([row[:4] for row in texts()])
        expected_unpadded = torch.stack([logits_of(model, row)[-1] for row in same_length])
        assert_close(last_token_logits(model, same_length), expected_unpadded, "logits, no mask,")
    rows = [torch.tensor(row) for row in texts()]
    assert_close(class_logits(model, rows), expected, "class_logits")


@path("classifier training, frozen features")
def check_frozen(model: GPT2) -> None:
    labels = [5, 3, 3, 200]
    model.requires_grad_(False)
    for part in (model.trf_blocks[-1], model.final_norm):
        part.requires_grad_()
    expected_loss = sum(
        F.cross_entropy(model(torch.tensor([row]))[:, -1], torch.tensor([label]), reduction="sum")
        for row, label in zip(texts(), labels, strict=True)
    )
    expected = gradients(model, expected_loss)
    data = texts_to_train_on(model, [torch.tensor(row) for row in texts()], labels)
    loss, count = last_token_step(model, data.batch([0, 1, 2, 3]))
    assert int(count) == 4
    assert_same_gradients(gradients(model, loss), expected)


# ---- training


@path("training")
def check_training(model: GPT2) -> None:
    check_gradients(model, nullcontext)


@path("training, activations recomputed")
def check_recomputed(model: GPT2) -> None:
    check_gradients(model, lambda model: recompute_activations())


@path("training, activation checkpointing")
def check_checkpointed(model: GPT2) -> None:
    check_gradients(model, activation_checkpointing)


@path("training, frozen weights cast once")
@torch.no_grad()
def check_frozen_weights_cast_once(model: GPT2) -> None:
    ids, _ = padded(texts(), "right")
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        with frozen_weights_cast_once(model):
            found = [model(ids), model(ids)]
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


@path("training, bfloat16 attention")
@torch.no_grad()
def check_bfloat16_attention(model: GPT2) -> None:
    """The kernel for processors that multiply bfloat16, which takes 64 tokens and more."""
    ids = torch.tensor([(5 * texts()[2])[:66]])
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(ids)
        with Bfloat16CPUAttention():
            found = model(ids)
    assert_near(found.float(), expected.float(), "bf16", "logits")


def check_gradients(model: GPT2, context: Callable[[GPT2], AbstractContextManager]) -> None:
    ids, mask = padded(texts(), "right")
    labels = ids.masked_fill(mask == 0, -100)
    expected_loss, _ = next_token_loss(model(ids, mask), labels)
    expected = gradients(model, expected_loss)
    with context(model):
        loss, _ = next_token_step(model, Batch(ids, labels, mask))
        found = gradients(model, loss)
    assert_close(loss.detach(), expected_loss.detach(), "losses")
    assert_same_gradients(found, expected)


def gradients(model: GPT2, loss: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    nonzero = {name for name, gradient in expected.items() if gradient.any()}
    assert nonzero <= found.keys(), f"no gradient of {sorted(nonzero - found.keys())[0]}"
    for name in nonzero:
        assert_close(found[name], expected[name], f"gradients of {name}")


@path("torch.compile")
def check_compiled(model: GPT2) -> None:
    """Traced, with its backward pass, but run by torch's own kernels: what might go wrong in the
    library goes wrong in tracing, and a C++ compiler takes half a minute."""
    ids = torch.tensor(texts()[2:3])
    expected = gradients(model, next_token_loss(model(ids), ids)[0])
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    logits = compiled(ids)
    assert_close(logits.detach(), model(ids).detach(), "logits")
    assert_same_gradients(gradients(model, next_token_loss(logits, ids)[0]), expected)


# ---- how likely a text is


@path("token_logprobs")
@torch.no_grad()
def check_token_logprobs(model: GPT2) -> None:
    for side in ("left", "right"):
        ids, mask = padded(texts(), side)
        asked = mask.bool() & (mask.cumsum(dim=1) > 1)  # all tokens but the first of each text
        found = token_logprobs(model, ids, mask, asked)
        for row, text in enumerate(texts()):
            expected = logprobs_of(model, torch.tensor(text))
            assert_close(found[row][asked[row]], expected, f"logprobs, padded on the {side},")


@path("perplexity")
def check_perplexity(model: GPT2) -> None:
    eos, text = tokenizer().eos_id, TEXT[:30]
    ids = torch.tensor([eos, *tokenizer().encode(text)])
    found = perplexity(model, tokenizer(), text).loss
    expected = -float(logprobs_of(model, ids).mean())
    assert math.isclose(found, expected, abs_tol=TOLERANCE, rel_tol=TOLERANCE), (found, expected)


@path("continuations")
def check_continuations(model: GPT2) -> None:
    rows = [Continuation(text[:3], text[3:]) for text in texts()]
    scores = score_continuations(model, rows)
    for text, score in zip(texts(), scores, strict=True):
        expected = logprobs_of(model, torch.tensor(text))[2:]
        assert_close(score.logprobs, expected, "logprobs")


@path("continuations of one context")
def check_continuations_of_one_context(model: GPT2) -> None:
    rows = [Continuation(text[:3], text[3 : 3 + n]) for text in texts() for n in (1, len(text))]
    for row, score in zip(rows, score_continuations(model, rows), strict=True):
        expected = logprobs_of(model, torch.tensor(row.context + row.ids))[2:]
        assert_close(score.logprobs, expected, "logprobs")


@path("forgetting")
def check_forgetting(model: GPT2) -> None:
    """Of a model that gives every token the same probability, which any other moves away from."""
    uniform = GPT2(CONFIG)
    uniform.out_head = nn.Linear(CONFIG.emb_dim, CONFIG.vocab_size, bias=False)
    nn.init.zeros_(uniform.out_head.weight)
    change = forgetting(uniform, model, tokenizer(), TEXT[:30], TEXT[:30]).general
    ids = [tokenizer().eos_id, *tokenizer().encode(TEXT[:30])]
    logprobs = logits_of(model, ids)[:-1].log_softmax(dim=1)
    kl = (logprobs.exp() * (logprobs + math.log(CONFIG.vocab_size))).sum(dim=1).mean()
    assert math.isclose(change.kl, float(kl), abs_tol=TOLERANCE, rel_tol=TOLERANCE)


@path("PPO's policy")
@torch.no_grad()
def check_actor_critic(model: GPT2) -> None:
    ids, mask = padded(texts(), "left")
    response = mask.bool() & (mask.cumsum(dim=1) > 1)
    logprobs, _ = ActorCritic(model)(ids, mask.bool(), response)
    for row, text in enumerate(texts()):
        expected = logprobs_of(model, torch.tensor(text))
        assert_close(logprobs[row][response[row]], expected, "logprobs")


# ---- inspection


@path("trace, logits")
def check_traced_logits(model: GPT2) -> None:
    for ids, mask in batches():
        with torch.no_grad():
            found = trace(model, ids, mask, ["logits"])["logits"]
            assert_close(found, model(ids, mask), "logits")


@path("trace, attention weights")
def check_traced_attention(model: GPT2) -> None:
    for ids, mask in batches():
        check_weights(model, ids, mask)


def check_weights(model: GPT2, ids: Tensor, mask: Tensor | None) -> None:
    """Those of a model that computes attention without torch's function are refused."""
    with torch.no_grad(), AttentionCalls() as calls:
        model(ids, mask)
    if not calls.weights:
        try:
            trace(model, ids, mask)["blocks.0.attention"]
        except ValueError as refusal:
            assert "attention" in str(refusal), f"an unclear refusal: {refusal}"
            return
        raise AssertionError("attention weights from somewhere, but from no call")
    assert len(calls.weights) == model.config.n_layers
    found = trace(model, ids, mask)
    for layer, weights in enumerate(calls.weights):
        assert_close(found[f"blocks.{layer}.attention"], weights, f"weights of block {layer}")


def batches() -> Iterator[tuple[Tensor, Tensor | None]]:
    yield torch.tensor(texts()[2:3]), None
    yield padded(texts(), "left")


class AttentionCalls(TorchFunctionMode):
    """The attention weights of each call of `F.scaled_dot_product_attention`, computed from its
    arguments. They give what the call gives, or they would prove nothing."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            weights, value = weights_and_value(*args, **(kwargs or {}))
            assert_close(weights @ value, result, "weights @ values")
            self.weights.append(weights)
        return result


def weights_and_value(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As torch documents its function: (softmax(query @ key.T * scale + mask), value)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.mT * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(dim=-1), value


@path("patched with its own activations")
@torch.no_grad()
def check_patched(model: GPT2) -> None:
    names = ["embedding", "blocks.1.attn_out", "blocks.1.mlp_out", "blocks.1.stream", "final_norm"]
    for ids, mask in batches():
        with AttentionCalls() as calls:
            model(ids, mask)
        names += ["blocks.0.attention", "blocks.2.head.1"] if calls.weights else []
        expected, activations = model(ids, mask), trace(model, ids, mask, names)
        with patched(model, {name: activations[name] for name in names}):
            assert_close(model(ids, mask), expected, "logits")


@path("logit_lens")
def check_lens(model: GPT2) -> None:
    for ids, mask in batches():
        lens = logit_lens(model, ids, mask, k=5)
        with torch.no_grad():
            expected = model(ids, mask).softmax(dim=2)
        assert_close(lens.probabilities[-1], expected.topk(5, dim=2).values, "probabilities")
        of_the_same = expected.gather(2, lens.token_ids[-1])
        assert_close(lens.probabilities[-1], of_the_same, "probabilities of the tokens")


# ---- fewer bits


@path("quantize('int8')")
def check_int8(model: GPT2) -> None:
    check_quantized(model, "int8")


@path("quantize('int4')")
def check_int4(model: GPT2) -> None:
    check_quantized(model, "int4")


@path("quantize('fp16')")
def check_fp16(model: GPT2) -> None:
    check_quantized(model, "fp16")


@path("quantize('bf16')")
def check_bf16(model: GPT2) -> None:
    check_quantized(model, "bf16")


def check_quantized(model: GPT2, weights: str) -> None:
    """The same numbers as with rounded weights, or a refusal that names the block."""
    ids, mask = padded(texts(), "left")
    with torch.no_grad():
        rounded = deepcopy(model)
        blocks = (with_rounded_weights(block, weights) for block in rounded.trf_blocks)
        rounded.trf_blocks = nn.ModuleList(blocks)
        expected = rounded(ids, mask)[mask.bool()]
        try:
            model.quantize(weights)
        except ValueError as refusal:
            named = "trf_blocks." in str(refusal) or "out_head" in str(refusal)
            assert named, f"the refusal names no block: {refusal}"
            return
        logits = model(ids, mask)
        assert_near(logits[mask.bool()], expected, weights, "logits")
    assert_close(trace(model, ids, mask, ["logits"])["logits"], logits, "traced logits")
    check_weights(model, ids, mask)
    prompt = torch.tensor([texts()[1]])
    out = generate(model, prompt, 16, temperature=0)
    expected = logprobs_of(model, out.token_ids[0])[-16:]
    assert_near(out.logprobs[0, -16:], expected, weights, "logprobs")


def assert_near(found: Tensor, expected: Tensor, format: str, what: str) -> None:
    error = relative_difference(found, expected)
    assert error <= ROUNDING[format], f"{what} differ by {error:.0%} of their spread"


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Of the spread of the expected numbers."""
    return float((found - expected).norm() / (expected - expected.mean()).norm())
