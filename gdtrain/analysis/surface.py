"""The objective of a model with one or two parameters: all of it, with the parameters as axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdtrain.analysis.landscape import POINTS, Landscape, axis_around
from gdtrain.analysis.landscape_figure import Grid, Line
from gdtrain.analysis.trajectory import Snapshots
from gdtrain.objective import Objective
from gdtrain.penalised import penalty, with_decay

__all__ = ["Surface"]


class Surface(Landscape):
    """J of a model with one or two parameters: its exact surface, and its minimum.

    Args:
        objective: As for `Landscape`.
        **options: Likewise.

    Raises:
        ValueError: The model has more parameters; or as `Landscape`.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> surface = Surface(Objective(model, SquaredError(), x, 3 * x))
        >>> surface.minimum().round(6).tolist(), surface.picture(points=5).values.shape
        ([3.0], (1, 5))
    """

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
        """The only one.

        Args:
            snapshots: The path of the run, with θ* as its last point; None: not known.
            span: Of random directions, which there are none of here; None.
            points: Of each axis, range [3, 1000]; None: 61.

        Returns:
            "surface".

        Raises:
            ValueError: An argument is out of range.
        """
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
        """J, as much of it as the run has come by.

        Args:
            snapshots: The path; None: θ* alone.
            points: Of each axis, range [3, 1000].
            box: The lowest and highest value of each parameter; None: what holds the start, the
                minimum, and the path as far as three times the start's distance from the minimum.
            names: Of the parameters, for the axes.

        Returns:
            The values, in float64, the path, the minimum if there is one, and the picture.

        Raises:
            ValueError: An argument is out of range.
        """
        POINTS.check("points", points)
        end = self.position.double().cpu().numpy()
        path = end[None] if snapshots is None else snapshots.parameters.astype(np.float64)
        updates = np.zeros(1, np.int64) if snapshots is None else snapshots.updates
        minimum = self.minimum()
        shown = path if minimum is None else _near(path, minimum)
        if box is None:
            axes = [axis_around(shown[:, k], points, 0.25, shown) for k in range(self.count)]
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
            with self._trial():
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

    def minimum(self) -> NDArray[np.float64] | None:
        """Where J is least, found from θ* by L-BFGS.

        Returns:
            (P,); None where the search did not end at a point that Newton's step would leave by
            less than a thousandth of the way there: J is flat, has a kink, or falls for ever.
        """
        params, start = self.objective.params, self.position.double()
        with self._trial(), torch.enable_grad():
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
        params, decays = self.objective.params, self.weight_decay
        return float(value) + penalty(params, decays), with_decay(made, params, decays)

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
        return torch.cat([h.flatten() for h in with_decay(product, v, self.weight_decay)])

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


def _near(path: NDArray[np.float64], minimum: NDArray[np.float64]) -> NDArray[np.float64]:
    """The points that a picture must hold: of a run that has left, not those far outside."""
    distance = np.linalg.norm(path - minimum, axis=1)
    return np.vstack([path[distance <= 3 * distance[0]], minimum])
