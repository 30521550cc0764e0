"""Classify texts by their last token: labeled data, logits, frozen features, report."""

from gpt2mini.classification.last_token import (
    Prediction,
    class_logits,
    last_token_logits,
    predict,
)
from gpt2mini.classification.report import ClassificationReport, classification_report

__all__ = [
    "ClassificationReport",
    "Prediction",
    "class_logits",
    "classification_report",
    "last_token_logits",
    "predict",
]
