"""The reference sweep: K whole updates, one after the other, for any module and any optimizer.

B examples per update. Faster engines do the same and are tested against this one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.objective import Objective

__all__ = ["run"]


def run(
    objective: Objective, optimizer: Optimizer, indices: Tensor, factors: Tensor, draw: int = 0
) -> Tensor:
    """Make K updates.

        for k in 0 … K−1:  g = ∇J(θ; indices[k]),  η = η₀ factors[k],  θ ← rule(θ, g, η)

    η₀ is each parameter group's "initial_lr", as torch's schedulers keep it.

    Args:
        objective: J.
        optimizer: Of the objective's parameters; its groups have "initial_lr".
        indices: (K, B), int64.
        factors: (K,), the schedule's factor at each update.
        draw: Names the random numbers of the first update; the next has the next.

    Returns:
        (K,), J on each update's examples before that update.

    Example:
        >>> from torch import nn
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.5}])
        >>> run(Objective(model, SquaredError(), x, y), optimizer,
        ...     indices=torch.tensor([[0], [1]]), factors=torch.tensor([1.0, 0.5]))
        tensor([0.5000, 0.5000])
        >>> model.weight.item()  # 0.5·1·1, then 0.5 + 0.25·1·2
        1.0
    """
    losses = []
    groups = optimizer.param_groups
    for k, factor in enumerate(factors.tolist()):
        for group in groups:
            group["lr"] = group["initial_lr"] * factor
        value, gradient = objective.value_and_grad(indices[k], draw + k)
        losses.append(value)
        for p, g in zip(objective.params, gradient, strict=True):
            p.grad = g
        optimizer.step()
    made = torch.stack(losses)
    return made.to(torch.promote_types(made.dtype, torch.float32))
