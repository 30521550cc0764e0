"""The model for lm-evaluation-harness, against transformers one request at a time.

lm-eval brings thirty packages, so its base class is replaced by what of it is used here;
`compare_lm_eval.py` runs the same requests through the harness itself.
"""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from compare_lm_eval import GENERATIONS, LIKELIHOODS, TEXTS, small_model

from gpt2mini import GPT2, Tokenizer


class TemplateLM:
    """What `HarnessModel` uses of lm-eval's class of this name: how a request becomes ids."""

    tok_encode: Any
    _loglikelihood_tokens: Any
    eot_token_id: int

    def __init__(self) -> None:
        self._device: Any = None

    @property
    def device(self) -> Any:
        return self._device

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        rows = []
        for context, continuation in (request.args for request in requests):
            stripped = context.rstrip()
            continuation = context[len(stripped) :] + continuation
            before = self.tok_encode(stripped)
            ids = self.tok_encode(stripped + continuation)[len(before) :]
            rows.append(((context, continuation), before or [self.prefix_token_id], ids))
        return self._loglikelihood_tokens(rows)


@pytest.fixture(scope="module")
def harness() -> Iterator[Any]:
    """The module, imported over the stand-in."""
    stubs = {name: ModuleType(name) for name in ("lm_eval", "lm_eval.api", "lm_eval.api.model")}
    stubs["lm_eval.api.model"].TemplateLM = TemplateLM  # type: ignore[attr-defined]
    name = "gpt2mini.evaluation.lm_eval_model"
    with pytest.MonkeyPatch.context() as patch:
        for stub in stubs:
            patch.setitem(sys.modules, stub, stubs[stub])
        yield importlib.import_module(name)
    del sys.modules[name]


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> GPT2:
    return small_model(tokenizer)


@pytest.fixture(scope="module")
def theirs(model: GPT2, tmp_path_factory: pytest.TempPathFactory) -> Any:
    import transformers

    folder = tmp_path_factory.mktemp("exported")
    model.save_pretrained(folder)
    return transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def ours(harness: Any, model: GPT2, tokenizer: Tokenizer) -> Any:
    return harness.HarnessModel(model, tokenizer, batch_size=3)


def requests(rows: list[Any]) -> list[Any]:
    return [SimpleNamespace(args=row) for row in rows]


def score(theirs: Any, context: list[int], ids: list[int]) -> tuple[float, bool]:
    """lm-eval's definition: of the last 64 ids before the last one, the logits of the last n."""
    inputs = (context + ids)[:-1][-64:]
    with torch.no_grad():
        logprobs = theirs(torch.tensor([inputs])).logits[0, -len(ids) :].log_softmax(dim=1)
    targets = torch.tensor(ids)
    total = float(logprobs.gather(1, targets[:, None]).sum())
    return total, bool((logprobs.argmax(dim=1) == targets).all())


def test_likelihoods_are_those_of_transformers(
    ours: Any, theirs: Any, tokenizer: Tokenizer
) -> None:
    greedy = tokenizer.decode(
        theirs.generate(
            torch.tensor([tokenizer.encode("The ship")]), max_new_tokens=1, do_sample=False,
            pad_token_id=0,
        )[0, -1:].tolist()
    )  # fmt: skip
    rows = [*LIKELIHOODS, ("The ship", greedy)]
    found = ours.loglikelihood(requests(rows))
    for (context, text), (logprob, is_greedy) in zip(rows, found, strict=True):
        before = tokenizer.encode(context.rstrip(), allow_special=True)
        ids = tokenizer.encode(context + text, allow_special=True)[len(before) :]
        expected, expected_greedy = score(theirs, before or [tokenizer.eos_id], ids)
        assert logprob == pytest.approx(expected, rel=1e-5) and is_greedy == expected_greedy
    assert found[-1][1]


def test_texts_are_scored_in_rolling_windows(ours: Any, theirs: Any, tokenizer: Tokenizer) -> None:
    found = ours.loglikelihood_rolling(requests([(text,) for text in [*TEXTS, ""]]))
    for text, logprob in zip(TEXTS, found[:-1], strict=True):
        ids = [tokenizer.eos_id, *tokenizer.encode(text)]
        expected = sum(
            score(theirs, ids[:first], ids[first : first + 64])[0]
            for first in range(1, len(ids), 64)
        )
        assert logprob == pytest.approx(expected, rel=1e-5)
    assert found[-1] == 0


def test_generated_texts_end_where_the_task_says(
    ours: Any, theirs: Any, tokenizer: Tokenizer
) -> None:
    found = ours.generate_until(requests(GENERATIONS))
    for (context, asked), text in zip(GENERATIONS, found, strict=True):
        new = asked["max_gen_toks"]
        ids = tokenizer.encode(context)[-(64 - new) :]
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0,
            eos_token_id=tokenizer.eos_id,
        )[0, len(ids) :]  # fmt: skip
        expected = tokenizer.decode([i for i in out.tolist() if i != tokenizer.eos_id])
        for stop in [asked["until"]] if isinstance(asked["until"], str) else asked["until"]:
            expected = expected.split(stop)[0]
        assert text == expected


def test_a_task_that_samples_is_seeded(harness: Any, model: GPT2, tokenizer: Tokenizer) -> None:
    asked = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    first, again, other = (
        harness.HarnessModel(model, tokenizer, seed=seed).generate_until(
            requests([("The ship", asked)])
        )
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_text_that_cannot_fit_is_refused(ours: Any) -> None:
    with pytest.raises(ValueError, match=r"max_gen_toks is 64; expected less than .* context, 64"):
        ours.generate_until(requests([("The ship", {"max_gen_toks": 64})]))
