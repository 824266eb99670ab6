"""A linear model's objective P and its dual D on one data set; see `gdtrain.convex.certificate`.

N examples, D features, C outputs, z and α (N, C). The mathematics of a loss stands on its class;
`Conjugate` adds what a free intercept asks for, Σ_i α_i = 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gdtrain.losses import Loss
from gdtrain.models.structure import NotDenseError, dense_layers
from gdtrain.objective import Objective, Rows
from gdtrain.ranges import Interval

__all__ = [
    "Conjugate",
    "LeastSquares",
    "LinearProblem",
    "NoCertificateError",
    "double",
    "linear_layer",
]

_RESIDENT = 64 * 2**20  # bytes of inputs in float64 that are kept; more are converted in parts
_FEATURES = 1024  # D, up to which a matrix (D, D) is made for least squares


class NoCertificateError(ValueError):
    """This model, loss or weight decay has no duality gap; the text says why."""


def linear_layer(model: nn.Module) -> nn.Linear:
    """The layer of a linear model, z = W x + b; a NoCertificateError says what another one is."""
    try:
        layers = dense_layers(model)
    except NotDenseError as error:
        raise NoCertificateError(f"the model is not linear: {error}") from None
    if len(layers) != 1 or not layers[0].is_linear:
        raise NoCertificateError("the model is not linear")
    return layers[0].linear


class LinearProblem:
    """P and D of one data set, loss and weight decay λ, which only least squares may lack.

    The inputs (N, …) are flattened to (N, D). Where there is b, x̃ = (x, 1) and θ = (W, b) is
    (C, D + 1); else x̃ = x and θ = W. All of it is in float64.
    """

    def __init__(
        self,
        inputs: Rows,
        targets: Tensor,
        loss: Loss,
        outputs: int,
        weight_decay: float,
        *,
        bias: bool = True,
        bias_decay: float = 0.0,
    ) -> None:
        if len(inputs) == 0 or len(inputs) != len(targets):
            raise ValueError(
                f"Expected one target for each of at least one example. Received: {len(inputs)} "
                f"examples and {len(targets)} targets."
            )
        decay = Interval(0, math.inf, closed="left")
        self.bias_decay = decay.check("bias_decay", bias_decay)
        self.weight_decay = decay.check("weight_decay", weight_decay)
        if not loss.states("slope", "curvature", "conjugate", "domain"):
            raise NoCertificateError(f"there is no conjugate of {type(loss).__name__} here")
        if weight_decay == 0 and not loss.quadratic:
            raise NoCertificateError(
                "without weight decay on the weights there is no finite certificate: set "
                "optimizer.weight_decay"
            )
        self.inputs = inputs
        self.count = len(inputs)
        self.has_bias = bias
        self.dual = Conjugate(loss, targets, outputs)
        self.balances = bias and bias_decay == 0
        self.passes = 0.0  # over the N examples, that were made so far
        self.lowest: tuple[float, Tensor] | None = None  # P met so far, θ
        self._kept: Tensor | None = None
        first = self._converted(slice(0, 1))[0]
        self.decays = torch.full_like(first, weight_decay)  # of the columns of θ
        if bias:
            self.decays[-1] = bias_decay
        self._rows = max(1, _RESIDENT // (8 * len(first)))  # that are converted at once
        self.least_squares = LeastSquares(self) if weight_decay == 0 else None

    @classmethod
    def of(cls, objective: Objective, optimizer: Optimizer) -> LinearProblem:
        """The problem that a run solves, with the decays of the optimizer's groups."""
        layer = linear_layer(objective.model)
        decays: dict[int, float] = {}
        for group in optimizer.param_groups:
            if group.get("decoupled_weight_decay") or isinstance(optimizer, torch.optim.AdamW):
                raise NoCertificateError(
                    "decoupled weight decay is no part of an objective: use SGD or Adam"
                )
            if group.get("maximize"):
                raise NoCertificateError("the optimizer maximises")
            decays |= {id(p): float(group.get("weight_decay", 0.0)) for p in group["params"]}
        tensors = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        if any(id(p) not in decays or not p.requires_grad for p in tensors):
            raise NoCertificateError("a parameter of the linear model is not trained")
        loss = objective.loss
        if not isinstance(loss, Loss):
            raise NoCertificateError("the loss is none of gdtrain's")
        if objective.inputs[:1].numel() != layer.in_features:
            raise NoCertificateError("the linear layer is applied to a part of an example")
        return cls(
            objective.inputs,
            objective.targets,
            loss,
            layer.out_features,
            decays[id(layer.weight)],
            bias=layer.bias is not None,
            bias_decay=0.0 if layer.bias is None else decays[id(layer.bias)],
        )

    def joined(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """θ of W (C, D) and b (C,)."""
        if (bias is None) == self.has_bias:
            raise ValueError(
                f"Expected {'a' if self.has_bias else 'no'} bias. Received: "
                f"{'none' if bias is None else 'one'}."
            )
        w = double(weight)
        return w if bias is None else torch.cat([w, double(bias)[:, None]], 1)

    def _converted(self, which: slice | Tensor) -> Tensor:
        x = double(self.inputs[which]).flatten(1)
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.has_bias else x

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """x̃_i of all examples, (n, …) at a time."""
        if self._kept is None and self.count <= self._rows:
            self._kept = self._converted(slice(0, self.count)).contiguous()
        for start in range(0, self.count, self._rows):
            part = slice(start, min(start + self._rows, self.count))
            yield part, self._converted(part) if self._kept is None else self._kept

    def rows(self, which: Tensor) -> Tensor:
        """x̃_i of some examples."""
        if self._kept is not None:
            return self._kept[which]
        return torch.cat([self._converted(part) for part in which.split(self._rows)])

    def outputs(self, theta: Tensor) -> Tensor:
        """z_i = θ x̃_i, (N, C)."""
        self.passes += 1
        return torch.cat([x @ theta.T for _, x in self.parts()])

    def gathered(self, alpha: Tensor) -> Tensor:
        """(A, a) = (1/N) Σ_i α_i x̃_iᵀ, of the shape of θ."""
        self.passes += 1
        return reduce(torch.add, (alpha[part].T @ x for part, x in self.parts())) / self.count

    def primal(self, theta: Tensor, z: Tensor) -> float:
        """P(θ), with z its outputs: (1/N) Σ_i ℓ(z_i, y_i) + ½λ‖W‖² + ½λ_b‖b‖²."""
        losses = self.dual.loss(z, self.dual.targets)
        return float(losses.mean() + 0.5 * (self.decays * theta.square()).sum())

    def lower_bound(self, alpha: Tensor, gathered: Tensor) -> float:
        """D(α), for α in the domain of ℓ* and, where b is free, balanced; `gathered` is (A, a)."""
        decayed = self.decays > 0
        squares = gathered[:, decayed].square() / (2 * self.decays[decayed])
        conjugates = self.dual.loss.conjugate(alpha, self.dual.targets)
        return -float(conjugates.mean() + squares.sum())

    def state_dict(self) -> dict[str, Any]:
        """Where a search goes on, in plain containers: the lowest P that was met, its W and b."""
        if self.lowest is None:
            return {"lowest": None}
        value, theta = self.lowest
        parts = [theta[:, :-1], theta[:, -1]] if self.has_bias else [theta, None]
        return {"lowest": [value, *parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`: a search then answers as it would have."""
        lowest = state_dict["lowest"]
        self.lowest = None if lowest is None else (lowest[0], self.joined(*lowest[1:]))


class LeastSquares:
    """Least squares without weight decay on W: G = (1/N) Σ x̃_i x̃_iᵀ, and its inverse."""

    def __init__(self, problem: LinearProblem) -> None:
        if problem.inputs[:1].numel() > _FEATURES:
            raise NoCertificateError(
                f"without weight decay, least squares has a certificate up to {_FEATURES} "
                f"features: set optimizer.weight_decay"
            )
        self.problem = problem
        products = (x.T @ x for _, x in problem.parts())
        g = reduce(torch.add, products) / problem.count + problem.decays.diag()
        # In units in which each feature has the mean square 1.
        size = g.diagonal().sqrt()
        self._unit = torch.where(size > 0, 1 / size.clamp(min=1e-300), 0.0)
        values, vectors = torch.linalg.eigh(g * self._unit * self._unit[:, None])
        kept = values > 1e-13 * len(values) * values.max()
        self._inverse = torch.where(kept, 1 / values, 0.0)
        self._vectors = vectors

    def excess(self, theta: Tensor, z: Tensor) -> float:
        """P − min P = ½ Σ_c ⟨g_c, G⁺ g_c⟩ with the gradient g at θ, whose outputs are z."""
        problem = self.problem
        gradient = problem.gathered(problem.dual.slopes(z)) + problem.decays * theta
        turned = (gradient * self._unit) @ self._vectors
        return 0.5 * float((turned.square() * self._inverse).sum())


# ---------------------------------------------------------------------- losses and their conjugates


def double(tensor: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).to(torch.float64)


class Conjugate:
    """A loss on the targets of all examples, in float64, as the dual asks for it."""

    def __init__(self, loss: Loss, targets: Tensor, outputs: int) -> None:
        targets = loss.as_targets(targets, outputs)
        self.loss = loss
        self.targets = double(targets) if loss.task == "regression" else targets
        self._shares = torch.zeros(0)
        if loss.domain == "simplex":
            self._one_hot = double(F.one_hot(targets, outputs))
            self._shares = self._one_hot.mean(0)

    def slopes(self, z: Tensor) -> Tensor:
        """α_i = ∇ℓ(z_i, y_i), (N, C)."""
        return self.loss.slope(z, self.targets)

    def curvatures(self, z: Tensor) -> Tensor:
        """Diagonals of ∇²ℓ(z_i, y_i), (N, C)."""
        return self.loss.curvature(z, self.targets)

    def shift(self, z: Tensor) -> Tensor:
        """t (C,) that minimises Σ_i ℓ(z_i + t, y_i); 0 where there is none."""
        if self.loss.domain == "simplex":
            return _shift_of_classes(z, self._shares)
        return _shift(self, z)

    def balanced(self, alpha: Tensor) -> Tensor:
        """An α near by, in the domain too, with Σ_i α_i = 0."""
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
