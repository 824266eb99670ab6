r"""How far from the optimum a linear model is at most: a duality gap.

N examples x_i (D numbers), targets y_i, C outputs z_i = W x_i + b, W (C, D), b (C,). With weight
decay λ > 0 on W, and λ_b on b (0: b is free),

    P(W, b) = (1/N) Σ_i ℓ(z_i, y_i) + ½λ‖W‖² + ½λ_b‖b‖²

is convex. Its dual has one vector α_i (C,) per example. With the conjugate of the loss,
ℓ*(α, y) = max_z ⟨α, z⟩ − ℓ(z, y), A = (1/N) Σ_i α_i x_iᵀ and a = (1/N) Σ_i α_i,

    D(α) = −(1/N) Σ_i ℓ*(α_i, y_i) − ‖A‖²/(2λ) − ‖a‖²/(2λ_b),   and a = 0 where b is free.

For every feasible α and every W, b: D(α) ≤ min P ≤ P(W, b) (weak duality). So P − D, the duality
gap, is a proof of how far P is from its minimum at most, however W, b and α were found. At the
optimum α_i = ∇ℓ(z_i, y_i), and the gap is 0.

α is found in three steps, each only as far as it is needed:

1. α_i = ∇ℓ(z_i, y_i) at (W, b'), where b' is the best intercept for W, so that a = 0. The gap of
   (W, b') is then ‖∇_W P‖²/(2λ). What rounding leaves of a is taken off within the domain of ℓ*.
2. Smooth losses: the same at a better (W, b), by Newton steps on a copy of the parameters.
3. The hinge loss, whose slopes say little: an interior-point method on D itself, over the examples
   that lie nearest to the margin; the others have α at a bound.

All is computed in float64, whatever the type of the parameters. λ = 0 has no certificate of this
kind: D is then −∞ unless A = 0 exactly. Least squares is the exception: see `least_squares_gap`.

References:
    Fenchel duality for linear models: Shalev-Shwartz and Zhang, Stochastic Dual Coordinate Ascent
    Methods for Regularized Loss Minimization, 2013 (arXiv 1209.1873). Gap as a certificate:
    Boyd and Vandenberghe, Convex Optimization, 2004, section 5.5. Step 3: Ferris and Munson,
    Interior-Point Methods for Massive Support Vector Machines, 2002; Mehrotra, On the
    Implementation of a Primal-Dual Interior Point Method, 1992.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from gdtrain.engines.engine import NotApplicableError
from gdtrain.engines.native.engine import dense_layers
from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Huber,
    Logistic,
    Loss,
    OneHotSquaredError,
    SquaredError,
    SquaredHinge,
)
from gdtrain.objective import Objective, Rows

__all__ = [
    "Certificate",
    "LinearProblem",
    "NoCertificateError",
    "double",
    "duality_gap",
    "least_squares_gap",
    "linear_layer",
]

_RESIDENT = (
    64 * 2**20
)  # bytes of inputs in float64 that are kept; more are converted piece by piece
_WHOLE = 2 * 10**8  # N D², up to which the interior-point method takes all examples at once
_NEWTON, _CONJUGATE, _INTERIOR = 30, 1000, 80  # most iterations
_FEATURES = 1024  # D, up to which a matrix (D, D) is made for least squares


class NoCertificateError(ValueError):
    """This model, loss or weight decay has no duality gap; the text says why.

    Example:
        >>> raise NoCertificateError("the model is not linear")
        Traceback (most recent call last):
        ...
        gdtrain.convex.certificate.NoCertificateError: the model is not linear
    """


@dataclass(frozen=True)
class Certificate:
    """A bound on how far P is from its minimum.

    Args:
        primal: P at the parameters.
        dual: D at the best feasible α that was found: a lower bound of min P.
        gap: P − D, range [0, ∞) (rounding below 0 is shown as 0); P − min P is at most this.
        relative_gap: gap / max(|P|, tiny).
        work: Passes over the N examples that it took, each with a product of all inputs.
        seconds: That it took to compute.

    Example:
        >>> Certificate(0.5, dual=0.49, gap=0.01, relative_gap=0.02, work=2.0, seconds=0.0).gap
        0.01
    """

    primal: float
    dual: float
    gap: float
    relative_gap: float
    work: float
    seconds: float

    def numbers(self) -> dict[str, float]:
        """All of them in a plain container.

        Example:
            >>> sorted(Certificate(0.5, 0.5, 0.0, 0.0, 2.0, 0.0).numbers())
            ['dual', 'gap', 'primal', 'relative_gap', 'seconds', 'work']
        """
        return {
            "primal": self.primal,
            "dual": self.dual,
            "gap": self.gap,
            "relative_gap": self.relative_gap,
            "work": self.work,
            "seconds": self.seconds,
        }


def duality_gap(
    weight: Any,
    bias: Any,
    inputs: Any,
    targets: Any,
    loss: Loss,
    weight_decay: float,
    bias_decay: float = 0.0,
    *,
    tolerance: float = 1e-6,
    work: float = math.inf,
) -> Certificate:
    """The duality gap of a linear model: how far its objective is from the minimum at most.

    Args:
        weight: W, (C, D).
        bias: b, (C,); None: the model has none.
        inputs: (N, D).
        targets: (N,) or (N, C), as for the loss.
        loss: One of gdtrain's.
        weight_decay: λ, range (0, ∞).
        bias_decay: λ_b, range [0, ∞).
        tolerance: A better α is looked for until the relative gap is at most this, or is known to
            be owed to W and b; range [0, ∞).
        work: As for `LinearProblem.certify`.

    Returns:
        P, D and their gap.

    Raises:
        NoCertificateError: The loss is not one of gdtrain's, or λ = 0.
        ValueError: λ_b, `work` or the shapes are out of range.

    Example:
        One example x = 1, y = 1, λ = 1: P(w) = ½(w − 1)² + ½w², least at w = ½, where it is ¼.

        >>> gap = duality_gap([[0.0]], None, [[1.0]], [1.0], SquaredError(), weight_decay=1.0)
        >>> gap.primal, round(gap.dual, 12), round(gap.gap, 12)
        (0.5, 0.25, 0.25)
    """
    w, x, y = _tensor(weight), _tensor(inputs), _tensor(targets)
    b = None if bias is None else _tensor(bias)
    problem = LinearProblem(
        x, y, loss, len(w), weight_decay, bias=b is not None, bias_decay=bias_decay
    )
    return problem.certify(w, b, tolerance=tolerance, work=work)


# ---------------------------------------------------------------------- losses and conjugates


class _Dual(ABC):
    """A loss ℓ(z, y), its slope and its conjugate. z and α are (N, C)."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    @abstractmethod
    def values(self, z: Tensor) -> Tensor:
        """ℓ(z_i, y_i), (N,)."""

    @abstractmethod
    def slopes(self, z: Tensor) -> Tensor:
        """α_i = ∇ℓ(z_i, y_i), (N, C)."""

    @abstractmethod
    def conjugates(self, alpha: Tensor) -> Tensor:
        """ℓ*(α_i, y_i), (N,), for α in the domain."""

    def curvature(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        """v ↦ ∇²ℓ(z_i, y_i) v_i, (N, C) to (N, C)."""
        h = self.second(z)
        return lambda v: h * v

    @abstractmethod
    def second(self, z: Tensor) -> Tensor:
        """Diagonals of ∇²ℓ(z_i, y_i), (N, C)."""

    @abstractmethod
    def shift(self, z: Tensor) -> Tensor:
        """t (C,) that minimises Σ_i ℓ(z_i + t, y_i), where there is one."""

    @abstractmethod
    def balanced(self, alpha: Tensor) -> Tensor:
        """An α near by, in the domain too, with Σ_i α_i = 0."""


class _SquaredError(_Dual):
    """ℓ = ½‖z − y‖², ℓ* = ½‖α‖² + ⟨α, y⟩; the domain is everything, so centring balances."""

    def values(self, z: Tensor) -> Tensor:
        return 0.5 * (z - self.targets).square().sum(1)

    def slopes(self, z: Tensor) -> Tensor:
        return z - self.targets

    def conjugates(self, alpha: Tensor) -> Tensor:
        return (0.5 * alpha.square() + alpha * self.targets).sum(1)

    def second(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def shift(self, z: Tensor) -> Tensor:
        return (self.targets - z).mean(0)

    def balanced(self, alpha: Tensor) -> Tensor:
        return alpha - alpha.mean(0)


class _Huber(_Dual):
    """ℓ = Σ_c h(z_c − y_c), ℓ* = ½‖α‖² + ⟨α, y⟩ for |α_c| ≤ δ.

    Balanced by scaling down, in each column, those of the sign that outweighs.
    """

    def __init__(self, targets: Tensor, delta: float) -> None:
        super().__init__(targets)
        self.delta = delta

    def values(self, z: Tensor) -> Tensor:
        return F.huber_loss(z, self.targets, reduction="none", delta=self.delta).sum(1)

    def slopes(self, z: Tensor) -> Tensor:
        return (z - self.targets).clamp(-self.delta, self.delta)

    def conjugates(self, alpha: Tensor) -> Tensor:
        return (0.5 * alpha.square() + alpha * self.targets).sum(1)

    def second(self, z: Tensor) -> Tensor:
        return ((z - self.targets).abs() <= self.delta).to(z)

    def shift(self, z: Tensor) -> Tensor:
        return _shift(self, z)

    def balanced(self, alpha: Tensor) -> Tensor:
        return _scaled(alpha)


class _Margin(_Dual):
    """ℓ = φ(s z) with s = ±1, C = 1; α = −sβ, and β ≥ 0.

    Σ_i α_i = 0 says that the β of both classes have the same sum: the larger side is scaled down,
    which keeps each β in [0, β_i]. With one class alone it leaves β = 0.
    """

    def __init__(self, targets: Tensor) -> None:
        super().__init__(2 * double(targets.reshape(-1, 1)) - 1)

    def shift(self, z: Tensor) -> Tensor:
        if bool((self.targets == self.targets[0]).all()):
            return z.new_zeros(1)  # the best intercept is infinite
        return _shift(self, z)

    def balanced(self, alpha: Tensor) -> Tensor:
        return _scaled(alpha)


class _Logistic(_Margin):
    """φ(m) = log(1 + exp(−m)), ℓ* = β log β + (1 − β) log(1 − β) for 0 ≤ β ≤ 1."""

    def values(self, z: Tensor) -> Tensor:
        m = self.targets * z  # torch's softplus leaves exp(−m) out from m = 20 on
        return torch.logaddexp(torch.zeros_like(m), -m)[:, 0]

    def slopes(self, z: Tensor) -> Tensor:
        return -self.targets * torch.sigmoid(-self.targets * z)

    def conjugates(self, alpha: Tensor) -> Tensor:
        beta = -self.targets * alpha
        return (torch.xlogy(beta, beta) + torch.special.xlog1py(1 - beta, -beta))[:, 0]

    def second(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z) * torch.sigmoid(-z)


class _Hinge(_Margin):
    """φ(m) = max(0, 1 − m), ℓ* = −β for 0 ≤ β ≤ 1."""

    def values(self, z: Tensor) -> Tensor:
        return F.relu(1 - self.targets * z)[:, 0]

    def slopes(self, z: Tensor) -> Tensor:
        return -self.targets * (self.targets * z < 1)

    def conjugates(self, alpha: Tensor) -> Tensor:
        return (self.targets * alpha)[:, 0]

    def second(self, z: Tensor) -> Tensor:
        return torch.zeros_like(z)

    def shift(self, z: Tensor) -> Tensor:
        return z.new_zeros(1)  # its slopes are not used


class _SquaredHinge(_Margin):
    """φ(m) = max(0, 1 − m)², ℓ* = ¼β² − β for β ≥ 0."""

    def values(self, z: Tensor) -> Tensor:
        return F.relu(1 - self.targets * z).square()[:, 0]

    def slopes(self, z: Tensor) -> Tensor:
        return -2 * self.targets * F.relu(1 - self.targets * z)

    def conjugates(self, alpha: Tensor) -> Tensor:
        beta = -self.targets * alpha
        return (0.25 * beta.square() - beta)[:, 0]

    def second(self, z: Tensor) -> Tensor:
        return 2.0 * (self.targets * z < 1).to(z)


class _CrossEntropy(_Dual):
    """ℓ = log Σ_c exp(z_c) − z_y, ℓ* = Σ_c p_c log p_c, where p = α + e_y is a distribution.

    π_c is the share of class c. Balanced means that the p_i have the mean π. With a mean π + r they
    are mixed with one distribution: (1 − ε) p_i + ε u, u = π − r (1 − ε)/ε, and ε the least for
    which u ≥ 0, the largest r_c/(π_c + r_c). Where a class has no example, b_c goes to −∞, and its
    p_ic are 0.
    """

    def __init__(self, targets: Tensor, classes: int) -> None:
        super().__init__(double(F.one_hot(targets, classes)))
        self.shares = self.targets.mean(0)

    def values(self, z: Tensor) -> Tensor:
        return torch.logsumexp(z, 1) - (z * self.targets).sum(1)

    def slopes(self, z: Tensor) -> Tensor:
        return torch.softmax(z, 1) - self.targets

    def conjugates(self, alpha: Tensor) -> Tensor:
        p = (alpha + self.targets).clamp(min=0)
        return torch.xlogy(p, p).sum(1)

    def curvature(self, z: Tensor) -> Callable[[Tensor], Tensor]:
        p = torch.softmax(z, 1)
        return lambda v: p * (v - (p * v).sum(1, keepdim=True))

    def second(self, z: Tensor) -> Tensor:
        p = torch.softmax(z, 1)
        return p * (1 - p)

    def shift(self, z: Tensor) -> Tensor:
        """Newton's method on Σ_i log Σ_c exp(z_ic + t_c) − N ⟨π, t⟩, with halved steps."""
        present = self.shares > 0
        whole = z
        z, shares = z[:, present], self.shares[present]
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
        found = torch.zeros_like(self.shares)
        found[present] = t
        if not bool(present.all()):  # exp(−800) = 0
            found[~present] = (z + t).min() - whole[:, ~present].amax(0) - 800
        return found

    def balanced(self, alpha: Tensor) -> Tensor:
        p = (alpha + self.targets).clamp(min=0)
        p = p / p.sum(1, keepdim=True)
        mean = p.mean(0)
        epsilon = float(((mean - self.shares) / mean.clamp(min=1e-300)).max().clamp(min=0))
        if epsilon > 0:
            u = (self.shares - (1 - epsilon) * mean).clamp(min=0)
            p = (1 - epsilon) * p + u
            p = p / p.sum(1, keepdim=True)
        return p - self.targets


def _scaled(alpha: Tensor) -> Tensor:
    """In each column, the entries of the sign that outweighs are scaled down to the others' sum."""
    positive, negative = alpha.clamp(min=0), (-alpha).clamp(min=0)
    up, down = positive.sum(0), negative.sum(0)
    least = torch.minimum(up, down)
    share = [torch.where(side > 0, least / side.clamp(min=1e-300), 0.0) for side in (up, down)]
    return positive * share[0] - negative * share[1]


def _shift(dual: _Dual, z: Tensor) -> Tensor:
    """t (C,) with Σ_i ∇ℓ(z_i + t) = 0 for losses that add up over columns.

    Newton's method, by bisection where that leaves the bracket, for all columns at once.
    """
    low, high = z.new_full((z.shape[1],), -1.0), z.new_full((z.shape[1],), 1.0)
    for _ in range(200):
        below, above = dual.slopes(z + low).sum(0) < 0, dual.slopes(z + high).sum(0) > 0
        if bool((below & above).all()):
            break
        low = torch.where(below, low, 2 * low)
        high = torch.where(above, high, 2 * high)
    t = torch.zeros_like(low)
    for _ in range(100):
        slope = dual.slopes(z + t).sum(0)
        low, high = torch.where(slope <= 0, t, low), torch.where(slope >= 0, t, high)
        if bool((slope.abs() <= 1e-15 * len(z)).all()):
            break
        new = t - slope / dual.second(z + t).sum(0)
        inside = (new > low) & (new < high)  # false for what is not a number
        new = torch.where(inside, new, (low + high) / 2)
        if bool((new == t).all()):
            break
        t = new
    return t


# ---------------------------------------------------------------------- the problem


class LinearProblem:
    """P and D of one data set, loss and weight decay.

    Args:
        inputs: (N, …), flattened to (N, D).
        targets: (N,) or (N, C).
        loss: One of gdtrain's.
        outputs: C.
        weight_decay: λ, range (0, ∞); for squared error also 0.
        bias: Whether there is b.
        bias_decay: λ_b, range [0, ∞).

    Raises:
        NoCertificateError: The loss is not one of gdtrain's, or λ = 0.
        ValueError: λ_b is out of range, or there are no examples.

    Example:
        >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])
        >>> problem = LinearProblem(x, y, Hinge(), 1, weight_decay=1.0)
        >>> problem.certify(torch.tensor([[1.0]]), torch.tensor([0.0])).numbers()["primal"]
        0.5
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
        if not 0 <= bias_decay < math.inf:
            raise ValueError(f"bias_decay must be finite and >= 0. Received: {bias_decay}.")
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay must be finite and >= 0. Received: {weight_decay}.")
        if weight_decay == 0 and type(loss) not in (SquaredError, OneHotSquaredError):
            raise NoCertificateError(
                "without weight decay on the weights there is no finite certificate: set "
                "optimizer.weight_decay"
            )
        self.inputs = inputs
        self.count = len(inputs)
        self.weight_decay, self.bias_decay = float(weight_decay), float(bias_decay)
        self.has_bias = bias
        self.dual = _dual_of(loss, targets, outputs)
        self.balances = bias and bias_decay == 0
        self.passes = 0.0  # over the N examples, that were made so far
        self._kept: Tensor | None = None
        self._lowest: tuple[float, Tensor, Tensor | None] | None = None  # P met so far, W, b
        self._least_squares = _Quadratic(self) if weight_decay == 0 else None

    @classmethod
    def of(cls, objective: Objective, optimizer: Optimizer) -> LinearProblem:
        """The problem that a run solves.

        Args:
            objective: J.
            optimizer: Whose groups tell the weight decay of each parameter.

        Returns:
            The problem.

        Raises:
            NoCertificateError: The model is not linear, the loss not one of gdtrain's, or there is
                no weight decay.

        Example:
            >>> from gdtrain import GD
            >>> model = nn.Linear(1, 1)
            >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.ones(1))
            >>> optimizer = GD(model.parameters(), weight_decay=0.5)
            >>> LinearProblem.of(objective, optimizer).weight_decay
            0.5
        """
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
        example = objective.inputs[:1]
        if example.numel() != layer.in_features:
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

    # ------------------------------------------------------------------ passes over the data

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows of the inputs, (n, D) in float64."""
        if self._kept is None:
            first = self.inputs[:1]
            width = max(1, first.numel())
            rows = max(1, _RESIDENT // (8 * width))
            if self.count > rows:
                for start in range(0, self.count, rows):
                    part = slice(start, min(start + rows, self.count))
                    yield part, double(self.inputs[part]).flatten(1)
                return
            self._kept = double(self.inputs[: self.count]).flatten(1).contiguous()
        yield slice(0, self.count), self._kept

    def outputs(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """z_i = W x_i + b, (N, C), in float64.

        Args:
            weight: (C, D), float64.
            bias: (C,), float64.
        """
        self.passes += 1
        made = torch.cat([x @ weight.T for _, x in self._parts()])
        return made if bias is None else made + bias

    def _gathered(self, alpha: Tensor) -> Tensor:
        """A = (1/N) Σ_i α_i x_iᵀ, (C, D)."""
        self.passes += 1
        total: Tensor | float = 0.0
        for part, x in self._parts():
            total = total + alpha[part].T @ x
        assert isinstance(total, Tensor)
        return total / self.count

    def _penalty(self, weight: Tensor, bias: Tensor | None) -> float:
        made = 0.5 * self.weight_decay * float(weight.square().sum())
        if bias is not None and self.bias_decay:
            made += 0.5 * self.bias_decay * float(bias.square().sum())
        return made

    def primal(self, weight: Tensor, bias: Tensor | None = None) -> float:
        """P(W, b).

        Args:
            weight: (C, D).
            bias: (C,).

        Example:
            >>> x, y = torch.tensor([[1.0]]), torch.tensor([1.0])
            >>> LinearProblem(x, y, SquaredError(), 1, 1.0, bias=False).primal(torch.ones(1, 1))
            0.5
        """
        w, b = double(weight), None if bias is None else double(bias)
        return float(self.dual.values(self.outputs(w, b)).mean()) + self._penalty(w, b)

    def lower_bound(self, alpha: Tensor) -> float:
        """D(α), for α in the domain of the conjugate and, where b is free, balanced.

        Args:
            alpha: (N, C), float64.
        """
        return self._bound(alpha, self._gathered(alpha))

    def _bound(self, alpha: Tensor, gathered: Tensor) -> float:
        made = -float(self.dual.conjugates(alpha).mean())
        made -= float(gathered.square().sum()) / (2 * self.weight_decay)
        if self.has_bias and self.bias_decay:
            made -= float(alpha.mean(0).square().sum()) / (2 * self.bias_decay)
        return made

    # ------------------------------------------------------------------ the certificate

    def certify(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        tolerance: float = 1e-6,
        work: float = math.inf,
        lower: float = 0.0,
    ) -> Certificate:
        """The gap at W and b.

        Args:
            weight: (C, D).
            bias: (C,).
            tolerance: A better α is looked for until the relative gap is at most this, or is known
                to be owed to W and b; range [0, ∞).
            work: Passes over the N examples, after which no better α is looked for; range (0, ∞].
                The first α takes two, whatever it is. A search that has ended so goes on at the
                next call; the answer depends on the calls before and on no clock.
            lower: A lower bound of min P that is known already, such as `dual` of an earlier
                certificate of this problem. (0 always is one.)

        Returns:
            P, D and their gap.

        Raises:
            ValueError: The shapes do not fit, or `work` is out of range.
        """
        if not work > 0:
            raise ValueError(f"work must lie in (0, ∞]. Received: work={work}.")
        started, before = time.perf_counter(), self.passes
        w, b = double(weight), None if bias is None else double(bias)
        if (b is None) == self.has_bias:
            raise ValueError(
                f"Expected {'a' if self.has_bias else 'no'} bias. Received: "
                f"{'none' if b is None else 'one'}."
            )
        if self._least_squares is not None:
            primal = self.primal(w, b)
            lower = max(lower, primal - self._least_squares.excess(w, b))
        else:
            z = self.outputs(w, b)
            primal = float(self.dual.values(z).mean()) + self._penalty(w, b)
            if math.isfinite(primal):
                wanted = max(tolerance * abs(primal), 1e-15)
                search = _Search(self, primal, wanted, before + work, lower)
                search.run(w, b, z)
                lower = search.best
        gap = max(primal - lower, 0.0) if math.isfinite(primal) else math.inf
        return Certificate(
            primal,
            lower,
            gap,
            gap / max(abs(primal), torch.finfo(torch.float64).tiny) if gap < math.inf else gap,
            self.passes - before,
            time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Any]:
        """Where a search goes on, in plain containers: the lowest P that was met, its W and b."""
        return {"lowest": None if self._lowest is None else list(self._lowest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`: `certify` then answers as it would have.

        Args:
            state_dict: Of a problem with the same data.
        """
        lowest = state_dict["lowest"]
        self._lowest = None if lowest is None else (lowest[0], lowest[1], lowest[2])


class _Search:
    """Looks for a good α: `best` is the largest D so far, a lower bound of min P."""

    def __init__(
        self, problem: LinearProblem, primal: float, wanted: float, most: float, lower: float
    ) -> None:
        self.problem, self.primal, self.wanted = problem, primal, wanted
        self.most = most  # passes, counted by the problem, after which it is over
        self.best = lower
        self.least = primal  # the smallest P that was met: min P lies in [best, least]

    @property
    def done(self) -> bool:
        """Whether the gap is as small as wanted, or nearly all of it is owed to W and b."""
        unknown = self.least - self.best
        return (
            self.primal - self.best <= self.wanted
            or unknown <= 1e-2 * self.wanted
            or unknown <= 1e-3 * (self.primal - self.least)
            or self.is_over
        )

    @property
    def is_over(self) -> bool:
        """Whether as many passes were made as it may make."""
        return self.problem.passes >= self.most

    def run(self, w: Tensor, b: Tensor | None, z: Tensor) -> None:
        if self.primal - self.best <= self.wanted:
            return
        if isinstance(self.problem.dual, _Hinge):
            self._interior(w, z)
        else:
            self._newton(w, b, z)

    # ------------------------------------------------------------------ smooth losses

    def _newton(self, w: Tensor, b: Tensor | None, z: Tensor) -> None:
        """α at (W, b), and then at better ones, by Newton's method with conjugate gradients.

        The direction solves (H + Λ) d = −∇P only as well as Newton's speed needs; the step is
        halved until P falls by 10⁻⁴ of what its slope promises.
        """
        problem, dual = self.problem, self.problem.dual
        if problem._lowest is not None and problem._lowest[0] < self.primal:
            _, w, b = problem._lowest  # of an earlier search
            z = problem.outputs(w, b)
        for _ in range(_NEWTON):
            if problem.balances:
                assert b is not None
                t = dual.shift(z)
                b, z = b + t, z + t
            alpha = dual.slopes(z)
            if problem.balances:
                alpha = dual.balanced(alpha)
            gathered = problem._gathered(alpha)
            value = float(dual.values(z).mean()) + problem._penalty(w, b)
            if problem._lowest is None or value < problem._lowest[0]:
                problem._lowest = value, w, b
            self.least = min(self.least, value)
            self.best = max(self.best, problem._bound(alpha, gathered))
            if self.done:
                return
            gradient = gathered + problem.weight_decay * w
            gradient_b = None
            if b is not None:
                gradient_b = alpha.mean(0) + problem.bias_decay * b
            step, step_b = self._direction(z, gradient, gradient_b)
            slope = float((gradient * step).sum())
            if gradient_b is not None and step_b is not None:
                slope += float((gradient_b * step_b).sum())
            along = problem.outputs(step, step_b)
            scale = 1.0
            while scale > 1e-10:
                w_new = w + scale * step
                b_new = None if b is None or step_b is None else b + scale * step_b
                new = float(dual.values(z + scale * along).mean()) + problem._penalty(w_new, b_new)
                if new <= value + 1e-4 * scale * slope:
                    break
                scale /= 2
            else:
                return  # rounding: P cannot be told apart any more
            w, b, z = w_new, b_new, z + scale * along

    def _direction(
        self, z: Tensor, gradient: Tensor, gradient_b: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """d with (H + Λ) d = −∇P, by conjugate gradients preconditioned with the diagonal."""
        problem = self.problem
        curvature, second = problem.dual.curvature(z), problem.dual.second(z)
        bias = gradient_b is not None

        def product(v: Tensor) -> Tensor:
            """(H + Λ) v; v is (C, D + 1) with a bias, its last column."""
            vw = v[:, :-1] if bias else v
            bent = curvature(problem.outputs(vw, v[:, -1] if bias else None))
            made = problem._gathered(bent) + problem.weight_decay * vw
            if not bias:
                return made
            last = bent.mean(0) + problem.bias_decay * v[:, -1]
            return torch.cat([made, last[:, None]], 1)

        diagonal = torch.zeros_like(gradient)
        problem.passes += 1
        for part, x in problem._parts():
            diagonal += second[part].T @ x.square() / problem.count
        diagonal += problem.weight_decay
        r = -gradient
        if gradient_b is not None:
            last = second.mean(0) + problem.bias_decay
            diagonal = torch.cat([diagonal, last[:, None]], 1)
            r = torch.cat([r, -gradient_b[:, None]], 1)
        diagonal = diagonal.clamp(min=1e-3 * problem.weight_decay)
        x = torch.zeros_like(r)
        y = r / diagonal
        p, inner = y.clone(), float((r * y).sum())
        first = inner
        # Superlinear where the gap is far from what is wanted, exact near the end.
        enough = first * min(0.1, math.sqrt(first)) ** 2
        for _ in range(min(_CONJUGATE, 2 * r.numel())):
            if inner <= enough or self.is_over:
                break
            q = product(p)
            curved = float((p * q).sum())
            if not curved > 0:
                break
            a = inner / curved
            x += a * p
            r -= a * q
            y = r / diagonal
            new = float((r * y).sum())
            p = y + new / inner * p
            inner = new
        if not bool(x.any()):
            x = r / diagonal
        return (x[:, :-1], x[:, -1]) if bias else (x, None)

    # ------------------------------------------------------------------ hinge

    def _interior(self, w: Tensor, z: Tensor) -> None:
        """β of the n examples nearest to the margin; the others' is 1 inside it and 0 outside."""
        problem, dual = self.problem, self.problem.dual
        signs = dual.targets[:, 0]
        distance = 1 - signs * z[:, 0]
        width = w.shape[1]
        n = problem.count
        if n * width**2 > _WHOLE:
            n = min(n, max(1000, 10 * (width + 1)))
        while True:
            near = distance.abs().argsort()[:n]
            beta = (distance > 0).to(z)
            found = self._near(near, beta, signs)
            if found is not None:
                alpha = dual.balanced(-signs[:, None] * found[0][:, None])
                if not problem.balances:
                    alpha = -signs[:, None] * found[0][:, None]
                gathered = problem._gathered(alpha)
                self.best = max(self.best, problem._bound(alpha, gathered))
                w_new = -gathered / problem.weight_decay
                b_new = None
                if problem.has_bias:
                    b_new = (
                        found[1].reshape(1)
                        if problem.balances
                        else -alpha.mean(0) / problem.bias_decay
                    )
                distance_new = 1 - signs * problem.outputs(w_new, b_new)[:, 0]
                value = float(F.relu(distance_new).mean()) + problem._penalty(w_new, b_new)
                self.least = min(self.least, value)
                distance = distance_new  # a better guess of who is near
            if self.done or n == problem.count:
                return
            n = min(problem.count, 4 * n)

    def _near(self, near: Tensor, beta: Tensor, signs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The best β of the near ones with the others fixed, and b; None: no balance possible."""
        problem = self.problem
        others = beta.clone()
        others[near] = 0
        fixed = problem._gathered((signs * others)[:, None])[0]
        excess = signs @ others  # s·β of the others
        s = signs[near]
        if problem.balances:
            up, down = float((s > 0).sum()), float((s < 0).sum())
            # Strictly inside what the near ones can make up for, or there is no interior.
            if not -0.99 * up <= float(excess) <= 0.99 * down:
                if len(near) < problem.count:
                    return None
                if not (up and down):
                    return torch.zeros_like(beta), beta.new_zeros(())
        x = torch.cat(list(self._rows(near)))
        if problem.has_bias and problem.bias_decay:  # as a feature more, decayed like the others
            more = math.sqrt(problem.weight_decay / problem.bias_decay)
            x = torch.cat([x, x.new_full((len(x), 1), more)], 1)
            fixed = torch.cat([fixed, (excess / problem.count * more).reshape(1)])
        scale = problem.weight_decay * problem.count
        linear = s * (x @ fixed) / problem.weight_decay - 1
        factor = s[:, None] * x / math.sqrt(scale)
        # A step's matrix takes as many products as it has rows, and its solutions a few more.
        share, rows = len(near) / problem.count, min(factor.shape)

        def is_over() -> bool:
            problem.passes += share * (rows + 8)
            return problem.passes > self.most

        found, b = _box_quadratic(factor, linear, s if problem.balances else None, -excess, is_over)
        made = others
        made[near] = found.clamp(0, 1)
        return made, b

    def _rows(self, near: Tensor) -> Iterator[Tensor]:
        kept = self.problem._kept
        if kept is not None:
            yield kept[near]
            return
        size = max(1, _RESIDENT // (8 * max(1, self.problem.inputs[:1].numel())))
        for part in near.split(size):
            yield double(self.problem.inputs[part]).flatten(1)


def _box_quadratic(
    factor: Tensor,
    linear: Tensor,
    signs: Tensor | None,
    total: Tensor,
    is_over: Callable[[], bool],
) -> tuple[Tensor, Tensor]:
    """min ½‖Mᵀβ‖² + ⟨q, β⟩ over 0 ≤ β ≤ 1 and, with signs s, ⟨s, β⟩ = total.

    Mehrotra's primal-dual interior-point method. z and u are the multipliers of β ≥ 0 and β ≤ 1,
    b that of the sum. Each step solves (MMᵀ + Θ) Δβ + s Δb = h with Θ = z/β + u/(1 − β), through
    the (D, D) matrix I + MᵀΘ⁻¹M (Woodbury).

    Args:
        factor: M, (n, D).
        linear: q, (n,).
        signs: s, (n,); None: no sum is asked for.
        total: Of s·β, a scalar.
        is_over: Asked before each step whether to stop.

    Returns:
        β (n,), strictly inside, and b.
    """
    n, d = factor.shape
    beta = linear.new_full((n,), 0.5)
    b = linear.new_zeros(())
    gradient = factor @ (factor.T @ beta) + linear
    z, u = gradient.clamp(min=0) + 1, (-gradient).clamp(min=0) + 1
    eye = torch.eye(min(n, d), dtype=factor.dtype, device=factor.device)
    for _ in range(_INTERIOR):
        gradient = factor @ (factor.T @ beta) + linear
        if signs is not None:
            gradient = gradient + signs * b
        wrong = gradient - z + u
        missing = signs @ beta - total if signs is not None else b
        low, high = z * beta, u * (1 - beta)
        mu = float(low.sum() + high.sum()) / (2 * n)
        # 2 n μ bounds N (P − D).
        small = mu < 1e-13 and float(wrong.abs().max()) < 1e-9 and float(missing.abs()) < 1e-9 * n
        if small or is_over():
            break
        theta = z / beta + u / (1 - beta)
        if n <= d:
            chol = torch.linalg.cholesky_ex(factor @ factor.T + theta.diag())[0]
        else:
            thin = factor / theta[:, None]
            chol = torch.linalg.cholesky_ex(eye + factor.T @ thin)[0]

        def solve(h: Tensor, theta: Tensor = theta, chol: Tensor = chol) -> Tensor:
            if n <= d:
                return torch.cholesky_solve(h[:, None], chol)[:, 0]
            y = h / theta
            return y - (factor @ torch.cholesky_solve((factor.T @ y)[:, None], chol)[:, 0]) / theta

        along = solve(signs) if signs is not None else None

        def step(h: Tensor, along: Tensor | None = along, missing: Tensor = missing) -> Any:
            db = solve(h)
            if along is None:
                return db, db.new_zeros(())
            assert signs is not None
            dt = (signs @ db + missing) / (signs @ along)
            return db - along * dt, dt

        # Straight to the boundary; then again, towards the path and with the second order.
        d_beta, _ = step(-wrong - z + u)
        dz = -z - z * d_beta / beta
        du = -u + u * d_beta / (1 - beta)
        most = _most(beta, d_beta, z, dz, u, du)
        after = float(
            ((z + most * dz) * (beta + most * d_beta)).sum()
            + ((u + most * du) * (1 - beta - most * d_beta)).sum()
        ) / (2 * n)
        aim = mu * (after / mu) ** 3
        rest_low = (aim - dz * d_beta) / beta
        rest_high = (aim + du * d_beta) / (1 - beta)
        d_beta, dt = step(-wrong + rest_low - z - rest_high + u)
        dz = rest_low - z - z * d_beta / beta
        du = rest_high - u + u * d_beta / (1 - beta)
        most = min(1.0, 0.995 * _most(beta, d_beta, z, dz, u, du))
        if not (most > 1e-12 and math.isfinite(float(dt))):
            break  # rounding
        beta, z, u, b = beta + most * d_beta, z + most * dz, u + most * du, b + most * dt
        tiny = 1e-300
        beta = beta.clamp(1e-16, 1 - 1e-16)
        z, u = z.clamp(min=tiny), u.clamp(min=tiny)
    return beta, b


def _most(beta: Tensor, d: Tensor, z: Tensor, dz: Tensor, u: Tensor, du: Tensor) -> float:
    """The longest step, at most 1/0.995, that leaves β, 1 − β, z and u at 0 or above."""
    room = torch.cat([beta, 1 - beta, z, u])
    down = -torch.cat([d, -d, dz, du])
    ratio = torch.where(down > 0, room / down.clamp(min=1e-300), math.inf)
    return min(1 / 0.995, float(ratio.min()))


# ---------------------------------------------------------------------- least squares, λ = 0


class _Quadratic:
    """Least squares without weight decay: G = (1/N) Σ x̃_i x̃_iᵀ with x̃ = (x, 1), and its inverse."""

    def __init__(self, problem: LinearProblem) -> None:
        width = problem.inputs[:1].numel()
        if width > _FEATURES:
            raise NoCertificateError(
                f"without weight decay, least squares has a certificate up to {_FEATURES} "
                f"features: set optimizer.weight_decay"
            )
        self.problem = problem
        g: Tensor | float = 0.0
        for _, x in problem._parts():
            x = self._with_one(x)
            g = g + x.T @ x
        assert isinstance(g, Tensor)
        g = g / problem.count
        if problem.has_bias:
            g[-1, -1] += problem.bias_decay
        # In units in which each feature has the mean square 1.
        size = g.diagonal().sqrt()
        self._unit = torch.where(size > 0, 1 / size.clamp(min=1e-300), 0.0)
        values, vectors = torch.linalg.eigh(g * self._unit * self._unit[:, None])
        kept = values > 1e-13 * len(values) * values.max()
        self._inverse = torch.where(kept, 1 / values, 0.0)
        self._vectors = vectors

    def _with_one(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_ones(len(x), 1)], 1) if self.problem.has_bias else x

    def excess(self, w: Tensor, b: Tensor | None) -> float:
        """P − min P = ½ Σ_c ⟨g_c, G⁺ g_c⟩ with the gradient g (C, D + 1)."""
        problem = self.problem
        alpha = problem.dual.slopes(problem.outputs(w, b))
        gradient = problem._gathered(alpha)
        if b is not None:
            last = alpha.mean(0) + problem.bias_decay * b
            gradient = torch.cat([gradient, last[:, None]], 1)
        turned = (gradient * self._unit) @ self._vectors
        return 0.5 * float((turned.square() * self._inverse).sum())


def least_squares_gap(weight: Any, bias: Any, inputs: Any, targets: Any) -> Certificate:
    """How far linear regression without weight decay is from its minimum, exactly.

    With G = (1/N) Σ_i x̃_i x̃_iᵀ, x̃ = (x, 1), and the gradient g (C, D + 1) of P,
    P − min P = ½ Σ_c ⟨g_c, G⁺ g_c⟩: P is quadratic. G⁺ is the pseudo-inverse.

    Args:
        weight: W, (C, D), D at most 1024.
        bias: b, (C,); None: the model has none.
        inputs: (N, D).
        targets: (N,) or (N, C).

    Returns:
        P, min P (as `dual`) and their gap.

    Raises:
        NoCertificateError: There are more features.

    Example:
        >>> gap = least_squares_gap([[0.0]], None, [[1.0], [2.0]], [1.0, 2.0])
        >>> gap.primal, round(gap.gap, 12)  # ½(1 + 4)/2, and w = 1 fits exactly
        (1.25, 1.25)
    """
    return duality_gap(weight, bias, inputs, targets, SquaredError(), weight_decay=0.0)


# ---------------------------------------------------------------------- what is linear


def linear_layer(model: nn.Module) -> nn.Linear:
    """The layer of a linear model, z = W x + b.

    Args:
        model: gdtrain's `Linear`, `torch.nn.Linear`, or an `nn.Sequential` of one and `Flatten`.

    Returns:
        It.

    Raises:
        NoCertificateError: The model is another.

    Example:
        >>> linear_layer(nn.Sequential(nn.Flatten(), nn.Linear(4, 2))).out_features
        2
    """
    try:
        layers = dense_layers(model)
    except NotApplicableError as error:
        raise NoCertificateError(f"the model is not linear: {error}") from None
    if len(layers) != 1 or layers[0].activation != "identity":
        raise NoCertificateError("the model is not linear")
    return layers[0].linear


def _dual_of(loss: Loss, targets: Tensor, outputs: int) -> _Dual:
    kind = type(loss)
    margins: dict[type, type[_Margin]] = {
        Logistic: _Logistic,
        Hinge: _Hinge,
        SquaredHinge: _SquaredHinge,
    }
    if kind not in (SquaredError, Huber, OneHotSquaredError, CrossEntropy, *margins):
        raise NoCertificateError(f"there is no conjugate of {kind.__name__} here")
    targets = loss.as_targets(targets, outputs)
    if kind in (SquaredError, Huber):
        y = double(targets.reshape(len(targets), -1))
        return _Huber(y, loss.delta) if isinstance(loss, Huber) else _SquaredError(y)
    if kind is OneHotSquaredError:
        return _SquaredError(double(F.one_hot(targets, outputs)))
    if kind is CrossEntropy:
        return _CrossEntropy(targets, outputs)
    return margins[kind](targets)


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.require(values, requirements="W"))


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
