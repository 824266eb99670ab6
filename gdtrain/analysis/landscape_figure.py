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


@dataclass
class _Picture:
    """What all pictures have."""

    title: str = ""
    path: NDArray[np.float64] | None = None
    path_values: NDArray[np.float64] | None = None
    path_updates: NDArray[np.int64] | None = None
    minimum: NDArray[np.float64] | None = None

    def numbers(self) -> dict[str, NDArray[Any]]:
        """All arrays, by name."""
        return {
            name: np.asarray(value)
            for name, value in vars(self).items()
            if isinstance(value, np.ndarray | tuple)
        }

    def plot(self) -> Any:
        """The picture.

        Returns:
            A matplotlib figure; `.savefig(path)` keeps it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 5.2), layout="constrained")
        self.draw(figure.subplots())
        return figure

    def draw(self, axes: Any) -> None:
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


@dataclass
class Line(_Picture):
    """J along lines. A points each, R lines.

    Args:
        title: Of the picture.
        path: (K, 1), points of the run on the line; None: none.
        path_values: (K,), J there.
        path_updates: (K,), after how many updates.
        minimum: (1,), where J is least; None: not known.
        x: (A,), the coordinate.
        values: (R, A), J.
        xlabel: What the coordinate is.
        labels: Of the R lines; empty: one that needs none.

    Example:
        >>> line = Line(x=np.array([-1.0, 0.0, 1.0]), values=np.array([[1.0, 0.0, 1.0]]))
        >>> line.plot().axes[0].get_ylabel()
        'objective J'
    """

    x: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    xlabel: str = "α"
    labels: list[str] = field(default_factory=list)

    def draw(self, axes: Any) -> None:
        """Draw into axes that are there.

        Args:
            axes: Of matplotlib.
        """
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
        if self.path is not None and self.path_values is not None and len(self.path):
            self._marks(axes, self.path[:, 0], self.path_values)
        elif self.minimum is None:
            axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set(
            xlabel=self.xlabel,
            ylabel="objective J",
            title=self.title,
            xlim=(self.x.min(), self.x.max()),
        )
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)


@dataclass
class Grid(_Picture):
    """J on a plane. A by B points.

    Args:
        title: Of the picture.
        path: (K, 2), points of the run in the plane; None: none.
        path_values: (K,), J at the run's points, which may lie off the plane.
        path_updates: (K,), after how many updates.
        minimum: (2,), where J is least; None: not known.
        x: (A,), coordinates.
        y: (B,), coordinates.
        values: (B, A), J.
        xlabel: What x is.
        ylabel: What y is.
        shares: Of the path's variance that the axes have; None: no components.

    Example:
        >>> x = np.linspace(-1, 1, 5)
        >>> grid = Grid(x=x, y=x, values=x[None] ** 2 + x[:, None] ** 2)
        >>> grid.levels()[:3].round(6).tolist()
        [0.2, 0.4, 0.6]
    """

    x: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    y: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    values: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    xlabel: str = "α"
    ylabel: str = "β"
    shares: tuple[float, float] | None = None

    def levels(self) -> NDArray[np.float64]:
        """The contours: round numbers, logarithmic where J spans more than a decade.

        Returns:
            Ascending; none where J is constant.
        """
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
        """Draw into axes that are there.

        Args:
            axes: Of matplotlib.
        """
        shown = np.ma.masked_invalid(self.values)
        levels = self.levels()
        if len(levels):
            from matplotlib.colors import LogNorm, Normalize

            low, high = _range(self.values)
            logarithmic = low > 0 and high / low >= _DECADES
            norm = LogNorm(max(low, 1e-6 * high), high) if logarithmic else Normalize(low, high)
            dx, dy = self.x[1] - self.x[0], self.y[1] - self.y[0]
            axes.imshow(
                shown,
                cmap="cividis",
                norm=norm,
                alpha=0.55,
                origin="lower",
                aspect="auto",
                interpolation="bilinear",
                extent=(
                    self.x[0] - dx / 2,
                    self.x[-1] + dx / 2,
                    self.y[0] - dy / 2,
                    self.y[-1] + dy / 2,
                ),
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
        if self.path is not None and len(self.path):
            self._marks(axes, self.path[:, 0], self.path[:, 1])
        elif self.minimum is None:
            axes.plot(
                0, 0, "*", color="#d55e00", markeredgecolor="black", markersize=15, label="end"
            )
        axes.set(
            xlabel=self.xlabel,
            ylabel=self.ylabel,
            title=self.title,
            xlim=(self.x.min(), self.x.max()),
            ylim=(self.y.min(), self.y.max()),
        )
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8, framealpha=0.9)


def _range(values: NDArray[np.float64]) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)


def save(pictures: Mapping[str, Line | Grid], folder: str | Path, update: int = 0) -> None:
    """Write `<name>.png`, all numbers as `landscape.npz`, and the PNGs as TensorBoard's images.

    Args:
        pictures: By name.
        folder: Made if it is not there.
        update: Step of the images.

    Example:
        >>> import tempfile
        >>> line = Line(x=np.array([-1.0, 0.0, 1.0]), values=np.array([[1.0, 0.0, 1.0]]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"line": line}, folder)
        ...     np.load(Path(folder) / "landscape.npz")["line/values"].tolist()
        [[1.0, 0.0, 1.0]]
    """
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
