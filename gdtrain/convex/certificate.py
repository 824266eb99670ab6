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
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdtrain.convex.conjugates import double
from gdtrain.convex.problem import LinearProblem
from gdtrain.convex.search import Search
from gdtrain.losses import Loss, SquaredError

__all__ = ["Certificate", "certify", "duality_gap", "least_squares_gap"]


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


def certify(
    problem: LinearProblem,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    tolerance: float = 1e-6,
    work: float = math.inf,
    lower: float = 0.0,
) -> Certificate:
    """The gap at W and b.

    Args:
        problem: P and D.
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

    Example:
        >>> x, y = torch.tensor([[1.0]]), torch.tensor([1.0])
        >>> problem = LinearProblem(x, y, SquaredError(), 1, weight_decay=1.0, bias=False)
        >>> round(certify(problem, torch.tensor([[0.0]])).gap, 12)
        0.25
    """
    if not work > 0:
        raise ValueError(f"work must lie in (0, ∞]. Received: work={work}.")
    started, before = time.perf_counter(), problem.passes
    w, b = double(weight), None if bias is None else double(bias)
    if (b is None) == problem.has_bias:
        raise ValueError(
            f"Expected {'a' if problem.has_bias else 'no'} bias. Received: "
            f"{'none' if b is None else 'one'}."
        )
    if problem.least_squares is not None:
        primal = problem.primal(w, b)
        lower = max(lower, primal - problem.least_squares.excess(w, b))
    else:
        z = problem.outputs(w, b)
        primal = float(problem.dual.values(z).mean()) + problem.penalty(w, b)
        if math.isfinite(primal):
            wanted = max(tolerance * abs(primal), 1e-15)
            search = Search(problem, primal, wanted, before + work, lower)
            search.run(w, b, z)
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
        weight_decay: λ, range (0, ∞).
        bias_decay: λ_b, range [0, ∞).
        tolerance: A better α is looked for until the relative gap is at most this, or is known to
            be owed to W and b; range [0, ∞).
        work: As for `certify`.

    Returns:
        P, D and their gap.

    Raises:
        NoCertificateError: The loss states no conjugate, or λ = 0.
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
    return certify(problem, w, b, tolerance=tolerance, work=work)


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


def _tensor(values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    return torch.from_numpy(np.require(values, requirements="W"))
