"""The report of a comparison: figures, tables of numbers, and one page that needs nothing else."""

from __future__ import annotations

import csv
import html
import io
import itertools
import math
import os
import re
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gdtrain.reporting.comparison import (
    CLOCKS,
    Clock,
    Comparison,
    Part,
    listed,
    noise_scale,
    rounded,
)

__all__ = ["page", "plot", "plot_costs", "save"]

# Okabe and Ito's colours, which stay apart for the colour-blind, from the darkest; each with a
# line and a marker, which stay apart without them.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_LINES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (8, 2)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_PARTS: tuple[Part, ...] = ("train", "val")
_WHOSE = {"train": "training", "val": "validation"}
_INK = "#1a2b3c"  # of axes and words in the page's charts, there replaced by the page's own


def plot(
    comparison: Comparison, clock: Clock | None = None, part: Part = "train", *, ink: str = "black"
) -> Any:
    """A loss: median over seeds, with a band from the lowest to the highest.

    Args:
        comparison: Of finished runs.
        clock: The horizontal axis; None: all three, side by side.
        part: "train" or "val".
        ink: Colour of axes and words.

    Returns:
        A matplotlib figure; `.savefig(path)` keeps it.

    Example:
        >>> from gdtrain.reporting.comparison import Contender, Curve, Run
        >>> x = np.arange(1.0, 9.0)
        >>> summary = {"data": {"train": 9}}
        >>> curves = [Curve(x, 9 * x, x / 9, c / x) for c in (1, 2)]
        >>> runs = [Run(Path("run"), {}, summary, curve) for curve in curves]
        >>> pair = Comparison([Contender("a", runs[:1]), Contender("b", runs[1:])], target=0.5)
        >>> len(plot(pair).axes)
        3
    """

    def draw(comparison: Comparison, axes: Any, clock: Clock) -> None:
        _draw_loss(comparison, axes, clock, part)

    return _figure(comparison, clock, ink, 3.0, draw, legend=True)


def plot_costs(comparison: Comparison, clock: Clock | None = None, *, ink: str = "black") -> Any:
    """What the target loss cost: a marker at the median, a line over the seeds.

    Args:
        comparison: Of finished runs.
        clock: The horizontal axis; None: all three, side by side.
        ink: Colour of axes and words.

    Returns:
        A matplotlib figure.

    Example:
        >>> from gdtrain.reporting.comparison import Contender, Curve, Run
        >>> x = np.arange(1.0, 9.0)
        >>> summary = {"data": {"train": 9}}
        >>> curves = [Curve(x, 9 * x, x / 9, c / x) for c in (1, 2)]
        >>> runs = [Run(Path("run"), {}, summary, curve) for curve in curves]
        >>> pair = Comparison([Contender("a", runs[:1]), Contender("b", runs[1:])], target=0.5)
        >>> plot_costs(pair, "updates").axes[0].get_xlabel()
        'updates'
    """
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
            color="#808080",
            linewidth=1,
            linestyle=(0, (1, 3)),
            label=f"target {rounded(comparison.target)}",
        )
    axes.set(
        title=f"{_WHOSE[part].capitalize()} loss against {clock}",
        xlabel=_axis(comparison, clock, furthest >= 10 * nearest),
        ylabel=f"{_WHOSE[part]} loss (mean per example)",
        xscale="log" if furthest >= 10 * nearest else "linear",
        yscale="log" if lowest > 0 else "linear",
    )
    _tick(axes, "x", nearest, furthest)
    _tick(axes, "y", lowest, highest)
    axes.grid(color="#808080", alpha=0.25, linewidth=0.6)


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
    axes.grid(axis="x", color="#808080", alpha=0.25, linewidth=0.6)


def _axis(comparison: Comparison, clock: Clock, logarithmic: bool) -> str:
    size = comparison.usable[0].runs[0].summary["data"]["train"]
    words = {
        "updates": "updates",
        "examples": f"examples seen (an epoch: {size:,}",
        "seconds": "seconds (wall clock",
    }[clock]
    if not logarithmic:
        return words + ")" * ("(" in words)
    return f"{words}; logarithmic)" if "(" in words else f"{words} (logarithmic)"


def save(comparison: Comparison, folder: str | Path) -> None:
    """Write report.html, loss.png, loss.pdf, costs.png, costs.pdf, runs.csv and curves.csv.

    And validation.png and validation.pdf, where the runs were validated.

    Args:
        comparison: Of finished runs.
        folder: Made if it is not there. Each file appears whole or not at all.

    Raises:
        OSError: The folder cannot be written.

    Example:
        >>> from gdtrain.reporting.comparison import Contender, Curve, Run
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
    tags = sorted({t for c in comparison.contenders for r in c.runs for t in r.summary["metrics"]})
    for c in comparison.contenders:
        for run in [*c.runs, *c.lost]:
            row = {"contender": c.name, "variant": run.variant, "seed": run.seed}
            for key in ("batch_size", "updates", "examples_seen", "epochs", "fit_seconds"):
                row[key] = run.summary.get(key)
            row["stop_reason"] = run.summary["stop_reason"]
            row |= {tag: run.summary["metrics"].get(tag) for tag in tags}
            row["noise_scale"] = noise_scale(run)
            reached = (None if run.lost else run.train.reach(comparison.target)) or {}
            row["target"] = comparison.target
            row |= {f"{clock}_to_target": reached.get(clock) for clock in CLOCKS}
            yield {k: None if v != v else v for k, v in row.items()}  # NaN: nothing


def _curve_rows(comparison: Comparison) -> Iterator[dict[str, Any]]:
    for c, part, clock in itertools.product(comparison.usable, _PARTS, CLOCKS):
        for x, middle, low, high in zip(*c.band(clock, part), strict=True):
            yield {
                "contender": c.name,
                "loss": _WHOSE[part],
                "clock": clock,
                "at": float(x),
                "median": float(middle),
                "lowest": float(low),
                "highest": float(high),
            }


def page(comparison: Comparison) -> str:
    """The report: one page that needs nothing beside it, on any width, in light and dark.

    Args:
        comparison: Of finished runs.

    Returns:
        HTML, with the charts inside.

    Example:
        >>> from gdtrain.reporting.comparison import Contender, Curve, Run
        >>> x = np.arange(1.0, 9.0)
        >>> summary = {"variant": "gd", "data": {"train": 9}, "metrics": {}, "epochs": 8,
        ...     "stop_reason": "BUDGET", "updates": 8, "fit_seconds": 1.0, "batch_size": 9}
        >>> curves = [Curve(x, 9 * x, x / 9, c / x) for c in (1, 2)]
        >>> runs = [Run(Path("run"), {}, summary, curve) for curve in curves]
        >>> pair = Comparison([Contender("a", runs[:1]), Contender("b", runs[1:])], target=0.5)
        >>> page(pair).count("<svg")
        6
    """
    seeds = sorted({len(c.runs) for c in comparison.usable})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    band = (
        f"Lines are medians over {count} seeds, bands reach from the lowest to the highest; "
        if seeds[-1] > 1
        else "One seed each, so there are no bands; "
    )
    absent = _paragraphs(comparison.absent(), "li")
    charts: dict[str, str] = {
        part: "".join(
            _chart(
                plot(comparison, clock, part, ink=_INK),
                f"{clock}-{part}",
                _alt(comparison, clock, part),
            )
            for clock in CLOCKS
        )
        for part in (_PARTS if comparison.validated else _PARTS[:1])
    }
    charts |= {
        "costs": "".join(
            _chart(plot_costs(comparison, clock, ink=_INK), f"{clock}-cost", comparison.on(clock))
            for clock in CLOCKS
        ),
    }
    portraits = "".join(
        f"<section><h3>{html.escape(name)}</h3><p>{_text(text)}</p></section>"
        for name, text in comparison.portraits().items()
    )
    return _PAGE.format(
        title=html.escape(comparison.title),
        sentences=_paragraphs(comparison.sentences(), "li"),
        reading=html.escape(
            band + "each contender has a line style and a marker of its own. A point is the "
            "mean over the last quarter of the examples seen, over 32 at least and an epoch at "
            "most; a run that has ended keeps its last loss."
        ),
        loss=charts["train"],
        validation=(
            "<h2>Validation loss on three clocks</h2><p class=reading>Over all held-out examples, "
            f"whenever it was measured.</p><div class=charts>{charts['val']}</div>"
            if "val" in charts
            else ""
        ),
        costs=charts["costs"],
        target=rounded(comparison.target),
        cost_table=_table(comparison.costs()),
        portraits=portraits,
        end_table=_table(comparison.ends()),
        absent=f"<h2>Left out</h2><ul>{absent}</ul>" if absent else "",
        made=_paragraphs(comparison.made, "p") + f"<p>{html.escape(_versions(comparison))}</p>",
    )


def _alt(comparison: Comparison, clock: Clock, part: Part) -> str:
    parts = []
    for c in comparison.usable:
        x, middle, _, _ = c.band(clock, part)
        if not len(x):
            continue
        parts.append(
            f"{c.name} from {rounded(float(middle[0]))} at {rounded(float(x[0]))} to "
            f"{rounded(float(middle[-1]))} at {rounded(float(x[-1]))}"
        )
    return f"{_WHOSE[part].capitalize()} loss against {clock}: {'; '.join(parts)}."


def _versions(comparison: Comparison) -> str:
    runs = [run for c in comparison.usable for run in c.runs]
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, value in (run.summary.get("versions") or {}).items():
            if value != "not installed":
                found.setdefault(name, set()).add(str(value))
    versions = ", ".join(f"{name} {'/'.join(sorted(v))}" for name, v in found.items())
    devices = sorted({str(run.summary.get("device", "cpu")) for run in runs})
    engines = sorted({str(run.summary.get("engine", "eager")) for run in runs})
    return f"Device: {listed(devices)}; engine: {listed(engines)}. Versions: {versions}."


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


def _write_rows(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    every = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(every[0]))
        writer.writeheader()
        writer.writerows(every)


# ---------------------------------------------------------------------- the page


def _text(words: str) -> str:
    """Escaped; a range such as 1–2 is not broken between lines."""
    return html.escape(words).replace("–", "&NoBreak;–&NoBreak;")


def _paragraphs(lines: Sequence[str], tag: str) -> str:
    return "".join(f"<{tag}>{_text(line)}</{tag}>" for line in lines)


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    names = list(rows[0])
    head = "".join(f"<th scope=col>{html.escape(name)}</th>" for name in names)
    body = "".join(
        "<tr>"
        + f"<th scope=row>{html.escape(row[names[0]])}</th>"
        + "".join(
            f'<td data-label="{html.escape(name)}"><span>{_text(row[name])}</span></td>'
            for name in names[1:]
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _chart(figure: Any, name: str, words: str) -> str:
    """A figure as a part of the page: its colours of ink follow the page's."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "gdtrain"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = svg.replace(_INK, "currentColor")
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = re.sub(
        r"<svg[^>]*>",
        lambda _: f'<svg {box.group(0)} role="img" aria-label="{html.escape(words)}">',
        svg,
        count=1,
    )
    return f"<figure>{svg}</figure>"


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de;
  --paper: #ffffff; --card: #f6f8fa; }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e6edf3; --soft: #9da7b1; --line: #3d444d;
  --paper: #0d1117; --card: #161b22; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1rem; max-width: 80rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 1rem; }}
h2 {{ font-size: 1.15rem; margin: 2rem 0 .5rem; }}
p, li {{ max-width: 46rem; }}
ul {{ padding-left: 1.2rem; }}
li {{ margin: .35rem 0; }}
h3 {{ font-size: 1rem; margin: 0 0 .35rem; }}
section p {{ margin: 0; }}
.reading {{ color: var(--soft); font-size: .9rem; }}
.charts, .cards {{ display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }}
figure, section {{ margin: 0; padding: .75rem; background: var(--card);
  border: 1px solid var(--line);
  border-radius: .5rem; }}
svg {{ display: block; width: 100%; max-width: 34rem; height: auto; margin: 0 auto; }}
table {{ border-collapse: collapse; width: 100%; margin: 1rem 0; font-size: .9rem;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; overflow-wrap: normal; }}
th:first-child {{ text-align: left; }}
thead th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; }}
.made p {{ font-size: .9rem; white-space: pre-wrap; max-width: none; }}
@media (max-width: 52rem) {{
  thead {{ display: none; }}
  table, tbody, tr, th, td {{ display: block; text-align: left; overflow-wrap: anywhere; }}
  tr {{ border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0;
    padding: .25rem 0; }}
  tbody th {{ font-size: 1rem; }}
  td {{ display: flex; justify-content: space-between; gap: 1rem; border: 0;
    padding: .2rem .6rem; }}
  td::before {{ content: attr(data-label); color: var(--soft); }}
  td span {{ text-align: right; }}
}}
@media print {{ figure, tr {{ break-inside: avoid; }} }}
</style>
</head>
<body>
<h1>{title}</h1>
<ul>{sentences}</ul>
<h2>Training loss on three clocks</h2>
<p class="reading">{reading}</p>
<div class="charts">{loss}</div>
<h2>What a training loss of {target} costs</h2>
<p class="reading">Marker: median; line: from the lowest to the highest seed;
in the table as median (lowest–highest).</p>
<div class="charts">{costs}</div>
{cost_table}
<h2>What each costs and buys</h2>
<div class="cards">{portraits}</div>
{validation}
<h2>Where they ended</h2>
<p class="reading">Losses and metrics of the last weights, over all examples of a part. Median
(lowest–highest seed).</p>
{end_table}
{absent}
<h2>How this was made</h2>
<div class="made">{made}</div>
</body>
</html>
"""
