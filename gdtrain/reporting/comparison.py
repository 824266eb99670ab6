"""Finished runs compared, in numbers: who came down to a loss, and by how much of each clock.

Runs that differ in nothing but their seed are repetitions of one contender. R runs of a contender.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gdtrain.data.reading import printable
from gdtrain.ranges import Interval
from gdtrain.reporting.finished import CLOCKS, Clock, Curve, Part, Run, Values

__all__ = ["Comparison", "Contender", "Standing", "compare", "standing"]

_TARGET = Interval(-math.inf, math.inf)
_POINTS = 160  # of a curve's common grid
_WORD = 60  # characters of a setting in a contender's name
_METRIC = re.compile(r"metric/([^/]+)/(train|val|test)")
_SETTINGS = 4  # in a contender's name
# What repeats a run, or only watches it: runs that differ in it are the same contender.
_WATCHING = ("logger", "callbacks", "instruments", "ckpt_path", "seed", "data.seed")


@dataclass
class Contender:
    """Runs that differ in nothing but their seed; some were lost: diverged, or interrupted."""

    name: str
    runs: list[Run]
    lost: list[Run] = field(default_factory=list)

    def curves(self, part: Part) -> list[Curve]:
        """One for each run."""
        return [run.train if part == "train" else run.val for run in self.runs]

    def band(
        self, clock: Clock, part: Part = "train", points: int = _POINTS
    ) -> tuple[Values, Values, Values, Values]:
        """Positions, median over seeds, lowest and highest loss; none where a run has no curve.

        From where all have begun to where the last one ends: a run that has ended keeps its last
        loss. The points are where validations were, and else equally spaced, by factors.
        """
        curves = self.curves(part)
        if not all(len(curve.losses) for curve in curves):
            return (np.zeros(0),) * 4
        first = max(curve.clock(clock)[0] for curve in curves)
        last = max(curve.clock(clock)[-1] for curve in curves)
        x = np.unique(np.concatenate([curve.clock(clock) for curve in curves]))
        x = x[x >= first]
        if part == "train" or len(x) > points:
            x = np.geomspace(first, last, points) if last > first else np.array([last])
            x = np.clip(x, first, last)  # of rounding
        values = np.stack([np.interp(x, curve.clock(clock), curve.losses) for curve in curves])
        return x, np.median(values, axis=0), values.min(axis=0), values.max(axis=0)

    def numbers(self, key: str) -> Values:
        """A number, loss or metric of each run's summary, (R,); NaN where a run has none."""
        return np.array([run.number(key) for run in self.runs])

    def updates_per_second(self) -> Values:
        """Of each run, (R,)."""
        return self.numbers("updates") / np.maximum(self.numbers("fit_seconds"), 1e-3)

    def reached(self, target: float) -> dict[Clock, Values] | None:
        """When each run came down to a loss, (R,); None where one did not."""
        found = [place for run in self.runs if (place := run.train.reach(target))]
        if len(found) < len(self.runs):
            return None
        return {clock: np.array([place[clock] for place in found]) for clock in CLOCKS}

    def count_reached(self, target: float) -> int:
        """How many runs came down to a loss."""
        return sum(run.train.reach(target) is not None for run in self.runs)


@dataclass
class Comparison:
    """Contenders, and a training loss whose cost is asked for.

    `left_out` are sentences about runs that are not in it; `made` says how it was made: lines of
    text, commands first.
    """

    contenders: list[Contender]
    target: float
    left_out: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)

    @property
    def usable(self) -> list[Contender]:
        """Those with a result."""
        return [c for c in self.contenders if c.runs]

    @property
    def runs(self) -> list[Run]:
        """All that ended with a result."""
        return [run for c in self.contenders for run in c.runs]

    @property
    def validated(self) -> bool:
        """Whether there is a validation curve to draw, of two points or more."""
        return any(len(c.band("updates", "val")[0]) > 1 for c in self.usable)

    @property
    def metric(self) -> tuple[str, str] | None:
        """Name and part of the final metric that is shown; None: the runs have none in common."""
        common = set.intersection(*(set(run.summary["metrics"]) for run in self.runs))
        wanted = [
            f"metric/{name}/{part}"
            for part in ("test", "val", "train")
            for name in ("accuracy", "r2")
        ]
        for tag in (*wanted, *sorted(common)):
            found = _METRIC.fullmatch(tag)
            if found and tag in common:
                return found[1], found[2]
        return None

    def reached(self, clock: Clock) -> dict[str, Values]:
        """When the runs came down to the target, by the names of contenders of which all did."""
        found = {c.name: c.reached(self.target) for c in self.usable}
        return {name: places[clock] for name, places in found.items() if places}


@dataclass(frozen=True)
class Standing:
    """Contenders in order, by one number; the range over the seeds of `close` ones overlaps with
    that of the best.
    """

    best: str
    close: list[str]
    apart: list[str]


def standing(found: Mapping[str, Values], *, lower: bool = True) -> Standing:
    """Sort contenders by their medians, and say which of them the seeds do not tell apart.

    `found` has a number of each run, (R,), by the contender's name.
    """
    order = sorted(found, key=lambda name: float(np.median(found[name])), reverse=not lower)
    best = found[order[0]]
    close = [
        name
        for name in order[1:]
        if best.min() <= found[name].max() and found[name].min() <= best.max()
    ]
    return Standing(order[0], close, [name for name in order[1:] if name not in close])


def compare(
    runs: Sequence[Run], target: float | None = None, names: Mapping[Path, str] | None = None
) -> Comparison:
    """Sort runs into contenders, and choose the loss whose cost is asked for.

    Args:
        runs: Finished runs on the same data.
        target: Training loss, finite; None: the best that the worst run reached, so that all do.
        names: Of the contenders, by a run's folder; None: what their settings differ in.

    Raises:
        ValueError: Fewer than two contenders have a result, the data differ, or the target is not
            finite.

    Example:
        >>> compare([])
        Traceback (most recent call last):
        ...
        ValueError: Comparing needs two contenders with a finished run each. Received: none. ...
    """
    if target is not None:
        target = _TARGET.check("target", target)
    kinds = sorted({run.data_name for run in runs})
    if len(kinds) > 1:
        raise ValueError(
            f"Losses can be compared on the same data only. Received: runs on "
            f"{'; '.join(kinds)}. Name fewer: runs=outputs/digits-*, for example."
        )
    losses = sorted({str(run.settings.get("loss._target_", "auto")) for run in runs})
    if len(losses) > 1:
        raise ValueError(
            f"Runs that minimise different losses cannot be compared by them. Received: "
            f"{', '.join(_short(name) for name in losses)}."
        )
    groups: dict[str, list[Run]] = {}
    seen: dict[Any, Run] = {}
    left_out = []
    for run in runs:
        identity = json.dumps(_identity(run), sort_keys=True, default=str)
        key = names[run.folder] if names else identity
        first = seen.setdefault((key, run.seed, run.settings.get("data.seed")), run)
        if first is run:
            groups.setdefault(key, []).append(run)
        else:  # no new information, but it would narrow the spread
            left_out.append(
                f"{printable(run.folder)}: the settings and the seed of {printable(first.folder)}, "
                f"again."
            )
    titles = list(groups) if names else _titles([group[0] for group in groups.values()])
    contenders = [
        Contender(title, [r for r in group if not r.lost], [r for r in group if r.lost])
        for title, group in zip(titles, groups.values(), strict=True)
    ]
    usable = [c for c in contenders if c.runs]
    if len(usable) < 2:
        received = "none" if not usable else f"{usable[0].name} alone"
        gone = [f"{r.variant}, seed {r.seed}: {r.summary['stop_reason']}" for r in runs if r.lost]
        raise ValueError(
            f"Comparing needs two contenders with a finished run each. Received: {received}"
            f"{' (without a result: ' + '; '.join(gone) + ')' if gone else ''}. Runs that differ "
            f"only in their seed are one contender."
        )
    if target is None:
        target = max(float(run.train.losses.min()) for c in usable for run in c.runs)
    return Comparison(contenders, target, left_out)


def _identity(run: Run) -> dict[str, Any]:
    found = {
        key: value
        for key, value in run.settings.items()
        if not any(key == name or key.startswith(f"{name}.") for name in _WATCHING)
    }
    if "model._target_" not in found:  # made in Python, where config.yaml knows less
        for key in ("batch_size", "parameters"):
            found[key] = run.summary.get(key)
    return found


def _titles(runs: Sequence[Run]) -> list[str]:
    """The variant, and what tells a contender from others of the same variant."""
    titles = []
    for run in runs:
        own = _identity(run)
        others = [_identity(r) for r in runs if r is not run and r.variant == run.variant]
        keys = [k for k in own if any(o.get(k) != own[k] for o in others)]
        chosen = [k.removesuffix("._target_") for k in keys if k.endswith("._target_")]
        # Another choice in a group says what its values are.
        keys = [k for k in keys if k.endswith("._target_") or k.partition(".")[0] not in chosen]
        words = [
            f"{printable(k.removeprefix('optimizer.').removesuffix('._target_'))}={_short(own[k])}"
            for k in keys[:_SETTINGS]
        ]
        titles.append(" ".join([run.variant, *words, *["…"] * (len(keys) > _SETTINGS)]))
    return [
        title if titles.count(title) == 1 else f"{title} ({titles[:i].count(title) + 1})"
        for i, title in enumerate(titles)
    ]


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value).rsplit(".", 1)[-1] if isinstance(value, str) else str(value).replace(" ", "")
    text = printable(text)
    return text if len(text) <= _WORD else f"{text[:_WORD]}…"
