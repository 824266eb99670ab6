"""The objective around a run: along random directions, and in the plane of its path.

θ parameters (P of them, flat), θ* those in the middle of a picture, J the objective with weight
decay. A picture shows J(θ* + αd) or J(θ* + αd + βe) on a grid of α and β. For a model with one or
two parameters, `gdtrain.analysis.surface` shows the whole truth.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gdtrain._compat.torch_modules import (
    BATCH_NORMS,
    DROPOUTS,
    NORMS,
    TRANSPOSED_CONVOLUTIONS,
)
from gdtrain.analysis.landscape_figure import Grid, Line
from gdtrain.analysis.trajectory import Snapshots, as_snapshot, plane_of
from gdtrain.descent.trial import staying
from gdtrain.objective import Objective, evaluating, untouched
from gdtrain.penalised import penalty
from gdtrain.ranges import Interval, Whole

__all__ = ["POINTS", "SPAN", "Landscape", "axis_around", "directions"]

_log = logging.getLogger("gdtrain")

SPAN = Interval(0, 10**6, closed="right")  # lengths of the weights
POINTS = Whole(3, 1000)  # of an axis: a million values of J
_AXIS = Whole(3)  # points of an axis that a user draws
_PASS = 64 * 2**20  # bytes that the outputs of the layers may take in one pass
_WORTH_SAYING = 5.0  # seconds
_TRIALS = 3  # by which the time of the pictures is foretold


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
        id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    params = [p for p in model.parameters() if p.requires_grad]
    weights = [p.ndim > 1 and id(p) not in of_norms for p in params]
    if not any(bool(p.any()) for p, is_weight in zip(params, weights, strict=True) if is_weight):
        raise ValueError(
            "Directions are as long as the weights, filter by filter. Received: a model without a "
            "weight other than 0."
        )
    groups = {
        id(m.weight): m.groups for m in model.modules() if isinstance(m, TRANSPOSED_CONVOLUTIONS)
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
        Whole(1).check("examples", examples)
        Whole(0).check("seed", seed)
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
        layers = [*self.objective.model.modules()]
        kinds = (BATCH_NORMS, DROPOUTS)
        if any(isinstance(m, kinds) or "Dropout" in type(m).__name__ for m in layers):
            parts.append("evaluation mode")
        return ", ".join(parts)

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
    def _trial(self) -> Iterator[None]:
        """The model in evaluation mode; in the end parameters, buffers and modes are as before."""
        model = self.objective.model
        with staying(self.objective.params), evaluating(model), untouched(model), torch.no_grad():
            yield

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
        return total / len(self.indices) + penalty(self.objective.params, self.weight_decay)

    def _examples_at_once(self) -> int:
        """As many as the outputs of all layers, and the inputs, take 64 MB for."""
        taken = [0]

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                taken[0] += output.numel() * output.element_size()

        layers = [m for m in self.objective.model.modules() if not list(m.children())]
        hooks = [m.register_forward_hook(note) for m in layers]
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
        with self._trial():
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
        with self._trial():
            return np.array([self._at(torch.as_tensor(theta)) for theta in thetas])

    def _at(self, theta: Tensor) -> float:
        self._put(theta)
        return self._here()

    def _along(self, x: NDArray[np.float64], origin: Tensor, d: Tensor) -> NDArray[np.float64]:
        return np.array([self._at(torch.add(origin, d, alpha=float(a))) for a in x])

    def slice_1d(self, lines: int = 2, *, span: float = 1.0, points: int = 51) -> Line:
        """J(θ* + αd) along random directions, filter-normalised (see `directions`).

        Args:
            lines: How many directions, range [1, 4].
            span: α goes from −span to span, range (0, 10⁶]; 1 is a step as long as the weights.
            points: Values of α, range [3, ∞); an odd number has θ* among them.

        Returns:
            The values, in float64, and the picture.

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        SPAN.check("span", span)
        _AXIS.check("points", points)
        origin, x = self.position, np.linspace(-span, span, points)
        made = directions(self.objective.model, lines, self.seed)
        with self._trial():
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
            span: α and β go from −span to span, range (0, 10⁶].
            points: Values of each, range [3, ∞); an odd number has θ* among them.

        Returns:
            The values, in float64, and the picture.

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        SPAN.check("span", span)
        _AXIS.check("points", points)
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
        with self._trial():
            return np.array(
                [self._along(x, torch.add(origin, second, alpha=float(b)), first) for b in y]
            )

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
        Interval(0, math.inf).check("margin", margin)
        _AXIS.check("points", points)
        end = self.position
        if not np.array_equal(snapshots.parameters[-1], as_snapshot(snapshots.parameters, end)):
            raise ValueError(
                "The last snapshot must be the parameters of the model, which the plane goes "
                "through. Received: others. See Snapshots.until(update, end)."
            )
        found = plane_of(snapshots.parameters[:-1], end)
        path = np.vstack([found.coordinates, np.zeros((1, 2))])
        x, y = (axis_around(path[:, k], points, margin, path) for k in range(2))
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

    def pictures(
        self,
        snapshots: Snapshots | None = None,
        *,
        span: float | None = None,
        points: int | None = None,
    ) -> Mapping[str, Line | Grid]:
        """All that there are of a model.

        Args:
            snapshots: The path of the run, with θ* as its last point; None: not known.
            span: Of random directions, range (0, 10⁶]; None: 1.
            points: Of each axis of a plane, range [3, 1000]; None: 31.

        Returns:
            "landscape-1d", "landscape-2d" and, with a path that moves, "trajectory".

        Raises:
            ValueError: An argument is out of range, or all weights are 0.
        """
        span, points = 1.0 if span is None else span, 31 if points is None else points
        SPAN.check("span", span)
        POINTS.check("points", points)
        self.value()  # warms up
        started = time.perf_counter()
        with self._trial():
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


def axis_around(
    values: NDArray[np.float64], points: int, margin: float, all_values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """An axis that holds the values and some room; as wide as a fifth of the widest at least.

    Args:
        values: (K,), along this axis.
        points: Of it.
        margin: Room on either side, in units of its width.
        all_values: (K, A), along all axes.

    Returns:
        (points,).

    Example:
        >>> axis_around(np.array([0.0, 2.0]), 3, 0.5, np.array([[0.0], [2.0]])).tolist()
        [-1.0, 1.0, 3.0]
    """
    low, high = float(values.min()), float(values.max())
    widest = float(np.ptp(all_values, axis=0).max())
    if widest == 0:
        widest = max(1.0, float(np.abs(all_values).max()))
    width = max(high - low, 0.2 * widest)
    middle = (low + high) / 2
    half = width * (0.5 + margin)
    return np.linspace(middle - half, middle + half, points)
