"""Private names of `torch.nn`: where a module keeps its tensors, base classes, and hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd

__all__ = [
    "BATCH_NORMS",
    "DROPOUTS",
    "NORMS",
    "TRANSPOSED_CONVOLUTIONS",
    "buffers_in",
    "children_in",
    "has_hooks",
    "parameters_in",
    "tensor_has_hooks",
]

BATCH_NORMS: type = _BatchNorm  # without InstanceNorm, which mixes no examples
NORMS: tuple[type, ...] = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
DROPOUTS: type = _DropoutNd
TRANSPOSED_CONVOLUTIONS = _ConvTransposeNd

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def parameters_in(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """A module's own mapping of parameters, of itself alone."""
    return module._parameters


def buffers_in(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own mapping of buffers, of itself alone: what stands in it is used."""
    return module._buffers


def children_in(module: nn.Module) -> dict[str, nn.Module | None]:
    """A module's own mapping of modules, with those that stand in it twice."""
    return module._modules


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody has registered a hook on a module's forward or backward pass."""
    return any(getattr(module, name, None) for name in _HOOKS)


def tensor_has_hooks(tensor: Any) -> bool:
    """Whether somebody has registered a hook on a tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)
