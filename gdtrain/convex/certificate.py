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
kind: D is then −∞ unless A = 0 exactly. Least squares is the exception: see `LeastSquares`.

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
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdtrain.convex.problem import LinearProblem
from gdtrain.convex.search import Search
from gdtrain.losses import Loss

__all__ = ["Certificate", "certify", "duality_gap"]


@dataclass(frozen=True)
class Certificate:
    """A bound on how far P is from its minimum: P − min P ≤ gap = P − D, of a feasible α.

    `work` is what it took in passes over the N examples, each with a product of all inputs.
    """

    primal: float
    dual: float
    gap: float
    relative_gap: float
    work: float
    seconds: float

    def numbers(self) -> dict[str, float]:
        """All of them in a plain container."""
        return asdict(self)


def certify(
    problem: LinearProblem,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    work: float = math.inf,
    lower: float = 0.0,
) -> Certificate:
    """The gap at W (C, D) and b (C,).

    A better α is looked for until the relative gap is at most `tolerance`, or is known to be owed
    to W and b, or until `work` passes over the examples were made: the first α takes two. A search
    that has ended so goes on at the next call; the answer depends on the calls before and on no
    clock. `lower` is a lower bound of min P that is known already; 0 always is one.
    """
    if not work > 0:
        raise ValueError(f"work must lie in (0, ∞]. Received: work={work}.")
    started, before = time.perf_counter(), problem.passes
    theta = problem.joined(weight, bias)
    z = problem.outputs(theta)
    primal = problem.primal(theta, z)
    if problem.least_squares is not None:
        lower = max(lower, primal - problem.least_squares.excess(theta, z))
    elif math.isfinite(primal):
        wanted = max(tolerance * abs(primal), 1e-15)
        search = Search(problem, primal, wanted, before + work, lower)
        search.run(theta, z)
        lower = search.best
    gap = max(primal - lower, 0.0) if math.isfinite(primal) else math.inf
    return Certificate(
        primal,
        lower,
        gap,
        gap / max(abs(primal), torch.finfo(torch.float64).tiny) if gap < math.inf else gap,
        problem.passes - before,
        time.perf_counter() - started,
    )


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
        loss: One that states its conjugate, as gdtrain's own do.
        weight_decay: λ, range (0, ∞); for squared error also 0: then D is the minimum itself.
        bias_decay: λ_b, range [0, ∞).
        tolerance: A better α is looked for until the relative gap is at most this, or is known to
            be owed to W and b; range [0, ∞).
        work: Passes over the N examples, after which no better α is looked for; range (0, ∞].

    Raises:
        NoCertificateError: The loss states no conjugate, or λ = 0.
        ValueError: λ_b, `work` or the shapes are out of range.

    Example:
        One example x = 1, y = 1, λ = 1: P(w) = ½(w − 1)² + ½w², least at w = ½, where it is ¼.

        >>> from gdtrain.losses import SquaredError
        >>> gap = duality_gap([[0.0]], None, [[1.0]], [1.0], SquaredError(), weight_decay=1.0)
        >>> gap.primal, round(gap.dual, 12), round(gap.gap, 12)
        (0.5, 0.25, 0.25)
    """
    w, x, y = _tensor(weight), _tensor(inputs), _tensor(targets)
    b = None if bias is None else _tensor(bias)
    problem = LinearProblem(
        x, y, loss, len(w), weight_decay, bias=b is not None, bias_decay=bias_decay
    )
    return certify(problem, w, b, tolerance=tolerance, work=work)


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.require(values, requirements="W"))
