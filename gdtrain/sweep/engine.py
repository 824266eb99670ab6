"""What the ways to run a sweep share.

K updates in one sweep, B examples per update.
"""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.objective import Objective

__all__ = ["Engine", "NotApplicableError", "check_hooks", "last_share", "rates_by_schedule"]


class NotApplicableError(ValueError):
    """An engine cannot make the updates of this model, loss, optimizer or data; the text says why.

    Example:
        >>> raise NotApplicableError("the model is no MLP")
        Traceback (most recent call last):
        ...
        gdtrain.sweep.engine.NotApplicableError: the model is no MLP
    """


class Engine(Protocol):
    """Makes K whole updates, one after the other. All engines make the same (to rounding).

        for k in 0 … K−1:  g = ∇J(θ; indices[k]),  η = η₀ factors[k],  θ ← rule(θ, g, η)

    η₀ is each parameter group's "initial_lr", as torch's schedulers keep it. After a call the
    parameters, the optimizer's state and each group's "lr" are as the K-th update left them, and
    one call of K updates is the same, bit for bit, as several that make K together.

    Example:
        >>> from gdtrain.sweep.eager import Eager
        >>> engine: type[Engine] = Eager
        >>> engine.name
        'eager'
    """

    name: ClassVar[str]
    rates: Tensor
    """(K,) float64: η of the first group at each update of the last call."""
    evaluations: int
    """How often a rule has looked at J or its gradient elsewhere, so far."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        """Prepare, or raise `NotApplicableError`: then nothing was changed."""

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers, int64, and (K,) factors of the schedule, float64, to (K,) losses.

        The losses are J on each update's examples before that update. `draw` names the random
        numbers of the first update; the next has the next.
        """


def rates_by_schedule(optimizer: Optimizer, factors: Tensor) -> Tensor:
    """η of the first group at each update, where a schedule alone decides.

    Args:
        optimizer: Its groups have "initial_lr".
        factors: (K,).

    Returns:
        (K,), float64, on CPU.

    Example:
        >>> import torch
        >>> p = torch.nn.Parameter(torch.zeros(1))
        >>> optimizer = torch.optim.SGD([{"params": [p], "initial_lr": 0.5}])
        >>> rates_by_schedule(optimizer, torch.tensor([1.0, 0.5]))
        tensor([0.5000, 0.2500], dtype=torch.float64)
    """
    return factors.to("cpu", torch.float64) * float(optimizer.param_groups[0]["initial_lr"])


def last_share(shares: Tensor, before: float = 0.0) -> float:
    """The last share of η₀ that is above 0, from which a smoothed bound goes on.

    Args:
        shares: (K,), of `StochasticPolyak`.
        before: What there was before, if none of them is.

    Example:
        >>> last_share(torch.tensor([0.5, 0.25, 0.0]))
        0.25
    """
    positive = shares[shares > 0]
    return float(positive[-1]) if len(positive) else before


def check_hooks(objective: Objective, optimizer: Optimizer) -> None:
    """Refuse what only the eager engine runs: hooks of the user's, on modules or on the step.

    Args:
        objective: J.
        optimizer: Of its parameters.

    Raises:
        NotApplicableError: There are hooks, or several processes.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> model = torch.nn.Linear(1, 1)
        >>> _ = model.register_forward_hook(lambda module, inputs, output: None)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
        >>> check_hooks(objective, SGD(model.parameters()))
        Traceback (most recent call last):
        ...
        gdtrain.sweep.engine.NotApplicableError: Linear has hooks, which ...
    """
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    for module in (*objective.model.modules(), objective.loss):
        if any(getattr(module, name, None) for name in hooks):
            raise NotApplicableError(
                f"{type(module).__name__} has hooks, which only the eager engine calls"
            )
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in objective.params):
        raise NotApplicableError("a parameter has hooks, which only the eager engine calls")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise NotApplicableError("the optimizer has hooks, which only the eager engine calls")
    if objective.ranks > 1:
        raise NotApplicableError("several processes share each update")
