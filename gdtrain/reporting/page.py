"""The report of a comparison: one page that needs nothing beside it, figures, and tables."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import re
import tempfile
import textwrap
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from gdtrain.reporting.comparison import Comparison
from gdtrain.reporting.finished import CLOCKS, Clock, Part
from gdtrain.reporting.text import PARTS, Report, rounded

__all__ = ["page", "plot", "plot_costs", "save"]

_PARTS: tuple[Part, ...] = ("train", "val")
_INK = "#1a2b3c"  # of axes and words where `_svg` is to give them the page's own colour
# Okabe and Ito's colours, which stay apart for the colour-blind, from the darkest; each with a
# line and a marker, which stay apart without them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_GREY = "#808080"


def page(comparison: Comparison) -> str:
    """The report: one page that needs nothing beside it, on any width, in light and dark."""
    report = Report(comparison)
    seeds = [len(c.runs) for c in comparison.usable]
    losses = {
        part: [
            _chart(
                plot(comparison, clock, part, ink=_INK),
                f"{clock}-{part}",
                _in_words(comparison, clock, part),
            )
            for clock in CLOCKS
        ]
        for part in (_PARTS if comparison.validated else _PARTS[:1])
    }
    costs = [
        _chart(plot_costs(comparison, clock, ink=_INK), f"{clock}-cost", report.on(clock))
        for clock in CLOCKS
    ]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    # With word joiners, so that a range such as 1–2 is not broken between lines.
    environment.filters["unbroken"] = lambda text: text.replace("–", "\u2060–\u2060")
    return environment.get_template("page.html").render(
        report=report,
        seeds=sorted({min(seeds), max(seeds)}),
        losses=losses,
        costs=costs,
        target=rounded(comparison.target),
        made=[*comparison.made, report.versions()],
    )


def _chart(figure: Any, name: str, words: str) -> dict[str, str]:
    box, inside = _svg(figure, name)
    return {"box": box, "inside": inside, "words": words}


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


# ---------------------------------------------------------------------- figures, by matplotlib


def plot(
    comparison: Comparison, clock: Clock | None = None, part: Part = "train", *, ink: str = "black"
) -> Any:
    """A loss: median over seeds, with a band from the lowest to the highest.

    Over one clock, or None: all three, side by side. `ink` is the colour of axes and words.
    """
    return _figure(comparison, clock, ink, 3.0, partial(_draw_loss, part=part), legend=True)


def plot_costs(comparison: Comparison, clock: Clock | None = None, *, ink: str = "black") -> Any:
    """What the target loss cost: a marker at the median, a line over the seeds."""
    rows = sum(_wrapped(c.name, 18).count("\n") + 1.4 for c in comparison.usable)
    return _figure(comparison, clock, ink, 1.1 + 0.2 * rows, _draw_cost, legend=False)


def _figure(
    comparison: Comparison, clock: Clock | None, ink: str, height: float, draw: Any, legend: bool
) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    clocks = CLOCKS if clock is None else (clock,)
    style: Any = {"font.size": 9, "text.color": ink, "axes.labelcolor": ink}
    style |= {"axes.edgecolor": ink, "xtick.color": ink, "ytick.color": ink}
    with matplotlib.rc_context(style):
        names = [_wrapped(c.name, 40) for c in comparison.usable] if legend else []
        longest = max([len(line) for name in names for line in name.split("\n")], default=0)
        columns = max(1, int(54 * len(clocks) / (max(longest, 12) + 10)))
        lines = sum(name.count("\n") + 1 for name in names) + 1
        height += 0.17 * lines / columns if legend else 0
        figure = Figure(figsize=(4 * len(clocks), height), layout="constrained")
        panels = figure.subplots(1, len(clocks), squeeze=False)[0]
        for axes, name in zip(panels, clocks, strict=True):
            draw(comparison, axes, name)
        if legend:
            figure.legend(
                *panels[0].get_legend_handles_labels(),
                loc="outside lower center",
                ncols=columns,
                handlelength=4,
                fontsize=9,
                frameon=False,
            )
    return figure


def _draw_loss(comparison: Comparison, axes: Any, clock: Clock, part: Part) -> None:
    lowest, nearest, highest, furthest = math.inf, math.inf, 0.0, 0.0
    for i, c in enumerate(comparison.usable):
        x, middle, low, high = c.band(clock, part)
        if not len(x):
            continue
        colour = _COLOURS[i % len(_COLOURS)]
        axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        step = max(1, len(x) // 6)
        axes.plot(
            x,
            middle,
            color=colour,
            linestyle=_LINES[i % len(_LINES)],
            linewidth=1.7,
            marker=_MARKERS[i % len(_MARKERS)],
            markersize=5,
            markevery=(i * step // max(1, len(comparison.usable)), step),
            label=_wrapped(c.name, 40),
        )
        lowest, highest = min(lowest, float(low.min())), max(highest, float(high.max()))
        nearest, furthest = min(nearest, float(x[0])), max(furthest, float(x[-1]))
    if part == "train":
        axes.axhline(
            comparison.target,
            color=_GREY,
            linewidth=1,
            linestyle=(0, (1, 3)),
            label=f"target {rounded(comparison.target)}",
        )
    axes.set(
        title=f"{PARTS[part].capitalize()} loss against {clock}",
        xlabel=_axis(comparison, clock, furthest >= 10 * nearest),
        ylabel=f"{PARTS[part]} loss (mean per example)",
        xscale="log" if furthest >= 10 * nearest else "linear",
        yscale="log" if lowest > 0 else "linear",
    )
    _tick(axes, "x", nearest, furthest)
    _tick(axes, "y", lowest, highest)
    axes.grid(color=_GREY, alpha=0.25, linewidth=0.6)


def _draw_cost(comparison: Comparison, axes: Any, clock: Clock) -> None:
    nearest, furthest = math.inf, 0.0
    for i, c in enumerate(comparison.usable):
        reached = c.reached(comparison.target)
        colour = _COLOURS[i % len(_COLOURS)]
        if reached is None:
            axes.annotate(
                "not reached by every seed",
                (0.5, i),
                xycoords=("axes fraction", "data"),
                ha="center",
                va="center",
            )
            continue
        values = reached[clock]
        axes.hlines(i, values.min(), values.max(), color=colour, linewidth=2.5)
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot(np.median(values), i, marker, color=colour, markersize=7)
        nearest = min(nearest, float(values.min()))
        furthest = max(furthest, float(values.max()))
    wide = furthest >= 10 * nearest
    axes.set(
        title=f"{clock.capitalize()} to a loss of {rounded(comparison.target)}",
        xlabel=_wrapped(_axis(comparison, clock, wide), 32),  # beside long names
        xscale="log" if wide else "linear",
        yticks=range(len(comparison.usable)),
        yticklabels=[_wrapped(c.name, 18) for c in comparison.usable],
        ylim=(len(comparison.usable) - 0.5, -0.5),
    )
    if not wide and furthest:
        axes.set_xlim(0, 1.1 * furthest)
    _tick(axes, "x", nearest, furthest)
    axes.grid(axis="x", color=_GREY, alpha=0.25, linewidth=0.6)


def _axis(comparison: Comparison, clock: Clock, logarithmic: bool) -> str:
    size = comparison.runs[0].training_examples
    words = {
        "updates": "updates",
        "examples": f"examples seen (an epoch: {size:,}",
        "seconds": "seconds (wall clock",
    }[clock]
    if not logarithmic:
        return words + ")" * ("(" in words)
    return f"{words}; logarithmic)" if "(" in words else f"{words} (logarithmic)"


def _svg(figure: Any, name: str) -> tuple[str, str]:
    """A figure's `viewBox` and content, to stand inside a page, where all ids begin with `name`.

    Letters are paths, and what has `_INK` has the page's colour.
    """
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "gdtrain"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    found = re.search(r'<svg[^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', text.getvalue(), re.DOTALL)
    assert found is not None
    box, inside = found.groups()
    inside = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", inside, flags=re.DOTALL)
    inside = re.sub(r' xmlns(:\w+)?="[^"]*"', "", inside).replace("xlink:href", "href")
    inside = re.sub(r'\bid="|url\(#|href="#', lambda start: f"{start[0]}{name}-", inside)
    return box, inside.replace(_INK, "currentColor")


def _tick(axes: Any, which: str, low: float, high: float) -> None:
    """Few and plain numbers on a logarithmic axis: 1, 2, 5 where it is short, else decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = getattr(axes, f"{which}axis")
    if axis.get_scale() != "log":
        return
    decades = math.log10(high / low) if high > low else 0.0
    axis.set_minor_formatter(NullFormatter())
    if decades < 2.3:
        subs = (1.0, 2.0, 5.0) if decades < 1.5 else (1.0, 3.0)
        axis.set_major_locator(LogLocator(subs=subs, numticks=12))
    if low >= 1e-3 and high < 2e5 and decades < 6:
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
        )


def _wrapped(name: str, width: int) -> str:
    """Over several lines; a dollar sign begins no formula."""
    return "\n".join(textwrap.wrap(name, width)).replace("$", "\\$")
