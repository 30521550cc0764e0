"""Perplexity, zero-shot tasks, classification reports, forgetting, generation quality."""

from gpt2mini.classification.report import ClassificationReport, classification_report
from gpt2mini.evaluation.forgetting import Forgetting, forgetting
from gpt2mini.evaluation.generation_quality import GenerationQuality, generation_quality
from gpt2mini.evaluation.perplexity import Perplexity, perplexity
from gpt2mini.evaluation.zero_shot import zero_shot

__all__ = [
    "ClassificationReport",
    "Forgetting",
    "GenerationQuality",
    "Perplexity",
    "classification_report",
    "forgetting",
    "generation_quality",
    "perplexity",
    "zero_shot",
]
