"""Step sizes from distances travelled over gradients seen: no rate to set."""

from __future__ import annotations

from dataclasses import replace
from math import inf, isfinite, sqrt
from typing import Literal

from gdtrain._compat import torch_foreach as foreach
from gdtrain.step_sizes.base import Needs, StepSize, option, optional
from gdtrain.step_sizes.context import Context, Memory, in_dtypes_of, squared_norm

__all__ = ["DoG", "DoWG"]


class DoG(StepSize):
    """Distance over gradients: no rate to set.

        η_t = r̄_t / √(Σ_{i≤t} ‖d_i‖²),    r̄_t = max_{i≤t} ‖θ_i − θ₀‖, at least r_ε

    r_ε = start · (1 + ‖θ₀‖) makes the first step. With `averaging`, the last iterate is noisy and
    the average below is what to evaluate: `eval` puts it into the parameters, `train` takes it out.

        θ̄_{t+1} = (1 − w) θ̄_t + w θ_{t+1},    w = (1 + γ)/(t + 1 + γ),    γ = 8

    Keeps a copy of θ₀ (and of θ̄).

    Args:
        start: Range (0, ∞).
        averaging: Whether to keep θ̄.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> theta = torch.nn.Parameter(torch.tensor([3.0]))
        >>> optimizer = SGD([theta], step_size=DoG(start=0.25))
        >>> theta.grad = torch.tensor([2.0])  # of 2|θ|
        >>> optimizer.step_by_rule(6.0, lambda: 2 * theta.abs())
        >>> optimizer.last_rate, theta.item()  # r = ¼·4 = 1, over √4
        (0.5, 2.0)

    References:
        Ivgi, Hinder and Carmon, DoG is SGD's Best Friend: A Parameter-Free Dynamic Step Size
        Schedule, 2023, arXiv 2302.12022. Shamir and Zhang, Stochastic Gradient Descent for
        Non-Smooth Optimization, 2013, arXiv 1212.1824 (the average).
    """

    needs = Needs(
        no_momentum="momentum goes on after η was measured, into distances that make η longer "
        "still: it can diverge"
    )

    def __init__(self, start: float = 1e-6, averaging: bool = False) -> None:
        self.start, self.averaging = option("start", start, 0), averaging

    @property
    def average(self) -> str | None:
        """θ̄, where it is kept."""
        return "average" if self.averaging else None

    @property
    def keeps(self) -> tuple[str, ...]:
        """θ₀ and θ̄."""
        return ("start", "average") if self.averaging else ("start",)

    def rate(self, context: Context, memory: Memory) -> float:
        """r̄ / √Σ‖d‖²."""
        distance = _farthest(context, memory, self.start)
        total = memory.numbers.get("total", 0.0) + context.squared_norm
        memory.numbers["total"] = total
        return distance / sqrt(total) if total > 0 else 0.0

    def follow(self, context: Context, memory: Memory, rate: float) -> None:
        """Take θ into the average."""
        if not self.averaging:
            return
        average = memory.tensors("average")
        if average is None:
            memory.keep("average", context.params)
        else:
            weight = 9.0 / (context.t + 9.0)
            foreach.lerp_(average, in_dtypes_of(average, context.params), weight)


class DoWG(StepSize):
    """Distance over weighted gradients: as `DoG`, with late gradients counting more.

        v_t = Σ_{i≤t} r̄_i² ‖d_i‖²,    r̄_t = max_{i≤t} ‖θ_i − θ₀‖, at least r_ε
        η_t = min(r̄_t²/√v_t, cap · (f − f*)/‖d‖²) · (1 − t/T)

    The cap and the linear decay (1 − t/T) are options. A decay is most of what a tuned schedule
    gains; the cap keeps a step from being longer than the loss at hand can justify.
    r_ε = start · (1 + ‖θ₀‖). Keeps a copy of θ₀.

    Args:
        start: Range (0, ∞).
        cap: Range (0, ∞), or None.
        decay: "linear", which needs the optimizer's total_updates = T, or None.
        f_star: f*, a lower bound of f on any batch, asked for by the cap; range (−∞, ∞).

    Raises:
        ValueError: At an update: t ≥ T.

    Example:
        >>> import torch
        >>> from gdtrain import SGD
        >>> theta, rates = torch.nn.Parameter(torch.tensor([3.0])), []
        >>> optimizer = SGD([theta], step_size=DoWG(start=0.25, decay="linear"), total_updates=2)
        >>> for _ in range(2):
        ...     theta.grad = torch.tensor([2.0])  # of 2|θ|
        ...     optimizer.step_by_rule(2 * theta.abs(), lambda: 2 * theta.abs())
        ...     rates.append(round(optimizer.last_rate, 4))
        >>> rates  # 1/√4, then ½ · 1/√8
        [0.5, 0.1768]

    References:
        Khaled, Mishchenko and Jin, DoWG Unleashed: An Efficient Universal Parameter-Free Gradient
        Descent Method, 2023, arXiv 2305.16284. Defazio et al., When, Why and How Much? Adaptive
        Learning Rate Scheduling by Refinement, 2023, arXiv 2310.07831 (linear decay).
    """

    keeps = ("start",)

    def __init__(
        self,
        start: float = 1e-4,
        cap: float | None = None,
        decay: Literal["linear"] | None = None,
        f_star: float = 0.0,
    ) -> None:
        if decay not in (None, "linear"):
            raise ValueError(f"decay must be 'linear' or None. Received: decay={decay!r}.")
        self.start, self.cap = option("start", start, 0), optional("cap", cap, 0)
        self.decay, self.f_star = decay, option("f_star", f_star, -inf)

    @property
    def needs(self) -> Needs:
        """T for the decay; and no momentum, as `DoG`."""
        return replace(DoG.needs, total_updates=self.decay is not None)

    def rate(self, context: Context, memory: Memory) -> float:
        """r̄²/√v, capped and decayed."""
        factor = 1.0 if self.decay is None else 1 - context.progress
        square = _farthest(context, memory, self.start) ** 2
        total = memory.numbers.get("total", 0.0) + square * context.squared_norm
        memory.numbers["total"] = total
        if context.squared_norm == 0 or total == 0:
            return 0.0
        rate = square / sqrt(total)
        if self.cap is not None:
            excess = max(context.value - self.f_star, 0.0)
            rate = min(rate, self.cap * excess / context.squared_norm)
        return rate * factor


def _farthest(context: Context, memory: Memory, start: float) -> float:
    """r̄: the largest distance from θ₀ so far, at least start · (1 + ‖θ₀‖)."""
    numbers, first = memory.numbers, memory.tensors("start")
    if first is None:  # the first update, or parameters that had no gradient before
        memory.keep_missing("start", context.params)
        first = memory.tensors("start") or []
    distance = sqrt(squared_norm(foreach.sub(context.params, first))) if first else 0.0
    if "distance" not in numbers:
        numbers["distance"] = start * (1 + sqrt(squared_norm(first)))
    if isfinite(distance):
        numbers["distance"] = max(numbers["distance"], distance)
    return numbers["distance"]
