"""Look inside: trace a forward pass, compare two models, the logit lens, heads, plots."""

from gpt2mini.inspection.ablation import HeadEffects, head_effects, mean_activations
from gpt2mini.inspection.activation_plots import (
    plot_change,
    plot_lens,
    plot_trace,
    token_labels,
)
from gpt2mini.inspection.attention_plots import plot_attention, plot_head_scores
from gpt2mini.inspection.compare import Difference, ModelComparison, compare_models
from gpt2mini.inspection.heads import (
    HeadScores,
    first_token_score,
    head_scores,
    induction_score,
    previous_token_score,
)
from gpt2mini.inspection.lens import (
    Lens,
    Piece,
    logit_lens,
    nearest_tokens,
    score_text,
    surprise_legend,
    surprise_text,
)
from gpt2mini.inspection.plots import (
    plot_calibration,
    plot_confusion,
    plot_figures,
    plot_losses,
    plot_runs,
)
from gpt2mini.inspection.tracing import Trace, activation_names, patched, trace

__all__ = [
    "Difference",
    "HeadEffects",
    "HeadScores",
    "Lens",
    "ModelComparison",
    "Piece",
    "Trace",
    "activation_names",
    "compare_models",
    "first_token_score",
    "head_effects",
    "head_scores",
    "induction_score",
    "logit_lens",
    "mean_activations",
    "nearest_tokens",
    "patched",
    "plot_attention",
    "plot_calibration",
    "plot_change",
    "plot_confusion",
    "plot_figures",
    "plot_head_scores",
    "plot_lens",
    "plot_losses",
    "plot_runs",
    "plot_trace",
    "previous_token_score",
    "score_text",
    "surprise_legend",
    "surprise_text",
    "token_labels",
    "trace",
]
