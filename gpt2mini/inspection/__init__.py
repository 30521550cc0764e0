"""Look at what training and tests did: plots."""

from gpt2mini.inspection.plots import plot_confusion, plot_losses

__all__ = ["plot_confusion", "plot_losses"]
