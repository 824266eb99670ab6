"""Polyak's step size: the step that would reach the least value if f were its tangent."""

from __future__ import annotations

from math import inf
from typing import Literal

import torch
from torch import Tensor

from gdtrain.step_sizes.base import Needs, StepSize, known_fraction, option, optional
from gdtrain.step_sizes.bounded import Bound, BoundedStep, last_share
from gdtrain.step_sizes.context import NUMBERS, Context, Memory

__all__ = ["Polyak", "StochasticPolyak"]


class Polyak(StepSize):
    """The step that would reach the value f* if f were its tangent.

        η = min(η_max, (f − f*) / (c ‖d‖²))

    f* is the least value of f, penalty included. With f_star="estimate" a target stands for it:

        f̂ = f_best − δ,    δ ← 2δ if f ≤ f_best − ½δ, else ½δ    before each update but the first

    δ starts at ½|f₀| (1 if that is 0). So the target is always below the best value so far: the
    further, the longer the steps bring at least half of what they aimed at.

    Args:
        f_star: f*, range (−∞, ∞); or "estimate". 0 where the model can fit the data exactly.
        c: Range (0, ∞); ½ gives twice the step, customary where f is nearly quadratic.
        max_lr: η_max, range (0, ∞); None: no bound.

    Raises:
        ValueError: At an update: f is below f_star.

    Example:
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = GD([theta], step_size=Polyak(f_star=0.0))
        >>> theta.grad = theta.detach().clone()  # of ½‖θ‖²
        >>> optimizer.step_by_rule(12.5, lambda: 0.5 * (theta**2).sum())
        >>> optimizer.last_rate, theta.data  # 12.5 / 25
        (0.5, tensor([1.5000, 2.0000]))

    References:
        Polyak, Introduction to Optimization, 1987. Hazan and Kakade, Revisiting the Polyak Step
        Size, 2019, arXiv 1905.00313. Bertsekas, Nedić and Ozdaglar, Convex Analysis and
        Optimization, 2003, section 8.2 (targets that adapt).
    """

    needs = Needs(
        full_batch="the loss of a batch is not f, and away from f* the steps of noisy gradients do "
        "not shrink; StochasticPolyak bounds them",
        no_momentum="the step is measured for a move along −d",
    )

    def __init__(
        self,
        f_star: float | Literal["estimate"] = 0.0,
        c: float = 1.0,
        max_lr: float | None = None,
    ) -> None:
        if isinstance(f_star, str) and f_star != "estimate":
            raise ValueError(
                f"f_star must be a number, or 'estimate'. Received: f_star={f_star!r}."
            )
        self.f_star = f_star if isinstance(f_star, str) else option("f_star", f_star, -inf)
        self.c, self.max_lr = option("c", c, 0), optional("max_lr", max_lr, 0)

    def rate(self, context: Context, memory: Memory) -> float:
        """(f − f*) / (c ‖d‖²)."""
        target = self._target(context, memory)
        if context.squared_norm == 0:
            return 0.0
        rate = max(context.value - target, 0.0) / (self.c * context.squared_norm)
        return rate if self.max_lr is None else min(self.max_lr, rate)

    def _target(self, context: Context, memory: Memory) -> float:
        f, numbers = context.value, memory.numbers
        if not isinstance(self.f_star, str):
            numbers["scale"] = scale = max(numbers.get("scale", 0.0), abs(f), abs(self.f_star))
            if f < self.f_star - 4 * context.precision * scale:
                raise ValueError(
                    f"f_star must be the least value of f, penalty included. Received: "
                    f"f_star={self.f_star}, and f={f} after {context.t} updates. "
                    f"Use f_star='estimate'."
                )
            return self.f_star
        if "best" not in numbers:
            numbers["best"], numbers["delta"] = f, 0.5 * abs(f) or 1.0
        else:
            reached = f <= numbers["best"] - 0.5 * numbers["delta"]
            numbers["delta"] *= 2.0 if reached else 0.5
            numbers["best"] = min(numbers["best"], f)
        return numbers["best"] - numbers["delta"]


class StochasticPolyak(BoundedStep):
    """Polyak's step on the batch at hand, with a cap: SPS_max.

        η = min(η_max, (f_B − f*) / (c ‖d_B‖²))

    f_B is of the update's examples; f* a lower bound of such values, 0 for most losses; f_B − f*
    counts as 0 below it. With `smoothing` γ the cap moves: η_max,t = γ^{B/N} η_{t−1}, so that η
    may grow by γ in a pass over the data (an η of 0, from a batch that is fitted exactly, is
    passed over). A function of the loss and the gradient's norm, so every engine has it.

    Args:
        max_lr: η_max, range (0, ∞); with smoothing, that of the first update. None: the
            optimizer's lr is η_max, with its schedule's factor.
        c: Range (0, ∞), customary ½; 1 for functions that are convex and not strongly so.
        f_star: f*, range (−∞, ∞).
        smoothing: γ, range [1, ∞), customary 2; None: a constant cap.
        batch_fraction: B/N, range (0, 1], asked for by smoothing; None: what the optimizer knows.

    Raises:
        ValueError: At the first update: B/N is not known.

    Example:
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = SGD([theta], step_size=StochasticPolyak(max_lr=0.75, c=1.0))
        >>> theta.grad = theta.detach().clone()  # of ½θ²
        >>> optimizer.step_by_rule(2.0, lambda: 0.5 * theta**2)
        >>> optimizer.last_rate, theta.item()  # min(¾, 2 / 4)
        (0.5, 1.0)

    References:
        Loizou et al., Stochastic Polyak Step-size for SGD: An Adaptive Learning Rate for Fast
        Convergence, 2021, arXiv 2002.10542.
    """

    def __init__(
        self,
        max_lr: float | None = None,
        c: float = 0.5,
        f_star: float = 0.0,
        smoothing: float | None = None,
        batch_fraction: float | None = None,
    ) -> None:
        self.max_lr = optional("max_lr", max_lr, 0)
        self.c, self.f_star = option("c", c, 0), option("f_star", f_star, -inf)
        self.smoothing = optional("smoothing", smoothing, 1, closed="left")
        self.batch_fraction = optional("batch_fraction", batch_fraction, 0, 1, closed="right")

    @property
    def needs(self) -> Needs:
        """η_max is lr, unless the rule has one."""
        return Needs(
            lr=self.max_lr is None,
            no_nesterov="the step looks ahead along the buffer, for which the bound is not meant",
        )

    def rate(self, context: Context, memory: Memory) -> float:
        """min(η_max, (f − f*) / (c ‖d‖²))."""
        most = context.lr if self.max_lr is None else self.max_lr
        last = memory.numbers.get("last")
        if self.smoothing is not None and last is not None:
            most = (
                self.smoothing ** known_fraction(self.batch_fraction, context.batch_fraction) * last
            )
        excess, square = max(context.value - self.f_star, 0.0), self.c * context.squared_norm
        rate = excess / square if excess < most * square else most
        if self.smoothing is not None and rate > 0:
            memory.numbers["last"] = rate
        return rate

    def bound(self, optimizer: torch.optim.Optimizer) -> Bound:
        """Growth is γ^{B/N}; η₀ is "initial_lr"."""
        group = optimizer.param_groups[0]
        peak = float(group["initial_lr"])
        first = 1.0 if self.max_lr is None or peak == 0 else self.max_lr / peak
        if self.smoothing is None:
            return Bound(1 / self.c, self.f_star, most=first)
        told: float | None = getattr(optimizer, "batch_fraction", None)
        growth = self.smoothing ** known_fraction(self.batch_fraction, told)
        numbers = group.get(NUMBERS, {})
        last, share = numbers.get("last"), numbers.get("share")
        if share is not None and share * peak == last:
            first = growth * share  # as without a break, to the last bit
        elif last is not None and peak != 0:
            first = growth * last / peak
        return Bound(1 / self.c, self.f_star, growth, first)

    def remember(
        self, optimizer: torch.optim.Optimizer, losses: Tensor, shares: Tensor, total: float
    ) -> None:
        """Keep the last share, from which smoothing goes on, as `rate` would have; never 0."""
        group, share = optimizer.param_groups[0], last_share(shares)
        if self.smoothing is not None and share > 0:
            last = share * float(group["initial_lr"])
            group[NUMBERS] = {**group.get(NUMBERS, {}), "last": last, "share": share}
