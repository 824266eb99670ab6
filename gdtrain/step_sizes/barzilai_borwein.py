"""Barzilai and Borwein's step size: one over the curvature along the last step."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, sqrt

from gdtrain._compat import torch_foreach as foreach
from gdtrain.ranges import Whole
from gdtrain.step_sizes.base import StepSize, option, optional
from gdtrain.step_sizes.context import Context, Memory, inner, squared_norm
from gdtrain.step_sizes.line_search import LONGEST, SEARCH, backtracked

__all__ = ["BarzilaiBorwein"]

_SHORTEST = 1e-12  # as LONGEST
_LONGEST_PAUSE = 64  # updates between two trials of Polyak's step


class BarzilaiBorwein(StepSize):
    """The secant's step size, safeguarded by a test against the last values.

        s = θ_t − θ_{t−1},    y = d_t − d_{t−1}
        η = ⟨s, s⟩ / ⟨s, y⟩                     BB1, the default; BB2 (short) is ⟨s, y⟩ / ⟨y, y⟩
        f(θ − η d) ≤ max(f_t, …, f_{t−M+1}) − c η ‖d‖²

    f need not decrease at each update: the test takes the largest of the last M values, or of the
    last T − t where the optimizer knows its total_updates T, so that a run does not end on a rise.
    Where it fails, η is interpolated as in `Armijo`. Where the curvature along s is not positive,
    η = ‖s‖/‖y‖. With `f_star`, Polyak's step (f − f*)/‖d‖² is tried instead where it is longer: it
    gets networks that can fit the data over plateaus. Each time it fails the test, twice as many
    updates pass before it is tried again (at most 64); each time it holds, half as many. Keeps two
    copies of the parameters; the test is one forward pass per update, two now and then.

    Args:
        short: BB2 instead of BB1.
        memory: M, range [1, ∞); 1: f decreases at each update.
        initial, c, max_backtracks: As for `Armijo`.
        f_star: f*, a lower bound of f, range (−∞, ∞); None: none is known.

    Example:
        >>> import torch
        >>> from gdtrain import GD
        >>> theta, scale = torch.nn.Parameter(torch.ones(2)), torch.tensor([1.0, 10.0])
        >>> optimizer = GD([theta], step_size=BarzilaiBorwein(initial=0.1))
        >>> def loss():
        ...     return 0.5 * (scale * theta.detach() ** 2).sum()
        >>> for _ in range(12):
        ...     theta.grad = scale * theta.detach()
        ...     optimizer.step_by_rule(loss(), loss)
        >>> bool(theta.abs().max() < 1e-6)
        True

    References:
        Barzilai and Borwein, Two-Point Step Size Gradient Methods, 1988.
        Raydan, The Barzilai and Borwein Gradient Method for the Large Scale Unconstrained
        Minimization Problem, 1997. Grippo, Lampariello and Lucidi, A Nonmonotone Line Search
        Technique for Newton's Method, 1986. Dai, Al-Baali and Yang, A Positive
        Barzilai–Borwein-Like Stepsize, 2015 (‖s‖/‖y‖). Polyak, Introduction to Optimization, 1987.
    """

    needs = replace(
        SEARCH,
        full_batch="the difference of two batches' gradients is noise, not curvature",
        no_momentum="the secant and the test are those of steps along −d",
    )
    keeps = ("theta", "direction")

    def __init__(
        self,
        short: bool = False,
        initial: float = 1.0,
        memory: int = 10,
        c: float = 1e-4,
        max_backtracks: int = 30,
        f_star: float | None = None,
    ) -> None:
        self.short = short
        self.initial = option("initial", initial, 0)
        self.memory = Whole(1).check("memory", memory)
        self.c = option("c", c, 0, 1)
        self.max_backtracks = Whole(1).check("max_backtracks", max_backtracks)
        self.f_star = optional("f_star", f_star, -inf)

    def rate(self, context: Context, memory: Memory) -> float:
        """The secant's η, after the test."""
        numbers = memory.numbers
        secant = self._secant(context, memory)
        start = max(secant, self._polyak(context, memory))
        values = [*numbers.get("values", []), context.value][-self.memory :]
        rate, numbers["last"] = backtracked(
            context,
            start,
            max(values[-context.updates_left :]),
            self.c,
            "interpolate",
            self.max_backtracks,
        )
        if start > secant:
            held, pause = rate == start, numbers.get("pause", 1)
            numbers["pause"] = max(pause // 2, 1) if held else min(2 * pause, _LONGEST_PAUSE)
            numbers["wait"] = 0 if held else numbers["pause"]
        numbers["values"], numbers["parameters"] = values, len(context.params)
        memory.keep("theta", context.params)
        memory.keep("direction", context.direction)
        return rate

    def _polyak(self, context: Context, memory: Memory) -> float:
        if self.f_star is None:
            return 0.0
        wait = memory.numbers.get("wait", 0)
        memory.numbers["wait"] = max(wait - 1, 0)
        excess = max(context.value - self.f_star, 0.0)
        if wait > 0 or excess > LONGEST * context.squared_norm:
            return 0.0
        return excess / context.squared_norm if context.squared_norm > 0 else 0.0

    def _secant(self, context: Context, memory: Memory) -> float:
        last = memory.numbers.get("last", self.initial)
        theta, direction = memory.tensors("theta"), memory.tensors("direction")
        if theta is None or direction is None:
            return last
        if memory.numbers["parameters"] != len(context.params):
            return last  # what has gained or lost its gradient belongs to no secant
        s = foreach.sub(context.params, theta)
        y = foreach.sub(context.direction, direction)
        ss, sy, yy = squared_norm(s), inner(s, y), squared_norm(y)
        if ss == 0 or not isfinite(sy):
            return last
        if sy <= 0:
            rate = sqrt(ss / yy) if yy > 0 else 10 * last
        else:
            rate = sy / yy if self.short else ss / sy
        return min(max(rate, _SHORTEST), LONGEST)
