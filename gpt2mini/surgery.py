"""Change the shape of a trained model."""

from copy import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from gpt2mini.checkpoints.origin import Origin, origin_of, remember_origin
from gpt2mini.model import GPT2, TiedHead
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
    config = model.config
    eos_id = config.vocab_size - 1 if config.eos_id is None else config.eos_id
    if vocab_size <= eos_id:
        raise ValueError(
            f"a vocabulary of {vocab_size} would cut off <|endoftext|>, token {eos_id}: "
            f"choose at least {eos_id + 1}"
        )
    head = model.out_head
    if isinstance(head, nn.Linear) and head.out_features == config.vocab_size:
        resize_rows(head, "weight", vocab_size)
        if head.bias is not None:
            resize_rows(head, "bias", vocab_size)
        head.out_features = vocab_size
    resize_rows(model.tok_emb, "weight", vocab_size)
    model.tok_emb.num_embeddings = vocab_size
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


def grow_depth(model: GPT2, n_layers: int) -> GPT2:
    """A deeper model that computes exactly the same, ready to learn more.

    Each block is followed by copies of itself whose two projections into the residual stream are
    zero: they add nothing yet, and their first gradient step changes that.
    """
    old = list(model.trf_blocks)
    if n_layers == len(old):
        return model
    if n_layers % len(old):
        raise ValueError(
            f"a model of {len(old)} blocks can grow to a multiple of that, not to {n_layers}"
        )
    grown = GPT2(replace(model.config, n_layers=n_layers))
    for name in ("tok_emb", "pos_emb", "final_norm"):
        getattr(grown, name).load_state_dict(getattr(model, name).state_dict())
    if not isinstance(model.out_head, TiedHead):
        grown.out_head = model.out_head
    copies = n_layers // len(old)
    for i, block in enumerate(grown.trf_blocks):
        block.load_state_dict(old[i // copies].state_dict())
        if i % copies:
            for name in ("attn.attn_out", "mlp.mlp_out"):
                for parameter in block.get_submodule(name).parameters():
                    torch.nn.init.zeros_(parameter)
    remember_origin(grown, Origin(settings=origin_of(model).settings))
    return grown


def first_blocks(model: GPT2, n_layers: int) -> GPT2:
    """A model of the first blocks with the same embedding, final norm and head, whose weights it
    shares. A draft for `generate`, and an exit early in the stream (the logit lens).

    Raises ValueError for more blocks than the model has, or none.
    """
    deepest = len(model.trf_blocks)
    if not 1 <= n_layers <= deepest:
        raise ValueError(f"n_layers must be from 1 to {deepest}, not {n_layers}")
    shallow = copy(model)
    shallow._modules = dict(model._modules)  # a copy shares the dictionary
    shallow.config = replace(model.config, n_layers=n_layers)
    shallow.trf_blocks = model.trf_blocks[:n_layers]
    return shallow
