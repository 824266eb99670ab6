"""One over the smoothness L, the largest curvature."""

from __future__ import annotations

from math import isfinite, sqrt

import torch

from gdtrain._compat import torch_foreach as foreach
from gdtrain.ranges import Whole
from gdtrain.step_sizes.base import Needs, StepSize, option, optional
from gdtrain.step_sizes.context import Context, Memory, at_least_single, squared_norm

__all__ = ["InverseSmoothness"]


class InverseSmoothness(StepSize):
    """One over the smoothness L, the largest curvature in absolute value: η = 1/L.

        v ← H v / ‖H v‖,    H v ≈ (d(θ + ε v) − d(θ)) / ε,    L ≈ ‖H v‖

    by power iteration on differences of gradients, ε = √(machine precision) · (1 + ‖θ‖). L is
    measured at the first update and every `every` updates after it, where the search goes on from
    the last v. Each iteration is one gradient. Gradient descent on a quadratic is stable below 2/L,
    so 1/L leaves a factor of 2 for what L changes in between. Power iteration sees L from below.

    Args:
        smoothness: L, range (0, ∞), if it is known; None: it is measured.
        every: Updates between measurements, range [1, ∞).
        iterations: At most, for each measurement, range [1, ∞).
        tolerance: A relative change of L that is small enough to stop at, range (0, 1).
        seed: Of the first v; no other random numbers are used.

    Raises:
        ValueError: At an update: gradients elsewhere cannot be had.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
        >>> optimizer = GD([theta], step_size=InverseSmoothness())
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (torch.tensor([1.0, 8.0]) * theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> _ = optimizer.step(closure)
        >>> round(optimizer.last_rate, 4)
        0.125

    References:
        Nesterov, Introductory Lectures on Convex Optimization, 2004, section 1.2.
        LeCun, Simard and Pearlmutter, Automatic Learning Rate Maximization by On-Line Estimation
        of the Hessian's Eigenvectors, 1992.
    """

    def __init__(
        self,
        smoothness: float | None = None,
        every: int = 100,
        iterations: int = 30,
        tolerance: float = 0.01,
        seed: int = 0,
    ) -> None:
        self.smoothness = optional("smoothness", smoothness, 0)
        self.every = Whole(1).check("every", every)
        self.iterations = Whole(1).check("iterations", iterations)
        self.tolerance = option("tolerance", tolerance, 0, 1, closed="right")
        self.seed = seed

    @property
    def needs(self) -> Needs:
        """A measured L is that of one batch."""
        noise = (
            "the curvature of one batch is not that of f, and 1/L is no safe step for noisy "
            "gradients (L may be given, as smoothness=)"
        )
        return Needs(
            gradients=True,
            smooth="where f has kinks there is no L",
            full_batch=noise if self.smoothness is None else None,
        )

    @property
    def keeps(self) -> tuple[str, ...]:
        """The direction of the largest curvature, from which the next search begins."""
        return ("vector",) if self.smoothness is None else ()

    def rate(self, context: Context, memory: Memory) -> float:
        """1/L."""
        if self.smoothness is not None:
            return 1 / self.smoothness
        numbers = memory.numbers
        if "smoothness" not in numbers or context.t % self.every == 0:
            numbers["smoothness"] = self._measured(context, memory, numbers.get("smoothness"))
        return 1 / numbers["smoothness"] if numbers["smoothness"] > 0 else 0.0

    def _measured(self, context: Context, memory: Memory, before: float | None) -> float:
        v = memory.tensors("vector")
        if v is None:
            generator = torch.Generator().manual_seed(self.seed)
            v = [
                torch.randn(p.shape, generator=generator, dtype=torch.float64).to(
                    p.device, at_least_single(p.dtype)
                )
                for p in context.params
            ]
            foreach.div_(v, sqrt(squared_norm(v)))
        epsilon = sqrt(context.precision) * (1 + sqrt(squared_norm(context.params)))
        largest = 0.0
        for _ in range(self.iterations):
            there = context.direction_at([epsilon * t for t in v])
            product = [
                (a.to(t.dtype) - b.to(t.dtype)) / epsilon
                for a, b, t in zip(there, context.direction, v, strict=True)
            ]
            last, largest = largest, sqrt(squared_norm(product))
            if not isfinite(largest) or largest == 0:
                # A flat place, or one on the edge of what is finite: what was known still holds.
                return before or 0.0
            v = [t / largest for t in product]
            if abs(largest - last) <= self.tolerance * largest:
                break
        memory.keep("vector", v)
        return largest
