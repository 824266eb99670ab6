"""Compare finished runs: curves on three clocks, what a loss costs on each, and one page to show.

Runs that differ in nothing but their seed are repetitions of one contender. N examples, R seeds.
"""

from __future__ import annotations

import csv
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

__all__ = [
    "CLOCKS",
    "Clock",
    "Comparison",
    "Contender",
    "Curve",
    "Run",
    "compare",
    "find_runs",
    "read_run",
]

Clock = Literal["updates", "examples", "seconds"]
Part = Literal["train", "val"]
Values = NDArray[np.float64]

CLOCKS: tuple[Clock, ...] = ("updates", "examples", "seconds")
_WORD = 60  # characters of a setting in a contender's name
_POINTS = 160  # of a curve's common grid
_LARGEST = 1e15  # of a count, a time or a metric
_INFINITE = 1e100  # from which on a loss counts as infinite
_WINDOW = 0.25  # of the examples seen: how far back a point of a curve averages, at most a pass
_FEWEST = 32  # examples in such an average; curves begin with them
_RISEN = 1.1  # times its lowest: a validation loss that has
_LOST = ("DIVERGED", "NON_FINITE", "INTERRUPTED")
# What repeats a run, or only watches it: runs that differ in it are the same contender.
_WATCHING = ("logger", "callbacks", "instruments", "ckpt_path", "seed", "data.seed")
_LOWER_IS_BETTER = ("mae", "mse", "rmse")


# ---------------------------------------------------------------------- one run


@dataclass
class Curve:
    """A loss against three clocks. P logged points.

    Args:
        updates: Updates made, (P,).
        examples: Examples seen, (P,).
        seconds: Wall clock, (P,).
        losses: Mean per example, (P,).

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> Curve(x, 10 * x, x / 2, np.array([4.0, 2.0, 1.0])).reach(1.5)
        {'updates': 3.0, 'examples': 30.0, 'seconds': 1.5}
    """

    updates: Values
    examples: Values
    seconds: Values
    losses: Values

    def clock(self, name: Clock) -> Values:
        """The points' positions, (P,).

        Args:
            name: The clock.
        """
        return {"updates": self.updates, "examples": self.examples, "seconds": self.seconds}[name]

    def reach(self, target: float) -> dict[Clock, float] | None:
        """When it first came down to a loss, by each clock; None: it did not.

        Between two points the curve is a straight line.

        Args:
            target: The loss.
        """
        below = np.flatnonzero(self.losses <= target)
        if not len(below):
            return None
        i = int(below[0])
        if i == 0:
            return {name: float(self.clock(name)[0]) for name in CLOCKS}
        before, after = self.losses[i - 1 : i + 1]
        part = (before - target) / (before - after)
        found: dict[Clock, float] = {}
        for name in CLOCKS:
            left, right = self.clock(name)[i - 1 : i + 1]
            found[name] = float(left + part * (right - left))
        return found


def _nothing() -> Curve:
    return Curve(*np.zeros((4, 0)))


@dataclass
class Run:
    """A finished run, read from its folder.

    Args:
        folder: Where it lies.
        settings: The configuration, flat: "optimizer.lr" and the like.
        summary: What `summary.json` holds.
        train: Training loss, averaged over the last examples (see `read_run`).
        val: Loss over all validation examples; without points where there was no validation.

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> run = Run(Path("run"), {}, {"variant": "gd"}, Curve(x, 10 * x, x / 2, 4 / x))
        >>> run.variant, len(run.val.losses)
        ('gd', 0)
    """

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]
    train: Curve
    val: Curve = field(default_factory=_nothing)

    @property
    def variant(self) -> str:
        """The optimizer's choice: gd, sgd, minibatch, …"""
        return str(self.summary["variant"])

    @property
    def seed(self) -> int:
        """Of initial weights and order."""
        return int(self.summary.get("seed", 0))

    @property
    def lost(self) -> bool:
        """Whether it ended without a result that can be compared."""
        return self.summary["stop_reason"] in _LOST or not len(self.train.losses)

    def value(self, tag: str) -> float:
        """A final loss or metric, over all examples of a part.

        Args:
            tag: Such as "loss/train"; NaN where the run has none.
        """
        found = self.summary["metrics"].get(tag)
        return math.nan if found is None else float(found)


def read_run(folder: str | Path) -> Run:
    """Read what a run has left in its folder: config.yaml, summary.json and metrics.csv.

    A row of metrics.csv has the mean loss of the updates since the row before, which for few
    examples is noise. Row i, at e_i examples, becomes the mean over the rows that lie within
    (e_i − w, e_i], weighted by their examples, with w = min(N, max(e_i/4, 32)), and never less than
    the row itself: so that a full-batch row stays as it is, and no curve is early. The curve begins
    with the first row at which min(N, 32) examples were seen: a single easy one is no loss.
    Validation losses are over all held-out examples, and stay as they are.

    Args:
        folder: Of the run.

    Returns:
        The run.

    Raises:
        ValueError: The run is not finished, or has no curve.

    Example:
        >>> read_run("missing")
        Traceback (most recent call last):
        ...
        ValueError: missing holds no finished run: it has no summary.json.
    """
    path = Path(folder)
    shown = printable(path)
    try:
        summary = read_json(path / "summary.json")
        config = read_yaml(path / "config.yaml")
        settings = dict(_flat(config))
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
    train = _smooth(train, int(summary["data"]["train"]))
    return Run(path, settings, summary, train, val)


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in words of our own."""
    if isinstance(error, OSError):
        return printable(error.strerror or "it cannot be opened")
    if isinstance(error, csv.Error):
        return "a field is too long, or it is no table"
    return printable(error) if type(error) is ValueError else "a part is of another kind"


def _check_digits(settings: Mapping[str, Any]) -> None:
    try:
        json.dumps(settings, default=str)
    except ValueError:  # of numbers that have no text
        raise ValueError("a number in config.yaml has too many digits") from None


def _number(text: str, kind: type = float) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"expected a number, received {text[:40]!r}") from None


def _check_summary(summary: Any) -> None:
    """Raise unless what is read of a summary is of the kind that a run writes."""

    def check(right: bool, key: str) -> None:
        if not right:
            raise ValueError(f"{key} is missing, or of another kind")

    def is_number(value: Any) -> bool:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return plain and (value != value or abs(value) <= _LARGEST)

    def is_metric(tag: str, value: Any) -> bool:
        named = len(tag) <= 200 and tag.isprintable() and tag[:1].isalnum()
        return named and (value is None or isinstance(value, float) or is_number(value))

    check(isinstance(summary, dict), "its content")
    for key in ("variant", "stop_reason"):
        value = summary.get(key)
        check(isinstance(value, str) and bool(re.fullmatch(r"[A-Za-z0-9][\w.-]{0,63}", value)), key)
    for key in ("fit_seconds", "updates"):
        check(is_number(summary.get(key)), key)
    for key in ("batch_size", "examples_seen", "epochs", "parameters"):
        check(summary.get(key) is None or is_number(summary[key]), key)
    check(type(summary.get("seed", 0)) is int and is_number(summary.get("seed", 0)), "seed")
    for key, words in (("device", str), ("engine", str)):
        check(isinstance(summary.get(key, ""), words | None), key)
    for key in ("data", "metrics"):
        check(isinstance(summary.get(key), dict), key)
    for key in ("versions", "instruments", "stop_numbers"):
        check(isinstance(summary.get(key) or {}, dict), key)
    for part in ("train", "val", "test"):
        size = summary["data"].get(part, 0)
        check(type(size) is int and 0 <= size <= _LARGEST, f"data.{part}")
    check(summary["data"].get("train", 0) > 0, "data.train")
    check(all(is_metric(tag, value) for tag, value in summary["metrics"].items()), "metrics")
    noise = (summary.get("instruments") or {}).get("noise_scale") or {}
    check(isinstance(noise, dict) and is_number(noise.get("value") or 0), "noise_scale")
    versions = (summary.get("versions") or {}).values()
    check(all(isinstance(v, str) and len(v) <= 100 for v in versions), "versions")


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
            if len(row) != len(names):
                if not row or len(row) < len(names):  # the line that was being written
                    continue
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


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(config, Mapping):
        raise ValueError("no settings")
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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
    import glob

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


# ---------------------------------------------------------------------- contenders


@dataclass
class Contender:
    """Runs that differ in nothing but their seed.

    Args:
        name: What tells it from the others.
        runs: That ended with a result, one for each seed.
        lost: That did not: diverged, or interrupted.

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> curves = [Curve(x, 10 * x, x, c / x) for c in (1, 2, 9)]
        >>> runs = [Run(Path("run"), {}, {"variant": "gd"}, curve) for curve in curves]
        >>> Contender("gd", runs).band("updates", points=3)[1].tolist()
        [2.0, 1.0, 0.5]
    """

    name: str
    runs: list[Run]
    lost: list[Run] = field(default_factory=list)

    def curves(self, part: Part) -> list[Curve]:
        """One for each run.

        Args:
            part: "train" or "val".
        """
        return [run.train if part == "train" else run.val for run in self.runs]

    def band(
        self, clock: Clock, part: Part = "train", points: int = _POINTS
    ) -> tuple[Values, Values, Values, Values]:
        """Median over seeds and band, from where all have begun to where the last one ends.

        A run that has ended keeps its last loss.

        Args:
            clock: What the points lie on: where validations were, and else equally spaced, by
                factors.
            part: "train" or "val".
            points: Their number at most, range [2, ∞).

        Returns:
            Positions, median, lowest and highest loss, each of equal length; none where a run has
            no such curve.
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

    def values(self, tag: str) -> Values:
        """A final loss or metric of each run.

        Args:
            tag: Such as "loss/train".
        """
        return np.array([run.value(tag) for run in self.runs])

    def numbers(self, key: str) -> Values:
        """A number of each run's summary.

        Args:
            key: Such as "updates"; NaN where a run has none.
        """
        found = [run.summary.get(key) for run in self.runs]
        return np.array([math.nan if value is None else float(value) for value in found])

    def noise(self) -> Values:
        """Gradient noise scale of each run, in examples; NaN where no instrument measured it."""
        return np.array([noise_scale(run) for run in self.runs])

    def reached(self, target: float) -> dict[Clock, Values] | None:
        """When each run came down to a loss; None where one did not.

        Args:
            target: Training loss.
        """
        found = [run.train.reach(target) for run in self.runs]
        if any(place is None for place in found):
            return None
        return {name: np.array([p[name] for p in found if p is not None]) for name in CLOCKS}


def noise_scale(run: Run) -> float:
    found = (run.summary.get("instruments") or {}).get("noise_scale") or {}
    value = found.get("value")
    return float(value) if isinstance(value, int | float) else math.nan


def compare(
    runs: Sequence[Run], target: float | None = None, names: Mapping[Path, str] | None = None
) -> Comparison:
    """Sort runs into contenders, and choose the loss whose cost is asked for.

    Args:
        runs: Finished runs on the same data.
        target: Training loss, finite; None: the best that the worst run reached, so that all do.
        names: Of the contenders, by a run's folder; None: what their settings differ in.

    Returns:
        The comparison.

    Raises:
        ValueError: Fewer than two contenders have a result, the data differ, or the target is not
            finite.

    Example:
        >>> compare([])
        Traceback (most recent call last):
        ...
        ValueError: Comparing needs two contenders with a finished run each. Received: none. ...
    """
    if target is not None and not math.isfinite(target):
        raise ValueError(f"target must be a finite loss. Received: target={target}.")
    kinds = sorted({_data(run) for run in runs})
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
    return Comparison(contenders, float(target), left_out)


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


def _data(run: Run) -> str:
    settings = run.settings
    path = settings.get("data.path")
    kind = str(settings.get("data._target_") or "").rsplit(".", 1)[-1]
    name = settings.get("data.name") or (Path(str(path)).name if path else kind) or "arrays"
    target = settings.get("data.target") or settings.get("data.target_path")
    sizes = run.summary["data"]
    total = sum(int(sizes.get(part, 0)) for part in ("train", "val", "test"))
    words = printable(f"{name}{f', {target}' if target else ''}")
    return f"{words} ({total:,} examples)"


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
        shown = [k.removeprefix("optimizer.").removesuffix("._target_") for k in keys[:4]]
        words = [
            f"{printable(name)}={_short(own[k])}" for name, k in zip(shown, keys, strict=False)
        ]
        more = ["…"] if len(keys) > 4 else []
        titles.append(" ".join([run.variant, *words, *more]))
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


# ---------------------------------------------------------------------- numbers in words


def rounded(value: float) -> str:
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.1e}"


def _middle(values: Values) -> str:
    return rounded(float(np.median(values)))


def _spread(values: Values, number: Any = rounded) -> str:
    """Median (lowest to highest)."""
    known = values[np.isfinite(values)]
    if not len(known):
        return "–"
    low, middle, high = (number(float(v)) for v in (known.min(), np.median(known), known.max()))
    return middle if low == high else f"{middle} ({low}–{high})"


def _has_recovered(run: Run) -> bool:
    return bool((run.summary.get("stop_numbers") or {}).get("recoveries"))


def _has_risen(curve: Curve) -> bool:
    """Whether a loss ended well above its lowest."""
    return len(curve.losses) > 1 and bool(curve.losses[-1] > _RISEN * curve.losses.min())


def _times(factor: float) -> str:
    return f"{factor:.2g}" if factor < 10 else f"{factor:,.0f}"


def _overlap(first: Values, second: Values) -> bool:
    return bool(first.min() <= second.max() and second.min() <= first.max())


def listed(words: Sequence[str]) -> str:
    if len(words) < 3:
        return " and ".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"


@dataclass
class Comparison:
    """Contenders, and a loss whose cost is asked for.

    Args:
        contenders: In the order that tables and legends have.
        target: Training loss.
        left_out: Sentences about runs that are not in it.
        made: How it was made: lines of text, commands first.

    Example:
        >>> x = np.array([1.0, 2.0, 4.0])
        >>> def run(name, loss):
        ...     summary = {"variant": name, "stop_reason": "BUDGET", "data": {"train": 10},
        ...         "metrics": {"loss/train": loss}, "updates": 4, "epochs": 4.0}
        ...     curve = Curve(x, 10 * x, x, loss * 4 / x)
        ...     return Run(Path(name), {"variant": name}, summary, curve)
        >>> compared = compare([run("gd", 2.0), run("sgd", 1.0)])
        >>> compared.target, compared.sentences()[0]
        (2.0, 'Counted in updates, sgd is the cheapest way to a training loss of 2: 2 updates. ...')
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
    def validated(self) -> bool:
        """Whether there is a validation curve to draw, of two points or more."""
        return any(len(c.band("updates", "val")[0]) > 1 for c in self.usable)

    @property
    def metric(self) -> str | None:
        """The tag of the final metric that is shown; None: the runs have none in common."""
        tags = [set(run.summary["metrics"]) for c in self.usable for run in c.runs]
        common = set.intersection(*tags)
        for part in ("test", "val", "train"):
            for name in ("accuracy", "r2"):
                if f"metric/{name}/{part}" in common:
                    return f"metric/{name}/{part}"
        others = sorted(tag for tag in common if tag.startswith("metric/"))
        return others[0] if others else None

    @property
    def title(self) -> str:
        """The data, the model if all have the same, and the contenders."""
        runs = [run for c in self.usable for run in c.runs]
        models = {str(run.settings.get("model._target_", "")).rsplit(".", 1)[-1] for run in runs}
        model = f", {models.pop()}" if len(models) == 1 and models != {""} else ""
        return f"{_data(runs[0])}{model}: {listed([c.name for c in self.contenders])}"

    # ------------------------------------------------------------------ tables

    def ends(self) -> list[dict[str, str]]:
        """The first table: where each contender's budget led. Median (lowest to highest seed)."""
        rows = []
        for c in self.usable:
            updates, seconds = c.numbers("updates"), c.numbers("fit_seconds")
            row = {
                "contender": c.name,
                "seeds": str(len(c.runs)),
                "examples per update": _spread(c.numbers("batch_size")),
                "updates": _spread(updates),
                "epochs": _spread(c.numbers("epochs")),
                "seconds": _spread(seconds),
                "updates/s": _spread(updates / np.maximum(seconds, 1e-3)),
                "training loss": _spread(c.values("loss/train")),
            }
            if any(np.isfinite(o.values("loss/val")).any() for o in self.usable):
                row["validation loss"] = _spread(c.values("loss/val"))
            if self.metric:
                _, name, part = self.metric.split("/")
                words = {"test": "test ", "val": "validation ", "train": "training "}[part]
                row[f"{words}{name}"] = _spread(c.values(self.metric))
            if any(np.isfinite(o.noise()).any() for o in self.usable):
                row["gradient noise scale"] = _spread(c.noise())
            rows.append(row)
        return rows

    def costs(self) -> list[dict[str, str]]:
        """The second table: what the target loss cost. Median (lowest to highest seed)."""
        rows = []
        for c in self.usable:
            reached = c.reached(self.target)
            row = {"contender": c.name}
            if reached is None:
                count = sum(run.train.reach(self.target) is not None for run in c.runs)
                row |= dict.fromkeys(
                    ("updates", "examples", "epochs", "seconds"), f"{count} of {len(c.runs)} did"
                )
            else:
                size = c.runs[0].summary["data"]["train"]
                row |= {
                    "updates": _spread(reached["updates"]),
                    "examples": _spread(reached["examples"]),
                    "epochs": _spread(reached["examples"] / size),
                    "seconds": _spread(reached["seconds"]),
                }
            rows.append(row)
        return rows

    # ------------------------------------------------------------------ words

    def sentences(self) -> list[str]:
        """What the numbers say: each clock, then the ends; computed, with the seeds' spread."""
        said = [self.on(clock) for clock in CLOCKS]
        losses = {c.name: c.values("loss/train") for c in self.usable}
        said.append(self._lowest("the end", "loss over all training examples", losses, lower=True))
        if self.metric:
            _, name, part = self.metric.split("/")
            values = {c.name: c.values(self.metric) for c in self.usable}
            words = {"test": "test", "val": "validation", "train": "training"}[part]
            lower = name in _LOWER_IS_BETTER
            said.append(self._lowest("the end", f"{words} {name}", values, lower=lower))
        said += [
            f"{count} of {len(c.runs)} runs of {c.name} diverged on the way and went on with a "
            f"smaller step size than was set."
            for c in self.usable
            if (count := sum(map(_has_recovered, c.runs)))
        ]
        said += [self._risen(c) for c in self.usable if all(map(_has_risen, c.curves("val")))]
        if min(len(c.runs) for c in self.usable) < 2:
            said.append("With one seed a contender shows no spread: small differences mean little.")
        return said

    @staticmethod
    def _risen(c: Contender) -> str:
        curves = c.curves("val")
        lowest = [int(curve.losses.argmin()) for curve in curves]
        at = np.array([curve.updates[i] for curve, i in zip(curves, lowest, strict=True)])
        least = np.array([curve.losses[i] for curve, i in zip(curves, lowest, strict=True)])
        end = np.array([curve.losses[-1] for curve in curves])
        return (
            f"The validation loss of {c.name} was lowest at update {_spread(at)}, "
            f"{_spread(least)}, and rose to {_spread(end)}: what it learned later did not help on "
            f"held-out examples."
        )

    def absent(self) -> list[str]:
        """A sentence for each run that is not in the numbers, and why."""
        lost = [
            f"{c.name}, seed {run.seed}: {run.summary['stop_reason']}. "
            f"{run.summary.get('stop_message', '')}"
            for c in self.contenders
            for run in c.lost
        ]
        return [*lost, *self.left_out]

    def on(self, clock: Clock) -> str:
        """The sentence on one clock: who comes to the target first, and by what factor.

        Args:
            clock: What is counted.
        """
        target = rounded(self.target)
        found = {c.name: r[clock] for c in self.usable if (r := c.reached(self.target))}
        missed = [c.name for c in self.usable if c.name not in found]
        late = (
            f" {listed(missed)} did not come to it with every seed."
            if missed and found
            else f"Counted in {clock}: nobody came to a training loss of {target} with every seed."
            if missed
            else ""
        )
        if not found:
            return late
        order = sorted(found, key=lambda name: float(np.median(found[name])))
        best = found[order[0]]
        head = (
            f"Counted in {clock}, {order[0]} is the cheapest way to a training loss of {target}: "
            f"{_spread(best)} {clock}."
        )
        close = [name for name in order[1:] if _overlap(best, found[name])]
        far = [name for name in order[1:] if name not in close]
        parts = [f"{_times(self._ratio(found[name], best))} times as many" for name in far]
        parts = [f"{name} needs {words}" for name, words in zip(far, parts, strict=True)]
        body = f" {listed(parts)}." if parts else ""
        if close:
            verb = "is" if len(close) == 1 else "are"
            body += f" {listed(close)} {verb} within the seeds' spread of it."
        return head + body + late

    @staticmethod
    def _ratio(values: Values, best: Values) -> float:
        return float(np.median(values) / np.median(best))

    @staticmethod
    def _lowest(when: str, what: str, found: Mapping[str, Values], *, lower: bool) -> str:
        known = {n: v[np.isfinite(v)] for n, v in found.items() if np.isfinite(v).any()}
        if len(known) < 2:
            return f"The {what} is not known for two contenders."
        order = sorted(known, key=lambda n: float(np.median(known[n])), reverse=not lower)
        best = known[order[0]]
        head = (
            f"At {when}, {order[0]} has the {'lowest' if lower else 'highest'} {what}: "
            f"{_spread(best)}."
        )
        close = [n for n in order[1:] if _overlap(best, known[n])]
        far = [f"{n} {_spread(known[n])}" for n in order[1:] if n not in close]
        body = f" {'; '.join(far)}." if far else ""
        if close:
            shown = listed([f"{n} with {_spread(known[n])}" for n in close])
            body += f" {shown} {'is' if len(close) == 1 else 'are'} within the seeds' spread of it."
        return head + body

    def portraits(self) -> dict[str, str]:
        """What each contender costs and buys, by its name."""
        found = {c.name: r for c in self.usable if (r := c.reached(self.target))}
        told = {}
        for c in self.usable:
            size = float(np.median(c.numbers("batch_size")))
            total = int(c.runs[0].summary["data"]["train"])
            updates, epochs = c.numbers("updates"), c.numbers("epochs")
            seconds = c.numbers("fit_seconds")
            each = (
                "all examples"
                if size >= total
                else "one example"
                if size == 1
                else f"{size:g} examples"
            )
            per_epoch = float(np.median(updates / np.maximum(epochs, 1e-9)))
            text = (
                f"An update sees {each}, so an epoch of {total:,} has {rounded(per_epoch)} "
                f"update{'' if round(per_epoch) == 1 else 's'}. In "
                f"{_middle(epochs)} epochs and {_middle(seconds)} s it made {_middle(updates)} "
                f"updates, {_middle(updates / np.maximum(seconds, 1e-3))} each second."
            )
            told[c.name] = text + self._trade(c, found)
        return told

    def _trade(self, c: Contender, found: Mapping[str, dict[Clock, Values]]) -> str:
        target = rounded(self.target)
        if c.name not in found:
            count = sum(run.train.reach(self.target) is not None for run in c.runs)
            best = _spread(np.array([run.train.losses.min() for run in c.runs]))
            return (
                f" {count} of its {len(c.runs)} runs came to a training loss of {target}; the best "
                f"was {best}."
            )
        own = found[c.name]
        passes = float(np.median(own["examples"])) / int(c.runs[0].summary["data"]["train"])
        text = (
            f" To come to {target} took {_middle(own['updates'])} updates, "
            f"{rounded(passes)} epochs, {_middle(own['seconds'])} s."
        )
        buys, costs, ties = [], [], []
        for clock in CLOCKS:
            others = {name: places[clock] for name, places in found.items() if name != c.name}
            if not others:
                continue
            rival = min(others, key=lambda name: float(np.median(others[name])))
            ratio = self._ratio(others[rival], own[clock])
            if _overlap(own[clock], others[rival]):
                ties.append(f"{clock} ({rival})")
            elif ratio > 1:
                buys.append(f"{clock} ({rival} needs {_times(ratio)} times as many)")
            else:
                costs.append(f"{_times(1 / ratio)} times the {clock} of {rival}")
        if buys:
            text += f" It buys the fewest {listed(buys)}."
        if costs:
            text += f" It costs {listed(costs)}."
        if ties:
            text += f" The seeds do not tell it from the best of the others in {listed(ties)}."
        return text
