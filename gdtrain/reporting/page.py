"""The report of a comparison: one page that needs nothing beside it, figures, and tables."""

from __future__ import annotations

import csv
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gdtrain.reporting.comparison import Comparison
from gdtrain.reporting.figures import INK, plot, plot_costs, svg
from gdtrain.reporting.finished import CLOCKS, Clock, Part
from gdtrain.reporting.text import PARTS, Report, rounded

__all__ = ["page", "save"]

_PARTS: tuple[Part, ...] = ("train", "val")


@dataclass(frozen=True)
class _Chart:
    box: str
    inside: str
    words: str


def page(comparison: Comparison) -> str:
    """The report: one page that needs nothing beside it, on any width, in light and dark.

    Args:
        comparison: Of finished runs.

    Returns:
        HTML, with the charts inside.

    Example:
        >>> import numpy as np
        >>> from gdtrain.reporting.comparison import Contender
        >>> from gdtrain.reporting.finished import Curve, Run
        >>> x = np.arange(1.0, 9.0)
        >>> summary = {"variant": "gd", "data": {"train": 9}, "metrics": {}, "epochs": 8,
        ...     "stop_reason": "BUDGET", "updates": 8, "fit_seconds": 1.0, "batch_size": 9}
        >>> curves = [Curve(x, 9 * x, x / 9, c / x) for c in (1, 2)]
        >>> runs = [Run(Path("run"), {}, summary, curve) for curve in curves]
        >>> pair = Comparison([Contender("a", runs[:1]), Contender("b", runs[1:])], target=0.5)
        >>> page(pair).count("<svg")
        6
    """
    report = Report(comparison)
    seeds = [len(c.runs) for c in comparison.usable]
    losses = {
        part: [
            _chart(
                plot(comparison, clock, part, ink=INK),
                f"{clock}-{part}",
                _in_words(comparison, clock, part),
            )
            for clock in CLOCKS
        ]
        for part in (_PARTS if comparison.validated else _PARTS[:1])
    }
    costs = [
        _chart(plot_costs(comparison, clock, ink=INK), f"{clock}-cost", report.on(clock))
        for clock in CLOCKS
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["unbroken"] = _unbroken
    return environment.get_template("page.html").render(
        report=report,
        seeds=sorted({min(seeds), max(seeds)}),
        losses=losses,
        costs=costs,
        target=rounded(comparison.target),
        made=[*comparison.made, report.versions()],
    )


def _unbroken(text: str) -> str:
    """With word joiners, so that a range such as 1–2 is not broken between lines."""
    return text.replace("–", "\u2060–\u2060")


def _chart(figure: Any, name: str, words: str) -> _Chart:
    return _Chart(*svg(figure, name), words)


def _in_words(comparison: Comparison, clock: Clock, part: Part) -> str:
    ends = []
    for c in comparison.usable:
        x, middle, _, _ = c.band(clock, part)
        if len(x):
            first, last = (
                f"{rounded(float(middle[i]))} at {rounded(float(x[i]))}" for i in (0, -1)
            )
            ends.append(f"{c.name} from {first} to {last}")
    return f"{PARTS[part].capitalize()} loss against {clock}: {'; '.join(ends)}."


def save(comparison: Comparison, folder: str | Path) -> None:
    """Write report.html, loss.png, loss.pdf, costs.png, costs.pdf, runs.csv and curves.csv.

    And validation.png and validation.pdf, where the runs were validated.

    Args:
        comparison: Of finished runs.
        folder: Made if it is not there. Each file appears whole or not at all.

    Raises:
        OSError: The folder cannot be written.

    Example:
        >>> import numpy as np
        >>> from gdtrain.reporting.comparison import Contender
        >>> from gdtrain.reporting.finished import Curve, Run
        >>> x = np.arange(1.0, 9.0)
        >>> summary = {"variant": "gd", "data": {"train": 9}, "metrics": {}, "epochs": 8,
        ...     "stop_reason": "BUDGET", "updates": 8, "fit_seconds": 1.0, "batch_size": 9}
        >>> curves = [Curve(x, 9 * x, x / 9, c / x) for c in (1, 2)]
        >>> runs = [Run(Path("run"), {}, summary, curve) for curve in curves]
        >>> pair = Comparison([Contender("a", runs[:1]), Contender("b", runs[1:])], target=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(pair, folder)
        ...     len(os.listdir(folder))
        7
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".report-") as scratch:
        new = Path(scratch)
        figures = {"loss": plot(comparison), "costs": plot_costs(comparison)}
        if comparison.validated:
            figures["validation"] = plot(comparison, part="val")
        for name, figure in figures.items():
            figure.savefig(new / f"{name}.png", dpi=120)
            figure.savefig(new / f"{name}.pdf", metadata={"CreationDate": None})
        _write_rows(new / "runs.csv", _run_rows(comparison))
        _write_rows(new / "curves.csv", _curve_rows(comparison))
        (new / "report.html").write_text(page(comparison), encoding="utf-8")
        for file in sorted(new.iterdir()):
            os.replace(file, path / file.name)


def _run_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    tags = sorted({tag for run in comparison.runs for tag in run.summary["metrics"]})
    for c in comparison.contenders:
        for run in [*c.runs, *c.lost]:
            row = {"contender": c.name, "variant": run.variant, "seed": run.seed}
            for key in ("batch_size", "updates", "examples_seen", "epochs", "fit_seconds"):
                row[key] = run.summary.get(key)
            row["stop_reason"] = run.summary["stop_reason"]
            row |= {tag: run.summary["metrics"].get(tag) for tag in tags}
            row["noise_scale"] = run.noise_scale
            reached = (None if run.lost else run.train.reach(comparison.target)) or {}
            row["target"] = comparison.target
            row |= {f"{clock}_to_target": reached.get(clock) for clock in CLOCKS}
            yield {k: None if v != v else v for k, v in row.items()}  # NaN: nothing


def _curve_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    names = ("at", "median", "lowest", "highest")
    for c, part, clock in itertools.product(comparison.usable, _PARTS, CLOCKS):
        for numbers in zip(*(column.tolist() for column in c.band(clock, part)), strict=True):
            row = {"contender": c.name, "loss": PARTS[part], "clock": clock}
            yield row | dict(zip(names, numbers, strict=True))


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    every = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(every[0]))
        writer.writeheader()
        writer.writerows(every)
