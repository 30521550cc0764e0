"""The training loop, and the run around it: checkpoints, ranks, optimizers, memory."""

from gpt2mini.losses.steps import LossFunction, evaluate_loss, next_token_step
from gpt2mini.training.growth import train_growing
from gpt2mini.training.loop import train
from gpt2mini.training.memory import activation_checkpointing, recompute_activations
from gpt2mini.training.metrics import Figures
from gpt2mini.training.optimizers import adamw, cosine, muon_and_adamw, warmup_stable_decay
from gpt2mini.training.settings import Settings
from gpt2mini.training.signals import TrainingStopped

__all__ = [
    "Figures",
    "LossFunction",
    "Settings",
    "TrainingStopped",
    "activation_checkpointing",
    "adamw",
    "cosine",
    "evaluate_loss",
    "muon_and_adamw",
    "next_token_step",
    "recompute_activations",
    "train",
    "train_growing",
    "warmup_stable_decay",
]
