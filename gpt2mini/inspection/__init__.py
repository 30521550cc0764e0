"""Look at what training did: plots."""

from gpt2mini.inspection.plots import plot_losses

__all__ = ["plot_losses"]
