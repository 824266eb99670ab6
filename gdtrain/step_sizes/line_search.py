"""Line searches: shrink η until f decreases enough."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import Literal

from gdtrain.ranges import Whole
from gdtrain.step_sizes.base import Needs, StepSize, known_fraction, option, optional
from gdtrain.step_sizes.context import Context, Memory

__all__ = ["LONGEST", "SEARCH", "Armijo", "StochasticLineSearch", "backtracked"]

LONGEST = 1e12  # a longer step comes from rounding, not from curvature
SEARCH = Needs(
    values=True,
    smooth="near a kink no step decreases f as the gradient promises, and the steps shrink to 0 "
    "away from the minimum",
    no_momentum="it tests the step along −d, and another would be made",
)


class Armijo(StepSize):
    """Backtracking until f decreases enough.

        f(θ − η d) ≤ f(θ) − c η ‖d‖²

    η starts at the last accepted one times `growth`, and is made smaller by `shrink` until this
    holds. Each trial is a forward pass over the data. Where f can no longer tell (differences of a
    few units in its last place) a trial counts as good. If none of `max_backtracks` + 1 trials is
    good, η = 0.

    Args:
        initial: The first η to try, range (0, ∞).
        c: How much of the decrease that the gradient promises is enough, range (0, 1).
        shrink: Range (0, 1); or "interpolate": the minimum of the parabola through f(θ), its slope
            and the trial, kept within [0.1, 0.5] of the trial.
        growth: Range [1, ∞).
        max_backtracks: Range [1, ∞).

    Example:
        >>> import torch
        >>> from gdtrain import GD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
        >>> optimizer = GD([theta], step_size=Armijo())
        >>> theta.grad = 4 * theta.detach()  # of 2θ²
        >>> optimizer.step_by_rule(2.0, lambda: 2 * theta.item() ** 2)
        >>> optimizer.last_rate, theta.item()  # η = 1 leads to −3; the parabola is least at ¼
        (0.25, 0.0)

    References:
        Armijo, Minimization of Functions Having Lipschitz Continuous First Partial Derivatives,
        1966. Nocedal and Wright, Numerical Optimization, 2006, section 3.1.
    """

    needs = replace(
        SEARCH,
        full_batch="a decrease on one batch says little about the next, from which its η would "
        "go on",
    )

    def __init__(
        self,
        initial: float = 1.0,
        c: float = 1e-4,
        shrink: float | Literal["interpolate"] = "interpolate",
        growth: float = 2.0,
        max_backtracks: int = 30,
    ) -> None:
        self.initial = option("initial", initial, 0)
        self.c, self.shrink = option("c", c, 0, 1), _shrink(shrink)
        self.growth = option("growth", growth, 1, closed="left")
        self.max_backtracks = Whole(1).check("max_backtracks", max_backtracks)

    def rate(self, context: Context, memory: Memory) -> float:
        """The first η on the way down that is good."""
        last = memory.numbers.get("last")
        start = self.initial if last is None else min(last * self.growth, LONGEST)
        rate, memory.numbers["last"] = backtracked(
            context, start, context.value, self.c, self.shrink, self.max_backtracks
        )
        return rate


class StochasticLineSearch(StepSize):
    """Armijo's test on the batch at hand, at each update.

        f_B(θ − η d_B) ≤ f_B(θ) − c η ‖d_B‖²

    Both sides are of the same examples with the same random numbers. η starts at
    min(η_max, γ^{B/N} η_{t−1}): it may grow by γ in a pass over the data. Holds best where the
    model can fit each example. One or two forward passes of the batch for each update.

    Args:
        initial, c, shrink, growth, max_backtracks: As for `Armijo`; growth is γ.
        max_lr: η_max, range (0, ∞).
        batch_fraction: B/N, range (0, 1]; None: what the optimizer knows (`GD` 1, and any inside
            `gdtrain`'s trainer).

    Raises:
        ValueError: At the first update: B/N is not known.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
        >>> rule = StochasticLineSearch(shrink=0.5, batch_fraction=1 / 2)
        >>> optimizer = SGD([theta], step_size=rule)
        >>> theta.grad = 4 * theta.detach()  # of 2θ²
        >>> optimizer.step_by_rule(2.0, lambda: 2 * theta.item() ** 2)
        >>> optimizer.last_rate, theta.item()
        (0.25, 0.0)

    References:
        Vaswani et al., Painless Stochastic Gradient: Interpolation, Line-Search, and Convergence
        Rates, 2019, arXiv 1905.09997.
    """

    needs = SEARCH

    def __init__(
        self,
        initial: float = 1.0,
        c: float = 0.1,
        shrink: float | Literal["interpolate"] = 0.9,
        growth: float = 2.0,
        max_lr: float = 10.0,
        max_backtracks: int = 100,
        batch_fraction: float | None = None,
    ) -> None:
        self.initial = option("initial", initial, 0)
        self.c, self.shrink = option("c", c, 0, 1), _shrink(shrink)
        self.growth = option("growth", growth, 1, closed="left")
        self.max_lr = option("max_lr", max_lr, 0)
        self.max_backtracks = Whole(1).check("max_backtracks", max_backtracks)
        self.batch_fraction = optional("batch_fraction", batch_fraction, 0, 1, closed="right")

    def rate(self, context: Context, memory: Memory) -> float:
        """The first η on the way down that is good for this batch."""
        grown = self.growth ** known_fraction(self.batch_fraction, context.batch_fraction)
        last = memory.numbers.get("last")
        start = min(self.initial if last is None else last * grown, self.max_lr)
        rate, tried = backtracked(
            context, start, context.value, self.c, self.shrink, self.max_backtracks
        )
        memory.numbers["last"] = tried if rate > 0 or last is None else last
        return rate


def backtracked(
    context: Context,
    start: float,
    reference: float,
    c: float,
    shrink: float | Literal["interpolate"],
    most: int,
) -> tuple[float, float]:
    """The first η with f(θ − η d) ≤ reference − c η ‖d‖², or 0; and the last that was tried.

    `start` is the first η to try, `most` the trials after it; `shrink` as for `Armijo`.
    """
    square, rate = context.squared_norm, start
    for trial in range(most + 1):
        value = context.evaluate(rate)
        if value <= reference - c * rate * square + context.resolution:
            return rate, rate
        if trial == most:
            break
        if shrink != "interpolate":
            rate *= shrink
        elif isfinite(value):
            above = value - context.value + rate * square  # the tangent; > 0 as the test has failed
            least = 0.5 * rate * square / above if above > 0 else 0.5
            rate *= min(max(least, 0.1), 0.5)
        else:
            rate *= 0.1
    return 0.0, rate


def _shrink(value: float | Literal["interpolate"]) -> float | Literal["interpolate"]:
    if not isinstance(value, str):
        return option("shrink", value, 0, 1)
    if value != "interpolate":
        raise ValueError(f"shrink must be in (0, 1), or 'interpolate'. Received: shrink={value!r}.")
    return value
