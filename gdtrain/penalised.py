"""What an optimizer with weight decay descends on, J + ½λ‖θ‖²: only here does λ meet J."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.objective import Objective

__all__ = ["Penalised", "penalty"]


@torch.no_grad()
def penalty(optimizer: Optimizer) -> float:
    """½λ‖θ‖², with each group's own λ ("weight_decay"), in double precision.

    Args:
        optimizer: Its groups have the parameters; those without "weight_decay" have no penalty.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> penalty(torch.optim.SGD([theta], lr=0.1, weight_decay=0.5))
        1.0
    """
    return sum(
        (
            0.5 * float(group["weight_decay"]) * float(p.double().square().sum())
            for group in optimizer.param_groups
            if group.get("weight_decay", 0) != 0
            for p in group["params"]
        ),
        start=0.0,
    )


class Penalised:
    """What an optimizer descends on: f = J + ½λ‖θ‖², with λ as each of its groups has it.

        f(θ) = J(θ) + ½ Σ_groups λ ‖θ_group‖²,   ∇f = ∇J + λθ

    With `maximize`, J enters with the opposite sign and the penalty does not: f = −J + ½λ‖θ‖², as
    the update rule has it.

    Args:
        objective: J.
        optimizer: Of its parameters; asked anew at each call, so that λ may change.

    Raises:
        ValueError: Some groups maximize and others do not: that is no function.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.zeros(1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        >>> f = Penalised(objective, optimizer)
        >>> f.value(torch.arange(1))  # ½2² + ½·0.5·2²
        3.0
        >>> value, (gradient,) = f.value_and_grad(torch.arange(1))
        >>> value, gradient.item()  # 2 + 0.5·2
        (3.0, 3.0)
    """

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        _ = self._sign

    @property
    def _sign(self) -> float:
        signs = {-1.0 if group.get("maximize") else 1.0 for group in self.optimizer.param_groups}
        if len(signs) > 1:
            raise ValueError(
                "Groups that maximize and groups that minimize have no objective in common. "
                "Received: both. Set maximize for all of them, or for none."
            )
        return signs.pop()

    def penalty(self) -> float:
        """½λ‖θ‖² alone."""
        return penalty(self.optimizer)

    def value(self, indices: Tensor, draw: int = 0) -> float:
        """f, on this process alone.

        Args:
            indices: (B,), int64.
            draw: As for `Objective.losses`.
        """
        return self._sign * float(self.objective.value(indices, draw)) + self.penalty()

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[float, list[Tensor | None]]:
        """f and ∇f, over all ranks.

        Args:
            indices: (B,), int64, the same on every rank.
            draw: As for `Objective.losses`.

        Returns:
            A number, and one gradient for each of the objective's parameters; None where J does not
            depend on it: such a parameter is not stepped, and λ does not act on it.
        """
        value, gradient = self.objective.value_and_grad(indices, draw)
        return self._sign * float(value) + self.penalty(), self.gradient(gradient)

    @torch.no_grad()
    def gradient(self, gradient: Sequence[Tensor | None]) -> list[Tensor | None]:
        """∇f from ∇J, at the parameters as they are.

        Args:
            gradient: ∇J, one for each of the objective's parameters, or None.

        Returns:
            The same, with λθ; None stays None.
        """
        sign = self._sign
        decays = {
            id(p): float(group.get("weight_decay", 0))
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        return [
            None if g is None else sign * g + decays.get(id(p), 0.0) * p
            for p, g in zip(self.objective.params, gradient, strict=True)
        ]
