"""What engines, callbacks and analyses ask of an optimizer, gdtrain's own or another's.

An optimizer answers in attributes: `update_rules`, `own_rule`, `step_size`, `is_full_batch`,
`examples`. One that lacks them, as torch's do, has no rule for the step size, gathers nothing and
promises nothing of what its gradients average. So whoever asks here needs no list of classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch.optim import Optimizer

from gdtrain.rules import UpdateRule
from gdtrain.step_sizes import StepSize

__all__ = [
    "gathers",
    "is_full_batch",
    "own_rule",
    "step_size_of",
    "takes_step_size",
    "update_rules",
]


def update_rules(optimizer: Optimizer) -> tuple[UpdateRule, ...] | None:
    """The rule of `gdtrain.rules.descend_`, if that is what the optimizer's `step` applies.

    Args:
        optimizer: Any.

    Returns:
        The rule of each group; None: its step makes another update.

    Example:
        >>> theta = [torch.ones(1)]
        >>> update_rules(torch.optim.SGD(theta, lr=0.5, momentum=0.9))[0].momentum
        0.9
        >>> update_rules(torch.optim.Adam(theta)) is None
        True
    """
    if hasattr(optimizer, "update_rules"):
        return optimizer.update_rules
    step = inspect.unwrap(type(optimizer).step)  # torch wraps it, for its hooks
    if step is not inspect.unwrap(torch.optim.SGD.step):
        return None
    return tuple(UpdateRule.of(group) for group in optimizer.param_groups)


def own_rule(optimizer: Optimizer) -> Callable[..., None] | None:
    """Another rule with the arguments of `gdtrain.rules.descend_`, if `step` applies one."""
    return getattr(optimizer, "own_rule", None)


def step_size_of(optimizer: object) -> StepSize | None:
    """The rule that computes η; None: lr is η.

    Args:
        optimizer: Any.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.step_sizes import Armijo
        >>> step_size_of(GD([torch.ones(1)], step_size=Armijo())).initial
        1.0
        >>> step_size_of(torch.optim.Adam([torch.ones(1)])) is None
        True
    """
    return getattr(optimizer, "step_size", None)


def takes_step_size(optimizer: Optimizer) -> bool:
    """Whether its constructor takes `step_size=`, and it then steps by the rule.

    Args:
        optimizer: Any.

    Example:
        >>> from gdtrain import SGD
        >>> takes_step_size(SGD([torch.ones(1)])), takes_step_size(torch.optim.SGD([torch.ones(1)]))
        (True, False)
    """
    return hasattr(optimizer, "step_by_rule")


def is_full_batch(optimizer: Optimizer) -> bool:
    """Whether each update averages all N examples, so that no gradient is noisy.

    Args:
        optimizer: Any.

    Example:
        >>> from gdtrain import GD
        >>> is_full_batch(GD([torch.ones(1)])), is_full_batch(torch.optim.SGD([torch.ones(1)]))
        (True, False)
    """
    return bool(getattr(optimizer, "is_full_batch", False))


def gathers(optimizer: object) -> bool:
    """Whether it gathers micro-batches by itself until the examples of an update are in.

    Args:
        optimizer: Any.

    Example:
        >>> from gdtrain import GD
        >>> gathers(GD([torch.ones(1)], num_samples=5)), gathers(GD([torch.ones(1)]))
        (True, False)
    """
    return getattr(optimizer, "examples", None) is not None
