"""Private names of `torch.optim.Optimizer` that have to do with its steps from outside."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

__all__ = ["has_step_hooks", "mark_stepped"]


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody has registered a hook on the optimizer's own steps.

    Args:
        optimizer: Any.

    Example:
        >>> import torch
        >>> has_step_hooks(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
        False
    """
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def mark_stepped(optimizer: Any) -> None:
    """Tell torch's schedulers that updates were made: not every engine calls `step()`.

    Args:
        optimizer: That a scheduler of torch follows.

    Example:
        >>> import torch
        >>> mark_stepped(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]))
    """
    optimizer._opt_called = True
