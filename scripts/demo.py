"""Demonstrations of gradient descent, each with a page in docs/.

    python scripts/demo.py update-rule                # docs/demo-update-rule.png, and the table
    python scripts/demo.py update-rule output=FOLDER  # the picture goes into another folder

Each is a function below that measures, draws, and returns the numbers. All seeds are fixed. N
examples, B of them per update, J the mean loss over the training examples, η the step size.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain import GD, SGD, MiniBatchSGD, minimize
from gdtrain.data.loader import IndexLoader
from gdtrain.engines import choose
from gdtrain.losses import CrossEntropy, Logistic, Loss
from gdtrain.models import MLP
from gdtrain.objective import Objective
from gdtrain.runs.configuration import closest

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Okabe and Ito's colours, which all eyes tell apart; lines differ in style or marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


@dataclass
class Shown:
    """A demonstration: what it draws, what it prints, and the numbers behind both."""

    figure: Figure
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Data:
    """Standardised digits, with a test part."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits() -> Data:
    x, y = load_digits(return_X_y=True)
    parts = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y)
    scaler = StandardScaler().fit(parts[0])
    x, x_test = (torch.tensor(scaler.transform(p), dtype=torch.float32) for p in parts[:2])
    y, y_test = (torch.tensor(p) for p in parts[2:])
    return Data(x, y, x_test, y_test)


def descend(
    model: nn.Module,
    loss: Loss,
    x: Tensor,
    y: Tensor,
    make: Callable[[Any], Optimizer],
    batch_size: int,
    marks: Sequence[int],
    seed: int = 0,
) -> list[float]:
    """J over all examples after each of the updates in `marks`; a constant rate."""
    objective = Objective(model, loss, x, y)
    optimizer = make(model.parameters())
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    loader = IndexLoader(len(x), batch_size, seed=seed)
    engine, _ = choose("auto", objective, optimizer, marks[-1])
    everything, update, losses = torch.arange(len(x)), 0, []
    for mark in marks:
        while update < mark:
            block = loader.block(update, mark - update)
            engine(block, torch.ones(len(block), dtype=torch.float64), update)
            update += len(block)
        losses.append(objective.value(everything).item())
    return losses


def marks_up_to(updates: int, count: int = 40) -> list[int]:
    """0 and about so many numbers, evenly spread on a logarithmic axis, the last included."""
    spread = {round(updates ** (k / count)) for k in range(count + 1)}
    return [0, *sorted(spread)]


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return make()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return (model(x).argmax(1) == y).double().mean().item()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def number(value: float, digits: int = 2) -> str:
    """Rounded to significant digits."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    if abs(rounded) < 1e-3:
        return f"{rounded:.{digits - 1}e}".replace("e-0", "e-")
    return f"{rounded:.{max(places, 0)}f}"


def loss_of(value: float, start: float = math.log(10)) -> str:
    """J, in a word where it is more than ten times that of a guess."""
    return number(value) if value <= 10 * start else "diverged"


def look(k: int) -> dict[str, Any]:
    return {"color": COLOURS[k], "linestyle": STYLES[k]}


# ---------------------------------------------------------------------- one dimension


def update_rule(curvature: float = 2.0, updates: int = 20) -> Shown:
    """J(x) = ½λ(x − 3)² from x = 0, at four rates in units of 1/λ."""
    rates = (0.1, 1.0, 1.9, 2.1)

    def f(x: Tensor) -> Tensor:
        return (0.5 * curvature * (x - 3) ** 2).sum()

    paths = {
        rate: minimize(f, [0.0], lr=rate / curvature, updates=updates, tolerance=0.0).path[:, 0]
        for rate in rates
    }
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    grid = torch.linspace(-0.6, 6.6, 200)
    left.plot(grid, 0.5 * curvature * (grid - 3) ** 2, color="gray", linewidth=1)
    for k, (rate, path) in enumerate(paths.items()):
        first = torch.as_tensor(path[:5])
        left.plot(first, 0.5 * curvature * (first - 3) ** 2, marker=MARKERS[k], **look(k))
        gap = [abs(x - 3) for x in path]
        shown = [t for t, g in enumerate(gap) if g > 1e-12]
        right.semilogy(
            shown,
            [gap[t] for t in shown],
            marker=MARKERS[k],
            markersize=4 + 2 * (k == 0),
            fillstyle="none" if k == 0 else "full",
            label=f"η = {rate:g}/λ",
            **look(k),
        )
    left.set(xlabel="x", ylabel="J(x)", title="the first four updates")
    right.set(xlabel="updates", ylabel="distance |x − 3|", title="distance to the minimum")
    right.legend()
    shown = [t for t in (0, 1, 2, 3, 4, 10, 20) if t <= updates]
    head = ["update", *(f"x at η = {rate:g}/λ" for rate in rates)]
    rows = [
        [str(t), *(f"{paths[r][t] if t < len(paths[r]) else paths[r][-1]:.3f}" for r in rates)]
        for t in shown
    ]
    factors = ["1 − ηλ", *(f"{1 - rate:.1f}" for rate in rates)]
    return Shown(figure, table(head, [*rows, factors]), {"paths": paths, "curvature": curvature})


# ---------------------------------------------------------------------- the three variants


def tuned(
    run: Callable[[float], list[float]], rates: Sequence[float]
) -> tuple[float, list[float], dict[float, float]]:
    """The rate whose run ends lowest, that run, and where each rate ended."""
    runs = {rate: run(rate) for rate in rates}
    ends = {r: losses[-1] if math.isfinite(losses[-1]) else math.inf for r, losses in runs.items()}
    best = min(ends, key=ends.__getitem__)
    return best, runs[best], ends


def fastest(work: Callable[[Tensor], object], blocks: Tensor) -> float:
    """Seconds of one update: the best of five parts, for other programs take their share."""
    times = []
    for part in blocks.chunk(5):
        started = time.perf_counter()
        work(part)
        times.append((time.perf_counter() - started) / len(part))
    return min(times)


def ordinary_seconds(data: Data, hidden: Sequence[int], batch_size: int, updates: int) -> float:
    """One update of PyTorch's usual loop."""
    model = seeded(lambda: MLP((64,), 10, hidden=hidden))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def loop(blocks: Tensor) -> None:
        for rows in blocks:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
            optimizer.step()

    return fastest(loop, update_blocks(data, batch_size, updates))


def sweep_seconds(data: Data, hidden: Sequence[int], batch_size: int, updates: int) -> float:
    """One update of a sweep of gdtrain's."""
    model = seeded(lambda: MLP((64,), 10, hidden=hidden))
    objective = Objective(model, CrossEntropy(), data.x, data.y)
    optimizer = SGD(model.parameters(), lr=1e-3)
    optimizer.param_groups[0]["initial_lr"] = 1e-3
    engine, _ = choose("auto", objective, optimizer, updates)
    blocks = update_blocks(data, batch_size, updates)
    return fastest(lambda part: engine(part, torch.ones(len(part), dtype=torch.float64)), blocks)


def update_blocks(data: Data, batch_size: int, updates: int) -> Tensor:
    """(updates, B) at most: as many as come before a ragged batch."""
    blocks = IndexLoader(len(data.x), batch_size).block(0, updates)
    return blocks.repeat(-(-updates // len(blocks)), 1)[:updates]


def variants(epochs: int = 30, hidden: Sequence[int] = (32,), timed: int = 1000) -> Shown:
    """The same MLP, examples and start by GD, mini-batch (B = 32) and SGD."""
    data = digits()
    n, per_epoch = len(data.x), {}
    long = epochs * -(-n // 32)  # updates, as many as mini-batches make: GD gets as many
    kinds: dict[str, tuple[Any, int, tuple[float, ...]]] = {
        "GD": (GD, n, (1.0, 2.0, 4.0, 8.0)),
        "mini-batch": (MiniBatchSGD, 32, (0.2, 0.4, 0.8, 1.6)),
        "SGD": (SGD, 1, (0.01, 0.02, 0.04, 0.08)),
    }
    numbers: dict[str, Any] = {"N": n}
    for name, (kind, size, rates) in kinds.items():
        per_epoch[name] = -(-n // size)
        total = max(epochs * per_epoch[name], long)
        wanted = {epochs, long, per_epoch[name], epochs * per_epoch[name]}
        marks = sorted({*marks_up_to(total), *wanted})

        def run(rate: float, kind: Any = kind, size: int = size, marks: Any = marks) -> list[float]:
            model = seeded(lambda: MLP((64,), 10, hidden=hidden))
            make = partial(kind, lr=rate)
            return descend(model, CrossEntropy(), data.x, data.y, make, size, marks)

        rate, losses, _ = tuned(run, rates)
        numbers[name] = {
            "rate": rate,
            "B": size,
            "per_epoch": per_epoch[name],
            "marks": marks,
            "losses": losses,
            "ordinary": ordinary_seconds(data, hidden, size, timed if size < n else timed // 10),
            "sweep": sweep_seconds(data, hidden, size, timed if size < n else timed // 10),
        }
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, by in zip(
        figure.subplots(1, 3, sharey=True), ("updates", "epochs", "seconds"), strict=True
    ):
        for k, name in enumerate(kinds):
            own = numbers[name]
            factor = {"updates": 1.0, "epochs": 1 / own["per_epoch"], "seconds": own["ordinary"]}
            axes.loglog(
                [m * factor[by] for m in own["marks"][1:]],
                own["losses"][1:],
                marker=MARKERS[k],
                markersize=3,
                label=name,
                **look(k),
            )
        label = "seconds of an ordinary loop" if by == "seconds" else by
        axes.set(xlabel=label, title=f"against {by}")
    figure.axes[0].set(ylabel="training loss J")
    figure.axes[0].legend()

    rows = []
    for name, own in ((name, numbers[name]) for name in kinds):
        at = dict(zip(own["marks"], own["losses"], strict=True))
        shown = (1, epochs, long, per_epoch[name], epochs * per_epoch[name])
        rows.append([name, str(own["B"]), f"{own['rate']:g}", *(number(at[m]) for m in shown)])
    head = ["", "B", "η", "J after 1 update", f"{epochs} updates", f"{long} updates"]
    head += ["1 epoch", f"{epochs} epochs"]
    times = [
        [
            name,
            *(
                number(own[way] * own["per_epoch"] ** e * 1e3)
                for way in ("ordinary", "sweep")
                for e in (0, 1)
            ),
        ]
        for name, own in ((name, numbers[name]) for name in kinds)
    ]
    time_head = ["ms", "update, ordinary loop", "epoch", "update, gdtrain", "epoch"]
    return Shown(figure, f"{table(head, rows)}\n\n{table(time_head, times)}", numbers)


# ---------------------------------------------------------------------- learning rates


def learning_rate(
    rates: Sequence[float] = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 10.0),
    epochs: int = 20,
    hidden: Sequence[int] = (32,),
) -> Shown:
    """Mini-batches of 32 at constant rates from far too small to far too large."""
    data = digits()
    per_epoch = -(-len(data.x) // 32)
    marks = [round(e * per_epoch / 4) for e in range(4 * epochs + 1)]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows, ends = [], {}
    for k, rate in enumerate(rates):
        model = seeded(lambda: MLP((64,), 10, hidden=hidden))
        make = partial(MiniBatchSGD, lr=rate)
        losses = descend(model, CrossEntropy(), data.x, data.y, make, 32, marks)
        ends[rate] = losses
        shown = [loss_of(losses[4 * e]) for e in (1, epochs // 4, epochs)]
        right = f"{100 * accuracy(model, data.x_test, data.y_test):.0f}%"
        rows.append([f"{rate:g}", *shown, "–" if shown[-1] == "diverged" else right])
        axes.semilogy(
            [m / per_epoch for m in marks],
            losses,
            label=f"η = {rate:g}",
            marker=MARKERS[k],
            markevery=8,
            markersize=4,
            **look(k),
        )
    axes.axhline(math.log(10), color="gray", linewidth=0.8)
    axes.annotate("a guess, log 10", (0.6 * epochs, math.log(10)), va="bottom", color="gray")
    axes.set(xlabel="epochs", ylabel="training loss J", title="MLP 64–32–10 on digits, B = 32")
    axes.set_ylim(None, 100)
    axes.legend()
    head = ["η", "J after 1 epoch", f"{epochs // 4} epochs", f"{epochs} epochs", "right on test"]
    return Shown(figure, table(head, rows), {"losses": ends, "rows": rows})


# ---------------------------------------------------------------------- local minima


def local_minima(
    widths: Sequence[int] = (2, 4, 8, 32), starts: int = 20, updates: int = 2000, lr: float = 0.5
) -> Shown:
    """Exclusive or, four noisy corners: where full-batch descent ends, from many starts."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]).repeat(25, 1)
    x = corners + 0.25 * torch.randn(100, 2, generator=generator)
    y = (corners.prod(1) < 0).long()
    ends: dict[int, list[float]] = {}
    right: dict[int, list[float]] = {}
    slopes: dict[int, list[float]] = {}
    for width in widths:
        ends[width], right[width], slopes[width] = [], [], []
        for start in range(starts):
            model = seeded(partial(MLP, (2,), 1, hidden=[width], activation="tanh"), start)
            make = partial(GD, lr=lr)
            ends[width] += descend(model, Logistic(), x, y, make, len(x), [updates])
            with torch.no_grad():
                answers = Logistic().decide(model(x))
            right[width].append((answers == y).double().mean().item())
            _, gradient = Objective(model, Logistic(), x, y).value_and_grad(torch.arange(len(x)))
            norms = [torch.linalg.vector_norm(g) for g in gradient if g is not None]
            slopes[width].append(torch.linalg.vector_norm(torch.stack(norms)).item())
    figure = Figure(figsize=(9, 6), layout="constrained")
    top = max(max(values) for values in ends.values())
    low = min(min(values) for values in ends.values())
    bins = torch.logspace(math.log10(0.99 * low), math.log10(1.01 * top), 31)
    grid = figure.subplots(len(widths), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for k, (axes, width) in enumerate(zip(grid, widths, strict=True)):
        axes.hist(
            ends[width],
            bins=bins.tolist(),
            color=COLOURS[k],
            edgecolor="black",
            hatch="/|-x"[k % 4],
        )
        axes.set(xscale="log", ylabel="starts", title=f"{width} hidden units")
    grid[-1].set(xlabel=f"training loss J after {updates:,} updates (a guess: log 2 = 0.69)")
    rows = []
    for width in widths:
        values = sorted(ends[width])
        good = sum(r >= 0.95 for r in right[width])
        worst = ends[width].index(values[-1])
        shown = (values[0], values[len(values) // 2], values[-1], slopes[width][worst])
        rows.append([str(width), *(number(v) for v in shown), f"{good} of {starts}"])
    head = [
        "hidden units",
        "lowest J",
        "median",
        "highest",
        "‖g‖ there",
        "starts with 95% right or more",
    ]
    return Shown(figure, table(head, rows), {"ends": ends, "right": right, "slopes": slopes})


# ---------------------------------------------------------------------- batch sizes


def batch_sizes(
    sizes: Sequence[int] = (1, 8, 32, 128, 512),
    epochs: int = 10,
    updates: int = 450,
    hidden: Sequence[int] = (32,),
    grid: Sequence[float] = tuple(0.01 * 2**k for k in range(10)),
) -> Shown:
    """Each B at its own best rate of a grid, for so many epochs and for so many updates."""
    data = digits()
    n = len(data.x)
    numbers: dict[str, dict[int, Any]] = {"epochs": {}, "updates": {}}
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = dict(zip(numbers, figure.subplots(1, 2, sharey=True), strict=True))
    for k, size in enumerate(sizes):
        per_epoch = -(-n // size)
        for budget, total in (("epochs", epochs * per_epoch), ("updates", updates)):
            marks = marks_up_to(total, 25)

            def run(rate: float, size: int = size, marks: Any = marks) -> list[float]:
                model = seeded(lambda: MLP((64,), 10, hidden=hidden))
                make = partial(MiniBatchSGD, lr=rate)
                return descend(model, CrossEntropy(), data.x, data.y, make, size, marks)

            rate, losses, _ = tuned(run, grid)
            numbers[budget][size] = {"rate": rate, "losses": losses, "updates": total}
            across = [m / per_epoch if budget == "epochs" else m for m in marks]
            panels[budget].loglog(
                across[1:],
                losses[1:],
                label=f"B = {size}",
                marker=MARKERS[k],
                markersize=3,
                **look(k),
            )
    panels["epochs"].set(xlabel="epochs", ylabel="training loss J", title="equal epochs")
    panels["updates"].set(xlabel="updates", title="equal updates")
    panels["epochs"].legend()
    rows = []
    for size in sizes:
        by_epoch, by_update = numbers["epochs"][size], numbers["updates"][size]
        rows.append(
            [
                str(size),
                str(by_epoch["updates"]),
                f"{by_epoch['rate']:g}",
                number(by_epoch["losses"][-1]),
                f"{updates * size / n:.1f}",
                f"{by_update['rate']:g}",
                number(by_update["losses"][-1]),
            ]
        )
    head = ["B", f"updates in {epochs} epochs", "best η", "J"]
    head += [f"epochs in {updates} updates", "best η", "J"]
    return Shown(figure, table(head, rows), numbers)


# ---------------------------------------------------------------------- gradient noise


def noise(
    sizes: Sequence[int] = (1, 4, 16, 64, 256, 700, 1200, 1437),
    batches: int = 400,
    hidden: Sequence[int] = (16,),
) -> Shown:
    """E‖g_B − g‖², from batches without replacement, and in closed form."""
    data = digits()
    model = seeded(lambda: MLP((64,), 10, hidden=hidden))
    descend(model, CrossEntropy(), data.x, data.y, partial(MiniBatchSGD, lr=0.1), 32, [45])
    model, x = model.double(), data.x.double()
    objective = Objective(model, CrossEntropy(), x, data.y)
    n = len(x)
    sizes = [size for size in sizes if size <= n]
    own = objective.per_example_gradients(torch.arange(n))
    gradients = torch.cat([g.reshape(n, -1) for g in own], 1)
    mean = gradients.mean(0)
    spread = (gradients - mean).square().sum(1).mean().item()  # the trace of the covariance
    generator = torch.Generator().manual_seed(0)
    measured, errors = [], []
    for size in sizes:
        values = []
        for _ in range(batches):
            rows = torch.randperm(n, generator=generator)[:size]
            _, parts = objective.value_and_grad(rows)
            g = torch.cat([p.reshape(-1) for p in parts if p is not None])
            values.append((g - mean).square().sum().item())
        found = torch.tensor(values)
        measured.append(found.mean().item())
        errors.append(found.std().item() / math.sqrt(batches))
    plain = [spread / size for size in sizes]
    law = [spread / size * (n - size) / (n - 1) for size in sizes]
    signal = mean.square().sum().item()
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    fine = [round(n ** (k / 200)) for k in range(200)]
    axes.loglog(fine, [spread / b for b in fine], label="tr Σ / B", **look(1))
    axes.loglog(
        fine,
        [spread / b * (n - b) / (n - 1) for b in fine],
        label="tr Σ / B · (N − B)/(N − 1)",
        **look(0),
    )
    shown = [k for k, size in enumerate(sizes) if size < n]
    axes.errorbar(
        [sizes[k] for k in shown],
        [measured[k] for k in shown],
        yerr=[2 * errors[k] for k in shown],
        fmt="o",
        color=COLOURS[4],
        capsize=3,
        label=f"measured, {batches} batches each, ± 2 standard errors",
    )
    axes.axhline(signal, label="‖g‖²", **look(3))
    axes.set(
        xlabel="examples in the batch, B",
        ylabel="E‖g_B − g‖², (loss per unit of parameter)²",
        title=f"noise of the gradient, N = {n}",
        ylim=(law[shown[-1]] / 3, None),
    )
    axes.legend()
    rows = [
        [
            str(size),
            number(measured[k]),
            number(law[k]),
            number(plain[k]),
            number(plain[k] / signal),
        ]
        for k, size in enumerate(sizes)
    ]
    for row, size in zip(rows, sizes, strict=True):
        if size == n:
            row[1] = "0"  # but for rounding
    head = ["B", "measured", "tr Σ/B · (N−B)/(N−1)", "tr Σ/B", "tr Σ/B as a multiple of ‖g‖²"]
    numbers = {"sizes": sizes, "measured": measured, "errors": errors, "law": law, "N": n}
    return Shown(figure, table(head, rows), {**numbers, "plain": plain, "signal": signal})


# ---------------------------------------------------------------------- averages


def averaging(
    marks: Sequence[int] = (100, 1000, 10_000, 100_000),
    rates: Sequence[float] = (0.02, 0.005),
    features: int = 5,
    repetitions: int = 200,
) -> Shown:
    """One-example SGD on a line with noise: the last θ, and the mean of the last half."""
    torch.manual_seed(0)
    truth = torch.ones(features, dtype=torch.float64)
    excess: dict[tuple[float, str], list[float]] = {}
    for rate in rates:
        theta = nn.Parameter(torch.zeros(repetitions, features, dtype=torch.float64))
        optimizer = SGD([theta], lr=rate)
        sums, begins, made = torch.zeros(len(marks), *theta.shape, dtype=torch.float64), [], 0
        begins = [mark // 2 for mark in marks]
        last, averaged = [], []
        for mark in marks:
            while made < mark:
                x = torch.randn(repetitions, features, dtype=torch.float64)
                residual = ((theta.detach() - truth) * x).sum(1) - torch.randn(
                    repetitions, dtype=torch.float64
                )
                theta.grad = residual[:, None] * x
                optimizer.step()
                made += 1
                for k, begin in enumerate(begins):
                    if begin < made <= marks[k]:
                        sums[k] += theta.detach()
            place = marks.index(mark)
            mean = sums[place] / (mark - begins[place])
            for point, kept in ((theta.detach(), last), (mean, averaged)):
                kept.append(0.5 * (point - truth).square().sum(1).mean().item())
        excess[rate, "last"], excess[rate, "average"] = last, averaged
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for k, ((rate, what), values) in enumerate(excess.items()):
        name = "last θ" if what == "last" else "mean of the last half"
        axes.loglog(marks, values, label=f"η = {rate:g}, {name}", marker=MARKERS[k], **look(k))
    axes.loglog(
        marks,
        [0.5 * features / m for m in marks],
        color="gray",
        label="D σ²/(2 t), the best possible",
    )
    axes.set(
        xlabel="updates t",
        ylabel="J − J* (squared error)",
        title=f"one-example SGD, D = {features}, mean of {repetitions} runs",
    )
    axes.legend()
    head = ["updates"]
    head += [f"{'last' if what == 'last' else 'mean'}, η = {rate:g}" for rate, what in excess]
    head += ["D σ²/(2 t)"]
    rows = [
        [f"{mark:,}", *(number(v[k]) for v in excess.values()), number(0.5 * features / mark)]
        for k, mark in enumerate(marks)
    ]
    return Shown(figure, table(head, rows), {"excess": excess, "marks": marks})


# ---------------------------------------------------------------------- first weights


def initialisation(epochs: int = 10, width: int = 64, depth: int = 5, lr: float = 0.05) -> Shown:
    """A deep ReLU MLP from Gaussians of several spreads, and from the rules of thumb."""
    data = digits()
    per_epoch = -(-len(data.x) // 32)
    kinds: list[tuple[str, dict[str, Any]]] = [
        *((f"Gaussian, σ = {std:g}", {"init": "gaussian", "std": std}) for std in (0.01, 0.1)),
        ("He, σ = √(2/64) = 0.18", {"init": "kaiming"}),
        ("Xavier, σ = √(1/64) = 0.125", {"init": "xavier"}),
        ("PyTorch's, ±1/√64", {"init": "default"}),
        *((f"Gaussian, σ = {std:g}", {"init": "gaussian", "std": std}) for std in (0.3, 1.0)),
    ]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    rows, numbers = [], {}
    marks = [round(e * per_epoch / 4) for e in range(4 * epochs + 1)]
    for k, (name, options) in enumerate(kinds):
        model = seeded(partial(MLP, (64,), 10, hidden=[width] * depth, **options))
        objective = Objective(model, CrossEntropy(), data.x, data.y)
        _, gradient = objective.value_and_grad(torch.arange(len(data.x)))
        with torch.no_grad():
            signal = model.layers[:-1](data.x).square().mean().sqrt().item()
        make = partial(MiniBatchSGD, lr=lr)
        losses = descend(model, CrossEntropy(), data.x, data.y, make, 32, marks)
        first = torch.linalg.vector_norm(gradient[0]).item()  # type: ignore[arg-type]
        numbers[name] = {"signal": signal, "gradient": first, "losses": losses}
        shown = [number(signal), number(first), loss_of(losses[4]), loss_of(losses[-1])]
        rows.append([name, *shown])
        axes.semilogy(
            [m / per_epoch for m in marks],
            losses,
            label=name,
            marker=MARKERS[k],
            markevery=4,
            markersize=4,
            **look(k),
        )
    axes.set(
        xlabel="epochs",
        ylabel="training loss J",
        title=f"ReLU MLP with {depth} hidden layers of {width} on digits, B = 32, η = {lr:g}",
        ylim=(None, 30),
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    head = ["first weights", "size of the last hidden layer", "‖∂J/∂W₁‖", "J after 1 epoch"]
    return Shown(figure, table([*head, f"{epochs} epochs"], rows), numbers)


# ---------------------------------------------------------------------- adaptive rates


def adaptive(epochs: int = 20, hidden: Sequence[int] = (32,)) -> Shown:
    """Adam beside SGD with and without momentum, over grids of rates, B = 32."""
    data = digits()
    per_epoch = -(-len(data.x) // 32)
    marks = [round(e * per_epoch / 2) for e in range(2 * epochs + 1)]
    kinds: dict[str, tuple[Any, list[float]]] = {
        "SGD": (MiniBatchSGD, [0.01 * 4**k for k in range(5)]),
        "momentum 0.9": (partial(MiniBatchSGD, momentum=0.9), [0.001 * 4**k for k in range(5)]),
        "Adam": (torch.optim.Adam, [0.0005 * 4**k for k in range(5)]),
    }
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows, numbers = [], {}
    for k, (name, (kind, grid)) in enumerate(kinds.items()):
        models: dict[float, nn.Module] = {}

        def run(rate: float, kind: Any = kind, models: dict[float, nn.Module] = models) -> Any:
            models[rate] = seeded(lambda: MLP((64,), 10, hidden=hidden))
            make = partial(kind, lr=rate)
            return descend(models[rate], CrossEntropy(), data.x, data.y, make, 32, marks)

        best, losses, ends = tuned(run, grid)
        reached = accuracy(models[best], data.x_test, data.y_test)
        numbers[name] = {"best": best, "losses": losses, "ends": ends, "test": reached}
        early = number(losses[2])
        rows.append([name, f"{best:g}", early, number(losses[-1]), f"{100 * reached:.1f}%"])
        left.semilogy(
            [m / per_epoch for m in marks],
            losses,
            label=f"{name}, η = {best:g}",
            marker=MARKERS[k],
            markevery=4,
            **look(k),
        )
        shown = {r: v for r, v in ends.items() if v < 23}
        right.loglog(list(shown), list(shown.values()), label=name, marker=MARKERS[k], **look(k))
    left.set(xlabel="epochs", ylabel="training loss J", title="each at its best rate")
    left.legend()
    right.set(xlabel="η", ylabel=f"J after {epochs} epochs", title="over the rates")
    head = ["", "best η of the grid", "J after 1 epoch", f"{epochs} epochs", "right on test"]
    return Shown(figure, table(head, rows), numbers)


# ---------------------------------------------------------------------- the command

DEMOS: dict[str, Callable[[], Shown]] = {
    "update-rule": update_rule,
    "variants": variants,
    "learning-rate": learning_rate,
    "local-minima": local_minima,
    "batch-sizes": batch_sizes,
    "noise": noise,
    "averaging": averaging,
    "initialisation": initialisation,
    "adaptive": adaptive,
}


def main() -> int:
    usage = f"usage: demo.py NAME [output=FOLDER]; NAME is one of {', '.join(DEMOS)}"
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(usage)
        return 0
    folder = DOCS
    names = [word for word in words if not word.startswith("output=")]
    for word in words:
        if word.startswith("output="):
            folder = Path(word.partition("=")[2])
            if not word.partition("=")[2]:
                print(f"error: output must name a folder. Received: {word}", file=sys.stderr)
                return 2
    if len(names) != 1 or names[0] not in DEMOS:
        received = " ".join(names) or "nothing"
        hint = closest(names[0], list(DEMOS)) if len(names) == 1 else ""
        print(
            f"error: Expected one demonstration. Received: {received}.{hint} {usage}",
            file=sys.stderr,
        )
        return 2
    name = names[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=folder, prefix=".demo-", suffix=".png")
    except OSError as error:
        print(f"error: The picture cannot be written: {error}", file=sys.stderr)
        return 2
    os.close(handle)
    try:
        torch.set_num_threads(1)  # the matrices are small
        shown = DEMOS[name]()
        shown.figure.savefig(scratch, dpi=110)
        Path(scratch).chmod(0o644)
        os.replace(scratch, folder / f"demo-{name}.png")
    finally:
        Path(scratch).unlink(missing_ok=True)
    print(shown.text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
