"""A model for EleutherAI's lm-evaluation-harness, which has hundreds of tasks.

    import lm_eval
    from gpt2mini.evaluation.lm_eval_model import HarnessModel

    found = lm_eval.simple_evaluate(HarnessModel(model, tokenizer), tasks=["lambada_openai"])

Its figures equal those of the harness's own `hf` model on the exported folder; an adapter or an
edited model needs no export. Needs lm-eval: pip install "gpt2mini[lm-eval]".
"""

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM

from gpt2mini.evaluation.continuations import Continuation, score_continuations
from gpt2mini.evaluation.windows import rolling_windows
from gpt2mini.generation import generate
from gpt2mini.masking import pad_left
from gpt2mini.model import GPT2
from gpt2mini.tokenizer import Tokenizer

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "no_repeat_ngram_size")


class HarnessModel(TemplateLM):
    """The three kinds of requests of the harness: the likelihood of a continuation, the likelihood
    of a text in rolling windows, and a text that is generated."""

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        batch_size: int = 8,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        """batch_size: of texts that are generated. precision: "fp32", "bf16" or "auto". seed: for
        tasks that sample."""
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.precision = batch_size, precision
        self._device = model.tok_emb.weight.device
        self.generator = torch.Generator(self._device).manual_seed(seed)
        self.max_length = model.config.context_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        return self.tokenizer.encode(string, allow_special=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether it is what greedy decoding gives) of each request:
        (anything, ids of the context, ids of the continuation)."""
        rows = [Continuation(context, ids) for _, context, ids in requests]
        scores = score_continuations(self.model, rows, precision=self.precision)
        return [(score.logprob, all(score.is_likeliest)) for score in scores]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, in nats, after <|endoftext|>. Windows of several texts share
        batches."""
        texts = [[self.prefix_token_id, *self.tok_encode(one.args[0])] for one in requests]
        of_texts = [rolling_windows([torch.tensor(ids)], self.max_length) for ids in texts]
        rows = [
            Continuation(
                window.token_ids[: window.n_context].tolist(),
                window.token_ids[window.n_context :].tolist(),
            )
            for windows in of_texts
            for window in windows
        ]
        scores = iter(score_continuations(self.model, rows, precision=self.precision))
        return [sum(next(scores).logprob for _ in windows) for windows in of_texts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A continuation of each context, up to the first of its `until`; greedy unless the task
        samples."""
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(place)
        found: dict[int, str] = {}
        for places in groups.values():
            for first in range(0, len(places), self.batch_size):
                some = places[first : first + self.batch_size]
                contexts = [requests[place].args[0] for place in some]
                texts = self.continue_contexts(contexts, requests[some[0]].args[1])
                found.update(zip(some, texts, strict=True))
        return [found[place] for place in range(len(requests))]

    def continue_contexts(self, contexts: Sequence[str], asked: dict[str, Any]) -> list[str]:
        """Continuations with the same settings; a context that is too long keeps its tail."""
        new = asked.get("max_gen_toks", asked.get("max_new_tokens", 256))
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"max_gen_toks is {new}; expected less than the model's context, {self.max_length}"
            )
        ids = [self.tok_encode(context)[-room:] or [self.eot_token_id] for context in contexts]
        token_ids, is_real = (x.to(self.device) for x in pad_left([*map(torch.tensor, ids)]))
        sampling = {name: asked[name] for name in SAMPLING if name in asked}
        if not asked.get("do_sample", sampling.get("temperature", 0) > 0):
            sampling["temperature"] = 0
        out = generate(
            self.model,
            token_ids,
            new,
            is_real,
            stop_ids=[self.eot_token_id],
            generator=self.generator,
            forbidden_ids=self.tokenizer.missing_ids(self.model.config.vocab_size),
            **sampling,
        )
        until = asked.get("until") or []
        stops = [until] if isinstance(until, str) else until
        rows = zip(out.token_ids, out.response_mask, strict=True)
        return [self.cut(row[is_new].tolist(), stops) for row, is_new in rows]

    def cut(self, ids: list[int], stops: Sequence[str]) -> str:
        """The text before the first of the stops, and before <|endoftext|>."""
        text = self.tokenizer.decode([i for i in ids if i != self.eot_token_id])
        for stop in filter(None, stops):
            text = text.partition(stop)[0]
        return text
