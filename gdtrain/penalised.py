"""What an optimizer with weight decay descends on, f = J + ½ Σ λ‖θ‖².

Update rules, kernels and the closed forms of `gdtrain.convex` restate it; everybody else asks here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["penalty", "weight_decays", "with_decay"]


def weight_decays(params: Iterable[Tensor], groups: Iterable[Mapping[str, Any]]) -> list[float]:
    """λ of each parameter, as far as it is added to the gradient, by an optimizer's groups.

    It is 0 where the decay is decoupled from the gradient, where the group has no "weight_decay",
    or where the optimizer does not have the parameter.
    """
    by_parameter = {
        p: 0.0 if group.get("decoupled_weight_decay") else float(group.get("weight_decay", 0.0))
        for group in groups
        for p in group["params"]
    }
    return [by_parameter.get(p, 0.0) for p in params]


@torch.no_grad()
def penalty(params: Iterable[Tensor], decays: Iterable[float]) -> float:
    """½ Σ λ‖θ‖², in double precision, over all devices and all parts of DTensors."""
    parts = [
        0.5 * decay * _squared_norm(p) for p, decay in zip(params, decays, strict=True) if decay
    ]
    return float(sum(part.to(parts[0].device) for part in parts))  # the host waits once


@torch.no_grad()
def with_decay(
    gradient: Iterable[Tensor | None], params: Iterable[Tensor], decays: Iterable[float]
) -> list[Tensor]:
    """∇f = ∇J + λθ; and likewise ∇²f v = ∇²J v + λv, from ∇²J v and v.

    None, where J does not depend on a parameter, is a gradient of 0.
    """
    made = []
    for g, p, decay in zip(gradient, params, decays, strict=True):
        g = torch.zeros_like(p) if g is None else g
        if decay:  # rounded as in the update rule, which refuses sparse gradients here
            g = decay * p + g if g.is_sparse else torch.add(g, p, alpha=decay)
        made.append(g)
    return made


def _squared_norm(p: Tensor) -> Tensor:
    square = (torch.view_as_real(p) if p.is_complex() else p).double().square().sum()
    # All of it, where a parameter is divided between ranks (DTensor).
    return square.full_tensor() if hasattr(square, "full_tensor") else square
