"""Change the shape of a trained model."""

import operator
from copy import copy, deepcopy
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2mini.checkpoints.huggingface import is_tied
from gpt2mini.checkpoints.origin import origin_of, remember_origin
from gpt2mini.model import GPT2
from gpt2mini.modes import evaluating
from gpt2mini.quantized_layers import refuse_quantized


@torch.no_grad()
def resize_vocab(model: GPT2, vocab_size: int) -> None:
    """Add tokens to the vocabulary, or remove the last ones, in place, with an output head over it.

    New rows start at the mean of the old ones and get an average logit, where random rows could
    get the highest of all (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language
    Models"). Make the optimizer afterwards: the embedding is a new parameter.
    Raises ValueError if <|endoftext|> would be cut off.
    """
    refuse_quantized(model, "another vocabulary")
    config, vocab_size = model.config, operator.index(vocab_size)
    eos_id = config.vocab_size - 1 if config.eos_id is None else config.eos_id
    if vocab_size <= eos_id:
        raise ValueError(
            f"a vocabulary of {vocab_size} would cut off <|endoftext|>, token {eos_id}: "
            f"choose at least {eos_id + 1}"
        )
    head, tied = model.out_head, is_tied(model)
    resize_rows(model.tok_emb, "weight", vocab_size)
    model.tok_emb.num_embeddings = vocab_size
    if isinstance(head, nn.Linear) and head.out_features == config.vocab_size:
        if tied:
            head.weight = model.tok_emb.weight
        else:
            resize_rows(head, "weight", vocab_size)
        if head.bias is not None:
            resize_rows(head, "bias", vocab_size)
        head.out_features = vocab_size
    last = eos_id == vocab_size - 1
    model.config = replace(config, vocab_size=vocab_size, eos_id=None if last else eos_id)


def resize_rows(module: nn.Module, name: str, n_rows: int) -> None:
    """Replace a parameter by one with more rows, the new ones at the mean, or with fewer."""
    old = module.get_parameter(name)
    rows: Tensor = old[:n_rows]
    if n_rows > len(old):
        mean = old.float().mean(dim=0, keepdim=True).to(old.dtype)
        rows = torch.cat([old, mean.expand(n_rows - len(old), *mean.shape[1:])])
    setattr(module, name, nn.Parameter(rows.clone(), requires_grad=old.requires_grad))


@torch.no_grad()
def grow_depth(model: GPT2, n_layers: int) -> None:
    """Make the model deeper, in place, without changing what it computes.

    Each block is followed by copies of itself whose two projections into the residual stream are
    zero: they add nothing yet, and their first gradient step changes that. The old blocks keep
    their parameters; an optimizer made before does not know those of the copies.
    Raises ValueError, before anything is changed, for a number of layers that is no multiple of the
    present one, and for blocks of which a copy without effect cannot be made: quantized ones, those
    with adapters, and those of another architecture that change the stream all the same.
    """
    refuse_quantized(model, "more blocks")
    present = len(model.trf_blocks)
    if n_layers < present or n_layers % present:
        raise ValueError(
            f"a model of {present} blocks can grow to a multiple of that, not to {n_layers}"
        )
    like = model.pos_emb.weight
    x = torch.linspace(-1, 1, 2 * like.shape[1]).to(like).view(1, 2, -1)  # (batch, tokens, emb)
    blocks = []
    for number, block in enumerate(model.trf_blocks):
        copies = [idle_copy(block) for _ in range(n_layers // present - 1)]
        for one in copies:
            with evaluating(one):  # dropout would draw random numbers
                is_idle = torch.equal(one(x, None, None), x)
            if not is_idle:
                raise ValueError(
                    f"a copy of block {number} changes the stream although its projections are "
                    "zero, so the model would not stay what it is: it cannot grow"
                )
        blocks += [block, *copies]
    model.trf_blocks = nn.ModuleList(blocks)
    model.config = replace(model.config, n_layers=n_layers)
    # an adapter for the deeper model does not fit the base that it was loaded from
    remember_origin(model, replace(origin_of(model), base=None, samples={}))


def idle_copy(block: nn.Module) -> nn.Module:
    """A copy whose two projections into the residual stream are zero."""
    twin = deepcopy(block)
    for name in ("attn.attn_out", "mlp.mlp_out"):
        for own, parameter in twin.get_submodule(name).named_parameters():
            if own not in ("weight", "bias"):
                raise ValueError(
                    f"{name} has a {own}, without which a copy would not learn: merge adapters "
                    "first (merge_lora)"
                )
            nn.init.zeros_(parameter)
    return twin


def first_blocks(model: GPT2, n_layers: int) -> GPT2:
    """A model of the first blocks with the same embedding, final norm and head, whose weights it
    shares. A draft for `generate`, and an exit early in the stream (the logit lens).

    Raises ValueError for more blocks than the model has, or none.
    """
    deepest = len(model.trf_blocks)
    if not 1 <= n_layers <= deepest:
        raise ValueError(f"n_layers must be from 1 to {deepest}, not {n_layers}")
    shallow = copy(model)
    for name, value in vars(model).items():  # a copy shares the dictionaries: of parts, of hooks
        if isinstance(value, dict):
            vars(shallow)[name] = copy(value)
    shallow.config = replace(model.config, n_layers=n_layers)
    shallow.trf_blocks = model.trf_blocks[:n_layers]
    return shallow
