"""How sharply the objective bends, and how long a step it lets gradient descent take.

J objective with its weight decay, f = J + Σ ½λ_i‖θ_i‖², H = ∇²f its Hessian, λ the largest
eigenvalue of H ("sharpness"), η step size, β momentum, N examples, B of them in an update,
P parameters. H is never formed: only products H v are, each exact and by micro-batches.

On a quadratic, gradient descent multiplies the error along an eigenvector of H by 1 − ηλ_i at each
update, so that it converges if η < 2/λ and grows without bound if η > 2/λ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.analysis.gradients import apart, dot, flat
from gdtrain.data.order import Order
from gdtrain.objective import Objective, untouched
from gdtrain.optim.protocol import update_rules
from gdtrain.penalised import weight_decays, with_decay
from gdtrain.ranges import Interval, Whole

__all__ = [
    "NotFiniteError",
    "Sharpness",
    "batch_sharpness",
    "draw_batches",
    "limit_of",
    "sharpness",
    "stability_limit",
]

_VECTORS = 20  # that are kept at once
_KEPT = 5  # of them, when there is no room for more
_ASYMMETRY = 0.05  # of ‖H‖; rounding does not reach it, in half precision or on GPUs neither
# A random start may miss the largest eigenvalue for a while, and find the second instead: the value
# must not have grown by more than a tenth of the tolerance in the last so many products.
_SETTLED = 4


class NotFiniteError(ValueError):
    """There is no curvature to measure: the parameters have diverged."""


@dataclass(frozen=True)
class Sharpness:
    """A measured curvature, in loss per squared unit of parameter.

    The error of an eigenvalue is the residual ‖H v − value·v‖ at the unit vector v that was found:
    no further away is an eigenvalue of H, and the largest is no lower than the value.
    """

    value: float  # the largest eigenvalue, or the mean curvature along the gradients of batches
    error: float  # of batches one standard error
    examples: int  # that the value is of
    iterations: int  # Hessian-vector products that were made


def sharpness(
    objective: Objective,
    examples: int | Tensor | None = None,
    *,
    optimizer: Optimizer | None = None,
    tolerance: float = 0.01,
    max_iterations: int = 200,
    seed: int = 0,
    draw: int = 0,
) -> Sharpness:
    """The largest eigenvalue λ of the Hessian H, weight decay included, by Lanczos' method.

        w = H q_j,  w ← w − Q Qᵀ w,  q_{j+1} = w/‖w‖;  λ ≈ the largest eigenvalue of Qᵀ H Q

    Each w is made orthogonal to all vectors so far; when they are too many, the Ritz vectors of the
    largest eigenvalues stand for them. Equal calls give equal results, and the model stays as it
    is. A pass takes two to three times a gradient's memory: the objective's `micro_batch_size`.

    Args:
        objective: J.
        examples: How many, range [1, N], drawn by `seed`; or their indices, int64; None: all N.
        optimizer: Whose parameter groups' weight_decay belongs to f; None: none.
        tolerance: At which error / |value| is small enough, range (0, 1).
        max_iterations: Products that are made at most, range [1, ∞); then the error is larger.
        seed: Of the first vector and of the sample, range [0, ∞).
        draw: Names the random numbers of gdtrain's dropout.

    Returns:
        λ; negative where f bends down in all directions.

    Raises:
        ValueError: An argument is out of range, the optimizer maximises, or the model cannot be
            differentiated twice.
        NotFiniteError: A product is not finite.

    Example:
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x, y = torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.zeros(2)
        >>> found = sharpness(Objective(model, SquaredError(), x, y))  # H = ½ diag(4, 16)
        >>> round(found.value, 4), found.examples
        (8.0, 2)

    References:
        Lanczos, An iteration method for the solution of the eigenvalue problem, 1950.
        Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems, 2000.
        Pearlmutter, Fast exact multiplication by the Hessian, 1994.
        Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability,
        arXiv 2103.00065.
    """
    Interval(0, 1).check("tolerance", tolerance)
    Whole(1).check("max_iterations", max_iterations)
    generator = torch.Generator().manual_seed(seed)
    params = objective.params
    dtype = torch.promote_types(params[0].dtype, torch.float32)
    size = sum(p.numel() for p in params)
    start = torch.randn(size, generator=generator, dtype=torch.float64).to(params[0].device, dtype)
    indices = _indices(objective, examples, generator)
    decays = _decays(objective, optimizer)
    hessian = objective.hessian(indices, draw)

    def product(v: Tensor) -> Tensor:
        parts = apart(v, params)
        return flat(with_decay(hessian(parts), parts, decays)).to(dtype)

    with torch.no_grad():
        value, error, iterations = _largest(product, start, tolerance, max_iterations)
    return Sharpness(value, error, len(indices), iterations)


def batch_sharpness(
    objective: Objective,
    batches: Iterable[Tensor],
    *,
    optimizer: Optimizer | None = None,
    draw: int = 0,
) -> Sharpness:
    """The curvature that updates of B < N examples meet along their own gradients.

        E_B[ g_Bᵀ H_B g_B ] / E_B[ ‖g_B‖² ],  g_B and H_B of the batch's mean loss and weight decay

    Stochastic descent without momentum settles where this is near 2/η ("edge of stochastic
    stability"); there the largest eigenvalue λ is lower, and 2/λ is no limit. `batches` are (K, B),
    or K tensors; the error, over them, is infinite for one. The model stays as it is. The first
    batch has the random numbers of `draw`, the next those of the next.

    Andreyev and Beneventano, Edge of stochastic stability: revisiting the edge of stability for
    SGD, arXiv 2412.20553.
    """
    decays = _decays(objective, optimizer)
    bends, squares, examples = [], [], 0
    for k, indices in enumerate(batches):
        # The same numbers for g and H: each starts from where the generators are.
        with untouched(objective.model), torch.enable_grad():
            _, gradient = objective.value_and_grad(indices, draw + k)
        g = with_decay(gradient, objective.params, decays)
        product = with_decay(objective.hessian_vector(indices, g, draw + k), g, decays)
        bends.append(dot(g, product))
        squares.append(dot(g, g))
        examples += len(indices)
    if not bends:
        raise ValueError("batch_sharpness needs at least one batch. Received: none.")
    a, b = np.array(bends), np.array(squares)
    if not np.isfinite([a, b]).all():
        raise NotFiniteError(
            "A gradient, or the Hessian along it, is not finite: the parameters have diverged. Go "
            "back to an earlier state, and take a smaller lr."
        )
    count = len(a)
    if b.sum() == 0:
        return Sharpness(math.nan, math.nan, examples, count)
    value = float(a.sum() / b.sum())
    spread = math.sqrt(((a - value * b) ** 2).sum() / (count - 1)) if count > 1 else math.inf
    return Sharpness(value, spread / math.sqrt(count) / float(b.mean()), examples, count)


def stability_limit(
    sharpness: float | Sharpness,
    momentum: float = 0.0,
    nesterov: bool = False,
    dampening: float = 0.0,
) -> float:
    """The step size η beyond which full-batch descent is unstable.

        2/λ without momentum,  2(1 + β)/((1 − d)λ) with momentum β and dampening d,
        (2 + 2β)/((1 + 2β)λ) with Nesterov momentum

    Exact on a quadratic, and for B = N only: fewer examples have no such limit in λ.

    Args:
        sharpness: λ.
        momentum: β, range [0, 1].
        nesterov: Whether the momentum is Nesterov's, as torch makes it.
        dampening: d, range [0, 1); 0 with Nesterov.

    Returns:
        In units of η; infinite where λ ≤ 0.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> stability_limit(4.0), stability_limit(4.0, momentum=0.5)
        (0.5, 0.75)

    References:
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
        Cohen et al., arXiv 2103.00065, appendix B.
    """
    Interval(0, 1, closed="both").check("momentum", momentum)
    Interval(0, 1, closed="left").check("dampening", dampening)
    if nesterov and dampening:
        raise ValueError(
            f"Nesterov momentum has no dampening. Received: nesterov=True, dampening={dampening}."
        )
    value = sharpness.value if isinstance(sharpness, Sharpness) else sharpness
    if math.isnan(value):
        raise ValueError("sharpness must be a number. Received: nan.")
    if value <= 0:
        return math.inf
    if nesterov:
        return (2 + 2 * momentum) / ((1 + 2 * momentum) * value)
    # The first step with momentum is undampened; what follows repeats (1 − d) of it.
    return 2 * (1 + momentum) / ((1 - dampening if momentum else 1.0) * value)


def limit_of(sharpness: Sharpness, optimizer: Optimizer) -> float | None:
    """The smallest `stability_limit` of an optimizer's groups.

    None where λ ≤ 0, or the optimizer is no gradient descent.
    """
    rules = update_rules(optimizer)
    if rules is None or not sharpness.value > 0:
        return None
    return min(stability_limit(sharpness, r.momentum, r.nesterov, r.dampening) for r in rules)


def draw_batches(num_examples: int, batch_size: int, count: int, seed: Sequence[int]) -> Tensor:
    """Batches in an order of their own, (count, B); no example twice, where there are enough."""
    at_once = min(num_examples // batch_size, count)
    drawn = [
        torch.from_numpy(Order(num_examples, (*seed, k))(0, at_once * batch_size))
        for k in range(-(-count // at_once))
    ]
    return torch.cat(drawn).view(-1, batch_size)[:count]


def _largest(
    product: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, most: int
) -> tuple[float, float, int]:
    """The largest eigenvalue of a symmetric operator, its error, and the products made."""
    size = len(start)
    room = min(_VECTORS, size)
    q = torch.empty(room, size, dtype=start.dtype, device=start.device)
    t = np.zeros((room, room))  # Qᵀ H Q
    q[0] = start / start.norm()
    known, history = 0, []
    expected = np.zeros(0)  # of the next w along the vectors before, as H is symmetric
    while True:
        w = product(q[known])
        known += 1
        basis = q[:known]
        along = basis @ w
        w = w - along @ basis
        again = basis @ w  # what rounding has left
        w -= again @ basis
        column = (along + again).double().cpu().numpy()
        t[known - 1, :known] = t[:known, known - 1] = column
        rest = w.norm().item()
        if not (math.isfinite(rest) and np.isfinite(t).all()):
            raise NotFiniteError(
                "The Hessian has entries that are not finite: the parameters have diverged, or the "
                "loss is not smooth there. Go back to an earlier state, and take a smaller lr."
            )
        values, vectors = np.linalg.eigh(t[:known, :known])
        size_of_h = max(np.abs(values).max(), rest)
        if known > 1 and np.abs(column[:-1] - expected).max() > _ASYMMETRY * size_of_h:
            raise ValueError(
                "The products with the Hessian are not those of a symmetric matrix. A part of the "
                "model may hide its backward pass from autograd (numpy, detach()), or draw from a "
                "generator of its own."
            )
        value = float(values[-1])
        error = rest * abs(float(vectors[-1, -1]))
        history.append(value)
        bound = tolerance * abs(value)
        settled = len(history) > _SETTLED and value - history[-1 - _SETTLED] <= bound / 10
        # Nothing is left but rounding: H maps the space of these vectors into itself.
        closed = rest <= 10 * torch.finfo(start.dtype).eps * size_of_h
        if (error <= bound and settled) or closed or known == size or len(history) == most:
            return value, error, len(history)
        expected = np.append(np.zeros(known - 1), rest)
        if known == room:
            known = min(_KEPT, room - 1)
            kept = torch.from_numpy(vectors[:, -known:].T.copy()).to(q)
            q[:known] = kept @ basis
            t[:] = 0
            t[range(known), range(known)] = values[-known:]
            expected = rest * vectors[-1, -known:]
        q[known] = w / rest


def _decays(objective: Objective, optimizer: Optimizer | None) -> list[float]:
    groups = [] if optimizer is None else optimizer.param_groups
    if any(group.get("maximize") for group in groups):
        raise ValueError(
            "The sharpness is that of a function that is minimised. Received: maximize=True."
        )
    return weight_decays(objective.params, groups)


def _indices(
    objective: Objective, examples: int | Tensor | None, generator: torch.Generator
) -> Tensor:
    if isinstance(examples, Tensor):
        if len(examples) == 0:
            raise ValueError("examples must name at least one example. Received: none.")
        return examples
    count = len(objective.inputs)
    device = objective.targets.device
    if examples is None:
        return torch.arange(count, device=device)
    Whole(1, count).check("examples", examples)
    # Sorted: rows of a file are then read from front to back.
    return torch.randperm(count, generator=generator)[:examples].sort().values.to(device)
