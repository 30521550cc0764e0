"""The GPT-2 that runs in the explorer page, beside torch on the same packed weights."""

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import enlarge
from explorer_engine import EXPLORER, KERNELS, Engine, numbers
from torch import Tensor, nn

from gpt2mini import GPT2, GPT2Config, generate
from gpt2mini.inspection import head_effects, logit_lens, patched, trace
from gpt2mini.inspection.explorer.recorded import packed
from gpt2mini.lora import add_lora
from gpt2mini.modes import evaluating

ODD: dict[str, Any] = dict(
    vocab_size=13, context_length=11, emb_dim=5, n_heads=1, n_layers=1
)  # head_dim 5
SMALL: dict[str, Any] = dict(vocab_size=211, context_length=150, emb_dim=24, n_heads=4, n_layers=3)
CONFIGS = {
    "odd": GPT2Config(**ODD),
    "small": GPT2Config(**SMALL),
    "without biases": GPT2Config(**SMALL, qkv_bias=False),
    "exact gelu": GPT2Config(**SMALL, gelu="none"),
}


def model_of(name: str) -> GPT2:
    if name == "gpt2-nano":
        return GPT2.from_pretrained(name).eval()
    untied = name.startswith("head")
    model = GPT2(CONFIGS["small" if untied else name])
    if untied:
        model.out_head = nn.Linear(24, 211, bias=name == "head with bias")
    enlarge(model)
    return model.eval()


def ids_of(model: GPT2, n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    n = min(n, model.config.context_length)
    return torch.randint(model.config.vocab_size, (n,), generator=generator).tolist()


def assert_close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found.view(right.shape), right, atol=1e-4, rtol=1e-5)


# ---- a forward pass

NAMES = [*CONFIGS, "head with bias", "head without bias", "gpt2-nano"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_all_activations_are_those_of_torch(name: str, kernel: str, tmp_path: Path) -> None:
    precision = "float16" if name == "small" else "int8"
    engine = Engine([model_of(name)], precision, kernel=kernel)
    model = engine.models[0]
    ids = ids_of(model, 21)
    (found,) = engine.run(tmp_path, {"call": "activations", "ids": ids})
    right = trace(model, torch.tensor([ids]))
    n, n_heads = len(ids), model.config.n_heads
    for part in ("embedding", "final_norm", "logits"):
        assert_close(found[part], right[part][0])
    for layer, block in enumerate(found["blocks"]):
        for part in ("attn_out", "mlp_out", "stream"):
            assert_close(block[part], right[f"blocks.{layer}.{part}"][0])
        attention = block["attention"].view(n_heads, 128, 128)[:, :n, :n]
        assert_close(attention.contiguous(), right[f"blocks.{layer}.attention"][0])
        heads = [right[f"blocks.{layer}.head.{head}"][0] for head in range(n_heads)]
        assert_close(block["context"], torch.cat(heads, dim=1))


def test_the_engine_s_further_vectors_are_those_of_the_layers(tmp_path: Path) -> None:
    engine = Engine([model_of("gpt2-nano")])
    model = engine.models[0]
    ids = ids_of(model, 9)
    (found,) = engine.run(tmp_path, {"call": "activations", "ids": ids})
    stream = trace(model, torch.tensor([ids]), names=["blocks.2.stream"])["blocks.2.stream"][0]
    block: Any = model.trf_blocks[3]
    of_block = found["blocks"][3]
    with torch.no_grad():
        norm1 = block.norm1(stream)
        for part in ("query", "key", "value"):
            assert_close(of_block[part], getattr(block.attn, part)(norm1))
        middle = stream + block.attn(norm1[None])[0]
        assert_close(of_block["norm1"], norm1)
        assert_close(of_block["middle"], middle)
        assert_close(of_block["norm2"], block.norm2(middle))
        hidden = nn.functional.gelu(block.mlp.mlp_in(block.norm2(middle)), approximate="tanh")
        assert_close(of_block["hidden"], hidden)


def test_a_text_of_128_tokens(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    ids = ids_of(engine.models[0], 128)
    (found,) = engine.run(tmp_path, {"call": "logits", "ids": ids})
    with torch.no_grad():
        assert_close(found, engine.models[0](torch.tensor([ids]))[0])


def test_kept_rows_are_those_of_a_full_pass(tmp_path: Path) -> None:
    """A source that reads one edited text after another, beside sources that read one each."""
    choice = random.Random(0)
    engine = Engine([model_of("small")])
    texts, ids = [], ids_of(engine.models[0], 20)
    for _ in range(25):
        start = choice.randrange(len(ids) + 1)
        end = min(len(ids), start + choice.choice([0, 0, 1, 3]))
        new = [choice.randrange(211) for _ in range(choice.choice([0, 1, 2, 9]))]
        ids = (ids[:start] + new + ids[end:])[:128] or [5]
        patches = choice.choice([[], [], [{"name": "blocks.1.head.2", "value": 0}]])
        texts.append({"call": "activations", "ids": ids, "patches": patches})
    alone = [{**text, "source": str(i)} for i, text in enumerate(texts)]
    found = engine.run(tmp_path, *texts, *alone)
    for kept, fresh in zip(found[: len(texts)], found[len(texts) :], strict=True):
        assert_close(kept["logits"], fresh["logits"])
        for one, other in zip(kept["blocks"], fresh["blocks"], strict=True):
            assert_close(one["stream"], other["stream"])
            assert_close(one["key"], other["key"])


# ---- interventions


def at_position(value: Tensor | float, position: int) -> Any:
    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, position] = value
        return x

    return edit


@pytest.mark.parametrize("name", ["small", "gpt2-nano"])
def test_patches_are_those_of_patched(name: str, tmp_path: Path) -> None:
    engine = Engine([model_of(name)])
    model = engine.models[0]
    width, head_dim = model.config.emb_dim, model.config.head_dim
    row, of_head = torch.randn(width), torch.randn(head_dim)
    cases: list[list[tuple[str, Any, int | None]]] = [
        [("blocks.1.head.2", 0, None)],
        [("blocks.1.head.2", of_head, None)],  # mean ablation is such a row
        [("blocks.0.attn_out", 0, None), ("blocks.2.mlp_out", row, None)],
        [("blocks.1.stream", row, 4)],
        [("embedding", row, 3)],
        [("blocks.2.head.0", of_head, 7), ("blocks.2.head.1", 0.5, None)],
    ]
    ids = ids_of(model, 10)
    calls = [
        {
            "call": "logits",
            "ids": ids,
            "patches": [
                {"name": name, "value": numbers(value), "position": position}
                for name, value, position in patches
            ],
        }
        for patches in cases
    ]
    for patches, found in zip(cases, engine.run(tmp_path, *calls), strict=True):
        edits = {
            name: value if position is None else at_position(value, position)
            for name, value, position in patches
        }
        with evaluating(model), patched(model, edits):
            right = model(torch.tensor([ids]))[0]
        assert_close(found, right)


@pytest.mark.parametrize("position", [3, 9])
def test_the_effects_of_all_heads(position: int, tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    model = engine.models[0]
    ids, target = ids_of(model, 10), 7
    (found,) = engine.run(
        tmp_path, {"call": "rankHeads", "ids": ids, "position": position, "target": target}
    )
    right = head_effects(model, torch.tensor([ids]), position, target)
    assert len(found) == right.after.numel()
    changes = [abs(one["after"] - one["before"]) for one in found]
    assert changes == sorted(changes, reverse=True)
    for one in found:
        assert one["before"] == pytest.approx(right.before, abs=1e-6)
        after = right.after[one["layer"], one["head"]]
        assert one["after"] == pytest.approx(float(after), abs=1e-6)


def test_heads_are_ranked_among_the_interventions_in_force(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    model = engine.models[0]
    ids = ids_of(model, 10)
    off = [{"name": "blocks.0.head.1", "value": 0}]
    (found,) = engine.run(
        tmp_path,
        {"call": "rankHeads", "ids": ids, "position": 9, "target": 7, "patches": off},
    )
    with patched(model, {"blocks.0.head.1": 0}):
        right = head_effects(model, torch.tensor([ids]), 9, 7)
    for one in found:
        after = right.after[one["layer"], one["head"]]
        assert one["after"] == pytest.approx(float(after), abs=1e-6)


# ---- readings


def test_the_lens_without_tokens_that_cannot_come(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    model = engine.models[0]
    ids, forbidden = ids_of(model, 6), [4, 17]
    places = [(layer, position) for layer in range(4) for position in range(6)]
    calls: list[dict[str, Any]] = [
        {"call": "reading", "ids": ids, "forbidden": forbidden, "method": "lens",
         "arguments": [layer, position, 5]}
        for layer, position in places
    ]  # fmt: skip
    right = logit_lens(model, torch.tensor([ids]), k=5, forbidden_ids=forbidden)
    for (layer, position), found in zip(places, engine.run(tmp_path, *calls), strict=True):
        assert [one["id"] for one in found] == right.token_ids[layer, 0, position].tolist()
        probabilities = torch.tensor([one["p"] for one in found])
        assert_close(probabilities, right.probabilities[layer, 0, position])


def test_what_a_reading_says(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    model = engine.models[0]
    ids = ids_of(model, 8)

    def call(method: str, *arguments: Any) -> dict[str, Any]:
        return {"call": "reading", "ids": ids, "method": method, "arguments": arguments}

    surprise, first, attention, later, norm, start, stream, head, step = engine.run(
        tmp_path,
        call("surprise", 5),
        call("surprise", 0),
        call("attention", 1, 3, 6, 2),
        call("attention", 1, 3, 2, 6),
        call("norm", "mlp_out", 2, 4),
        call("norm", "embedding", 0, 4),
        call("stream", 2, 4),
        call("head", 1, 3, 6),
        call("step", 1, 6),
    )
    right = trace(model, torch.tensor([ids]))
    assert first is None and later == 0
    assert surprise == pytest.approx(-right["logits"][0, 4].log_softmax(0)[ids[5]].item(), abs=1e-4)
    assert attention == pytest.approx(right["blocks.1.attention"][0, 3, 6, 2].item(), abs=1e-5)
    assert norm == pytest.approx(right["blocks.2.mlp_out"][0, 4].norm().item(), rel=1e-5)
    assert start == pytest.approx(right["embedding"][0, 4].norm().item(), rel=1e-5)
    assert_close(stream, right["blocks.1.stream"][0, 4])
    assert_close(head["context"], right["blocks.1.head.3"][0, 6])
    with torch.no_grad():
        block: Any = model.trf_blocks[1]
        query = block.attn.query(block.norm1(right["blocks.0.stream"][0, 6]))
    assert_close(head["query"], query[18:24])
    assert [*step] == [
        *("before", "norm1", "query", "key", "value", "context", "attn_out", "middle", "norm2"),
        *("hidden", "mlp_out", "stream"),
    ]
    assert_close(torch.tensor(step["before"]["values"]), right["blocks.0.stream"][0, 6, :16])
    assert step["stream"]["norm"] == pytest.approx(right["blocks.1.stream"][0, 6].norm().item())
    assert (step["hidden"]["size"], len(step["hidden"]["values"])) == (96, 16)


def test_writing_the_most_likely_is_what_generate_writes(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    model = engine.models[0]
    ids = ids_of(model, 7)
    off = {"name": "blocks.1.mlp_out", "value": 0}
    calls = {"call": "write", "ids": ids, "n": 12, "temperature": 0}
    plain, without = engine.run(tmp_path, calls, {**calls, "patches": [off]})
    right = generate(model, torch.tensor([ids]), 12, temperature=0).token_ids[0, 7:]
    assert plain == right.tolist()
    with patched(model, {"blocks.1.mlp_out": 0}):
        right = generate(model, torch.tensor([ids]), 12, temperature=0).token_ids[0, 7:]
    assert without == right.tolist()


def test_writing_ends_at_the_end_of_the_context_and_repeats_for_a_seed(tmp_path: Path) -> None:
    engine = Engine([model_of("odd")])
    call = {"call": "write", "ids": [1, 2, 3], "n": 30, "seed": 4, "forbidden": [0, 5]}
    first, again, other = engine.run(tmp_path, call, call, {**call, "seed": 5})
    assert len(first) == 11 - 3 and first == again != other
    assert not {0, 5} & {*first, *other}


# ---- a second model, and what a page checks when it starts


def test_a_second_model_of_changed_tensors_and_one_with_an_adapter(tmp_path: Path) -> None:
    first = model_of("small")
    changed, adapted = GPT2(first.config).eval(), GPT2(first.config).eval()
    for model in (changed, adapted):
        model.load_state_dict(first.state_dict())
    block: Any = changed.trf_blocks[1]
    with torch.no_grad():
        block.mlp.mlp_in.weight.mul_(1.1)
        add_lora(adapted, rank=3, alpha=6, targets=("query", "mlp_out"))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    ids = ids_of(first, 9)
    for other in (changed, adapted):
        engine = Engine([first, other])
        assert len(engine.input["models"][1]["tensors"]) < 20
        logits = engine.run(
            tmp_path, *({"call": "logits", "ids": ids, "model": model} for model in (0, 1, 0))
        )
        with torch.no_grad():
            right = [model(torch.tensor([ids]))[0] for model in engine.models]
        assert (right[0] - right[1]).abs().max() > 0.1
        for found, expected in zip(logits, (*right, right[0]), strict=True):
            assert_close(found, expected)


def test_the_page_sees_that_another_model_was_meant(tmp_path: Path) -> None:
    engine = Engine([model_of("small")])
    ids, positions = ids_of(engine.models[0], 9), [0, 4, 8]
    with torch.no_grad():
        logits = engine.models[0](torch.tensor([ids]))[0, positions]
    checks = [
        {"token_ids": ids, "positions": positions, "logits": packed(x, "<f4")}
        for x in (logits, logits + 0.1 * torch.randn(logits.shape), logits * torch.nan)
    ]
    same, different, broken = engine.run(
        tmp_path, *({"call": "prove", "check": check} for check in checks)
    )
    assert same[0] < 1e-4 and same[0] <= same[1]
    assert different[0] > different[1]
    assert broken[0] is None  # NaN, which is not below any tolerance


# ---- the kernel


def test_the_kernel_is_what_its_source_gives(tmp_path: Path) -> None:
    compiler = shutil.which("wat2wasm")
    if compiler is None:
        pytest.skip("needs wat2wasm (wabt), which is not installed")
    built = tmp_path / "kernel.wasm"
    subprocess.run([compiler, str(EXPLORER / "model" / "kernel.wat"), "-o", str(built)], check=True)
    assert built.read_bytes() == (EXPLORER / "model" / "kernel.wasm").read_bytes()


def test_without_a_usable_kernel_the_page_computes_in_javascript(tmp_path: Path) -> None:
    engine = Engine([model_of("odd")])
    ids = ids_of(engine.models[0], 5)
    engine.input["kernel"] = engine.input["kernel"][:-40]  # a browser without SIMD refuses it too
    found, kind = engine.run(tmp_path, {"call": "logits", "ids": ids}, {"call": "kind"})
    with torch.no_grad():
        assert_close(found, engine.models[0](torch.tensor([ids]))[0])
    assert kind == "JavaScript"
