"""Learning-rate schedules: η as a pure function of the update number.

t update number, 0 … T−1; T planned updates; w warm-up updates; η₀ the peak (`lr`).

A schedule gives a factor s(t), and the update uses η_t = η₀ s(t). A duration is a whole number of
updates, or a fraction in (0, 1), a share of T. With `per="epoch"`, t and T count epochs instead,
and η is constant within an epoch.

Every schedule can start with a linear warm-up, s(t) = (t + 1) / w for t < w, after which it runs
its course over the T − w updates that are left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = [
    "Constant",
    "Cosine",
    "Exponential",
    "InverseSquareRoot",
    "InverseTime",
    "OneCycle",
    "Polynomial",
    "ReduceOnPlateau",
    "Schedule",
    "ScheduleLR",
    "Step",
    "WarmupStableDecay",
]


def _duration(value: float, total: int) -> int:
    """A count of updates, from a count or from a fraction of the total."""
    return int(value) if value >= 1 else round(value * total)


@dataclass(kw_only=True)
class Schedule:
    """Base of the schedules: warm-up, units, and the torch scheduler.

    A subclass defines `shape(t, total)`, the factor after the warm-up.

    Args:
        warmup: w, updates of linear warm-up (or a fraction of T below 1), range [0, ∞).
        per: What t counts: "update" or "epoch".

    Raises:
        ValueError: An argument is out of its range; so for all schedules.

    Example:
        >>> Constant(warmup=4)(torch.arange(6), total=10).tolist()
        [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        >>> Step(every=2, gamma=0.5, per="epoch")(range(8), total=8, updates_per_epoch=2).tolist()
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    """

    warmup: float = 0
    per: Literal["update", "epoch"] = "update"

    durations: ClassVar[tuple[str, ...]] = ("warmup",)
    """Arguments in updates, or a fraction of the total."""
    ranges: ClassVar[tuple[tuple[str, float, float, str], ...]] = ()
    """Names of the others, each with its interval: from, to, which ends belong to it."""

    def __post_init__(self) -> None:
        if type(self).shape is Schedule.shape:
            raise ValueError(
                f"A schedule must define shape(t, total), as Cosine and Step do. Received: "
                f"{type(self).__name__}, without it."
            )
        for name in self.durations:
            self._check(name, 0, math.inf, "[)")
            duration = getattr(self, name)
            if duration >= 1 and duration != int(duration):
                raise ValueError(
                    f"{name} must be a whole number of updates, or a fraction of the total below "
                    f"1. Received: {name}={duration!r}."
                )
        for interval in self.ranges:
            self._check(*interval)
        if self.per not in ("update", "epoch"):
            raise ValueError(f"per must be 'update' or 'epoch'. Received: per={self.per!r}.")

    def _check(self, name: str, low: float, high: float, closed: str) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        above = number and (value > low or (closed[0] == "[" and value == low))
        below = number and (value < high or (closed[1] == "]" and value == high))
        if not (above and below):
            raise ValueError(
                f"{name} must lie in {closed[0]}{low}, {high}{closed[1]}. "
                f"Received: {name}={value!r}."
            )

    def __call__(
        self, t: int | Sequence[int] | Tensor, total: int, updates_per_epoch: int = 1
    ) -> Tensor:
        """The factor s(t), float64, of the shape of t.

        Args:
            t: Update numbers, range [0, T), any shape.
            total: T, planned updates of the run.
            updates_per_epoch: Used with `per="epoch"`.
        """
        if isinstance(t, range):
            t = list(t)
        time = torch.as_tensor(t, dtype=torch.float64)
        if self.per == "epoch":
            time = torch.floor(time / updates_per_epoch)
            total = math.ceil(total / updates_per_epoch)
        w = _duration(self.warmup, total)
        if w == 0:
            return self.shape(time, max(total, 1))
        factor = self.shape((time - w).clamp(min=0), max(total - w, 1))
        return torch.where(time < w, (time + 1) / max(w, 1), factor)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """The factor at update t of the `total` that follow the warm-up."""
        raise NotImplementedError

    def scheduler(
        self, optimizer: Optimizer, total: int, updates_per_epoch: int = 1
    ) -> LRScheduler | ReduceLROnPlateau:
        """An ordinary torch scheduler: call its `step()` after each `optimizer.step()`.

        The optimizer, any of torch's, has the peak η₀ as its `lr`; the rest is as for a call. The
        scheduler's `state_dict` holds plain numbers.
        """
        return ScheduleLR(optimizer, self, total, updates_per_epoch)


class ScheduleLR(LRScheduler):
    """A `Schedule` as a torch scheduler. Made by `Schedule.scheduler`, which has its arguments.

    Example:
        >>> from gdtrain import SGD
        >>> optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.4)
        >>> ScheduleLR(optimizer, InverseTime(k=1.0), total=100).get_last_lr()
        [0.4]
    """

    def __init__(
        self, optimizer: Optimizer, schedule: Schedule, total: int, updates_per_epoch: int = 1
    ) -> None:
        self.schedule = schedule
        self.total = total
        self.updates_per_epoch = updates_per_epoch
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        """η of each group at the current update."""
        # A scheduler is stepped once more after the last update; the factor there is never used.
        t = min(self.last_epoch, self.total - 1)
        factor = self.schedule(t, self.total, self.updates_per_epoch).item()
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """All but the optimizer and the schedule itself, which the user constructs again."""
        return {k: v for k, v in self.__dict__.items() if k not in ("optimizer", "schedule")}


@dataclass(kw_only=True)
class Constant(Schedule):
    """s(t) = 1; `warmup` and `per` as for `Schedule`, here and in all that follow.

    Example:
        >>> Constant()(torch.arange(3), total=3).tolist()
        [1.0, 1.0, 1.0]
    """

    def shape(self, t: Tensor, total: int) -> Tensor:
        """1."""
        return torch.ones_like(t)


@dataclass(kw_only=True)
class Step(Schedule):
    """s(t) = γ^⌊t / every⌋.

    Args:
        every: Updates between two drops, or a fraction of what follows the warm-up, range (0, ∞).
        gamma: γ, range (0, 1].

    Example:
        >>> Step(every=2, gamma=0.5)(torch.arange(6), total=6).tolist()
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    every: float = 0.25
    gamma: float = 0.5

    durations = ("warmup", "every")
    ranges = (("every", 0, math.inf, "()"), ("gamma", 0, 1, "(]"))

    def shape(self, t: Tensor, total: int) -> Tensor:
        """γ^⌊t / every⌋."""
        return self.gamma ** torch.floor(t / max(_duration(self.every, total), 1))


@dataclass(kw_only=True)
class Exponential(Schedule):
    """s(t) = final^(t/T): the same ratio between any two updates, `final` at the end.

    Args:
        final: s(T), range (0, 1].

    Example:
        >>> [round(s, 3) for s in Exponential(final=0.0625)(torch.arange(4), total=4).tolist()]
        [1.0, 0.5, 0.25, 0.125]
    """

    final: float = 0.01

    ranges = (("final", 0, 1, "(]"),)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """final^(t/T)."""
        return self.final ** (t / total)


@dataclass(kw_only=True)
class Polynomial(Schedule):
    """s(t) = final + (1 − final)(1 − t/T)^power; linear decay with power 1.

    Args:
        power: Range (0, ∞).
        final: s(T), range [0, 1].

    Example:
        >>> Polynomial(warmup=2)(torch.arange(6), total=6).tolist()
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    power: float = 1.0
    final: float = 0.0

    ranges = (("power", 0, math.inf, "()"), ("final", 0, 1, "[]"))

    def shape(self, t: Tensor, total: int) -> Tensor:
        """final + (1 − final)(1 − t/T)^power."""
        return self.final + (1 - self.final) * (1 - t / total).clamp(min=0) ** self.power


@dataclass(kw_only=True)
class Cosine(Schedule):
    """s(t) = final + (1 − final)(1 + cos(π t/T))/2.

    Args:
        final: s(T), range [0, 1].

    Example:
        >>> [round(s, 3) for s in Cosine()(torch.arange(4), total=4).tolist()]
        [1.0, 0.854, 0.5, 0.146]

    References:
        Loshchilov and Hutter, SGDR, 2017, arXiv 1608.03983.
    """

    final: float = 0.0

    ranges = (("final", 0, 1, "[]"),)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """final + (1 − final)(1 + cos(π t/T))/2."""
        angle = math.pi * (t / total).clamp(max=1)
        return self.final + (1 - self.final) * (1 + torch.cos(angle)) / 2


@dataclass(kw_only=True)
class OneCycle(Schedule):
    """Up along a half cosine from `start` to 1, then down to `final`.

    With r = `rise`·T updates of rise:

        s(t) = start + (1 − start)(1 − cos(π t/r))/2                for t < r
        s(t) = final + (1 − final)(1 + cos(π (t − r)/(T − r)))/2    else

    Args:
        rise: Updates of rise, or a fraction of T, range [0, ∞). `warmup` must be 0.
        start: s(0), range [0, 1].
        final: s(T), range [0, 1].

    Example:
        >>> [round(s, 2) for s in OneCycle(rise=2, start=0.2)(torch.arange(6), total=6).tolist()]
        [0.2, 0.6, 1.0, 0.85, 0.5, 0.15]

    References:
        Smith and Topin, Super-Convergence, 2018, arXiv 1708.07120.
    """

    rise: float = 0.3
    start: float = 0.04
    final: float = 0.0001

    durations = ("warmup", "rise")
    ranges = (("start", 0, 1, "[]"), ("final", 0, 1, "[]"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup:
            raise ValueError(
                f"one-cycle rises by itself: set rise instead of warmup. "
                f"Received: warmup={self.warmup}."
            )

    def shape(self, t: Tensor, total: int) -> Tensor:
        """The cycle."""
        r = _duration(self.rise, total)
        up = self.start + (1 - self.start) * (1 - torch.cos(math.pi * t / max(r, 1))) / 2
        fall = ((t - r) / max(total - r, 1)).clamp(0, 1)
        down = self.final + (1 - self.final) * (1 + torch.cos(math.pi * fall)) / 2
        return torch.where(t < r, up, down)


@dataclass(kw_only=True)
class InverseTime(Schedule):
    """s(t) = 1/(1 + kt): Σ η_t = ∞ and Σ η_t² < ∞, as Robbins and Monro ask.

    Args:
        k: Decay per update, range [0, ∞).

    Example:
        >>> InverseTime(k=1.0)(torch.arange(4), total=4).tolist()
        [1.0, 0.5, 0.3333333333333333, 0.25]

    References:
        Robbins and Monro, A Stochastic Approximation Method, 1951.
    """

    k: float = 0.001

    ranges = (("k", 0, math.inf, "[)"),)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """1/(1 + kt)."""
        return 1 / (1 + self.k * t)


@dataclass(kw_only=True)
class InverseSquareRoot(Schedule):
    """s(t) = 1/√(1 + kt).

    With k = 1/w after w updates of warm-up this is √(w/(t + w)), the schedule of Transformers.

    Args:
        k: Decay per update, range [0, ∞).

    Example:
        >>> InverseSquareRoot(k=1.0)(torch.tensor([0, 3, 8]), total=9).tolist()
        [1.0, 0.5, 0.3333333333333333]

    References:
        Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762.
    """

    k: float = 0.001

    ranges = (("k", 0, math.inf, "[)"),)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """1/√(1 + kt)."""
        return 1 / torch.sqrt(1 + self.k * t)


@dataclass(kw_only=True)
class WarmupStableDecay(Schedule):
    """Linear warm-up, then constant, then linear decay over the last `decay` updates.

        s(t) = 1 before T − d, then final + (1 − final)(T − t)/d

    Args:
        warmup: As for `Schedule`, by default a twentieth of T.
        decay: d, updates of decay, or a fraction of what follows the warm-up, range [0, ∞).
        final: s(T), range [0, 1].

    Example:
        >>> WarmupStableDecay(warmup=2, decay=2)(torch.arange(6), total=6).tolist()
        [0.5, 1.0, 1.0, 1.0, 1.0, 0.5]

    References:
        Hu et al., MiniCPM, 2024, arXiv 2404.06395.
    """

    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.0

    durations = ("warmup", "decay")
    ranges = (("final", 0, 1, "[]"),)

    def shape(self, t: Tensor, total: int) -> Tensor:
        """1, then linear to `final`."""
        d = max(_duration(self.decay, total), 1)
        left = ((total - t) / d).clamp(0, 1)
        return self.final + (1 - self.final) * left


@dataclass(kw_only=True)
class ReduceOnPlateau(Schedule):
    """η is multiplied by `gamma` when the validation loss has not fallen for `patience` looks.

    `observe` is told that loss after each validation. A look counts as a fall if the loss is below
    best·(1 − threshold) (best > 0).

    Args:
        gamma: Range (0, 1).
        patience: Looks without a fall that are borne, range [0, ∞).
        threshold: Relative fall that counts, range [0, 1).
        floor: The factor never goes below, range [0, 1].

    Example:
        >>> schedule = ReduceOnPlateau(gamma=0.5, patience=1)
        >>> for loss in (3.0, 2.0, 2.0, 2.0):
        ...     schedule.observe(loss)
        >>> schedule(10, total=20).item()
        0.5
    """

    gamma: float = 0.5
    patience: int = 5
    threshold: float = 1e-3
    floor: float = 1e-4
    factor: float = field(default=1.0, init=False, repr=False)
    best: float = field(default=math.inf, init=False, repr=False)
    bad_looks: int = field(default=0, init=False, repr=False)

    ranges = (
        ("gamma", 0, 1, "()"),
        ("patience", 0, math.inf, "[)"),
        ("threshold", 0, 1, "[)"),
        ("floor", 0, 1, "[]"),
    )

    def observe(self, value: float) -> None:
        """Take note of a validation loss; lower is better."""
        margin = 0.0 if math.isinf(self.best) else self.threshold * abs(self.best)
        if value < self.best - margin:
            self.best, self.bad_looks = value, 0
            return
        self.bad_looks += 1
        if self.bad_looks > self.patience:
            self.factor, self.bad_looks = max(self.factor * self.gamma, self.floor), 0

    def shape(self, t: Tensor, total: int) -> Tensor:
        """The current factor."""
        return torch.full_like(t, self.factor)

    def state_dict(self) -> dict[str, float]:
        """Factor, best loss, and looks since."""
        return {"factor": self.factor, "best": self.best, "bad_looks": self.bad_looks}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from `state_dict`."""
        self.factor, self.best = state["factor"], state["best"]
        self.bad_looks = int(state["bad_looks"])

    def scheduler(
        self, optimizer: Optimizer, total: int, updates_per_epoch: int = 1
    ) -> ReduceLROnPlateau:
        """PyTorch's own scheduler, without warm-up; its `step` takes the validation loss."""
        if self.warmup:
            raise ValueError("torch's ReduceLROnPlateau has no warm-up: use warmup=0.")
        return ReduceLROnPlateau(
            optimizer,
            factor=self.gamma,
            patience=int(self.patience),
            threshold=self.threshold,
            min_lr=[group["lr"] * self.floor for group in optimizer.param_groups],
        )
