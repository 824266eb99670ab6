"""Pictures of the objective: along lines and on planes, with the path of a run drawn in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Grid", "Line", "save"]

_LEVELS = 12  # contours, at most
_DPI = 120
_DECADES = 10.0  # ratio of the highest to the lowest value, from which contours are logarithmic


@dataclass(kw_only=True)
class _Picture:
    """What all pictures have: values of J, the path of a run among them, and where J is least."""

    x: NDArray[np.float64]  # (A,), coordinates
    values: NDArray[np.float64]  # J, see below
    title: str = ""
    xlabel: str = "α"
    path: NDArray[np.float64] | None = None  # (K, axes), points of the run
    path_values: NDArray[np.float64] | None = None  # (K,), J there; it may lie off a plane
    path_updates: NDArray[np.int64] | None = None  # (K,), after how many updates
    minimum: NDArray[np.float64] | None = None  # (axes,)

    def numbers(self) -> dict[str, NDArray[Any]]:
        """All arrays, by name."""
        return {
            name: np.asarray(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray | tuple)
        }

    def plot(self) -> Any:
        """The picture, as a figure of matplotlib's."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        self.draw(figure.subplots())
        return figure

    def draw(self, axes: Any) -> None:
        """Draw into axes of matplotlib's that are there."""
        raise NotImplementedError

    def _marks(self, axes: Any, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """The path, its start and its end."""
        updates = np.arange(len(x)) if self.path_updates is None else self.path_updates
        same = {"markeredgecolor": "black", "linestyle": "none", "zorder": 4}
        if len(x) > 1:
            label = "path, each update a point"
            if int(np.diff(updates).max()) > 1:
                label = f"path, {len(x)} of {int(updates[-1]) + 1:,} points"
            axes.plot(x, y, "-o", color="black", linewidth=1.0, markersize=3, label=label)
            name = f"start (update {int(updates[0]):,})"
            axes.plot(x[0], y[0], "s", color="white", markersize=9, label=name, **same)
        name = f"end (update {int(updates[-1]):,})"
        axes.plot(x[-1], y[-1], "*", color="#d55e00", markersize=15, label=name, **same)

    def _frame(self, axes: Any, **options: Any) -> None:
        """Words and bounds, and a legend where there is something to tell apart."""
        bounds = (self.x.min(), self.x.max())
        axes.set(xlabel=self.xlabel, title=self.title, xlim=bounds, **options)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, framealpha=0.9)


@dataclass(kw_only=True)
class Line(_Picture):
    """J along R lines; its values are (R, A)."""

    labels: list[str] = field(default_factory=list)  # of the lines; empty: one that needs none

    def draw(self, axes: Any) -> None:
        """Draw into axes of matplotlib's that are there."""
        styles = ("-", "--", "-.", ":")
        colors = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
        shown = np.where(np.isfinite(self.values), self.values, np.nan)
        for i, row in enumerate(shown):
            label = self.labels[i] if self.labels else None
            axes.plot(self.x, row, styles[i % 4], color=colors[i % 4], linewidth=1.8, label=label)
        low, high = _range(shown)
        if low > 0 and high / low > 100:
            axes.set_yscale("log")
            room = (high / low) ** 0.06
            axes.set_ylim(low / room, high * room)
        else:
            room = 0.06 * (high - low) or 1.0
            axes.set_ylim(low - room, high + room)
        if self.minimum is not None:
            axes.axvline(
                self.minimum[0], color="0.4", linewidth=1, linestyle=":", label="minimum", zorder=0
            )
        if self.path is not None and self.path_values is not None:
            self._marks(axes, self.path[:, 0], self.path_values)
        elif self.minimum is None:
            axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        self._frame(axes, ylabel="objective J")


@dataclass(kw_only=True)
class Grid(_Picture):
    """J on a plane; its values are (B, A)."""

    y: NDArray[np.float64]  # (B,), coordinates
    ylabel: str = "β"
    shares: tuple[float, float] | None = None  # of the path's variance that the axes have

    def levels(self) -> NDArray[np.float64]:
        """The contours: round numbers, logarithmic where J spans more than a decade."""
        low, high = _range(self.values)
        if not high > low:
            return np.zeros(0)
        if low > 0 and high / low >= _DECADES:
            for steps in ((1, 2, 5), (1, 3), (1,)):
                first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
                round_numbers = [s * 10.0**k for k in range(first, last + 1) for s in steps]
                inside = [float(f"{v:.1g}") for v in round_numbers if low < v < high]
                if len(inside) <= _LEVELS:
                    return np.asarray(inside)
            return np.asarray(inside[:: -(-len(inside) // _LEVELS)])
        from matplotlib.ticker import MaxNLocator

        locator = MaxNLocator(_LEVELS, steps=[1, 2, 2.5, 5, 10])
        ticks = np.asarray(locator.tick_values(low, high), dtype=np.float64)
        return ticks[(low < ticks) & (ticks < high)]

    def draw(self, axes: Any) -> None:
        """Draw into axes of matplotlib's that are there."""
        shown = np.ma.masked_invalid(self.values)
        levels = self.levels()
        if len(levels):
            from matplotlib.colors import LogNorm, Normalize

            low, high = _range(self.values)
            logarithmic = low > 0 and high / low >= _DECADES
            norm = LogNorm(max(low, 1e-6 * high), high) if logarithmic else Normalize(low, high)
            axes.imshow(
                shown,
                cmap="cividis",
                norm=norm,
                alpha=0.55,
                origin="lower",
                aspect="auto",
                interpolation="bilinear",
                extent=(*_edges(self.x), *_edges(self.y)),
            )
            lines = axes.contour(self.x, self.y, shown, levels, colors="0.15", linewidths=0.7)
            axes.clabel(lines, fontsize=7, fmt="%.4g")
        if self.minimum is not None:
            from matplotlib.patheffects import Normal, Stroke

            axes.plot(
                *self.minimum,
                "x",
                color="white",
                markeredgewidth=2.5,
                markersize=8,
                path_effects=[Stroke(linewidth=4.5, foreground="black"), Normal()],
                linestyle="none",
                label="minimum",
                zorder=5,
            )
        if self.path is not None:
            self._marks(axes, self.path[:, 0], self.path[:, 1])
        elif self.minimum is None:
            axes.plot(
                0, 0, "*", color="#d55e00", markeredgecolor="black", markersize=15, label="end"
            )
        self._frame(axes, ylabel=self.ylabel, ylim=(self.y.min(), self.y.max()))


def _edges(x: NDArray[np.float64]) -> tuple[float, float]:
    """Of the cells around evenly spaced points."""
    half = (x[1] - x[0]) / 2
    return x[0] - half, x[-1] + half


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def save(pictures: Mapping[str, Line | Grid], folder: str | Path, update: int = 0) -> None:
    """Write `<name>.png`, all numbers as `landscape.npz`, and the PNGs as TensorBoard's images."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard import SummaryWriter

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, Any] = {}
    with SummaryWriter(str(path)) as writer:
        for name, picture in pictures.items():
            figure = picture.plot()
            figure.savefig(path / f"{name}.png", dpi=_DPI)
            width, height = (round(float(inches) * _DPI) for inches in figure.get_size_inches())
            image = Summary.Image(
                height=height,
                width=width,
                colorspace=4,
                encoded_image_string=(path / f"{name}.png").read_bytes(),
            )
            entry = Summary.Value(tag=f"landscape/{name}", image=image)
            writer.file_writer.add_summary(Summary(value=[entry]), update)
            numbers |= {f"{name}/{key}": value for key, value in picture.numbers().items()}
    np.savez_compressed(path / "landscape.npz", allow_pickle=False, **numbers)
