"""Mini-batch gradient descent: each update averages B training examples, 1 < B < N."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdtrain.optim.base import Descent
from gdtrain.step_sizes import StepSize

__all__ = ["MiniBatchSGD"]


class MiniBatchSGD(Descent):
    """Mini-batch stochastic gradient descent.

        θ ← θ − η (1/B) Σ_{i∈batch} ∇f_i(θ)

    f_i is the loss of example i. ⌈N/B⌉ updates per pass over the data. A batch may come in
    micro-batches of any sizes that add up to B: see `step` and `gather`; `flush` closes the
    smaller batch that an epoch may end with. The order of a loop is that of `GD`.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: η, range [0, ∞). "auto": `PolyakDoG`, which decays over total_updates, chooses it;
            then step with a closure.
        batch_size: B, the examples whose mean gradient makes one update, range [1, ∞). None:
            every `step()` is an update, as in torch.
        momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused,
            step_size, total_updates: As for `SGD`.

    Raises:
        ValueError: A hyperparameter is out of range, or the rule does not hold here.

    Example:
        >>> import torch
        >>> x = torch.arange(1.0, 9.0).reshape(8, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = MiniBatchSGD(model.parameters(), lr=0.02, batch_size=4)
        >>> for epoch in range(50):
        ...     for part in x.split(2):  # two micro-batches an update
        ...         optimizer.zero_grad()
        ...         (0.5 * (model(part) - 2 * part) ** 2).mean().backward()
        ...         optimizer.step(num_samples=len(part))
        >>> round(model.weight.item(), 4)
        2.0

    References:
        Dekel et al., Optimal Distributed Online Prediction Using Mini-Batches, 2012,
        arXiv 1012.1367.
    """

    examples_argument = "batch_size"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | Literal["auto"] = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        batch_size: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        step_size: StepSize | None = None,
        total_updates: int | None = None,
    ) -> None:
        rule = (lr, momentum, dampening, weight_decay, nesterov, maximize)
        way = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        super().__init__(params, rule, way, batch_size, step_size, total_updates)
