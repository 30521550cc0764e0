"""How well does a model predict a text?"""

from gpt2mini.evaluation.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
