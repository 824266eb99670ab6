"""Full-batch gradient descent: each update averages all N training examples."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdtrain.optim.base import Descent
from gdtrain.step_sizes import StepSize

__all__ = ["GD"]


class GD(Descent):
    """Full-batch (or batch) gradient descent.

        θ ← θ − η (1/N) Σ_{i=1..N} ∇f_i(θ)

    f_i is the loss of example i. One update per pass over the data, from the exact gradient of the
    objective. The data may come in micro-batches of any sizes: see `step` and `gather`.

    The order: `zero_grad`, `backward`, (`scaler.unscale_`), `gather`, and when it returns True:
    clip, `step`; then (`scaler.update`). Without clipping, `step(num_samples=m)` does both.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: η, range [0, ∞); below 2/λ_max(∇²J) near a minimum, or the iteration diverges.
            "auto": `BarzilaiBorwein` chooses it; then step with a closure.
        num_samples: N, the examples whose mean gradient makes one update, range [1, ∞). None:
            every `step()` is an update, as in torch.
        momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused,
            step_size, total_updates: As for `SGD`.

    Raises:
        ValueError: A hyperparameter is out of range, or the rule does not hold here.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = GD(model.parameters(), lr=0.2, num_samples=len(x))
        >>> for epoch in range(50):
        ...     for part in (slice(0, 2), slice(2, 3)):  # micro-batches, ragged tail included
        ...         optimizer.zero_grad()
        ...         (0.5 * (model(x[part]) - y[part]) ** 2).mean().backward()
        ...         optimizer.step(num_samples=len(x[part]))
        >>> round(model.weight.item(), 4)
        2.0

    References:
        Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.
        Nesterov, Introductory Lectures on Convex Optimization, 2004.
    """

    examples_argument = "num_samples"
    is_full_batch = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | Literal["auto"] = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        num_samples: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        step_size: StepSize | None = None,
        total_updates: int | None = None,
    ) -> None:
        rule = (lr, momentum, dampening, weight_decay, nesterov, maximize)
        way = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        super().__init__(params, rule, way, num_samples, step_size, total_updates)
