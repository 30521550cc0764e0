"""What `train` refuses to train."""

from torch import nn
from torch.optim import Optimizer

from gpt2mini.training.optimizers import check_learning_precision, optimized_parameters


def check_can_be_trained(model: nn.Module, optimizers: list[Optimizer]) -> None:
    """Raise ValueError for what would be trained in vain, or could not be saved."""
    of_model = set(model.parameters())
    optimized = optimized_parameters(optimizers)
    if optimized - of_model:
        raise ValueError(
            f"an optimizer has {len(optimized - of_model)} tensors that are not parameters of the "
            "model and would not be saved with it: make them part of it, or make the optimizer "
            "after the last change to the model"
        )
    check_learning_precision(p for p in optimized if p.requires_grad)
