"""The hyperparameters of a GPT-2, and the four published sizes."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GPT2Config:
    """The hyperparameters. The defaults are OpenAI's smallest published model (124M parameters)."""

    vocab_size: int = 50257  # tokens; GPT-2's are 256 bytes, 50,000 merges and <|endoftext|>
    context_length: int = 1024  # most tokens of a text: one learned position vector for each
    emb_dim: int = 768  # width of the residual stream
    n_heads: int = 12  # attention heads, each emb_dim / n_heads wide
    n_layers: int = 12  # transformer blocks
    drop_rate: float = 0.0  # dropout; OpenAI trained with 0.1, 0 is as good where data abound
    qkv_bias: bool = True  # OpenAI's query, key and value projections have a bias
    gelu: str = "tanh"  # form of the activation; "none": the exact one, as nanoGPT's (F.gelu)
    eos_id: int | None = None  # the token <|endoftext|>; None: the last of the vocabulary

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"):
            number = getattr(self, name)
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(f"{name} must be an integer of at least 1, not {number!r}")
        if self.emb_dim % self.n_heads:
            raise ValueError(
                f"emb_dim {self.emb_dim} cannot be divided evenly among {self.n_heads} heads: "
                "choose n_heads so that it divides emb_dim"
            )
        if self.gelu not in ("tanh", "none"):
            raise ValueError(
                f"gelu must be 'tanh' or, for the exact form, 'none', not {self.gelu!r}"
            )
        is_id = isinstance(self.eos_id, int) and 0 <= self.eos_id < self.vocab_size
        if self.eos_id is not None and not is_id:
            raise ValueError(
                f"eos_id {self.eos_id!r} is not in the vocabulary of {self.vocab_size}"
            )
        if not isinstance(self.qkv_bias, bool):
            raise ValueError(f"qkv_bias must be True or False, not {self.qkv_bias!r}")
        if not isinstance(self.drop_rate, int | float) or not 0.0 <= self.drop_rate < 1.0:
            raise ValueError(f"drop_rate must be a number in [0, 1), not {self.drop_rate!r}")

    @property
    def head_dim(self) -> int:
        return self.emb_dim // self.n_heads

    @classmethod
    def from_name(cls, name: str) -> "GPT2Config":
        """The config of a published size, by its Hugging Face or its OpenAI name."""
        if name not in PUBLISHED_SIZES:
            raise ValueError(
                f"no published GPT-2 is called {name!r}; choose from {', '.join(PUBLISHED_SIZES)}"
            )
        return cls(**PUBLISHED_SIZES[name])


# Radford et al. 2019, table 2, as corrected by OpenAI: 124M (printed there as 117M), 355M (345M),
# 774M (762M) and 1558M (1542M) parameters.
PUBLISHED_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": dict(emb_dim=768, n_heads=12, n_layers=12),
    "gpt2-medium": dict(emb_dim=1024, n_heads=16, n_layers=24),
    "gpt2-large": dict(emb_dim=1280, n_heads=20, n_layers=36),
    "gpt2-xl": dict(emb_dim=1600, n_heads=25, n_layers=48),
}
PUBLISHED_SIZES |= {
    "124M": PUBLISHED_SIZES["gpt2"],
    "355M": PUBLISHED_SIZES["gpt2-medium"],
    "774M": PUBLISHED_SIZES["gpt2-large"],
    "1558M": PUBLISHED_SIZES["gpt2-xl"],
}
