"""The objective around a run: along random directions, and in the plane of its path.

θ parameters (P of them, flat), θ* those in the middle of a picture, J the objective with weight
decay. A picture shows J(θ* + αd) or J(θ* + αd + βe) on a grid of α and β. For a model with one or
two parameters, `Surface` shows the whole truth.
"""

from __future__ import annotations

import logging
import math
import timeit
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
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
from gdtrain.analysis.gradients import apart, flat
from gdtrain.analysis.landscape_figure import Grid, Line
from gdtrain.analysis.trajectory import Snapshots, as_snapshot, plane_of
from gdtrain.descent.trial import staying
from gdtrain.objective import Objective, evaluating, untouched
from gdtrain.penalised import penalty, with_decay
from gdtrain.ranges import Interval, Whole

__all__ = ["Landscape", "Surface", "directions"]

_log = logging.getLogger("gdtrain")

_SPAN = Interval(0, 10**6, closed="right")  # lengths of the weights
_POINTS = Whole(3, 1000)  # of an axis: a million values of J
_AXIS = Whole(3)  # points of an axis that a user draws
_PASS = 64 * 2**20  # bytes that the outputs of the layers may take in one pass
_WORTH_SAYING = 5.0  # seconds


@torch.no_grad()
def directions(model: nn.Module, count: int = 2, seed: int = 0) -> list[Tensor]:
    """Random directions (P,), filter by filter as long as the weights; the same on every device.

        d_f ← d_f ‖θ_f‖ / ‖d_f‖,  d ~ N(0, I)

    for each filter f: the weights that lead to one output of a layer (a row of its matrix, a kernel
    of a convolution). Biases, and the parameters of norms, get 0. So a step of α changes each
    filter by α times its length, whatever the scale of the layer, and pictures of different
    networks can be compared.

    Li, Xu, Taylor, Studer and Goldstein, Visualizing the loss landscape of neural nets, 2018,
    arXiv 1712.09913.
    """
    of_norms = {
        p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)
    }
    params = [p for p in model.parameters() if p.requires_grad]
    weights = {p for p in params if p.ndim > 1} - of_norms
    if not any(bool(p.any()) for p in weights):
        raise ValueError(
            "Directions are as long as the weights, filter by filter. Received: a model without a "
            "weight other than 0."
        )
    transposed = [m for m in model.modules() if isinstance(m, TRANSPOSED_CONVOLUTIONS)]
    groups: dict[Tensor, int] = {m.weight: m.groups for m in transposed}
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        parts = []
        for p in params:
            d = torch.zeros_like(p)
            if p in weights:
                d = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                d = d * (_lengths(p, groups.get(p)) / _lengths(d, groups.get(p)))
            parts.append(d)
        made.append(flat(parts))
    return made


def _lengths(weight: Tensor, groups: int | None) -> Tensor:
    """Of the filters, to be multiplied with the weight; `groups` of a transposed convolution.

    Such a one has its inputs first, and then the outputs of a group.
    """
    if groups is None:
        return torch.linalg.vector_norm(weight, dim=[*range(1, weight.ndim)], keepdim=True)
    parts = weight.unflatten(0, (groups, -1)).flatten(3)  # (G, inputs, outputs, places)
    return parts.norm(dim=(1, 3), keepdim=True).expand_as(parts).reshape(weight.shape)


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
        decays = (
            weight_decay if isinstance(weight_decay, Sequence) else [weight_decay] * len(params)
        )
        if len(decays) != len(params):
            raise ValueError(
                f"weight_decay must be one number, or one for each of {len(params)} parameters. "
                f"Received: {len(decays)}."
            )
        self.weight_decay = [float(d) for d in decays]
        self.count = sum(p.numel() for p in params)
        here = len(objective.targets)
        self.total = here if total is None else total
        drawn = torch.arange(here)
        if examples < here:
            generator = torch.Generator().manual_seed(seed)
            drawn = torch.randperm(here, generator=generator)[:examples].sort().values
        self.indices = drawn.to(objective.targets.device)

    @property
    def said(self) -> str:
        """What J is, for a title."""
        own = len(self.indices)
        which = f"all {own:,}" if own == self.total else f"{own:,} of {self.total:,}"
        decays = sorted({d for d in self.weight_decay if d})
        parts = [f"J over {which} training examples"]
        if decays:
            parts.append(f"weight decay {', '.join(f'{d:g}' for d in decays)}")
        kinds = (BATCH_NORMS, DROPOUTS)
        layers = self.objective.model.modules()
        if any(isinstance(m, kinds) or "Dropout" in type(m).__name__ for m in layers):
            parts.append("evaluation mode")
        return ", ".join(parts)

    @property
    def position(self) -> Tensor:
        """θ*, a flat copy (P,)."""
        return flat([p.detach() for p in self.objective.params])

    @staticmethod
    def bytes_needed(parameters: int, itemsize: int) -> int:
        """Memory of the pictures: the model, θ* twice, two directions, two points, and a pass.

        The examples, and the path where there is one, come on top.
        """
        return parameters * 7 * itemsize + _PASS

    def value(self, theta: Tensor | None = None) -> float:
        """J at θ, flat (P,); None: at θ*."""
        return float(self.values([self.position if theta is None else theta])[0])

    def values(self, thetas: Any) -> NDArray[np.float64]:
        """J at several points, (K, P)."""
        with self._trial():
            return np.array([self._at(torch.as_tensor(theta)) for theta in thetas])

    def slice_1d(self, lines: int = 2, *, span: float = 1.0, points: int = 51) -> Line:
        """J(θ* + αd) along 1 to 4 random directions, filter-normalised (see `directions`).

        α has `points` values, range [3, ∞), from −`span` to `span`, range (0, 10⁶]: 1 is a step as
        long as the weights. An odd number has θ* among them.
        """
        x, origin = _axis(span, points), self.position
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
        """J(θ* + αd + βe) with two random directions; α and β as in `slice_1d`."""
        x = _axis(span, points)
        first, second = directions(self.objective.model, 2, self.seed)
        return Grid(
            x=x,
            y=x,
            values=self._on(x, x, self.position, first, second),
            xlabel="α, of θ* + α d₁ + β d₂ (no unit: 1 is as long as the weights)",
            ylabel="β",
            title=f"The objective around the end, filter-normalised\n{self.said}",
        )

    def plane(self, snapshots: Snapshots, *, points: int = 31, margin: float = 0.25) -> Grid:
        """J in the plane of a path's two principal components through θ*, and the path.

        Its last point must be θ*, as `Snapshots.until` can see to. `margin` is the room around it,
        in units of its extent. `path_values` are J at the snapshots themselves, which lie off the
        plane by what the two components leave.
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
        x, y = (_axis_around(path[:, k], points, margin, path) for k in range(2))
        xlabel, ylabel = (
            f"principal component {k + 1} of the path (units of θ; {share:.1%} of its variance)"
            for k, share in enumerate(found.shares)
        )
        return Grid(
            x=x,
            y=y,
            values=self._on(x, y, end, found.first, found.second),
            path=path,
            path_values=self.values(snapshots.parameters),
            path_updates=snapshots.updates,
            xlabel=xlabel,
            ylabel=ylabel,
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
        """All that there are of a model: "landscape-1d", "landscape-2d" and "trajectory".

        The last where the path of the run moves; it ends at θ*. `span` is of random directions
        (None: 1), `points` of each axis of a plane, range [3, 1000] (None: 31).
        """
        span = 1.0 if span is None else span
        points = _POINTS.check("points", 31 if points is None else points)
        moves = snapshots is not None and bool(
            (snapshots.parameters != snapshots.parameters[-1:]).any()
        )
        evaluations = points**2 * (2 if moves else 1)
        seconds = evaluations * min(timeit.repeat(self.value, number=1, repeat=3))
        if seconds > _WORTH_SAYING:
            _log.info("landscape: %s values of J, about %.0f s", f"{evaluations:,}", seconds)
        found: dict[str, Line | Grid] = {
            "landscape-1d": self.slice_1d(span=span, points=2 * (points // 2 * 2) + 1),
            "landscape-2d": self.slice_2d(span=span, points=points),
        }
        if snapshots is not None and moves:
            found["trajectory"] = self.plane(snapshots, points=points)
        return found

    @contextmanager
    def _trial(self) -> Iterator[None]:
        """The model in evaluation mode; in the end parameters, buffers and modes are as before."""
        model = self.objective.model
        with staying(self.objective.params), evaluating(model), untouched(model), torch.no_grad():
            yield

    def _at(self, theta: Tensor) -> float:
        """J, within a trial."""
        params = self.objective.params
        for p, part in zip(params, apart(theta, params), strict=True):
            p.copy_(part)
        total, size = 0.0, self._pass
        while len(self.indices) % size == 1 and 1 < size < len(self.indices):
            size += 1  # normalisation by the pass's own statistics takes no single example
        with untouched(self.objective.model):  # the same random numbers at all points
            for part in self.indices.split(size):
                total += float(self.objective.losses(part).double().sum())
        return total / len(self.indices) + penalty(params, self.weight_decay)

    def _along(self, x: NDArray[np.float64], origin: Tensor, d: Tensor) -> NDArray[np.float64]:
        return np.array([self._at(torch.add(origin, d, alpha=float(a))) for a in x])

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

    @cached_property
    def _pass(self) -> int:
        """Examples for which the outputs of all layers, and the inputs, take 64 MB."""
        taken = 0

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal taken
            if isinstance(output, Tensor):
                taken += output.numel() * output.element_size()

        layers = [m for m in self.objective.model.modules() if not list(m.children())]
        hooks = [m.register_forward_hook(note) for m in layers]
        try:
            few = self.indices[:2]
            x = self.objective.inputs[few]
            with untouched(self.objective.model):
                self.objective.losses(few)
        finally:
            for hook in hooks:
                hook.remove()
        each = (2 * taken + x.numel() * x.element_size()) // len(few)
        return max(min(2, len(few)), _PASS // each)


class Surface(Landscape):
    """J of a model with one or two parameters: its exact surface, and its minimum."""

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__(objective, **options)
        if self.count > 2:
            raise ValueError(
                f"A surface has one or two parameters as its axes. Received: a model with "
                f"{self.count:,}. Landscape shows slices of more."
            )

    def pictures(
        self,
        snapshots: Snapshots | None = None,
        *,
        span: float | None = None,
        points: int | None = None,
    ) -> Mapping[str, Line | Grid]:
        """The only one, "surface"; it has no random directions with a span."""
        if span is not None:
            raise ValueError(
                f"span is of random directions, and a model with {self.count} parameters is drawn "
                f"on its exact surface. Received: span={span:g}. Leave it out."
            )
        return {"surface": self.picture(snapshots, points=61 if points is None else points)}

    def picture(
        self,
        snapshots: Snapshots | None = None,
        *,
        points: int = 61,
        box: Sequence[tuple[float, float]] | None = None,
        names: Sequence[str] = (),
    ) -> Line | Grid:
        """J, as much of it as the run has come by; the path, and the minimum if there is one.

        `box` has the lowest and highest value of each parameter; None: what holds the start, the
        minimum, and the path as far as three times the start's distance from the minimum. `names`
        are of the parameters; empty: the model's.
        """
        _POINTS.check("points", points)
        end = self.position.double().cpu().numpy()
        path = end[None] if snapshots is None else snapshots.parameters.astype(np.float64)
        updates = np.zeros(1, np.int64) if snapshots is None else snapshots.updates
        minimum = self.minimum()
        shown = path if minimum is None else _near(path, minimum)
        if box is None:
            axes = [_axis_around(shown[:, k], points, 0.25, shown) for k in range(self.count)]
        else:
            axes = [np.linspace(low, high, points) for low, high in box]
        origin = torch.zeros_like(self.position)
        units = torch.eye(self.count).to(origin)
        labels = [f"parameter {n}" for n in names or self._names()]
        common: dict[str, Any] = {
            "x": axes[0],
            "xlabel": labels[0],
            "title": f"The exact surface and the path of the run\n{self.said}",
            "path": path,
            "path_values": self.values(torch.from_numpy(path)),
            "path_updates": updates,
            "minimum": minimum,
        }
        if self.count == 1:
            with self._trial():
                return Line(values=self._along(axes[0], origin, units[0])[None], **common)
        values = self._on(axes[0], axes[1], origin, units[0], units[1])
        return Grid(y=axes[1], ylabel=labels[1], values=values, **common)

    def minimum(self) -> NDArray[np.float64] | None:
        """Where J is least, (P,), found from θ* by L-BFGS.

        None where the search did not end at a point that Newton's step would leave by less than a
        thousandth of the way there: J is flat, has a kink, or falls for ever.
        """
        params, start = self.objective.params, self.position.double()
        grads = [p.grad for p in params]
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

        with self._trial(), torch.enable_grad():
            try:
                search.step(closure)
            finally:
                for p, g in zip(params, grads, strict=True):
                    p.grad = g
            found = self.position.double()
            gradient = flat(self._value_and_gradient()[1]).double()
            hessian = torch.stack([self._hessian_column(k) for k in range(self.count)]).double()
        if not bool(torch.cat([found, gradient, hessian.flatten()]).isfinite().all()):
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
        params, decays = self.objective.params, self.weight_decay
        return float(value) + penalty(params, decays), with_decay(made, params, decays)

    def _hessian_column(self, k: int) -> Tensor:
        unit = torch.zeros_like(self.position)
        unit[k] = 1.0
        v = apart(unit, self.objective.params)
        try:
            product = self.objective.hessian_vector(self.indices, v)
        except ValueError:  # a kink has none
            return torch.full_like(unit, math.nan)
        return flat(with_decay(product, v, self.weight_decay))

    def _names(self) -> list[str]:
        """Of each single parameter, such as linear.weight[0, 1]."""
        names = []
        for name, p in self.objective.model.named_parameters():
            if p.requires_grad:
                for place in np.ndindex(*p.shape):
                    where = f"[{', '.join(map(str, place))}]" if p.numel() > 1 else ""
                    names.append(f"{name}{where}")
        return names


def _near(path: NDArray[np.float64], minimum: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points that a picture must hold: of a run that has left, not those far outside."""
    distance = np.linalg.norm(path - minimum, axis=1)
    return np.vstack([path[distance <= 3 * distance[0]], minimum])


def _axis(span: float, points: int) -> NDArray[np.float64]:
    _SPAN.check("span", span)
    _AXIS.check("points", points)
    return np.linspace(-span, span, points)


def _axis_around(
    values: NDArray[np.float64], points: int, margin: float, all_values: NDArray[np.float64]
) -> NDArray[np.float64]:
    """An axis that holds the values (K,), and room of so many times its width on either side.

    It is as wide as a fifth of the widest of all axes (K, A) at least.
    """
    low, high = float(values.min()), float(values.max())
    widest = float(np.ptp(all_values, axis=0).max())
    if widest == 0:
        widest = max(1.0, float(np.abs(all_values).max()))
    half = max(high - low, 0.2 * widest) * (0.5 + margin)
    middle = (low + high) / 2
    return np.linspace(middle - half, middle + half, points)
