"""Stochastic gradient descent: each update uses one training example."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdtrain.optim.base import Descent
from gdtrain.step_sizes import StepSize

__all__ = ["SGD"]


class SGD(Descent):
    """Stochastic gradient descent, one example an update; a drop-in for `torch.optim.SGD`.

        θ ← θ − η ∇f_i(θ),    i drawn from 1 … N

    f_i is the loss of example i. N updates per pass over the data. In a torch loop the loader
    decides what `p.grad` averages, as with `torch.optim.SGD`, whose arguments, numbers, state
    and errors this class shares.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: η, range [0, ∞). A constant η leaves noise of a size in proportion to it; let η decay.
            "auto": `PolyakDoG`, which decays over total_updates, chooses it; then step with a
            closure.
        momentum: μ, range [0, ∞), customary 0.9; dampening: τ, customary 0.
        weight_decay: λ of the penalty ½λ‖θ‖², range [0, ∞).
        nesterov, maximize, differentiable: As for `torch.optim.SGD`.
        foreach: False applies the rule tensor by tensor.
        fused: True takes PyTorch's fused kernel, which may round less often. None, with `foreach`
            None: the fastest way that has the bits of torch's loop, tensor by tensor.
        step_size: A rule that computes η at each `step(closure)`: see `gdtrain.step_sizes`.
            It takes the place of lr.
        total_updates: T, the updates of the whole run, range [1, ∞), for rules that decay.

    Raises:
        ValueError: A hyperparameter is out of range, or the rule does not hold here.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = SGD(model.parameters(), lr=0.1)
        >>> for x in [1.0, 2.0, 3.0] * 30:  # of y = 2x
        ...     optimizer.zero_grad()
        ...     (0.5 * (model(torch.tensor([x])) - 2 * x) ** 2).sum().backward()
        ...     optimizer.step()
        >>> round(model.weight.item(), 4)
        2.0

    References:
        Robbins and Monro, A Stochastic Approximation Method, 1951.
        Bottou, Curtis and Nocedal, Optimization Methods for Large-Scale Machine Learning, 2018,
        arXiv 1606.04838.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | Literal["auto"] = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        step_size: StepSize | None = None,
        total_updates: int | None = None,
    ) -> None:
        rule = (lr, momentum, dampening, weight_decay, nesterov, maximize)
        way = {"foreach": foreach, "differentiable": differentiable, "fused": fused}
        super().__init__(params, rule, way, None, step_size, total_updates)
