"""Gradient descent on the exact surface of models with one and two parameters.

    python scripts/demo_landscape.py                        # the figure and table of the docs page
    python scripts/demo_landscape.py --json                 # all numbers
    python scripts/demo_landscape.py --figure here.png

Least squares without an intercept on the 442 patients of scikit-learn's diabetes data, all columns
standardised: the disease's progression from one column (bmi), and from two that go together (s1
and s2, correlation 0.90). Each is descended from the same start with a rate that is too small, one
that is right, and one that is too large. The page is docs/landscape.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import StandardScaler

import gdtrain
from gdtrain.analysis.landscape import Surface
from gdtrain.analysis.landscape_figure import Grid, Line
from gdtrain.analysis.trajectory import Snapshots
from gdtrain.losses import SquaredError
from gdtrain.models import Linear
from gdtrain.objective import Objective

UPDATES = 30
FIGURE = Path(__file__).parent.parent / "docs" / "landscape.png"


@dataclass
class Case:
    """A model, where it starts, what a picture of it shows."""

    columns: list[str]
    start: list[float]
    box: list[tuple[float, float]]


CASES = [
    Case(["bmi"], [-1.0], [(-1.6, 2.8)]),
    Case(["s1", "s2"], [-1.6, 1.2], [(-2.6, 3.6), (-3.4, 2.6)]),
]


@dataclass
class Descent:
    """One rate on one model."""

    columns: list[str]
    name: str
    lr: float
    curvature: float  # λ, the largest eigenvalue of the Hessian
    values: list[float]  # J after each update
    least: float  # J at the minimum
    to_one_percent: int | None  # updates until J − J_min is 1% of the start's
    picture: Line | Grid


def descend(case: Case) -> list[Descent]:
    data = load_diabetes(as_frame=True)
    x = torch.from_numpy(StandardScaler().fit_transform(data.data[case.columns]))
    y = torch.from_numpy(StandardScaler().fit_transform(data.target.to_numpy()[:, None]))
    model = Linear((len(case.columns),), 1, bias=False).double()
    surface = Surface(Objective(model, SquaredError(), x, y))

    def objective(w: torch.Tensor) -> torch.Tensor:
        return 0.5 * (x @ w - y[:, 0]).square().mean()

    eigenvalues = torch.linalg.eigvalsh(x.T @ x / len(x))
    low, high = float(eigenvalues[0]), float(eigenvalues[-1])
    rates = {"too small": 0.1 / high, "right": 2 / (low + high), "too large": 2.06 / high}
    runs = []
    for name, lr in rates.items():
        found = gdtrain.minimize(objective, case.start, lr=lr, updates=UPDATES)
        path = Snapshots(found.path_updates, found.path)
        names = [f"w of {column}" for column in case.columns]
        picture = surface.picture(path, box=case.box, names=names)
        picture.title = f"{name}: η = {lr:.3g} = {lr * high:.3g}/λ"
        values: NDArray[np.float64] = found.values
        assert picture.minimum is not None
        least = surface.value(torch.from_numpy(picture.minimum))
        near = np.flatnonzero(values - least <= 0.01 * (values[0] - least))
        first = int(near[0]) if len(near) else None
        runs.append(Descent(case.columns, name, lr, high, values.tolist(), least, first, picture))
    return runs


def draw(descents: list[Descent], path: Path) -> None:
    figure = Figure(figsize=(13, 8), layout="constrained")
    for axes, descent in zip(figure.subplots(2, 3).flat, descents, strict=True):
        descent.picture.draw(axes)
        if descent.name == "too small":
            axes.legend(fontsize=8, loc="upper right", framealpha=0.9)
        else:
            axes.get_legend().remove()
    figure.savefig(path, dpi=100)


def row(descent: Descent) -> str:
    after = [descent.values[min(k, len(descent.values) - 1)] for k in (0, 5, UPDATES)]
    first = "never" if descent.to_one_percent is None else str(descent.to_one_percent)
    return (
        f"| {', '.join(descent.columns)} | {descent.name} | {descent.lr:.3g} | "
        f"{descent.lr * descent.curvature:.3g} | {' | '.join(f'{v:.4g}' for v in after)} | "
        f"{descent.least:.4g} | {first} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Descent on the exact surface of small models.")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the PNG goes")
    parser.add_argument("--json", action="store_true", help="print numbers, and draw nothing")
    arguments = parser.parse_args()
    descents = [descent for case in CASES for descent in descend(case)]
    if arguments.json:
        numbers = [{k: v for k, v in vars(d).items() if k != "picture"} for d in descents]
        print(json.dumps(numbers))
        return
    draw(descents, arguments.figure)
    print(f"| column | rate | η | ηλ | J | after 5 | after {UPDATES} | least J | updates to 1% |")
    print("| --- |" + " --- |" * 8)
    print("\n".join(row(descent) for descent in descents))


if __name__ == "__main__":
    main()
