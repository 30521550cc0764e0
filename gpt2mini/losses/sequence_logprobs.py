"""Log-probabilities of answers: the one place where DPO, PPO and GRPO get them from."""

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gpt2mini.checks import check_predicts_tokens, check_response_mask
from gpt2mini.losses.chunked import cross_entropy_of_each
from gpt2mini.losses.deferred import hidden_states_and_head
from gpt2mini.model import GPT2


def sequence_logprobs(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None,
    response_mask: Bool[Tensor, "batch tokens"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """log p(response | what stands before it) of each row: (sum in nats, number of tokens).

    response_mask: True at the tokens whose probability counts. Differentiable; the logits never all
    exist. Raises ValueError for a response token with no real token before it, or a head that is
    not one over the vocabulary.
    """
    logprobs = token_logprobs(model, token_ids, attention_mask, response_mask)
    return logprobs.sum(dim=1), response_mask.sum(dim=1)


def token_logprobs(
    model: GPT2,
    token_ids: Int[Tensor, "batch tokens"],
    attention_mask: Int[Tensor, "batch tokens"] | Bool[Tensor, "batch tokens"] | None,
    response_mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """The same, of every response token by itself; 0 elsewhere."""
    check_predicts_tokens(model)
    hidden, head = hidden_states_and_head(model, token_ids, attention_mask)
    check_response_mask(token_ids, attention_mask, response_mask)
    return logprobs_from_hidden(hidden, head, token_ids, response_mask)


def logprobs_from_hidden(
    hidden: Float[Tensor, "batch tokens emb"],
    out_head: nn.Module,
    token_ids: Int[Tensor, "batch tokens"],
    response_mask: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens"]:
    """log p of every response token, from the hidden states that predict it, one to its left."""
    asked = response_mask[:, 1:]  # (batch, tokens - 1)
    found = -cross_entropy_of_each(hidden[:, :-1][asked], out_head, token_ids[:, 1:][asked])
    return found.new_zeros(token_ids.shape).masked_scatter(response_mask, found)
