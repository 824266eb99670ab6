"""Tells from losses whether a run has failed: pure functions of what the loop hands out.

η step size, J the loss on an update's examples before it, J₀ that of a fixed probe at the start, T
planned updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "FINITE",
    "WINDOW",
    "Cause",
    "Failure",
    "Health",
    "LossMonitor",
    "Verdict",
    "next_station",
    "stretch_length",
]

WINDOW = 16
"""Updates over which a loss must have grown."""
_STRETCH, _GOOD = 64, 256  # updates and examples at least, by whose losses states are compared
_SPACING = 2**16  # updates from station to station, at most
_PART = 16  # of the planned updates, 1/16 at most (but 16 updates)
_HIGH = 2.0  # times the start's loss: is above it, whatever the noise
_LASTING = 1.5  # the same, where it lasts for three looks or until the end
_FORECAST = 0.2  # of the start's loss: where the run would end, if the loss fell as 1/t
_SHARE = 8  # of the planned updates, 1/8 must be over until a lasting loss counts
_DEAD = 0.9  # of a layer's units: the rest cannot make up for them
_HALF = 0.5  # of a layer's units, that a state to go back to may have lost
_LEFT = 0.25  # of the start's loss: below it a loss that no longer falls is no sign of death
_SUSPECT = 1.2  # of the start's loss: below it only death is looked for
_FLAT = 0.9  # of the loss before: one that has not fallen below it no longer falls
_SCALE = 0.1  # of the loss of predicting 0, which a start is not taken to be below
_NEARLY_ALL = 0.95  # share of a layer's outputs from which on it counts as saturated


class Cause(str, Enum):
    """What made a run fail."""

    INPUT = "INPUT"
    """A feature of an example is infinite or not a number."""
    TARGET = "TARGET"
    """A label or number to predict is."""
    WEIGHT = "WEIGHT"
    """A parameter or buffer is, before the update."""
    LOSS = "LOSS"
    """The loss is, of finite examples and parameters."""
    GRADIENT = "GRADIENT"
    """The gradient is, of a finite loss."""
    STEP = "STEP"
    """The parameters are after the update, of a finite gradient."""
    GROWTH = "GROWTH"
    """The loss grew beyond the bound."""
    DEAD = "DEAD"
    """All units of a layer give 0 for every example, and all predictions are the same."""
    SATURATED = "SATURATED"
    """Nearly all units of a layer are at the flat ends, and the loss is above the start's."""
    ABOVE_START = "ABOVE_START"
    """The loss stays above the start's, and does not fall."""


FINITE = (Cause.GROWTH, Cause.DEAD, Cause.SATURATED, Cause.ABOVE_START)
"""Causes with which all numbers are finite."""


@dataclass(frozen=True)
class Health:
    """How the hidden units answer to a probe of examples."""

    value: float  # J on the probe
    dead: Mapping[str, float] = field(default_factory=dict)
    """Share of each rectifier layer's units that give 0 for all examples, by layer."""
    saturated: Mapping[str, float] = field(default_factory=dict)
    """Share of each tanh or sigmoid layer's outputs within 0.5% of its range of one of the ends."""
    constant: bool = False  # whether all predictions are equal
    value_of_zero: float = math.nan  # the loss of predicting 0 for each, a scale for losses

    @property
    def died(self) -> bool:
        """A whole layer gives 0, and the predictions no longer depend on the example."""
        return self.constant and any(share == 1.0 for share in self.dead.values())

    @property
    def dead_share(self) -> float:
        """Of the units of the layer that has lost most."""
        return max(self.dead.values(), default=0.0)

    @property
    def is_saturated(self) -> bool:
        """At least 95% of a layer's outputs are saturated."""
        return any(share >= _NEARLY_ALL for share in self.saturated.values())


@dataclass(frozen=True)
class Failure:
    """An update that failed."""

    update: int
    cause: Cause | None = None  # None: something is not finite, and it is not known yet what
    units: Health | None = None  # what the probe showed, where it decided


@dataclass(frozen=True)
class Verdict:
    """What losses say."""

    failure: Failure | None = None  # the first update that failed
    lowest: bool = False  # a stretch with the lowest mean so far is over: keep the state before it


@dataclass
class LossMonitor:
    """Reads losses station by station, and says at which update a run has failed.

    `gdtrain.callbacks.Divergence` has the conditions and their bounds.
    """

    growth: float = 1e4  # bound on the loss in units of J₀
    origin: int = 0  # update from which on losses are compared
    start: float = math.nan  # J₀; NaN: not known yet. Without a probe, the first stretch's mean
    dead_before: float = 0.0  # share of dead units at the start
    window: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))  # fill no 16 yet
    since: tuple[float, int] = (0.0, 0)  # sum and number of the losses since the last look
    mean_before: float = math.inf  # of the losses before that look
    looks: list[tuple[int, float]] = field(default_factory=list)  # age, and loss / J₀
    stretch: tuple[float, int] = (0.0, 0)  # sum and number of the losses in it
    good_mean: float = math.inf  # the lowest of a stretch so far

    def begin(self, update: int, units: Health) -> None:
        """Take the probe's loss for the start's, unless that is known."""
        if not math.isnan(self.start):
            return
        self.origin, self.dead_before = update, units.dead_share
        self.start = max(units.value, _SCALE * units.value_of_zero)
        self.good_mean = units.value if math.isfinite(units.value) else math.inf

    def begin_again(self, update: int) -> None:
        """Compare from here on, after a recovery: the start's loss and the lowest mean stay."""
        kept = self.growth, update, self.start, self.dead_before
        vars(self).update(vars(LossMonitor(*kept, good_mean=self.good_mean)))

    def read(
        self,
        first: int,
        losses: NDArray[np.float64],
        *,
        finite: bool = True,
        total: int | None = None,
        stretch: int = _STRETCH,
        units: Callable[[], Health] | None = None,
        rectifies: bool = True,
    ) -> Verdict:
        """Take in the losses of updates first, first + 1, …, of `total` planned ones.

        `finite` tells whether the parameters are, after the last of them; `units` looks at the
        probe then, where losses make it suspect; `rectifies`, whether there are units that can die.
        """
        bad = np.flatnonzero(~np.isfinite(losses))
        before = len(self.window)
        series = np.concatenate([self.window, losses[: bad[0]] if len(bad) else losses])
        grown = self._grown(series)
        if grown is not None:
            return Verdict(Failure(first - before + grown - 1, Cause.GROWTH))
        if len(bad):
            return Verdict(Failure(first + int(bad[0])))
        self.window = series[len(series) // WINDOW * WINDOW :]
        lowest = self._compare(losses, stretch)
        end = first + len(losses)
        if not finite:
            return Verdict(Failure(end), lowest)
        failure = self._look(first, losses, total, units, rectifies)
        if failure is None and end == total and units is not None:
            failure = self._look_at_the_end(end, units())
        return Verdict(failure, lowest)

    def _grown(self, series: NDArray[np.float64]) -> int | None:
        """After how many losses a window's mean is beyond the bound."""
        bound = self.growth * self.start
        count = len(series) // WINDOW
        windows = np.minimum(series[: count * WINDOW].reshape(count, WINDOW), 4 * bound)
        over = np.flatnonzero(windows.mean(1) > bound)
        return (int(over[0]) + 1) * WINDOW if len(over) else None

    def _compare(self, losses: NDArray[np.float64], stretch: int) -> bool:
        """Whether the stretch is over, with the lowest mean so far."""
        total, count = self.stretch
        self.stretch = total, count = total + float(losses.sum()), count + len(losses)
        if count < stretch:
            return False
        mean = total / count
        if math.isnan(self.start):  # no probe: the first stretch has to do
            self.start = mean
        is_lowest = mean < self.good_mean
        self.good_mean = mean if is_lowest else self.good_mean
        return is_lowest

    # ------------------------------------------------------------------ looks

    def _look(
        self,
        first: int,
        losses: NDArray[np.float64],
        total: int | None,
        units: Callable[[], Health] | None,
        rectifies: bool,
    ) -> Failure | None:
        """Look at the units, if one of 16, 32, 64, … updates were made since the origin."""
        summed, count = self.since
        self.since = summed, count = summed + float(losses.sum()), count + len(losses)
        before, age = first - self.origin, first + len(losses) - self.origin
        if (before // WINDOW).bit_length() == (age // WINDOW).bit_length():
            return None
        mean, self.since = summed / count, (0.0, 0)
        flat, self.mean_before = mean > _FLAT * self.mean_before, mean
        # A loss that only does not fall may be that of a net whose units are dead.
        idle = flat or mean > _FLAT * self.start
        dead = idle and rectifies and units is not None and self._has_died(units())
        if not mean > _SUSPECT * self.start and not dead:
            self.looks.append((age, mean / self.start))
            return None
        left = None if total is None else total - self.origin
        return self._suspect(age, Health(mean) if units is None else units(), flat, left)

    def _has_died(self, units: Health) -> bool:
        return units.dead_share >= _DEAD > self.dead_before

    def too_few_live(self, units: Health) -> bool:
        """Whether a net has lost so many units that it is no state to go back to."""
        return units.dead_share > max(_HALF, self.dead_before)

    def _suspect(self, age: int, units: Health, flat: bool, left: int | None) -> Failure | None:
        """Whether the state at hand is that of a failed run."""
        ratio = units.value / self.start
        before = self.looks[-1][1] if self.looks else math.inf
        self.looks.append((age, ratio))
        cause: Cause | None = None
        if self._has_died(units) and (ratio > _FLAT or (flat and ratio > _LEFT) or units.died):
            cause = Cause.DEAD
        elif units.is_saturated and ratio > _HIGH:
            slow = ratio > 0.7 * before if left is None else ratio * age / left > _FORECAST
            cause = Cause.SATURATED if slow else None
        elif ratio > self.growth:
            cause = Cause.GROWTH
        if cause is None and left is not None and age * _SHARE >= left and len(self.looks) > 2:
            ratios = [value for _, value in self.looks[-3:]]
            lasts = min(ratios) > _LASTING and ratios[2] >= _FLAT * ratios[0]
            if lasts or ratio * age / left > _HIGH:
                cause = Cause.ABOVE_START
        return None if cause is None else Failure(self.origin + age - 1, cause, units)

    def _look_at_the_end(self, end: int, units: Health) -> Failure | None:
        """Whether all planned updates have led above the start."""
        ratio = units.value / self.start
        if self._has_died(units) and (ratio > _FLAT or units.died):
            return Failure(end - 1, Cause.DEAD, units)
        if ratio > _LASTING:
            cause = Cause.SATURATED if units.is_saturated else Cause.ABOVE_START
            return Failure(end - 1, cause, units)
        return None

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain containers; the bound is an option, and no state."""
        state = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "growth"}
        return {**state, "window": self.window.tolist(), "looks": list(self.looks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        window = np.asarray(state["window"], dtype=np.float64)
        new = LossMonitor(self.growth, **{**state, "window": window, "looks": list(state["looks"])})
        vars(self).update(vars(new))


def next_station(update: int, most: int, total: int | None, *ends: int | None) -> int | None:
    """The next update number at which losses are read; fixed before training.

    A multiple of a power of two that is at most the updates made, T/16, 2¹⁶ or `most`, and at
    least 16 where `most` allows it.
    """
    most = min(_SPACING, most)
    if total is not None:
        most = min(most, max(WINDOW, total // _PART))
    spacing = 1 << (min(most, max(WINDOW, update)).bit_length() - 1)
    stations = ((update // spacing + 1) * spacing, total, *ends)
    return min((s for s in stations if s is not None and s > update), default=None)


def stretch_length(batch_size: int | None) -> int:
    """Updates by whose mean loss states are compared: 64, and those of 256 examples, at least."""
    if batch_size is None:
        return _STRETCH
    return _STRETCH * max(1, -(-_GOOD // (batch_size * _STRETCH)))
