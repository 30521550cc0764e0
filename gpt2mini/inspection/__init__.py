"""Look at what training and tests did: plots."""

from gpt2mini.inspection.plots import plot_calibration, plot_confusion, plot_figures, plot_losses

__all__ = ["plot_calibration", "plot_confusion", "plot_figures", "plot_losses"]
