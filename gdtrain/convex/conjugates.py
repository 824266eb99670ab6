"""A loss on the targets of a data set, as the dual of a linear problem asks for it.

N examples, C outputs, z and α (N, C). The mathematics of a loss stands on its class; here is what
follows from it for a free intercept, which asks for Σ_i α_i = 0: the intercept that is best for
given outputs, and the balanced α nearest to a given one, by the domain of the conjugate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from gdtrain.losses import Loss

__all__ = ["Conjugate", "double"]


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none.

    Args:
        tensor: Of any device and type.

    Example:
        >>> double(torch.ones(1)).dtype
        torch.float64
    """
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


class Conjugate:
    """ℓ(z_i, y_i) and ℓ*(α_i, y_i) of all examples, in float64.

    Args:
        loss: It states slope, curvature, conjugate and domain.
        targets: (N,) or (N, C), as the loss takes them.
        outputs: C.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> dual = Conjugate(SquaredError(), torch.tensor([1.0, 3.0]), 1)
        >>> z = torch.zeros(2, 1, dtype=torch.float64)
        >>> alpha = dual.slopes(z)  # ℓ + ℓ* = ⟨α, z⟩ = 0 there
        >>> dual.values(z) + dual.conjugates(alpha)
        tensor([0., 0.], dtype=torch.float64)
        >>> dual.shift(z), dual.balanced(alpha).ravel()
        (tensor([2.], dtype=torch.float64), tensor([ 1., -1.], dtype=torch.float64))
    """

    def __init__(self, loss: Loss, targets: Tensor, outputs: int) -> None:
        targets = loss.as_targets(targets, outputs)
        self.loss = loss
        self.targets = double(targets) if loss.task == "regression" else targets
        self._shares = torch.zeros(0)
        if loss.domain == "simplex":
            self._one_hot = double(F.one_hot(targets, outputs))
            self._shares = self._one_hot.mean(0)

    def values(self, z: Tensor) -> Tensor:
        """ℓ(z_i, y_i), (N,).

        Args:
            z: (N, C).
        """
        made: Tensor = self.loss(z, self.targets)
        return made

    def slopes(self, z: Tensor) -> Tensor:
        """α_i = ∇ℓ(z_i, y_i), (N, C).

        Args:
            z: (N, C).
        """
        return self.loss.slope(z, self.targets)

    def curvatures(self, z: Tensor) -> Tensor:
        """Diagonals of ∇²ℓ(z_i, y_i), (N, C).

        Args:
            z: (N, C).
        """
        return self.loss.curvature(z, self.targets)

    def hessian(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ ∇²ℓ(z_i, y_i) v_i, (N, C) to (N, C).

        Args:
            z: (N, C).
        """
        return self.loss.hessian(z, self.targets)

    def conjugates(self, alpha: Tensor) -> Tensor:
        """ℓ*(α_i, y_i), (N,).

        Args:
            alpha: (N, C), in the domain.
        """
        return self.loss.conjugate(alpha, self.targets)

    def shift(self, z: Tensor) -> Tensor:
        """t (C,) that minimises Σ_i ℓ(z_i + t, y_i); 0 where there is none.

        Args:
            z: (N, C).
        """
        if self.loss.domain == "simplex":
            return _shift_of_classes(z, self._shares)
        return _shift(self, z)

    def balanced(self, alpha: Tensor) -> Tensor:
        """An α near by, in the domain too, with Σ_i α_i = 0.

        Args:
            alpha: (N, C), in the domain.
        """
        if self.loss.domain == "everything":
            return alpha - alpha.mean(0)
        if self.loss.domain == "simplex":
            return _mixed(alpha, self._one_hot, self._shares)
        return _scaled(alpha)


def _mixed(alpha: Tensor, one_hot: Tensor, shares: Tensor) -> Tensor:
    """The distributions p = α + onehot(y), mixed with one so that their mean is π.

    π_c is the share of class c. With a mean π + r: (1 − ε) p_i + ε u, u = π − r (1 − ε)/ε, and ε
    the least for which u ≥ 0, the largest r_c/(π_c + r_c). Where a class has no example, b_c goes
    to −∞, and its p_ic are 0.
    """
    p = (alpha + one_hot).clamp(min=0)
    p = p / p.sum(1, keepdim=True)
    mean = p.mean(0)
    epsilon = float(((mean - shares) / mean.clamp(min=1e-300)).max().clamp(min=0))
    if epsilon > 0:
        u = (shares - (1 - epsilon) * mean).clamp(min=0)
        p = (1 - epsilon) * p + u
        p = p / p.sum(1, keepdim=True)
    return p - one_hot


def _scaled(alpha: Tensor) -> Tensor:
    """In each column, the entries of the sign that outweighs are scaled down to the others' sum."""
    positive, negative = alpha.clamp(min=0), (-alpha).clamp(min=0)
    up, down = positive.sum(0), negative.sum(0)
    least = torch.minimum(up, down)
    share = [torch.where(side > 0, least / side.clamp(min=1e-300), 0.0) for side in (up, down)]
    return positive * share[0] - negative * share[1]


def _shift(dual: Conjugate, z: Tensor) -> Tensor:
    """t (C,) with Σ_i ∇ℓ(z_i + t) = 0 for losses that add up over columns; 0 where none is.

    Newton's method, by bisection where that leaves the bracket, for all columns at once.
    """
    low, high = z.new_full((z.shape[1],), -1.0), z.new_full((z.shape[1],), 1.0)
    for _ in range(200):
        below, above = dual.slopes(z + low).sum(0) < 0, dual.slopes(z + high).sum(0) > 0
        if bool((below & above).all()):
            break
        low = torch.where(below, low, 2 * low)
        high = torch.where(above, high, 2 * high)
    found = below & above  # not so with one class alone: the best intercept is infinite
    t = torch.zeros_like(low)
    for _ in range(100):
        slope = dual.slopes(z + t).sum(0)
        low, high = torch.where(slope <= 0, t, low), torch.where(slope >= 0, t, high)
        if bool((slope.abs() <= 1e-15 * len(z)).all()):
            break
        new = t - slope / dual.curvatures(z + t).sum(0)
        inside = (new > low) & (new < high)  # false for what is not a number
        new = torch.where(inside, new, (low + high) / 2)
        if bool((new == t).all()):
            break
        t = new
    return torch.where(found, t, 0.0)


def _shift_of_classes(z: Tensor, shares: Tensor) -> Tensor:
    """Newton's method on Σ_i log Σ_c exp(z_ic + t_c) − N ⟨π, t⟩, with halved steps."""
    present = shares > 0
    whole = z
    found = torch.zeros_like(shares)
    z, shares = z[:, present], shares[present]
    t = torch.zeros_like(shares)

    def level(t: Tensor) -> float:
        return float(torch.logsumexp(z + t, 1).mean() - shares @ t)

    value = level(t)
    for _ in range(50):
        p = torch.softmax(z + t, 1)
        r = p.mean(0) - shares
        if float(r.abs().max()) < 1e-15:
            break
        # Singular along (1, …, 1), to which r is orthogonal.
        h = p.mean(0).diag() - p.T @ p / len(p) + 1 / len(shares)
        step = torch.linalg.lstsq(h, -r[:, None]).solution[:, 0]
        scale = 1.0
        while scale > 1e-6 and not (new := level(t + scale * step)) < value:
            scale /= 2
        if scale <= 1e-6:
            break
        t, value = t + scale * step, new
    found[present] = t
    if not bool(present.all()):  # exp(−800) = 0
        found[~present] = (z + t).min() - whole[:, ~present].amax(0) - 800
    return found
