"""The key/value cache: keys and values of earlier tokens, kept for generation.

The keys and values of a token depend only on the tokens before it, so generation computes them
once. Each new token then costs one row of work instead of a forward pass over the whole text. The
buffers are allocated once at their full size: without gradients, nothing is copied as the text
grows.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gpt2mini.config import GPT2Config


class LayerCache:
    """The keys and values of one attention layer."""

    def __init__(
        self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.empty(
            shape, device=device, dtype=dtype
        )  # (batch, heads, max_tokens, head_dim)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(
        self,
        keys: Float[Tensor, "batch heads tokens head_dim"],
        values: Float[Tensor, "batch heads tokens head_dim"],
    ) -> tuple[
        Float[Tensor, "batch heads total head_dim"], Float[Tensor, "batch heads total head_dim"]
    ]:
        """Store the new tokens' keys and values; return those of all tokens so far. An attention of
        your own may have fewer heads for them than for its queries, or wider ones.
        Raises ValueError if they have another dtype than the cache, outside of autocast.
        """
        if keys.dtype != self.keys.dtype and not torch.is_autocast_enabled(keys.device.type):
            raise ValueError(
                f"the cache holds {self.keys.dtype}, attention computes in {keys.dtype}: make it "
                f"with KeyValueCache(..., dtype={keys.dtype})"
            )
        if self.length == 0:
            self.keys, self.values = resized(self.keys, keys), resized(self.values, values)
        start, self.length = self.length, self.length + keys.shape[2]
        if keys.requires_grad or self.keys.requires_grad:
            # Backward needs what earlier calls have read: copy the buffers, do not write to them.
            keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
            self.keys = torch.slice_scatter(self.keys, keys, 2, start, self.length)
            self.values = torch.slice_scatter(self.values, values, 2, start, self.length)
        else:
            self.keys[:, :, start : self.length] = keys
            self.values[:, :, start : self.length] = values
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def resized(
    buffer: Float[Tensor, "batch _ max_tokens _"], like: Float[Tensor, "batch heads _ head_dim"]
) -> Float[Tensor, "batch heads max_tokens head_dim"]:
    """The empty buffer, or one with as many heads, of the same width, as `like`."""
    shape = (buffer.shape[0], like.shape[1], buffer.shape[2], like.shape[3])
    return buffer if buffer.shape == shape else buffer.new_empty(shape)


class KeyValueCache:
    """One `LayerCache` for each block, and which of the cached tokens are real (not padding).

    Use it as `model(new_token_ids, cache=cache)`: each call adds its tokens to those before.
    """

    def __init__(
        self,
        config: GPT2Config,
        batch_size: int,
        max_tokens: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, config.n_heads, max_tokens, config.head_dim)
        self.layers = [
            LayerCache(shape, torch.device(device), dtype) for _ in range(config.n_layers)
        ]
        self.config = config
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.segment_ids: Int[Tensor, "batch total"] | None = None  # 0: padding; None: none

    @property
    def length(self) -> int:
        """The number of cached tokens, padding included."""
        return self.layers[0].length

    def forget(self, last: int) -> None:
        """Take the last tokens back, so many of each row."""
        length = self.length - last
        for layer in self.layers:
            layer.length = length
        if self.segment_ids is not None:
            self.segment_ids = self.segment_ids[:, :length]

    def repeated(self, copies: Int[Tensor, " batch"] | int, max_tokens: int) -> "KeyValueCache":
        """A cache of so many copies of each row, in neighboring rows, each of which goes on by
        itself."""
        like, rows = self.layers[0].keys, torch.arange(self.batch_size)
        rows = rows.to(like.device).repeat_interleave(copies)  # (repeated batch)
        repeated = KeyValueCache(self.config, len(rows), max_tokens, like.device, like.dtype)
        for own, layer in zip(self.layers, repeated.layers, strict=True):
            layer.append(own.keys[rows, :, : own.length], own.values[rows, :, : own.length])
        if self.segment_ids is not None:
            repeated.segment_ids = self.segment_ids[rows]
        return repeated
