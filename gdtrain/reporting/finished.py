"""Finished runs, read from their folders. What lies there may come from anybody.

N training examples, P logged points of a curve.
"""

from __future__ import annotations

import csv
import glob
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.reading import lines, printable, read_json, read_yaml

__all__ = ["CLOCKS", "Clock", "Curve", "Part", "Run", "find_runs", "read_run"]

Clock = Literal["updates", "examples", "seconds"]
Part = Literal["train", "val"]
Values = NDArray[np.float64]

CLOCKS: tuple[Clock, ...] = ("updates", "examples", "seconds")
_LARGEST = 1e15  # of a count, a time or a metric
_INFINITE = 1e100  # from which on a loss counts as infinite
_WINDOW = 0.25  # of the examples seen: how far back a point of a curve averages, at most an epoch
_FEWEST = 32  # examples in such an average; curves begin with them
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,63}")
_LOST = ("DIVERGED", "NON_FINITE", "INTERRUPTED")


@dataclass
class Curve:
    """A loss, the mean per example, against three clocks; each (P,)."""

    updates: Values
    examples: Values
    seconds: Values
    losses: Values

    def clock(self, name: Clock) -> Values:
        """The points' positions, (P,)."""
        return {"updates": self.updates, "examples": self.examples, "seconds": self.seconds}[name]

    def reach(self, target: float) -> dict[Clock, float] | None:
        """When it first came down to a loss, by each clock; None: it did not.

        Between two points the curve is a straight line.
        """
        below = np.flatnonzero(self.losses <= target)
        if not len(below):
            return None
        after = int(below[0])
        before = max(after - 1, 0)
        fall = self.losses[before] - self.losses[after]
        part = (self.losses[before] - target) / fall if after else 0.0
        places = {name: self.clock(name) for name in CLOCKS}
        return {n: float(x[before] + part * (x[after] - x[before])) for n, x in places.items()}


@dataclass
class Run:
    """A finished run, read from its folder.

    `settings` are flat ("optimizer.lr"); the training loss is averaged (see `read_run`); there are
    no points in `val` where there was no validation.
    """

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    val: Curve = field(default_factory=lambda: Curve(*np.zeros((4, 0))))

    @property
    def variant(self) -> str:
        """The optimizer's choice: gd, sgd, minibatch, …"""
        return str(self.summary["variant"])

    @property
    def seed(self) -> int:
        """Of initial weights and order."""
        return int(self.summary.get("seed", 0))

    @property
    def training_examples(self) -> int:
        """N."""
        return int(self.summary["data"]["train"])

    @property
    def data_name(self) -> str:
        """The data, with the number of examples; fit for the screen."""
        found = self.settings
        path = found.get("data.path")
        kind = str(found.get("data._target_") or "").rsplit(".", 1)[-1]
        name = found.get("data.name") or (Path(str(path)).name if path else kind) or "arrays"
        target = found.get("data.target") or found.get("data.target_path")
        sizes = self.summary["data"]
        total = sum(int(sizes.get(part, 0)) for part in ("train", "val", "test"))
        return f"{printable(f'{name}, {target}' if target else name)} ({total:,} examples)"

    @property
    def lost(self) -> bool:
        """Whether it ended without a result that can be compared."""
        return self.summary["stop_reason"] in _LOST or not len(self.train.losses)

    @property
    def recovered(self) -> bool:
        """Whether it diverged on the way, and went on with a smaller step size."""
        return bool((self.summary.get("stop_numbers") or {}).get("recoveries"))

    @property
    def noise_scale(self) -> float:
        """Gradient noise scale, in examples; NaN where no instrument measured it."""
        found = (self.summary.get("instruments") or {}).get("noise_scale") or {}
        return _or_nan(found.get("value"))

    def number(self, key: str) -> float:
        """A number of the summary, or a final loss or metric by its tag; NaN: there is none."""
        return _or_nan((self.summary["metrics"] if "/" in key else self.summary).get(key))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def find_runs(pattern: str | Path) -> tuple[list[Run], list[str]]:
    """Every finished run in a folder and below it.

    Args:
        pattern: A folder, or a pattern of folders such as "outputs/digits-*".

    Returns:
        The runs, in the order of their folders, and a sentence for each one that was left out.

    Raises:
        ValueError: There is no such folder, or no finished run in it.

    Example:
        >>> find_runs("missing")
        Traceback (most recent call last):
        ...
        ValueError: There is no folder missing.
    """
    named = [str(pattern)] if Path(pattern).is_dir() else glob.glob(str(pattern))
    roots = sorted(Path(name) for name in named if Path(name).is_dir())
    if not roots:
        raise ValueError(f"There is no folder {pattern}.")
    parts = ("config.yaml", "summary.json")
    folders = sorted({f.parent for root in roots for name in parts for f in root.rglob(name)})
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            left_out.append(str(error))
    if not runs:
        why = f" {left_out[0]}" if left_out else ""
        raise ValueError(
            f"There is no finished run in {pattern}: a run's folder holds config.yaml, "
            f"summary.json and metrics.csv.{why}"
        )
    return runs, left_out


def read_run(folder: str | Path) -> Run:
    """Read what a run has left in its folder: config.yaml, summary.json and metrics.csv.

    A row of metrics.csv has the mean loss of the updates since the row before, which for few
    examples is noise. Row i, at e_i examples, becomes the mean over the rows that lie within
    (e_i − w, e_i], weighted by their examples, with w = min(N, max(e_i/4, 32)), and never less than
    the row itself: so that a full-batch row stays as it is, and no curve is early. The curve begins
    with the first row at which min(N, 32) examples were seen: a single easy one is no loss.
    Validation losses are over all held-out examples, and stay as they are.
    """
    path = Path(folder)
    shown = printable(path)
    try:
        summary = read_json(path / "summary.json")
        settings = dict(_flat(read_yaml(path / "config.yaml")))
        _check_digits(settings)
        _check_summary(summary)
    except FileNotFoundError as error:
        name = Path(error.filename).name
        raise ValueError(f"{shown} holds no finished run: it has no {name}.") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{shown} cannot be read: its config.yaml or summary.json is damaged "
            f"({_reason(error)})."
        ) from None
    train, val = _curves(path)
    return Run(path, settings, summary, _smooth(train, summary["data"]["train"]), val)


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in words of our own."""
    if isinstance(error, OSError):
        return printable(error.strerror or "it cannot be opened")
    if isinstance(error, csv.Error):
        return "a field is too long, or it is no table"
    return printable(error) if type(error) is ValueError else "a part is of another kind"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        raise ValueError("no settings")
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_digits(settings: Mapping[str, Any]) -> None:
    try:
        json.dumps(settings, default=str)
    except ValueError:  # of numbers that have no text
        raise ValueError("a number in config.yaml has too many digits") from None


def _check_summary(summary: Any) -> None:
    """Raise unless what is read of a summary is of the kind that a run writes."""
    _check(isinstance(summary, dict), "its content")
    for key in ("data", "metrics"):
        _check(isinstance(summary.get(key), dict), key)
    for key in ("versions", "instruments", "stop_numbers"):
        _check(isinstance(summary.get(key) or {}, dict), key)
    for key in ("variant", "stop_reason"):
        value = summary.get(key)
        _check(isinstance(value, str) and bool(_NAME.fullmatch(value)), key)
    for key in ("device", "engine"):
        _check(isinstance(summary.get(key, ""), str | None), key)
    for key in ("fit_seconds", "updates"):
        _check(_is_number(summary.get(key)), key)
    for key in ("batch_size", "examples_seen", "epochs", "parameters"):
        _check(summary.get(key) is None or _is_number(summary[key]), key)
    _check(_is_whole(summary.get("seed", 0)), "seed")
    for part in ("train", "val", "test"):
        size = summary["data"].get(part, 0)
        _check(_is_whole(size) and size >= (part == "train"), f"data.{part}")
    for tag, value in summary["metrics"].items():
        named = len(tag) <= 200 and tag.isprintable() and tag[:1].isalnum()
        _check(named and (value is None or type(value) is float or _is_number(value)), "metrics")
    noise = (summary.get("instruments") or {}).get("noise_scale") or {}
    _check(isinstance(noise, dict), "noise_scale")
    _check(noise.get("value") is None or _is_number(noise["value"]), "noise_scale")
    for version in (summary.get("versions") or {}).values():
        _check(isinstance(version, str) and len(version) <= 100, "versions")


def _check(right: bool, key: str) -> None:
    if not right:
        raise ValueError(f"{key} is missing, or of another kind")


def _is_number(value: Any) -> bool:
    """Whether it is one that arithmetic can take: NaN is, and no whole number without end."""
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and (value != value or abs(value) <= _LARGEST)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= _LARGEST


def _curves(path: Path) -> tuple[Curve, Curve]:
    """Training and validation as metrics.csv has them, each to its first loss that is not finite.

    A resumed run may have a row twice: the last counts.
    """
    places, losses = ("step", "examples", "seconds"), ("loss/train", "loss/val")
    found: dict[str, dict[int, list[float]]] = {tag: {} for tag in losses}
    shown = printable(path)
    try:
        reader = csv.reader(lines(path / "metrics.csv"))
        names = next(reader, [])
        missing = [name for name in (*places, "loss/train") if name not in names]
        columns = {name: names.index(name) for name in (*places, *losses) if name in names}
        for row in reader if not missing else ():
            if len(row) < len(names) or not row:  # the line that was being written
                continue
            if len(row) > len(names):
                raise ValueError("a row is longer than the header")
            for tag in losses:
                if tag in columns and row[columns[tag]]:
                    values = [_number(row[columns[name]]) for name in (*places, tag)]
                    if not all(0 <= value <= _LARGEST for value in values[:3]) or 0 in values[:2]:
                        raise ValueError("a row has no place on the clocks")
                    found[tag][_number(row[columns["step"]], int)] = values
    except FileNotFoundError:
        raise ValueError(
            f"{shown} has no metrics.csv: its curve was not kept. Train with logger=csv or "
            f"logger=tensorboard."
        ) from None
    except (OSError, ValueError, TypeError, OverflowError, csv.Error) as error:
        raise ValueError(f"{shown}/metrics.csv is damaged ({_reason(error)}).") from None
    if missing:
        raise ValueError(f"{shown}/metrics.csv has no column {missing[0]}.")
    return _curve(found["loss/train"]), _curve(found["loss/val"])


def _number(text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected a number, received {text[:40]!r}") from None


def _curve(rows: Mapping[int, Sequence[float]]) -> Curve:
    ordered = [rows[step] for step in sorted(rows)]
    kept = list(itertools.takewhile(lambda row: abs(row[-1]) <= _INFINITE, ordered))
    updates, examples, seconds, losses = np.array(kept, dtype=float).reshape(-1, 4).T
    return Curve(updates, examples, np.maximum(seconds, 1e-4), losses)  # the file's last digit


def _smooth(curve: Curve, size: int) -> Curve:
    examples, losses = curve.examples, curve.losses
    before = np.concatenate([[0.0], examples[:-1]]) if len(examples) else examples
    weights = np.maximum(examples - before, 1e-9)
    ends = np.arange(1, len(losses) + 1)
    reach = np.minimum(size, np.maximum(_WINDOW * examples, _FEWEST))
    starts = np.minimum(np.searchsorted(before, examples - reach - 1e-9), ends - 1)
    # Not by differences of running sums, in which small losses are lost.
    windows = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    means = np.array([np.average(losses[w], weights=weights[w]) for w in windows])
    kept = examples >= min(size, _FEWEST)
    kept[-1:] = True  # of a run that has seen fewer
    return Curve(curve.updates[kept], examples[kept], curve.seconds[kept], means[kept])
