"""The edge of stability, on the digits of scikit-learn.

    python scripts/demo_edge_of_stability.py         # the figure and tables of the docs page
    python scripts/demo_edge_of_stability.py --json  # all numbers
    python scripts/demo_edge_of_stability.py --updates 600 --figure short.png

Full-batch gradient descent on a tanh MLP 64–64, float64, all N = 1797 examples, each pixel
standardised, once with the squared error of one-hot targets and once with cross-entropy. Every 20
updates (every 4 at first) it measures λ, the largest eigenvalue of the Hessian of J over all N
examples. The page is docs/edge-of-stability.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import matplotlib as mpl
import torch
from sklearn.datasets import load_digits
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from gdtrain import GD
from gdtrain.analysis.curvature import sharpness
from gdtrain.losses import CrossEntropy, Loss, OneHotSquaredError
from gdtrain.models import MLP
from gdtrain.objective import Objective

mpl.use("agg")
from matplotlib import pyplot as plt

LOSSES: dict[str, tuple[Loss, float]] = {  # with η
    "squared error": (OneHotSquaredError(), 0.3),
    "cross-entropy": (CrossEntropy(), 1.0),
}
SHOWN = (0, 8, 100, 300, 500, 1000, 2000, 3000)
FIGURE = Path(__file__).parent.parent / "docs" / "edge-of-stability.png"


@dataclass
class Run:
    """What was measured, and when."""

    lr: float
    update: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    sharpness: list[float] = field(default_factory=list)
    output_curvature: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> list[float]:
        """λ / (2/η)."""
        return [value * self.lr / 2 for value in self.sharpness]


def output_curvature(loss: Loss, prediction: Tensor) -> float:
    """Mean over examples of the largest eigenvalue of ∂²ℓ/∂p²."""
    if isinstance(loss, OneHotSquaredError):
        return 1.0  # the identity
    p = prediction.softmax(1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    return float(torch.linalg.eigvalsh(curvature)[:, -1].mean())


def descend(loss: Loss, lr: float, updates: int, every: int = 20) -> Run:
    data = load_digits()
    x = torch.from_numpy(StandardScaler().fit_transform(data.data))
    y = torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = MLP((64,), 10, hidden=[64, 64], activation="tanh").double()
    objective = Objective(model, loss, x, y)
    optimizer = GD(model.parameters(), lr=lr)
    everything, run = torch.arange(len(x)), Run(lr)
    for update in range(updates + 1):
        value, gradient = objective.value_and_grad(everything)
        if update % (4 if update < 100 else every) == 0:
            run.update.append(update)
            run.loss.append(value.item())
            run.sharpness.append(sharpness(objective, tolerance=0.001).value)
            with torch.no_grad():
                run.output_curvature.append(output_curvature(loss, model(x)))
        for p, g in zip(model.parameters(), gradient, strict=True):
            p.grad = g
        optimizer.step()
    return run


def draw(runs: dict[str, Run], path: Path) -> None:
    figure, axes = plt.subplots(2, 2, figsize=(9, 5.5), sharex="col", layout="constrained")
    for column, (name, run) in enumerate(runs.items()):
        top, bottom = axes[0, column], axes[1, column]
        top.plot(run.update, run.sharpness, label="λ")
        top.axhline(2 / run.lr, color="black", linestyle="--", linewidth=1, label="2/η")
        top.set(title=f"{name}, η = {run.lr:g}", ylim=(0, 1.25 * max(2 / run.lr, *run.sharpness)))
        top.legend(loc="lower right" if run.ratio[-1] > 0.5 else "upper right")
        bottom.semilogy(run.update, run.loss, color="tab:red")
        bottom.set(xlabel="update")
        bottom.set_xscale("symlog", linthresh=10, linscale=0.5)
        bottom.set_xlim(0, run.update[-1])
    axes[0, 0].set(ylabel="sharpness λ")
    axes[1, 0].set(ylabel="loss J")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def table(run: Run) -> str:
    lines = [
        "| update | loss | λ | λ / (2/η) | curvature in the output |",
        "| --- |" + " --- |" * 4,
    ]
    for k, update in enumerate(run.update):
        if update in SHOWN:
            lines.append(
                f"| {update} | {run.loss[k]:.2g} | {run.sharpness[k]:.2f} | {run.ratio[k]:.2f} | "
                f"{run.output_curvature[k]:.2g} |"
            )
    return "\n".join(lines)


def edge(run: Run) -> str:
    late = [r for u, r in zip(run.update, run.ratio, strict=True) if u >= 500]
    top = max(range(len(run.ratio)), key=run.ratio.__getitem__)
    highest = f"The highest λ / (2/η) is {run.ratio[top]:.2f}, at update {run.update[top]}"
    if not late:
        return f"{highest}."
    return f"{highest}; from update 500 on it lies between {min(late):.2f} and {max(late):.2f}."


def main() -> None:
    parser = argparse.ArgumentParser(description="The edge of stability on digits.")
    parser.add_argument("--updates", type=int, default=3000, help="of each run")
    parser.add_argument("--every", type=int, default=20, help="updates between two measurements")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where the PNG goes")
    parser.add_argument("--json", action="store_true", help="print numbers, and draw nothing")
    arguments = parser.parse_args()
    for name in ("updates", "every"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1. Received: {getattr(arguments, name)}.")
    torch.set_num_threads(1)  # the matrices are small
    runs = {
        name: descend(loss, lr, arguments.updates, arguments.every)
        for name, (loss, lr) in LOSSES.items()
    }
    if arguments.json:
        print(json.dumps({n: {**asdict(run), "ratio": run.ratio} for n, run in runs.items()}))
        return
    draw(runs, arguments.figure)
    print("\n\n".join(f"{table(run)}\n\n{edge(run)}" for run in runs.values()))


if __name__ == "__main__":
    main()
