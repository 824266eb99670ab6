"""A comparison in text: tables and sentences, computed from its numbers.

Numbers of several seeds stand as "median (lowest–highest)".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gdtrain.data.reading import printable
from gdtrain.reporting.comparison import Comparison, Contender, standing
from gdtrain.reporting.finished import CLOCKS, Clock, Curve, Values

__all__ = ["PARTS", "Report", "listed", "rounded"]

PARTS = {"train": "training", "val": "validation", "test": "test"}
_RISEN = 1.1  # times its lowest: a validation loss that has
_LOWER_IS_BETTER = ("mae", "mse", "rmse")


def rounded(value: float) -> str:
    """Three digits; a dash for what is not finite."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def listed(words: Sequence[str]) -> str:
    """Words in a row, with "and" before the last."""
    if len(words) < 3:
        return " and ".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _median(values: Values) -> str:
    return rounded(float(np.median(values)))


def _spread(values: Values) -> str:
    """Median (lowest to highest)."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    low, middle, high = (rounded(float(v)) for v in (known.min(), np.median(known), known.max()))
    return middle if low == high else f"{middle} ({low}–{high})"


def _ratio(values: Values, best: Values) -> float:
    return float(np.median(values) / np.median(best))


def _times(factor: float) -> str:
    return f"{factor:.2g}" if factor < 10 else f"{factor:,.0f}"


def _within(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f" {listed(names)} {'is' if len(names) == 1 else 'are'} within the seeds' spread of it."


@dataclass(frozen=True)
class Report:
    """What is said of a comparison: title, sentences and tables."""

    comparison: Comparison

    @property
    def title(self) -> str:
        """The data, the model if all have the same, and the contenders."""
        runs = self.comparison.runs
        models = {str(run.settings.get("model._target_", "")).rsplit(".", 1)[-1] for run in runs}
        model = f", {printable(models.pop())}" if len(models) == 1 and models != {""} else ""
        return f"{runs[0].data_name}{model}: {listed([c.name for c in self.comparison.contenders])}"

    def ends(self) -> list[dict[str, str]]:
        """A table of where each contender's budget led: a row for each, by the columns' names."""
        usable = self.comparison.usable
        columns = {
            "examples per update": [c.numbers("batch_size") for c in usable],
            "updates": [c.numbers("updates") for c in usable],
            "epochs": [c.numbers("epochs") for c in usable],
            "seconds": [c.numbers("fit_seconds") for c in usable],
            "updates/s": [c.updates_per_second() for c in usable],
            "training loss": [c.numbers("loss/train") for c in usable],
            "validation loss": [c.numbers("loss/val") for c in usable],
        }
        if self.comparison.metric:
            name, part = self.comparison.metric
            tag = f"metric/{name}/{part}"
            columns[f"{PARTS[part]} {name}"] = [c.numbers(tag) for c in usable]
        scales = [np.array([run.noise_scale for run in c.runs]) for c in usable]
        columns["gradient noise scale"] = scales
        for name in ("validation loss", "gradient noise scale"):
            if not np.isfinite(np.concatenate(columns[name])).any():
                del columns[name]
        return [
            {"contender": c.name, "seeds": str(len(c.runs))}
            | {name: _spread(column[i]) for name, column in columns.items()}
            for i, c in enumerate(usable)
        ]

    def costs(self) -> list[dict[str, str]]:
        """A table of what the target loss cost each contender."""
        rows = []
        for c in self.comparison.usable:
            reached = c.reached(self.comparison.target)
            if reached is None:
                told = f"{c.count_reached(self.comparison.target)} of {len(c.runs)} did"
                row = dict.fromkeys(("updates", "examples", "epochs", "seconds"), told)
            else:
                row = {
                    "updates": _spread(reached["updates"]),
                    "examples": _spread(reached["examples"]),
                    "epochs": _spread(reached["examples"] / c.runs[0].training_examples),
                    "seconds": _spread(reached["seconds"]),
                }
            rows.append({"contender": c.name, **row})
        return rows

    def sentences(self) -> list[str]:
        """What the numbers say: each clock, then the ends; with the seeds' spread."""
        usable = self.comparison.usable
        said = [self.on(clock) for clock in CLOCKS]
        losses = {c.name: c.numbers("loss/train") for c in usable}
        said.append(_best("loss over all training examples", losses, lower=True))
        if self.comparison.metric:
            name, part = self.comparison.metric
            values = {c.name: c.numbers(f"metric/{name}/{part}") for c in usable}
            said.append(_best(f"{PARTS[part]} {name}", values, lower=name in _LOWER_IS_BETTER))
        said += [
            f"{count} of {len(c.runs)} runs of {c.name} diverged on the way and went on with a "
            f"smaller step size than was set."
            for c in usable
            if (count := sum(run.recovered for run in c.runs))
        ]
        said += [_risen(c) for c in usable if all(map(_has_risen, c.curves("val")))]
        if min(len(c.runs) for c in usable) < 2:
            said.append("With one seed a contender shows no spread: small differences mean little.")
        return said

    def on(self, clock: Clock) -> str:
        """The sentence on one clock: who comes to the target first, and by what factor."""
        target, found = rounded(self.comparison.target), self.comparison.reached(clock)
        if not found:
            return (
                f"Counted in {clock}: nobody came to a training loss of {target} with every seed."
            )
        order = standing(found)
        best = found[order.best]
        said = (
            f"Counted in {clock}, {order.best} is the cheapest way to a training loss of {target}: "
            f"{_spread(best)} {clock}."
        )
        factors = {name: _times(_ratio(found[name], best)) for name in order.apart}
        if factors:
            needs = [f"{name} needs {factor} times as many" for name, factor in factors.items()]
            said += f" {listed(needs)}."
        said += _within(order.close)
        missed = [c.name for c in self.comparison.usable if c.name not in found]
        if missed:
            said += f" {listed(missed)} did not come to it with every seed."
        return said

    def portraits(self) -> dict[str, str]:
        """What each contender costs and buys, by its name."""
        return {c.name: _work(c) + self._trade(c) for c in self.comparison.usable}

    def _trade(self, c: Contender) -> str:
        target, own = rounded(self.comparison.target), c.reached(self.comparison.target)
        if own is None:
            best = _spread(np.array([run.train.losses.min() for run in c.runs]))
            return (
                f" {c.count_reached(self.comparison.target)} of its {len(c.runs)} runs came to a "
                f"training loss of {target}; the best was {best}."
            )
        said = (
            f" To come to {target} took {_median(own['updates'])} updates, "
            f"{_median(own['examples'] / c.runs[0].training_examples)} epochs, "
            f"{_median(own['seconds'])} s."
        )
        buys, costs, ties = [], [], []
        for clock in CLOCKS:
            others = {n: v for n, v in self.comparison.reached(clock).items() if n != c.name}
            if not others:
                continue
            rival = standing(others).best
            ratio = _ratio(others[rival], own[clock])
            if standing({c.name: own[clock], rival: others[rival]}).close:
                ties.append(f"{clock} ({rival})")
            elif ratio > 1:
                buys.append(f"{clock} ({rival} needs {_times(ratio)} times as many)")
            else:
                costs.append(f"{_times(1 / ratio)} times the {clock} of {rival}")
        if buys:
            said += f" It buys the fewest {listed(buys)}."
        if costs:
            said += f" It costs {listed(costs)}."
        if ties:
            said += f" The seeds do not tell it from the best of the others in {listed(ties)}."
        return said

    def absent(self) -> list[str]:
        """A sentence for each run that is not in the numbers, and why."""
        lost = [
            f"{c.name}, seed {run.seed}: {run.summary['stop_reason']}. "
            f"{printable(run.summary.get('stop_message', ''))}"
            for c in self.comparison.contenders
            for run in c.lost
        ]
        return [*lost, *self.comparison.left_out]

    def versions(self) -> str:
        """On what the runs were made."""
        found: dict[str, set[str]] = {}
        for run in self.comparison.runs:
            for name, value in (run.summary.get("versions") or {}).items():
                if value != "not installed":
                    found.setdefault(printable(name), set()).add(printable(value))
        versions = ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in found.items())
        summaries = [run.summary for run in self.comparison.runs]
        devices = sorted({printable(summary.get("device", "cpu")) for summary in summaries})
        engines = sorted({printable(summary.get("engine", "eager")) for summary in summaries})
        return f"Device: {listed(devices)}; engine: {listed(engines)}. Versions: {versions}."


def _best(what: str, found: Mapping[str, Values], *, lower: bool) -> str:
    known = {n: v[np.isfinite(v)] for n, v in found.items() if np.isfinite(v).any()}
    if len(known) < 2:
        return f"The {what} is not known for two contenders."
    order = standing(known, lower=lower)
    said = (
        f"At the end, {order.best} has the {'lowest' if lower else 'highest'} {what}: "
        f"{_spread(known[order.best])}."
    )
    if order.apart:
        said += f" {'; '.join(f'{name} {_spread(known[name])}' for name in order.apart)}."
    return said + _within([f"{name} with {_spread(known[name])}" for name in order.close])


def _has_risen(curve: Curve) -> bool:
    """Whether a loss ended well above its lowest."""
    return len(curve.losses) > 1 and bool(curve.losses[-1] > _RISEN * curve.losses.min())


def _risen(c: Contender) -> str:
    curves = c.curves("val")
    at = np.array([curve.updates[curve.losses.argmin()] for curve in curves])
    lowest = np.array([curve.losses.min() for curve in curves])
    last = np.array([curve.losses[-1] for curve in curves])
    return (
        f"The validation loss of {c.name} was lowest at update {_spread(at)}, {_spread(lowest)}, "
        f"and rose to {_spread(last)}: what it learned later did not help on held-out examples."
    )


def _work(c: Contender) -> str:
    size, total = float(np.median(c.numbers("batch_size"))), c.runs[0].training_examples
    each = "one example" if size == 1 else f"{size:g} examples"
    updates, epochs = c.numbers("updates"), c.numbers("epochs")
    per_epoch = float(np.median(updates / np.maximum(epochs, 1e-9)))
    return (
        f"An update sees {'all examples' if size >= total else each}, so an epoch of {total:,} has "
        f"{rounded(per_epoch)} update{'' if round(per_epoch) == 1 else 's'}. In {_median(epochs)} "
        f"epochs and {_median(c.numbers('fit_seconds'))} s it made {_median(updates)} updates, "
        f"{_median(c.updates_per_second())} each second."
    )
