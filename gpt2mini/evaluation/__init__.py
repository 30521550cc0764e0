"""How well does a model predict a text, or tell classes apart?"""

from gpt2mini.evaluation.classification import ClassificationReport, classification_report
from gpt2mini.evaluation.perplexity import Perplexity, perplexity

__all__ = ["ClassificationReport", "Perplexity", "classification_report", "perplexity"]
