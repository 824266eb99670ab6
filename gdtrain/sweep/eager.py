"""The reference sweep: K whole updates, one after the other, for any module and any optimizer.

B examples per update. Faster engines do the same and are tested against this one.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.objective import Objective

__all__ = ["Eager"]


class Eager:
    """Makes K updates, as `gdtrain.sweep.engine.Engine` says.

    Args:
        objective: J.
        optimizer: Of the objective's parameters; its groups have "initial_lr".

    Example:
        >>> from torch import nn
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.5}])
        >>> sweep = Eager(Objective(model, SquaredError(), x, y), optimizer)
        >>> sweep(indices=torch.tensor([[0], [1]]), factors=torch.tensor([1.0, 0.5]))
        tensor([0.5000, 0.5000])
        >>> model.weight.item()  # 0.5·1·1, then 0.5 + 0.25·1·2
        1.0
    """

    name: ClassVar[str] = "eager"

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses.

        Args:
            indices: (K, B), int64.
            factors: (K,), the schedule's factor at each update.
            draw: Names the random numbers of the first update; the next has the next.

        Returns:
            (K,), J on each update's examples before that update.
        """
        losses = []
        objective, groups = self.objective, self.optimizer.param_groups
        for k, factor in enumerate(factors.tolist()):
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
            value, gradient = objective.value_and_grad(indices[k], draw + k)
            losses.append(value)
            for p, g in zip(objective.params, gradient, strict=True):
                p.grad = g
            self.optimizer.step()
        made = torch.stack(losses)
        return made.to(torch.promote_types(made.dtype, torch.float32))
