"""What lr="auto" stands for: no rate to set, whatever an update sees."""

from __future__ import annotations

from math import inf, isfinite, sqrt

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach
from gdtrain.schedules import WarmupStableDecay
from gdtrain.step_sizes.barzilai_borwein import BarzilaiBorwein
from gdtrain.step_sizes.base import Needs, StepSize, option
from gdtrain.step_sizes.bounded import Bound, BoundedStep, last_share
from gdtrain.step_sizes.context import NUMBERS, Context, Memory, squared_norm

__all__ = ["SCHEDULE", "PolyakDoG", "automatic"]

SCHEDULE = WarmupStableDecay(warmup=0.1, decay=0.8)
"""The factor that goes with `PolyakDoG`: over T/10 it warms up, over the last 0.72 T it decays."""
_STATIONS = 8  # from one power of two of the updates to the next, at which r̄ is read
_WITHOUT_SLOPE = 32  # updates
_OF_START = 0.1  # share of ‖θ₀‖
_SHALLOW = 4  # layers, up to which depth does not count


class PolyakDoG(BoundedStep):
    """Distance over gradients, whose unit is Polyak's step: no rate to set, at any batch size.

        η_t = min( scale · r̄_t / (gain √(Σ_{i≤t} ‖d_i‖²)),  cap · (f_t − f*)/(gain^¾ ‖d_t‖²) )
        r̄_t = max( (f_0 − f*)/‖d_0‖, ‖θ_i − θ_0‖ for the stations i ≤ t )

    (f_0 − f*)/‖d_0‖ is the length of Polyak's first step; where f is convex and d_0 is its
    gradient, the way to a minimum is at least as long. Of a network with hidden layers, which may
    start where it is nearly flat, it is at most ‖θ_0‖/10, and with L > 4 weight matrices `scale`
    is multiplied by 4/L. From there on r̄ is what was travelled.
    The first bound is the best constant rate for noisy gradients, r/(‖d‖√t), and so falls as long
    as they are noisy; the second keeps a step from being longer than the loss at hand can justify.
    A schedule that warms up and decays goes with both: `SCHEDULE`.

    With momentum, `gain` is 1/(1 − μ), the sum of the weights that a gradient gets. (The ¾ was
    measured: steps with momentum are stable at longer η, for short runs to make use of.) Then η
    grows by at most 1/μ from update to update: a buffer forgets no faster, and what it holds of a
    steep example must not meet the long step of a flat one.

    Stations are all updates up to 16, then 8 from one power of two to the next. Keeps a copy of θ₀.

    Args:
        scale: Range (0, ∞).
        cap: Range (0, ∞).
        gain: (1 − dampening)/(1 − μ), range [1, ∞).
        f_star: f*, a lower bound of f on any batch, range (−∞, ∞); 0 for most losses.
        decay: Whether η has `SCHEDULE`'s factor, over the optimizer's total_updates = T:
            for plain loops, which have no schedule.

    Raises:
        ValueError: At an update: f is below f_star, or the gradient was 0 at each of the first 32.

    Example:
        >>> from gdtrain import SGD
        >>> theta, rates = torch.nn.Parameter(torch.tensor([3.0])), []
        >>> optimizer = SGD([theta], step_size=PolyakDoG(scale=0.5, cap=0.5))
        >>> for _ in range(3):
        ...     theta.grad = theta.detach().clone()  # of ½θ²
        ...     optimizer.step_by_rule(0.5 * theta**2, lambda: 0.5 * theta**2)
        ...     rates.append(round(optimizer.last_rate, 4))
        >>> rates  # ½ · 4.5/9; then r̄ = 4.5/3, and ½ · 1.5/√(9 + 2.25²), ½ · 1.5/√(… + 1.8²)
        [0.25, 0.2, 0.1803]

    References:
        Ivgi, Hinder and Carmon, DoG is SGD's Best Friend, 2023, arXiv 2302.12022. Loizou et al.,
        Stochastic Polyak Step-size for SGD, 2021, arXiv 2002.10542.
    """

    keeps = ("start",)

    def __init__(
        self,
        scale: float = 3.0,
        cap: float = 1.5,
        gain: float = 1.0,
        f_star: float = 0.0,
        decay: bool = False,
    ) -> None:
        self.scale, self.cap = option("scale", scale, 0), option("cap", cap, 0)
        self.gain = option("gain", gain, 1, closed="left")
        self.f_star, self.decay = option("f_star", f_star, -inf), bool(decay)

    @property
    def needs(self) -> Needs:
        """T for the decay."""
        return Needs(total_updates=self.decay)

    @property
    def _inverse(self) -> float:
        return self.cap * self.gain**-0.75

    def _reach(self, numbers: dict[str, float]) -> float:
        """What is divided by √Σ‖d‖²; without end, until there is a distance."""
        return self.scale * numbers.get("depth", 1.0) * numbers.get("distance", inf) / self.gain

    @property
    def growth(self) -> float:
        """The most by which η grows from update to update; 0: by any factor."""
        return self.gain / (self.gain - 1) if self.gain > 1 else 0.0

    def rate(self, context: Context, memory: Memory) -> float:
        """The smaller of the two bounds."""
        numbers, square = memory.numbers, context.squared_norm
        self._check_value(context.value, context.resolution)
        self._arrive(numbers, memory, context.params)
        numbers["seen"] = numbers.get("seen", 0) + 1
        if square == 0:
            return 0.0
        excess = max(context.value - self.f_star, 0.0)
        numbers["total"] = numbers.get("total", 0.0) + square
        rate = self._inverse * excess / square
        if "distance" in numbers:
            rate = min(rate, self._reach(numbers) / sqrt(numbers["total"]))
        elif excess > 0:
            numbers |= _first_distance(excess / sqrt(square), memory)
        if self.growth > 0:
            rate = min(rate, self.growth * numbers.get("last", inf))
        if rate > 0:
            numbers["last"] = rate
        if self.decay and context.progress < 1:  # which refuses updates beyond T
            rate *= float(SCHEDULE(context.t, context.total_updates or 1))
        return rate

    # ------------------------------------------------------------------ for an engine

    @property
    def by_engines(self) -> bool:
        """Without a decay of its own: an engine has a schedule."""
        return not self.decay

    def bound(self, optimizer: torch.optim.Optimizer) -> Bound:
        """For the updates up to the next station."""
        numbers = _numbers(optimizer)
        params = _trainable(optimizer)
        self._arrive(numbers, Memory.of(optimizer, params), params)
        most = self.growth * numbers.get("last", inf) if self.growth > 0 else inf
        total = numbers.get("total", 0.0)
        return Bound(self._inverse, self.f_star, self.growth, most, self._reach(numbers), total)

    def stretch(self, optimizer: torch.optim.Optimizer, updates: int) -> int:
        """To the next station; one by one, until there is a distance."""
        numbers = _numbers(optimizer)
        if "distance" not in numbers:
            return min(updates, 1)
        seen = int(numbers["seen"])
        spacing = _spacing(seen)
        return min(updates, (seen // spacing + 1) * spacing - seen)

    def remember(
        self, optimizer: torch.optim.Optimizer, losses: Tensor, shares: Tensor, total: float
    ) -> None:
        """As `rate` would have."""
        numbers = _numbers(optimizer)
        if len(losses):
            least = float(losses.min())
            self._check_value(least, 4 * torch.finfo(losses.dtype).eps * abs(least))
        square = total - numbers.get("total", 0.0)
        last = last_share(shares)
        numbers["seen"] = numbers.get("seen", 0) + len(shares)
        numbers["total"] = total
        if "distance" not in numbers and last > 0:
            length = last / self._inverse * sqrt(square)
            memory = Memory.of(optimizer, _trainable(optimizer))
            numbers |= _first_distance(length, memory)
        if last > 0:
            numbers["last"] = last

    # ------------------------------------------------------------------ for both

    def _arrive(self, numbers: dict[str, float], memory: Memory, params: list[Tensor]) -> None:
        """Before an update: at a station, keep θ₀ where it is missing, and read the distance."""
        seen = int(numbers.get("seen", 0))
        if seen % _spacing(seen) != 0:
            return
        memory.keep_missing("start", params)
        if seen == _WITHOUT_SLOPE and numbers.get("total", 0.0) == 0:
            raise ValueError(
                f"The gradient of the first {seen} updates is 0, so that no step size can be "
                f"found: the start is a stationary point. Initialise the weights at random."
            )
        if "distance" in numbers:
            start = memory.tensors("start") or []
            distance = sqrt(squared_norm(foreach.sub(params, start)))
            if isfinite(distance):
                numbers["distance"] = max(numbers["distance"], distance)

    def _check_value(self, value: float, resolution: float) -> None:
        if value < self.f_star - resolution:
            raise ValueError(
                f"lr=auto bounds each step by f/‖g‖², which asks for a loss that is never below "
                f"{self.f_star:g}. Received: loss {value:g}. Set the learning rate, or add a "
                f"constant to the loss."
            )


def _spacing(update: int) -> int:
    """Updates from station to station."""
    return 1 << max(0, update.bit_length() - _STATIONS.bit_length())


def _first_distance(length: float, memory: Memory) -> dict[str, float]:
    """That of Polyak's first step; of a network with hidden layers at most ‖θ₀‖/10. And 4/L."""
    start = memory.tensors("start") or []
    norm, layers = sqrt(squared_norm(start)), sum(t.dim() > 1 for t in start)
    if layers > 1 and norm > 0:
        length = min(length, _OF_START * norm)
    return {"distance": length, "depth": min(1.0, _SHALLOW / max(layers, 1))}


def _trainable(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]


def _numbers(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    numbers: dict[str, float] = optimizer.param_groups[0].setdefault(NUMBERS, {})
    return numbers


def automatic(
    full_batch: bool,
    momentum: float = 0.0,
    dampening: float = 0.0,
    smooth: bool = True,
    decay: bool = False,
) -> StepSize:
    """The rule that lr="auto" stands for.

    Args:
        full_batch: Whether an update sees all examples.
        momentum: μ.
        dampening: Of the momentum.
        smooth: Whether f has no kinks.
        decay: Whether it is for a plain loop, as for `PolyakDoG`.

    Example:
        >>> automatic(full_batch=False, momentum=0.5)
        PolyakDoG(scale=3.0, cap=1.5, gain=2.0, f_star=0.0, decay=False)
    """
    if full_batch and smooth and momentum == 0:
        # No loss is below 0; what the closure of a plain loop returns may be.
        return BarzilaiBorwein(memory=30, f_star=None if decay else 0.0)
    gain = max((1 - dampening) / max(1 - momentum, 1e-3), 1.0)
    if full_batch:  # no noise, for which steps would have to be kept short
        return PolyakDoG(scale=5.0, cap=1.5 * gain**-0.25, gain=gain, decay=decay)
    return PolyakDoG(gain=gain, decay=decay)
