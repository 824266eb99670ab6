"""The objective around a run: along random directions, in the plane of its path, or all of it.

θ parameters (P of them, flat), θ* those in the middle of a picture, J the objective with weight
decay. A picture shows J(θ* + αd) or J(θ* + αd + βe) on a grid of α and β. For a model with one or
two parameters the axes are the parameters themselves, and the picture is the whole truth.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from gdtrain.data.reading import read_arrays
from gdtrain.objective import Objective, untouched

__all__ = ["Grid", "Landscape", "Line", "Plane", "Snapshots", "directions", "plane_of", "save"]

_log = logging.getLogger("gdtrain")

_PASS = 64 * 2**20  # bytes that the outputs of the layers may take in one pass
_CHUNK = 2**20  # parameters that are in double precision at once
_LEVELS = 12  # contours, at most
_DPI = 120
_WORTH_SAYING = 5.0  # seconds
_MOST_POINTS = 1000  # of an axis: a million values of J
_MOST_SPAN = 10**6  # lengths of the weights
_TRIALS = 3  # by which the time of the pictures is foretold
_DECADES = 10.0  # ratio of the highest to the lowest value, from which contours are logarithmic
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)


# ---------------------------------------------------------------------- directions


def directions(model: nn.Module, count: int = 2, seed: int = 0) -> list[Tensor]:
    """Random directions, filter by filter as long as the weights.

        d_f ← d_f ‖θ_f‖ / ‖d_f‖,  d ~ N(0, I)

    for each filter f: the weights that lead to one output of a layer (a row of its matrix, a kernel
    of a convolution). Biases, and the parameters of norms, get 0. So a step of α changes each
    filter by α times its length, whatever the scale of the layer, and pictures of different
    networks can be compared.

    Args:
        model: Its trainable parameters count, in their order.
        count: How many, range [1, ∞).
        seed: Of the directions; the numbers are the same on every device.

    Returns:
        `count` flat tensors (P,), of the dtype and on the device of the parameters.

    Raises:
        ValueError: There is no weight, or all weights are 0, so that nothing has a length.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> (d,) = directions(layer, count=1)
        >>> rows = d[:6].view(2, 3)
        >>> torch.allclose(rows.norm(dim=1), layer.weight.norm(dim=1)), d[6:].tolist()
        (True, [0.0, 0.0])

    References:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018,
        arXiv 1712.09913.
    """
    of_norms = {
        id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)
    }
    params = [p for p in model.parameters() if p.requires_grad]
    weights = [p.ndim > 1 and id(p) not in of_norms for p in params]
    if not any(bool(p.any()) for p, is_weight in zip(params, weights, strict=True) if is_weight):
        raise ValueError(
            "Directions are as long as the weights, filter by filter. Received: a model without a "
            "weight other than 0."
        )
    groups = {
        id(m.weight): m.groups
        for m in model.modules()
        if isinstance(m, nn.modules.conv._ConvTransposeNd)
    }
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        parts = []
        for p, is_weight in zip(params, weights, strict=True):
            if not is_weight:
                parts.append(torch.zeros_like(p.detach()).flatten())
                continue
            d = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
            ratio = _filters(p.detach(), groups.get(id(p))) / _filters(d, groups.get(id(p)))
            parts.append((d * ratio).flatten())
        made.append(torch.cat(parts))
    return made


def _filters(weight: Tensor, groups: int | None) -> Tensor:
    """The length of each number's filter, as the weight; `groups` of a transposed convolution.

    Such a one has its inputs first, and then the outputs of a group.
    """
    if groups is None:
        return weight.flatten(1).norm(dim=1).view(-1, *[1] * (weight.ndim - 1)).expand_as(weight)
    parts = weight.unflatten(0, (groups, -1)).flatten(3)  # (G, inputs, outputs, places)
    length = parts.norm(dim=(1, 3), keepdim=True).expand_as(parts)
    return length.reshape(weight.shape)


# ---------------------------------------------------------------------- the path of a run


@dataclass
class Snapshots:
    """Parameters of a run at some of its updates. K snapshots, P parameters.

    Args:
        updates: (K,), ascending: how many updates had been made.
        parameters: (K, P), the trainable parameters, flat, in the model's order.
        names: Of the parameters' tensors; empty: not known.
        sizes: How many numbers each tensor has.

    Example:
        >>> Snapshots(np.array([0, 1]), np.zeros((2, 3), np.float32)).parameters.shape
        (2, 3)
    """

    updates: NDArray[np.int64]
    parameters: NDArray[Any]
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write an `.npz`, all of it or nothing.

        Args:
            path: Of the file; one that is there is replaced.
        """
        path = Path(path)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(
                    file,
                    allow_pickle=False,
                    updates=self.updates,
                    parameters=self.parameters,
                    names=np.asarray(self.names, dtype=np.str_),
                    sizes=np.asarray(self.sizes, dtype=np.int64),
                )
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> Snapshots:
        """Read what `save` wrote.

        Args:
            path: Of the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else, or is damaged.
        """
        try:
            file = read_arrays(path)
            found = cls(
                file["updates"],
                file["parameters"],
                file["names"].tolist(),
                file["sizes"].tolist(),
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} cannot be read as the path of a run ({error}).") from None
        if (
            found.parameters.ndim != 2
            or found.parameters.dtype.kind != "f"
            or found.updates.dtype.kind not in "iu"
            or found.updates.shape != found.parameters.shape[:1]
            or bool((np.diff(found.updates) <= 0).any())
            or file["names"].dtype.kind != "U"
            or file["sizes"].dtype.kind not in "iu"
            or not file["names"].ndim == file["sizes"].ndim == 1
            or len(found.names) != len(found.sizes)
        ):
            raise ValueError(f"{path} cannot be read as the path of a run (of another shape).")
        return found

    def check(self, model: nn.Module, path: str | Path) -> None:
        """Raise where the snapshots are those of another model.

        Args:
            model: Its trainable parameters are compared by name and size.
            path: For the message.

        Raises:
            ValueError: They differ.
        """
        own = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        then = dict(zip(self.names, self.sizes, strict=True))
        if own != then or self.parameters.shape[1] != sum(own.values()):
            raise ValueError(
                f"{path} is the path of another model: expected {sum(own.values()):,} parameters "
                f"in {', '.join(own)}. Received: {self.parameters.shape[1]:,} in "
                f"{', '.join(then)}."
            )

    def until(self, update: int, end: Tensor | None = None) -> Snapshots:
        """Those up to an update, without any that is not finite.

        Args:
            update: The last that counts.
            end: (P,), the parameters after it, which become the last snapshot; None: none does.
        """
        kept = (self.updates <= update) & np.isfinite(self.parameters).all(axis=1)
        updates, parameters = self.updates[kept], self.parameters[kept]
        if end is not None:
            before = updates < update
            parameters = np.vstack([parameters[before], _as(parameters, end.detach())])
            updates = np.append(updates[before], update)
        return Snapshots(updates, parameters, self.names, self.sizes)


@dataclass
class Plane:
    """The plane of a path's two principal components.

    Args:
        first: (P,), of length 1.
        second: (P,), of length 1, orthogonal to the first.
        coordinates: (K, 2), ⟨θ_i − θ*, first⟩ and ⟨θ_i − θ*, second⟩.
        shares: Of the variance of the path, each in [0, 1].

    Example:
        >>> plane = plane_of([[4.0, 0.0, 0.0], [1.0, 1.0, 0.0]], [0.0, 0.0, 0.0])
        >>> round(sum(plane.shares), 6)
        1.0
    """

    first: Tensor
    second: Tensor
    coordinates: NDArray[np.float64]
    shares: tuple[float, float]


def plane_of(path: ArrayLike | Tensor, end: ArrayLike | Tensor) -> Plane:
    """The two principal components of a path, and the path in them.

    They are the first two right singular vectors of the matrix with the rows θ_i − θ*, i = 1 … K,
    and 0 (for θ* itself), less their mean; found from its (K+1, K+1) Gram matrix, so that nothing
    larger than the path itself is made. The start lies to the left of the end.

    Args:
        path: (K, P), points θ_i.
        end: (P,), θ*.

    Returns:
        The plane through θ* that these directions span.

    Raises:
        ValueError: No point differs from the end.

    Example:
        >>> plane = plane_of([[3.0, 0.0, 0.0]], [0.0, 0.0, 0.0])
        >>> plane.coordinates.round(6).tolist()[0][0], plane.shares
        (-3.0, (1.0, 0.0))

    References:
        Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018,
        arXiv 1712.09913, section 7.
    """
    end = torch.as_tensor(end)
    points = torch.as_tensor(path).to(end.device)
    count = len(points)
    chunks = [slice(i, i + _CHUNK) for i in range(0, len(end), _CHUNK)]
    gram = torch.zeros(count + 1, count + 1, dtype=torch.float64)
    for part in chunks:
        d = points[:, part].double() - end[part].double()
        gram[:count, :count] += (d @ d.T).cpu()
    if not gram.diagonal().max() > 0:
        raise ValueError("A plane needs a path. Received: points that are all equal to the end.")
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(centred)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    found: list[Tensor] = []
    for k in range(2):
        # A path on a line, to rounding, has one component.
        if k < len(values) and values[k] > 1e-12 * values[0]:
            u = vectors[:count, k].to(end.device) / values[k].sqrt()
            direction = torch.cat(
                [u @ (points[:, part].double() - end[part].double()) for part in chunks]
            )
        else:
            values[k] = 0.0
            drawn = torch.randn(len(end), generator=torch.Generator().manual_seed(0))
            direction = drawn.to(end.device, torch.float64)
            direction -= (direction @ found[0].double()) * found[0].double()
        direction /= direction.norm()
        found.append(direction.to(end.dtype))
    coordinates = np.zeros((count, 2))
    for part in chunks:
        d = points[:, part].double() - end[part].double()
        for k in range(2):
            coordinates[:, k] += (d @ found[k][part].double()).cpu().numpy()
    for k in range(2):
        furthest = np.abs(coordinates[:, k]).argmax()
        start = coordinates[0, k]
        if (start or coordinates[furthest, k]) > 0:
            coordinates[:, k] *= -1
            found[k] = -found[k]
    total = float(values.sum())
    shares = (float(values[0]) / total, float(values[1]) / total)
    return Plane(found[0], found[1], coordinates, shares)


# ---------------------------------------------------------------------- pictures


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


# ---------------------------------------------------------------------- the objective, moved about


class Landscape:
    """J as a function of flat parameters, on a fixed sample of the training examples.

        J(θ) = (1/B) Σ_{i ∈ sample} ℓ(model(x_i; θ), y_i) + ½ Σ_p λ_p ‖θ_p‖²

    in evaluation mode: BatchNorm uses the statistics that it has, dropout drops nothing.
    Parameters, buffers and the mode are put back after each call. θ* are those at hand.

    Args:
        objective: Whose model, loss and examples these are; one process.
        weight_decay: λ_p, one for each of the objective's parameters, or one for all.
        examples: B, range [1, ∞): as many are drawn without replacement where there are more.
        total: N, for the titles, where the objective has only some of the training examples.
        seed: Of the sample, and of random directions.

    Raises:
        ValueError: An argument is out of range, or the model has nothing to train.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 2.0)
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> landscape = Landscape(Objective(model, SquaredError(), x, 3 * x))
        >>> landscape.value(), landscape.value(torch.tensor([3.0]))
        (1.25, 0.0)
    """

    def __init__(
        self,
        objective: Objective,
        *,
        weight_decay: float | Sequence[float] = 0.0,
        examples: int = 2048,
        total: int | None = None,
        seed: int = 0,
    ) -> None:
        for name, value, least in (("examples", examples, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}. Received: "
                    f"{name}={value!r}."
                )
        self.objective, self.seed = objective, seed
        params = objective.params
        if not params:
            raise ValueError("A landscape needs parameters that train. Received: none.")
        decay = (
            [weight_decay] * len(params) if isinstance(weight_decay, float | int) else weight_decay
        )
        if len(decay) != len(params):
            raise ValueError(
                f"weight_decay must be one number, or one for each of {len(params)} parameters. "
                f"Received: {len(decay)}."
            )
        self.weight_decay = [float(d) for d in decay]
        self.count = sum(p.numel() for p in params)
        here = len(objective.targets)
        self.total = here if total is None else total
        drawn = torch.arange(here)
        if examples < here:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(here, generator=generator)[:examples].sort().values
        self.indices = drawn.to(objective.targets.device)
        self._pass = 0  # examples

    @property
    def said(self) -> str:
        """What J is, for a title."""
        own = len(self.indices)
        which = f"all {own:,}" if own == self.total else f"{own:,} of {self.total:,}"
        decays = sorted({d for d in self.weight_decay if d})
        parts = [f"J over {which} training examples"]
        if decays:
            parts.append(f"weight decay {', '.join(f'{d:g}' for d in decays)}")
        modes = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
        if any(isinstance(m, modes) or "Dropout" in type(m).__name__ for m in self._modules()):
            parts.append("evaluation mode")
        return ", ".join(parts)

    def _modules(self) -> Iterator[nn.Module]:
        return self.objective.model.modules()

    @property
    def position(self) -> Tensor:
        """θ*, a flat copy (P,)."""
        return torch.cat([p.detach().flatten() for p in self.objective.params])

    @staticmethod
    def bytes_needed(parameters: int, itemsize: int) -> int:
        """Memory of the pictures: the model, θ* twice, two directions, two points, and a pass.

        The examples, and the path where there is one, come on top.

        Args:
            parameters: P.
            itemsize: Bytes of each.
        """
        return parameters * 7 * itemsize + _PASS

    @contextmanager
    def _lent(self) -> Iterator[None]:
        """The model in evaluation mode, and put back in the end."""
        model = self.objective.model
        modes = [(m, m.training) for m in model.modules()]
        own = [p.detach().clone() for p in self.objective.params]
        model.eval()
        try:
            with untouched(model), torch.no_grad():
                yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.objective.params, own, strict=True):
                    p.copy_(value)
            for m, training in modes:
                m.training = training

    def _put(self, theta: Tensor) -> None:
        done = 0
        for p in self.objective.params:
            p.copy_(theta[done : done + p.numel()].view(p.shape))
            done += p.numel()

    def _here(self) -> float:
        if not self._pass:
            with untouched(self.objective.model):
                self._pass = self._examples_at_once()
        with untouched(self.objective.model):  # the same random numbers at all points
            return self._mean()

    def _mean(self) -> float:
        total, size = 0.0, self._pass
        while len(self.indices) % size == 1 and 1 < size < len(self.indices):
            size += 1  # normalisation by the pass's own statistics takes no single example
        for part in self.indices.split(size):
            total += float(self.objective.losses(part).double().sum())
        decay = sum(
            0.5 * d * float(p.double().square().sum())
            for d, p in zip(self.weight_decay, self.objective.params, strict=True)
            if d
        )
        return total / len(self.indices) + decay

    def _examples_at_once(self) -> int:
        """As many as the outputs of all layers, and the inputs, take 64 MB for."""
        taken = [0]

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                taken[0] += output.numel() * output.element_size()

        hooks = [m.register_forward_hook(note) for m in self._modules() if not list(m.children())]
        try:
            few = self.indices[:2]
            x = self.objective.inputs[few]
            self.objective.losses(few)
        finally:
            for hook in hooks:
                hook.remove()
        each = (2 * taken[0] + x.numel() * x.element_size()) // len(few)
        return max(min(2, len(few)), _PASS // each)

    def value(self, theta: Tensor | None = None) -> float:
        """J.

        Args:
            theta: (P,); None: θ*.
        """
        with self._lent():
            if theta is not None:
                self._put(theta)
            return self._here()

    def values(self, thetas: Any) -> NDArray[np.float64]:
        """J at several points.

        Args:
            thetas: (K, P).

        Returns:
            (K,).
        """
        with self._lent():
            return np.array([self._at(torch.as_tensor(theta)) for theta in thetas])

    def _at(self, theta: Tensor) -> float:
        self._put(theta)
        return self._here()

    def _along(self, x: NDArray[np.float64], origin: Tensor, d: Tensor) -> NDArray[np.float64]:
        return np.array([self._at(torch.add(origin, d, alpha=float(a))) for a in x])

    # ------------------------------------------------------------------ all pictures

    def pictures(
        self,
        snapshots: Snapshots | None = None,
        *,
        span: float | None = None,
        points: int | None = None,
    ) -> dict[str, Line | Grid]:
        """All that there are of a model.

        Args:
            snapshots: The path of the run, with θ* as its last point; None: not known.
            span: Of random directions, range (0, 10⁶]; None: 1.
            points: Of each axis of a plane, range [3, 1000]; None: 31, of a surface 61.

        Returns:
            "landscape-1d", "landscape-2d" and, with a path, "trajectory"; for one or two parameters
            "surface". By these names.

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        for name, value, most in (("points", points, _MOST_POINTS), ("span", span, _MOST_SPAN)):
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most:,}. Received: {name}={value}.")
        if self.count <= 2:
            return {"surface": self.surface(snapshots, points=61 if points is None else points)}
        span, points = 1.0 if span is None else span, 31 if points is None else points
        _check_grid(span, points)
        self.value()  # warms up
        started = time.perf_counter()
        with self._lent():
            for _ in range(_TRIALS):
                self._here()
        seconds = (time.perf_counter() - started) / _TRIALS
        moves = snapshots is not None and bool(
            (snapshots.parameters != snapshots.parameters[-1:]).any()
        )
        evaluations = points**2 * (2 if moves else 1)
        if evaluations * seconds > _WORTH_SAYING:
            _log.info(
                "landscape: %s values of J, about %.0f s", f"{evaluations:,}", evaluations * seconds
            )
        found: dict[str, Line | Grid] = {
            "landscape-1d": self.slice_1d(span=span, points=2 * (points // 2 * 2) + 1),
            "landscape-2d": self.slice_2d(span=span, points=points),
        }
        if snapshots is not None and moves:
            found["trajectory"] = self.plane(snapshots, points=points)
        return found

    # ------------------------------------------------------------------ slices

    def slice_1d(self, lines: int = 2, *, span: float = 1.0, points: int = 51) -> Line:
        """J(θ* + αd) along random directions, filter-normalised (see `directions`).

        Args:
            lines: How many directions, range [1, 4].
            span: α goes from −span to span, range (0, ∞); 1 is a step as long as the weights.
            points: Values of α, range [3, ∞); an odd number has θ* among them.

        Returns:
            The values, in float64, and the picture.

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        _check_grid(span, points)
        origin, x = self.position, np.linspace(-span, span, points)
        made = directions(self.objective.model, lines, self.seed)
        with self._lent():
            values = np.array([self._along(x, origin, d) for d in made])
        return Line(
            x=x,
            values=values,
            xlabel="α, of θ* + α d (no unit: 1 is a step as long as the weights)",
            labels=[f"direction {i + 1}" for i in range(lines)],
            title=f"The objective along filter-normalised directions\n{self.said}",
        )

    def slice_2d(self, *, span: float = 1.0, points: int = 31) -> Grid:
        """J(θ* + αd + βe) with two random directions, filter-normalised (see `directions`).

        Args:
            span: α and β go from −span to span, range (0, ∞).
            points: Values of each, range [3, ∞); an odd number has θ* among them.

        Returns:
            The values, in float64, and the picture.

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        _check_grid(span, points)
        x = np.linspace(-span, span, points)
        first, second = directions(self.objective.model, 2, self.seed)
        return Grid(
            x=x,
            y=x,
            values=self._on(x, x, self.position, first, second),
            xlabel="α, of θ* + α d₁ + β d₂ (no unit: 1 is as long as the weights)",
            ylabel="β",
            title=f"The objective around the end, filter-normalised\n{self.said}",
        )

    def _on(
        self,
        x: NDArray[np.float64],
        y: NDArray[np.float64],
        origin: Tensor,
        first: Tensor,
        second: Tensor,
    ) -> NDArray[np.float64]:
        with self._lent():
            return np.array(
                [self._along(x, torch.add(origin, second, alpha=float(b)), first) for b in y]
            )

    # ------------------------------------------------------------------ paths

    def plane(self, snapshots: Snapshots, *, points: int = 31, margin: float = 0.25) -> Grid:
        """J in the plane of a path's two principal components through θ*, and the path.

        Args:
            snapshots: The path; the last is θ*, as `Snapshots.until` can see to.
            points: Of each axis, range [3, ∞).
            margin: Room around the path, in units of its extent, range (0, ∞).

        Returns:
            The values, in float64, and the picture. `path_values` are J at the snapshots
            themselves, which lie off the plane by what the two components leave.

        Raises:
            ValueError: An argument is out of range, no snapshot differs from θ*, or the last does.
        """
        _check_grid(margin, points)
        end = self.position
        if not np.array_equal(snapshots.parameters[-1], _as(snapshots.parameters, end)):
            raise ValueError(
                "The last snapshot must be the parameters of the model, which the plane goes "
                "through. Received: others. See Snapshots.until(update, end)."
            )
        found = plane_of(snapshots.parameters[:-1], end)
        path = np.vstack([found.coordinates, np.zeros((1, 2))])
        x, y = (_axis(path[:, k], points, margin, path) for k in range(2))
        along = [
            f"principal component {k + 1} of the path (units of θ; {share:.1%} of its variance)"
            for k, share in enumerate(found.shares)
        ]
        return Grid(
            x=x,
            y=y,
            values=self._on(x, y, end, found.first, found.second),
            path=path,
            path_values=self.values(snapshots.parameters),
            path_updates=snapshots.updates,
            xlabel=along[0],
            ylabel=along[1],
            shares=found.shares,
            title=f"The path of the run in its plane\n{self.said}",
        )

    def surface(
        self,
        snapshots: Snapshots | None = None,
        *,
        points: int = 61,
        box: Sequence[tuple[float, float]] | None = None,
        names: Sequence[str] = (),
    ) -> Line | Grid:
        """J of a model with one or two parameters, all of it that the run has come by.

        Args:
            snapshots: The path; None: θ* alone.
            points: Of each axis, range [3, ∞).
            box: The lowest and highest value of each parameter; None: what holds the start, the
                minimum, and the path as far as three times the start's distance from the minimum.
            names: Of the parameters, for the axes.

        Returns:
            The values, in float64, the path, the minimum if there is one, and the picture.

        Raises:
            ValueError: The model has more than two parameters, or an argument is out of range.
        """
        if self.count > 2:
            raise ValueError(
                f"A surface has one or two parameters as its axes. Received: a model with "
                f"{self.count:,}. slice_2d and plane show more."
            )
        _check_grid(1.0, points)
        end = self.position.double().cpu().numpy()
        path = end[None] if snapshots is None else snapshots.parameters.astype(np.float64)
        updates = np.zeros(1, np.int64) if snapshots is None else snapshots.updates
        minimum = self.minimum()
        shown = path if minimum is None else _near(path, minimum)
        if box is None:
            axes = [_axis(shown[:, k], points, 0.25, shown) for k in range(self.count)]
        else:
            axes = [np.linspace(low, high, points) for low, high in box]
        origin = torch.zeros_like(self.position)
        units = torch.eye(self.count).to(origin)
        common: dict[str, Any] = {
            "path": path,
            "path_values": self.values(torch.from_numpy(path)),
            "path_updates": updates,
            "minimum": minimum,
        }
        labels = [f"parameter {n}" for n in names or self._names()]
        if self.count == 1:
            with self._lent():
                values = self._along(axes[0], origin, units[0])[None]
            title = f"The exact surface and the path of the run\n{self.said}"
            return Line(x=axes[0], values=values, xlabel=labels[0], title=title, **common)
        return Grid(
            x=axes[0],
            y=axes[1],
            values=self._on(axes[0], axes[1], origin, units[0], units[1]),
            xlabel=labels[0],
            ylabel=labels[1],
            title=f"The exact surface and the path of the run\n{self.said}",
            **common,
        )

    def _names(self) -> list[str]:
        """Of each single parameter, such as linear.weight[0, 1]."""
        owned = {id(p) for p in self.objective.params}
        names = []
        for name, p in self.objective.model.named_parameters():
            if id(p) in owned:
                for place in np.ndindex(*p.shape):
                    where = f"[{', '.join(map(str, place))}]" if p.numel() > 1 else ""
                    names.append(f"{name}{where}")
        return names

    def minimum(self) -> NDArray[np.float64] | None:
        """Where J is least, found from θ* by L-BFGS; for one or two parameters.

        Returns:
            (P,); None where the search did not end at a point that Newton's step would leave by
            less than a thousandth of the way there: J is flat, has a kink, or falls for ever.

        Raises:
            ValueError: The model has more than two parameters.
        """
        if self.count > 2:
            raise ValueError(f"Expected one or two parameters. Received: {self.count:,}.")
        params, start = self.objective.params, self.position.double()
        with self._lent(), torch.enable_grad():
            search = torch.optim.LBFGS(
                params,
                max_iter=500,
                tolerance_grad=1e-12,
                tolerance_change=1e-15,
                line_search_fn="strong_wolfe",
            )

            def closure() -> float:
                value, gradient = self._value_and_gradient()
                for p, g in zip(params, gradient, strict=True):
                    p.grad = g
                return value

            grads = [p.grad for p in params]
            try:
                search.step(closure)
            finally:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
            found = self.position.double()
            gradient = torch.cat([g.flatten() for g in self._value_and_gradient()[1]]).double()
            hessian = torch.stack([self._hessian_column(k) for k in range(self.count)]).double()
        numbers = torch.cat([found, gradient, hessian.flatten()])
        if not bool(torch.isfinite(numbers).all()):
            return None
        curvatures = torch.linalg.eigvalsh((hessian + hessian.T) / 2)
        if not float(curvatures[0]) > 1e-12 * max(float(curvatures[-1]), 1e-300):
            return None
        left = float(torch.linalg.solve(hessian, gradient).norm())
        way = float((found - start).norm())
        if left > 1e-3 * max(way, 1e-3 * max(1.0, float(found.norm()))):
            return None
        return found.cpu().numpy()

    def _value_and_gradient(self) -> tuple[float, list[Tensor]]:
        value, made = self.objective.value_and_grad(self.indices)
        total, gradient = float(value), []
        for p, g, decay in zip(self.objective.params, made, self.weight_decay, strict=True):
            held = p.detach()
            gradient.append((torch.zeros_like(held) if g is None else g) + decay * held)
            total += 0.5 * decay * float(held.square().sum())
        return total, gradient

    def _hessian_column(self, k: int) -> Tensor:
        unit = torch.zeros_like(self.position)
        unit[k] = 1.0
        params = self.objective.params
        parts = unit.split([p.numel() for p in params])
        v = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]
        try:
            product = self.objective.hessian_vector(self.indices, v)
        except ValueError:  # a kink has none
            return torch.full_like(unit, math.nan)
        return torch.cat(
            [(h + d * w).flatten() for h, d, w in zip(product, self.weight_decay, v, strict=True)]
        )


def save(pictures: Mapping[str, Line | Grid], folder: str | Path, update: int = 0) -> None:
    """Write `<name>.png`, all numbers as `landscape.npz`, and the PNGs as TensorBoard's images.

    Args:
        pictures: By name.
        folder: Made if it is not there.
        update: Step of the images.

    Example:
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


def _check_grid(span: float, points: int) -> None:
    if isinstance(span, bool) or not isinstance(span, int | float) or not 0 < span < math.inf:
        raise ValueError(f"span must be finite and > 0. Received: span={span!r}.")
    if isinstance(points, bool) or not isinstance(points, int) or points < 3:
        raise ValueError(
            f"points must be a whole number of at least 3. Received: points={points!r}."
        )


def _as(like: NDArray[Any], theta: Tensor) -> NDArray[Any]:
    return theta.to("cpu", torch.float64).numpy().astype(like.dtype)


def _near(path: NDArray[np.float64], minimum: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points that a picture must hold: of a run that has left, not those far outside."""
    distance = np.linalg.norm(path - minimum, axis=1)
    return np.vstack([path[distance <= 3 * distance[0]], minimum])


def _axis(
    values: NDArray[np.float64], points: int, margin: float, all_values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """An axis that holds the values and some room; as wide as a fifth of the widest at least."""
    low, high = float(values.min()), float(values.max())
    widest = float(np.ptp(all_values, axis=0).max())
    if widest == 0:
        widest = max(1.0, float(np.abs(all_values).max()))
    width = max(high - low, 0.2 * widest)
    middle = (low + high) / 2
    half = width * (0.5 + margin)
    return np.linspace(middle - half, middle + half, points)
