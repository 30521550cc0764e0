"""Optimizers and learning-rate schedules: AdamW as GPT-2's successors use it; Muon for pretraining.

A schedule returns the learning-rate multiplier of a step, which scales each optimizer's peak rate.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gpt2mini.device import best_precision
from gpt2mini.model import GPT2
from gpt2mini.training.distributed import (
    get_rank,
    get_world_size,
    sharded_like,
    sum_tensor_over_ranks,
    whole_tensor,
)


def adamw(
    model: nn.Module, lr: float, weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95)
) -> AdamW:
    """AdamW over the trainable parameters; weight decay on matrices only.

    Biases and norms have no scale to keep small, so they are not decayed. The betas are GPT-3's
    (Brown et al. 2020, appendix B). Raises ValueError if no parameter is trainable, or one is in
    fewer bits than float32.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("no parameter requires a gradient: there is nothing to train")
    check_learning_precision(trainable)
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def parameter_groups(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The parameter groups of all optimizers."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def optimized_parameters(optimizers: Iterable[Optimizer]) -> set[nn.Parameter]:
    """The parameters that the optimizers hold."""
    return {parameter for group in parameter_groups(optimizers) for parameter in group["params"]}


def check_learning_precision(parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError for parameters in fewer bits than float32.

    A step changes a weight by a small part of it, and rounding loses that part: of the weights of
    a model in bfloat16 most do not move at all (Micikevicius et al. 2018, section 3.1). Autocast
    keeps float32 weights, and computes as fast.
    """
    few_bits = {p.dtype for p in parameters if torch.finfo(p.dtype).bits < 32}
    if few_bits:
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in few_bits))
        raise ValueError(
            f"parameters in {kinds} lose small updates and do not learn: load the model in float32 "
            "or call model.float(); precision bf16 or fp16 computes in fewer bits all the same. "
            "Frozen parameters may stay as they are"
        )


def muon_and_adamw(
    model: GPT2, lr: float, adamw_lr: float, weight_decay: float = 0.1
) -> tuple["Muon", AdamW]:
    """Muon for the matrices inside the blocks; AdamW for embeddings, norms, biases and the head.
    Raises ValueError for trainable parameters in fewer bits than float32."""
    check_learning_precision(p for p in model.parameters() if p.requires_grad)
    matrices = [p for p in model.trf_blocks.parameters() if p.ndim == 2 and p.requires_grad]
    inside = set(matrices)
    others = [p for p in model.parameters() if p.requires_grad and p not in inside]
    muon = Muon(matrices, lr=lr, weight_decay=weight_decay)
    return muon, AdamW(others, lr=adamw_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


class Muon(Optimizer):
    """Momentum whose step is orthogonalized: all directions of a weight matrix move equally far.

    Jordan et al. 2024, kellerjordan.github.io/posts/muon. The same update as `torch.optim.Muon`,
    which computes in bfloat16 on any processor: where bfloat16 is emulated (CPUs before
    AVX512-BF16) that is ten times slower than this, which then stays in the gradient's precision,
    and takes all matrices of one shape at once. Under torchrun the ranks, whose gradients have to
    be the same, share the work.

    precision: in which float32 gradients are orthogonalized, "bf16" or "fp32"; "auto" takes the
        faster one.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        precision: str = "auto",
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.precision = precision

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                for some in stacks(parameters):
                    self.update(some, group["lr"], group["momentum"], group["weight_decay"])

    def update(
        self, parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float
    ) -> None:
        """One step of matrices that have one shape."""
        averages = torch.stack([whole_tensor(self.momentum_step(p, momentum)) for p in parameters])
        directions = self.directions(averages)
        rows, columns = parameters[0].shape
        scale = lr * max(1.0, rows / columns) ** 0.5
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - lr * weight_decay)
            parameter.sub_(sharded_like(parameter, direction), alpha=scale)

    def momentum_step(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """Nesterov momentum: the average of past gradients, seen one step ahead."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None  # `step` passes only parameters that have one
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def directions(self, averages: Tensor) -> Tensor:
        """The averages orthogonalized. Every rank has the same ones: each takes a part of them."""
        directions = torch.zeros_like(averages)
        own = slice(get_rank(), None, get_world_size())
        directions[own] = orthogonalize(self.rounded(averages[own])).to(averages.dtype)
        return sum_tensor_over_ranks(directions)

    def rounded(self, averages: Tensor) -> Tensor:
        """In the precision in which they are orthogonalized."""
        half = best_precision(averages.device, self.precision) == "bf16"
        return averages.bfloat16() if half and averages.dtype == torch.float32 else averages


def stacks(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Matrices of one shape, so many at a time that in float32 they take 256 MB at most."""
    n = max(1, 2**26 // parameters[0].numel())
    return [parameters[i : i + n] for i in range(0, len(parameters), n)]


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """U V.T of each matrix U S V.T in a stack (n, rows, columns), nearly, without an SVD.

    A Newton-Schulz iteration: an odd polynomial of the matrix acts on its singular values alone,
    and this one, Jordan's, drives them all towards 1 (they end between about 0.7 and 1.2).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # (n, rows, columns), rows <= columns
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    is_precise = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    if is_precise and x.shape[2] >= 2 * x.shape[1]:
        x = iterations_together(x @ x.mT, iterations) @ x
    else:
        for _ in range(iterations):
            x = times_polynomial(x, even_terms(x @ x.mT))
    return x.mT if tall else x


def iterations_together(gram: Tensor, iterations: int) -> Tensor:
    """The matrix by which all iterations together multiply x, given x @ x.T, (n, rows, rows).

    It is a product of polynomials of the Gram matrix, which all commute, so that no step needs x
    itself. With four times as many columns as rows this takes half the time. A Gram matrix has
    the singular values squared: bfloat16 would lose the small ones.
    """
    product = torch.eye(gram.shape[1], dtype=gram.dtype).expand_as(gram)
    for _ in range(iterations):
        terms = even_terms(gram)
        product = times_polynomial(product, terms)
        gram = times_polynomial(times_polynomial(gram, terms), terms)
    return product


def even_terms(gram: Tensor) -> Tensor:
    """b G + c G^2 of Jordan's polynomial x (a + b G + c G^2), where G = x @ x.T."""
    return torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)


def times_polynomial(x: Tensor, even: Tensor) -> Tensor:
    """(a + b G + c G^2) @ x, given the `even_terms` of G."""
    return torch.baddbmm(x, even, x, beta=3.4445)


class ChangesInGroups:
    """The numbers in the optimizers' parameter groups that have changed since the start: some
    optimizers count there (schedule-free ones, for example), not in the state of each parameter.
    Learning rates are the schedule's. For checkpoints, through `state_dict`."""

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers  # not their groups: loading a state replaces those
        self.at_start = [numbers_of(group) for group in parameter_groups(optimizers)]

    def state_dict(self) -> dict[str, list[dict[str, Any]]]:
        pairs = zip(parameter_groups(self.optimizers), self.at_start, strict=True)
        changed = [
            {name: n for name, n in numbers_of(group).items() if n != before.get(name)}
            for group, before in pairs
        ]
        return {"changed": changed}

    def load_state_dict(self, state: dict[str, list[dict[str, Any]]]) -> None:
        groups = parameter_groups(self.optimizers)
        for group, changed in zip(groups, state["changed"], strict=False):
            group.update(changed)


def numbers_of(group: dict[str, Any]) -> dict[str, float]:
    """The numbers in a parameter group, other than learning rates."""
    rates = ("lr", "peak_lr", "initial_lr")
    numbers = {name: value for name, value in group.items() if isinstance(value, int | float)}
    return {name: number for name, number in numbers.items() if name not in rates}


def cosine(step: int, steps: int, warmup_steps: int, final_multiplier: float = 0.1) -> float:
    """Linear warmup, then half a cosine down to `final_multiplier` (Loshchilov & Hutter 2017; the
    schedule of GPT-3)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return final_multiplier + (1 - final_multiplier) * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_stable_decay(
    step: int, steps: int, warmup_steps: int, decay_share: float = 0.3
) -> float:
    """Linear warmup, a constant rate, and a linear decay to zero over the last `decay_share` of
    all steps (Hu et al. 2024, MiniCPM). Until the decay begins, a run can be prolonged at no
    loss."""
    decay_steps = max(1, round(decay_share * steps))
    return max(0.0, min(1.0, (step + 1) / max(1, warmup_steps), (steps - step) / decay_steps))
