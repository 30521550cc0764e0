"""torch.compile, a block at a time: what stands between two matrix products becomes one pass.

All blocks are alike, so one is compiled and the others find it done. The model keeps its names and
parameters; head and loss stay as they are, since the loss already works in pieces.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from gpt2mini.model import TransformerBlock


@contextmanager
def compiled_blocks(model: nn.Module) -> Iterator[None]:
    """Inside, the blocks run compiled. Raises what torch.compile raises, for instance where there
    is no C++ compiler."""
    blocks = [module for module in model.modules() if isinstance(module, TransformerBlock)]
    try:
        for block in blocks:
            block.compile()
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None  # there is no public way back
