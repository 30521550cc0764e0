"""GPT-2 from scratch. Read in this order: config, model, masking, cache, sampling, generation."""

from gpt2mini.config import GPT2Config
from gpt2mini.generation import complete, generate
from gpt2mini.model import GPT2
from gpt2mini.surgery import resize_vocab
from gpt2mini.tokenizer import Tokenizer

__all__ = ["GPT2", "GPT2Config", "Tokenizer", "complete", "generate", "resize_vocab"]
