"""Norms and products of lists of tensors, the parameters taken as one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach

__all__ = ["at_least_single", "in_dtypes_of", "inner", "squared_norm"]


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 where it has fewer bits."""
    return torch.promote_types(dtype, torch.float32)


def in_dtypes_of(others: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors, each in the dtype of another."""
    return [t.to(other.dtype) for t, other in zip(tensors, others, strict=True)]


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """Σ ‖t‖², added up in double precision, over all devices and all parts of DTensors."""
    if not tensors:
        return 0.0
    own = foreach.norm([t if t.dtype.itemsize >= 4 else t.float() for t in tensors])
    norms = [_over_ranks(n) for n in own]
    if all(n.is_cpu for n in norms):
        return sum(n.item() ** 2 for n in norms)
    return float(torch.stack([n.to(norms[0].device).double() for n in norms]).square().sum())


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ ⟨a, b⟩, the real part where they are complex."""
    products = [
        _over_ranks((x.conj() * y).sum()).real
        if hasattr(x, "full_tensor")
        else torch.vdot(_flat(x), _flat(y)).real
        for x, y in zip(a, b, strict=True)
    ]
    if all(p.is_cpu for p in products):
        return sum(p.item() for p in products)
    return float(torch.stack([p.to(products[0].device).double() for p in products]).sum())


def _over_ranks(number: Tensor) -> Tensor:
    """All of it, where the parameters are divided between ranks (DTensor)."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1).to(at_least_single(t.dtype))
