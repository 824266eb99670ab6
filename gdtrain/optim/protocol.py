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
from gdtrain.step_sizes.bounded import BoundedStep

__all__ = [
    "bounded_step_of",
    "gathers",
    "is_full_batch",
    "own_rule",
    "step_size_of",
    "takes_step_size",
    "update_rules",
]


def update_rules(optimizer: Optimizer) -> tuple[UpdateRule, ...] | None:
    """The rule of each group, if `step` applies `gdtrain.rules.descend_`; else None."""
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
    """The rule that computes η; None: lr is η."""
    return getattr(optimizer, "step_size", None)


def bounded_step_of(optimizer: object) -> BoundedStep | None:
    """The rule, if it is one that engines apply by themselves."""
    rule = step_size_of(optimizer)
    return rule if isinstance(rule, BoundedStep) and rule.by_engines else None


def takes_step_size(optimizer: Optimizer) -> bool:
    """Whether its constructor takes `step_size=`, and it then steps by the rule."""
    return hasattr(optimizer, "step_by_rule")


def is_full_batch(optimizer: Optimizer) -> bool:
    """Whether each update averages all N examples, so that no gradient is noisy."""
    return bool(getattr(optimizer, "is_full_batch", False))


def gathers(optimizer: object) -> bool:
    """Whether it gathers micro-batches by itself until the examples of an update are in."""
    return getattr(optimizer, "examples", None) is not None
