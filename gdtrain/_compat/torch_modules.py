"""Private names of `torch.nn`: where a module keeps its tensors, base classes, and hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

__all__ = [
    "BATCH_NORMS",
    "DROPOUTS",
    "NORMS",
    "buffers_in",
    "children_in",
    "has_hooks",
    "parameters_in",
    "tensor_has_hooks",
]

BATCH_NORMS: type = _BatchNorm  # without InstanceNorm, which mixes no examples
NORMS: tuple[type, ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
DROPOUTS: type = _DropoutNd

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own mapping of parameters, of itself alone.

    Args:
        module: Any.

    Example:
        >>> parameters_in(nn.Linear(1, 1, bias=False))["bias"] is None
        True
    """
    return module._parameters


def buffers_in(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own mapping of buffers, of itself alone: what stands in it is used.

    Args:
        module: Any.

    Example:
        >>> list(buffers_in(nn.BatchNorm1d(1)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return module._buffers


def children_in(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own mapping of modules, with those that stand in it twice.

    Args:
        module: Any.

    Example:
        >>> one = nn.ReLU()
        >>> list(children_in(nn.Sequential(one, one)))
        ['0', '1']
    """
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has registered a hook on a module's forward or backward pass.

    Args:
        module: Any.

    Example:
        >>> has_hooks(nn.ReLU())
        False
    """
    return any(getattr(module, name, None) for name in _HOOKS)


def tensor_has_hooks(tensor: Any) -> bool:
    """Whether somebody has registered a hook on a tensor's gradient.

    Args:
        tensor: A parameter.

    Example:
        >>> tensor_has_hooks(nn.Linear(1, 1).weight)
        False
    """
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
