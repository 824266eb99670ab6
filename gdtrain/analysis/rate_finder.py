"""Find a learning rate: descend with a growing η, look where the loss falls and where it turns.

N examples, B examples per update, J mean training loss. Over T updates η grows geometrically,

    η_k = η_min (η_max/η_min)^(k/(T−1)),  k = 0 … T−1,

and J is read at up to 100 of them, always on the same examples, so that the curve has no noise from
the choice of a batch. Where B < N the test is made several times in different orders and averaged.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer

from gdtrain.analysis.curvature import limit_of, sharpness
from gdtrain.data.loader import IndexLoader
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.preparation import check_examples
from gdtrain.descent.trial import Snapshot, trial
from gdtrain.engines import EngineName, choose
from gdtrain.generators import RandomStates
from gdtrain.objective import Objective
from gdtrain.optim.protocol import step_size_of, update_rules
from gdtrain.ranges import Interval, Whole

__all__ = ["RateCurve", "find_lr", "suggest"]

_log = logging.getLogger("gdtrain")

_POINTS = 100  # at which J is read
_SAMPLE = 4096  # examples on which it is read, at most
_PASS = 1024  # of them in one forward pass
_EXPLODED = 4  # times the start's loss, above the best
_POSITIVE = Interval(0, math.inf)
_BANDWIDTH = 0.35  # decades, of the local polynomial
_GONE = 0.01  # of the start's loss: below it there is nothing left to turn
_FALL = 0.001  # of the start's loss: the least that counts as a fall
# The turn is divided by it. Full batch: the loss reacts late, since what grows beyond the limit
# starts from nearly nothing. B < N: noise turns the curve before any limit does.
_MARGIN_FULL, _MARGIN_BATCH = 4.0, 2.0


@dataclass
class RateCurve:
    """What a range test found at P points: J against a growing η, smoothed, read and drawn."""

    rates: NDArray[np.float64]  # η, (P,), growing
    losses: NDArray[np.float64]  # J after the update with that η, mean over the repetitions
    errors: NDArray[np.float64]  # standard error of that mean; 0 for one repetition
    smoothed: NDArray[np.float64]  # J by local quadratic regression on log₁₀ η
    slopes: NDArray[np.float64]  # dJ/d log₁₀ η of it, loss per decade
    start: float  # J before any update
    suggestion: float | None = None  # η; None, as the next two: the loss nowhere falls
    basis: str = ""  # why that one, in words and numbers
    steepest: float | None = None  # η at which the smoothed loss falls fastest
    turn: float | None = None  # the largest η before the loss turns
    limit: float | None = None  # of stability at the start; None where there is none
    sharpness: float | None = None  # λ at the start; None where `limit` is
    details: dict[str, Any] | None = None  # updates, repetitions, engine and the like

    def to_dict(self) -> dict[str, Any]:
        """The numbers, in plain containers; None for what is not finite."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def rows(self) -> dict[int, str]:
        """Points for a table, about two in each decade, and words for what is near some of them."""
        last = len(self.rates) - 1
        decades = math.log10(self.rates[-1] / self.rates[0])
        step = max(1, round(last / max(2 * decades, 1)))
        found: dict[int, list[str]] = {i: [] for i in range(last, -1, -step)}
        for name in ("steepest", "turn", "limit", "suggestion"):
            value = getattr(self, name)
            if value is not None:
                nearest = int(np.abs(np.log(self.rates / value)).argmin())
                found.setdefault(nearest, []).append(name)
        return {i: ", ".join(words) for i, words in sorted(found.items())}

    def plot(self) -> Any:
        """Loss and its slope against η, as a figure of matplotlib's."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        low, high = self.rates[[0, -1]]
        above.axhline(self.start, color="0.75", linewidth=0.8, label="before any update")
        above.fill_between(
            self.rates, self.losses - self.errors, self.losses + self.errors, color="0.88"
        )
        above.plot(self.rates, self.losses, ".", color="0.55", markersize=4, label="measured")
        above.plot(self.rates, self.smoothed, "-", color="black", linewidth=1.6, label="smoothed")
        below.axhline(0, color="0.75", linewidth=0.8)
        below.plot(self.rates, self.slopes, "-", color="black", linewidth=1.2)
        for value, style, color, name in (
            (self.steepest, ":", "0.25", "steepest descent"),
            (self.turn, "--", "0.25", "largest before the turn"),
            (self.limit, "-.", "0.45", "stability limit at the start"),
            (self.suggestion, "-", "C3", "suggestion"),
        ):
            if value is not None:
                label = f"{name}: {value:.2g}"
                for axes in (above, below):
                    axes.axvline(value, linestyle=style, color=color, linewidth=1.6, label=label)
                low, high = min(low, value), max(high, value)
        bottom = float(min(self.smoothed.min(), self.losses.min()))
        room = 0.15 * max(self.start - bottom, 1e-3 * abs(self.start), 1e-12)
        above.set(
            ylabel="mean training loss",
            ylim=(bottom - room, self.start + 3 * room),
            title=self._title(),
        )
        within = self.slopes[self.smoothed <= self.start + 3 * room]
        if len(within) and within.min() < 0:
            below.set_ylim(1.3 * within.min(), -0.7 * within.min())
        below.set(
            xlabel="step size η (lr; no unit, logarithmic)",
            ylabel="slope\n(loss per decade)",
            xscale="log",
            xlim=(0.8 * low, 1.25 * high),
        )
        above.legend(fontsize=8, loc="lower left")
        return figure

    def _title(self) -> str:
        details = self.details or {}
        parts = [details.get("name") or "learning rate range test"]
        if "updates" in details:
            parts += [f"B = {details['batch_size']}", f"{details['updates']:,} updates"]
            if details["repetitions"] > 1:
                parts.append(f"mean of {details['repetitions']} orders")
        return ", ".join(parts)

    def save(self, folder: str | Path) -> None:
        """Write `find_lr.json`, `find_lr.png` and TensorBoard events into a folder."""
        from torch.utils.tensorboard import SummaryWriter

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        (path / "find_lr.json").write_text(text, encoding="utf-8")
        figure = self.plot()
        figure.savefig(path / "find_lr.png", dpi=120)
        with SummaryWriter(str(path)) as writer:
            columns = {"loss": self.losses, "smoothed": self.smoothed, "lr": self.rates}
            for name, values in columns.items():
                for index, value in enumerate(values.tolist()):
                    writer.add_scalar(f"find_lr/{name}", value, index)
            writer.add_text("find_lr/suggestion", self.basis)
            writer.add_figure("find_lr/curve", figure)


def find_lr(
    objective: Objective,
    optimizer: Optimizer,
    plan: IndexLoader,
    *,
    engine: EngineName = "auto",
    min_lr: float = 1e-6,
    max_lr: float = 1e2,
    updates: int | None = None,
    repetitions: int | None = None,
    curvature: bool = True,
    total: int | None = None,
) -> RateCurve:
    """Range test of a model and an optimizer, which leaves both as they were.

    A test ends early where the loss is no longer finite, or 4 times the start's above the best.

    Args:
        objective: J on the training examples.
        optimizer: Of its parameters; its lr is not used (with several groups: their ratios).
        plan: Which examples make which update: N, B, sampling and seed.
        engine: As for `gdtrain.engines.choose`; "compiled" takes too long, and stands for "auto".
        min_lr: η_min, range (0, max_lr).
        max_lr: η_max, range (min_lr, ∞).
        updates: Of one test, range [20, ∞); None: 200 for B = N, else 5000/B, at least 1000.
        repetitions: Tests in different orders, range [1, ∞); None: 1 for B = N, else 3.
        curvature: Whether to measure λ at the start, where B = N: the limit is drawn in.
        total: N, where the objective has only some of the training examples.

    Returns:
        The curve, with the suggestion and its basis, by the rule of `suggest`.

    Raises:
        ValueError: An argument is out of range; the optimizer computes η by itself; the loss is
            not finite before any update; model, loss and examples do not fit.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.losses import SquaredError
        >>> x = torch.linspace(-1, 1, 50)[:, None]
        >>> model = torch.nn.Linear(1, 1)
        >>> objective = Objective(model, SquaredError(), x, 3 * x + 1)
        >>> optimizer = GD(model.parameters(), lr=1.0)
        >>> curve = find_lr(objective, optimizer, IndexLoader(50, 50))
        >>> 0.1 < curve.suggestion < curve.limit  # 2/λ = 2
        True

    References:
        Smith, Cyclical learning rates for training neural networks, 2017, arXiv 1506.01186.
    """
    _POSITIVE.check("min_lr", min_lr)
    _POSITIVE.check("max_lr", max_lr)
    if not min_lr < max_lr:
        raise ValueError(
            f"min_lr must be below max_lr. Received: min_lr={min_lr:g}, max_lr={max_lr:g}."
        )
    many, size = plan.num_examples, plan.batch_size
    full = size == (total or many) and plan.sampling != "replacement"
    if updates is None:
        updates = 200 if full else max(1000, 5000 // size)
    if repetitions is None:
        repetitions = 1 if full else 3
    Whole(20).check("updates", updates)
    Whole(1).check("repetitions", repetitions)
    rates = np.geomspace(min_lr, max_lr, updates)
    cuts = np.unique(np.linspace(0, updates, min(_POINTS, updates) + 1).round().astype(int))[1:]
    _refuse_what_has_no_rate(objective, optimizer)
    with _training(objective.model), trial(objective, optimizer) as before:
        test = _RangeTest(objective, optimizer, plan, before)
        check_examples(
            objective.model,
            objective.loss,  # type: ignore[arg-type]
            objective.inputs,
            objective.targets,
        )
        start = test.value()
        if not math.isfinite(start):
            raise ValueError(
                f"The mean training loss must be finite before any update. Received: {start}. "
                f"Look for such numbers in the data and the model's weights."
            )
        asked: EngineName = "auto" if engine == "compiled" else engine
        runs = [test.run(asked, rates, cuts, start, number) for number in range(repetitions)]
        points = max(len(run) for run in runs)
        losses, errors = _average(runs, points, start)
        curve = suggest(rates[cuts[:points] - 1], losses, start, errors=errors, full_batch=full)
        if curvature and full:
            test.add_limit(curve)
    curve.details = {
        "updates": updates,
        "updates_made": int(sum(cuts[len(run) - 1] for run in runs)),
        "repetitions": repetitions,
        "batch_size": size,
        "examples": many,
        "min_lr": min_lr,
        "max_lr": max_lr,
        "engine": test.engine,
    }
    return curve


def _refuse_what_has_no_rate(objective: Objective, optimizer: Optimizer) -> None:
    if not objective.params:
        raise ValueError("The model has no parameter to train.")
    rule = step_size_of(optimizer)
    if rule is not None:
        raise ValueError(
            f"There is no rate to find where a rule computes the step size. Received: "
            f"step_size={rule!r}. Give the optimizer a number: lr=1.0."
        )
    units = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
    if not min(units) > 0:
        raise ValueError(
            f"lr must be > 0 in each parameter group: the test scales it. Received: lr={units}."
        )


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Within it the model is in training mode; after it, each layer is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        if not model.training:
            model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _RangeTest:
    """Descents from one start with a growing η, and J on the examples that it is read on."""

    def __init__(
        self, objective: Objective, optimizer: Optimizer, plan: IndexLoader, start: Snapshot
    ) -> None:
        self.objective, self.optimizer, self.plan, self.start = objective, optimizer, plan, start
        self.device = objective.targets.device
        generator = np.random.default_rng(plan.seed)
        picked = generator.permutation(plan.num_examples)[:_SAMPLE]
        self.sample = torch.from_numpy(np.sort(picked)).to(self.device)
        self.engine = ""  # its name, once there is one

    def value(self) -> float:
        """J on the sample, with the same random numbers each time."""
        size = _PASS
        if isinstance(self.objective.inputs, SparseInputs):
            size = min(size, self.objective.inputs.rows_at_once)
        total = 0.0
        for part in self.sample.split(size):
            total += float(self.objective.losses(part, draw=self.plan.seed & (2**30 - 1)).sum())
        return total / len(self.sample)

    def run(
        self,
        asked: EngineName,
        rates: NDArray[np.float64],
        cuts: NDArray[np.int64],
        start: float,
        number: int,
    ) -> list[float]:
        """J after the updates before each cut, up to the first that exploded, which is included."""
        self._back_to_start()
        engine, why = choose(asked, self.objective, self.optimizer, len(rates))
        if not self.engine:
            self.engine = engine.name
            _log.info("engine: %s (%s)", engine.name, why)
        plan, seed = self.plan, self.plan.seed + number
        plan = IndexLoader(plan.num_examples, plan.batch_size, sampling=plan.sampling, seed=seed)
        factors = torch.from_numpy(rates / float(self.optimizer.param_groups[0]["initial_lr"]))
        draw = (seed & (2**30 - 1)) << 32
        values: list[float] = []
        best, t = start, 0
        for cut in cuts.tolist():
            finite = True
            while t < cut and finite:
                block = plan.block(t, cut - t).to(self.device)
                losses = engine(block, factors[t : t + len(block)], draw + t)
                finite = bool(losses.isfinite().all())
                t += len(block)
            value = self.value() if finite else math.inf
            values.append(value)
            best = min(best, value)
            if not math.isfinite(value) or value > best + _EXPLODED * max(abs(start), start - best):
                break
        return values

    def _back_to_start(self) -> None:
        """But for the generators: repetitions differ in what layers draw, too."""
        states = RandomStates.now([self.objective.params[0].device])
        self.start.give_back()
        states.restore()
        for p in self.objective.params:
            p.grad = None
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def add_limit(self, curve: RateCurve) -> None:
        """λ and the limit of the rule at hand, where there is one, and words for it."""
        self._back_to_start()
        groups = self.optimizer.param_groups
        same = ("initial_lr", "momentum", "dampening", "nesterov")
        if (
            update_rules(self.optimizer) is None
            or any(g["maximize"] for g in groups)
            or any(g[name] != groups[0][name] for g in groups for name in same)
        ):
            return
        try:
            found = sharpness(self.objective, optimizer=self.optimizer)
        except ValueError as error:  # such as a layer without a second derivative
            curve.basis += f" No stability limit: {error}"
            return
        limit = limit_of(found, self.optimizer)
        if limit is None:
            curve.basis += f" No stability limit: λ = {found.value:.3g} at the start."
            return
        curve.limit, curve.sharpness = limit, found.value
        curve.basis += f" Stability limit {limit:.3g}, from λ = {found.value:.3g} at the start."


def _average(
    runs: list[list[float]], points: int, start: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard error of the runs, (P,) each; after its end a run counts as cut off."""
    top = start + max(abs(start), 1e-12)
    table = np.full((len(runs), points), top)
    for row, run in zip(table, runs, strict=True):
        row[: len(run)] = np.minimum(np.where(np.isfinite(run), run, top), top)
    if len(runs) == 1:
        return np.asarray(runs[0], dtype=np.float64), np.zeros(points)
    return table.mean(0), table.std(0, ddof=1) / math.sqrt(len(runs))


def suggest(
    rates: NDArray[np.float64],
    losses: NDArray[np.float64],
    start: float,
    *,
    errors: NDArray[np.float64] | None = None,
    full_batch: bool = True,
) -> RateCurve:
    """The rule that reads a curve of a range test; J₀ = `start`, P ≥ 10 points.

    The loss, cut off above J₀ + |J₀|, is smoothed by a quadratic in log₁₀ η, fitted at each point
    with tricube weights over 0.35 decades to both sides, times 1/(s² + median s²) for standard
    errors s (Cleveland, 1979). Then

        turn     = the η of the lowest smoothed loss, before it has first risen again by half of
                   its fall; or the first η with J < 0.01 J₀ if that comes before (there is nothing
                   left then that could turn)
        steepest = the η up to the turn at which dJ/d log₁₀ η is lowest
        η        = max(turn/c, min(steepest, turn/2)),  c = 4 for B = N, 2 for B < N.

    The turn is a property of the problem. The steepest point, which other finders suggest, is one
    of the test (twice the updates halve it), and serves as a lower bound only. A fall counts from
    0.001 |J₀| on, and from three times the noise, which is the larger of median s and 1.48 times
    the median distance of the losses from the smoothed ones; without one there is no suggestion.
    """
    s = np.zeros(len(losses)) if errors is None else np.asarray(errors, dtype=np.float64)
    if not len(rates) == len(losses) == len(s) or len(rates) < 10:
        raise ValueError(
            f"A curve needs at least 10 points, with a rate, a loss and an error each. Received: "
            f"{len(rates)} rates, {len(losses)} losses, {len(s)} errors. If the test ended too "
            f"early, lower min_lr or raise updates."
        )
    top = start + max(abs(start), 1e-12)
    cut = np.minimum(np.where(np.isfinite(losses), losses, top), top)
    middle = float(np.median(s))
    weights = 1 / (s**2 + middle**2) if middle > 0 else np.ones_like(s)
    smoothed, slopes = _smooth(np.log10(rates), cut, weights / weights.max())
    curve = RateCurve(rates, losses, s, smoothed, slopes, start)
    least = np.minimum.accumulate(smoothed)
    noise = max(middle, 1.48 * float(np.median(np.abs(cut - smoothed))))
    enough = max(_FALL * abs(start), 3 * noise)
    risen = (start - least >= enough) & (smoothed > (start + least) / 2)
    end = int(risen.argmax()) if risen.any() else len(rates)
    lowest = int(smoothed[:end].argmin())
    fall = start - float(smoothed[lowest])
    clear = bool((start - smoothed > 3 * s).any())
    if lowest == 0 or fall < enough or not clear:
        curve.basis = (
            f"No suggestion: between {rates[0]:.2g} and {rates[-1]:.2g} the loss does not fall "
            f"from its start, {start:.4g} (its lowest, smoothed: {smoothed[lowest]:.4g})."
            + (" It rises from the first rates on: lower min_lr." if slopes[0] > 0 else "")
        )
        return curve
    gone = np.flatnonzero(cut < _GONE * start)
    why = "turned" if lowest < len(rates) - 1 else "range"
    if len(gone) and gone[0] < lowest:
        lowest, why = max(int(gone[0]), 1), "gone"
    steepest = int(slopes[: lowest + 1].argmin())
    margin = _MARGIN_FULL if full_batch else _MARGIN_BATCH
    turn, fastest = float(rates[lowest]), float(rates[steepest])
    bound = min(fastest, turn / 2)
    curve.turn, curve.steepest = turn, fastest
    curve.suggestion = float(f"{max(turn / margin, bound):.1e}")
    curve.basis = (
        f"{curve.suggestion:.2g}, which is "
        + (
            f"the turn divided by {margin:g} ({'B = N' if full_batch else 'B < N'})"
            if turn / margin >= bound
            else f"where the loss falls fastest (more than the turn divided by {margin:g})"
            if bound == fastest
            else "half of the turn (the loss falls fastest close to it)"
        )
        + f". The loss falls from {start:.4g}, fastest at η = {fastest:.2g} "
        + f"({slopes[steepest]:.3g} per decade), "
        + {
            "turned": f"and turns at η = {turn:.2g} ({smoothed[lowest]:.4g}).",
            "gone": f"and is below {_GONE:.0%} of that from η = {turn:.2g} on: what happens beyond "
            f"says nothing.",
            "range": f"and has not turned at η = {turn:.2g} ({smoothed[lowest]:.4g}), where the "
            f"test ends: raise max_lr to see more.",
        }[why]
    )
    return curve


def _smooth(
    x: NDArray[np.float64], y: NDArray[np.float64], weights: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Value and slope at each x of the quadratic that fits its neighbours best, (P,) each."""
    fitted = np.empty((len(x), 2))
    for i, centre in enumerate(x):
        distance = x - centre
        # At least 6 points: more decades where they lie wide.
        radius = max(_BANDWIDTH, np.sort(np.abs(distance))[6] * 1.001)
        near = np.abs(distance) < radius
        d = distance[near]
        root = np.sqrt((1 - np.abs(d / radius) ** 3) ** 3 * weights[near])
        design = np.stack([np.ones_like(d), d, d * d], 1)
        fitted[i] = np.linalg.lstsq(design * root[:, None], y[near] * root, rcond=None)[0][:2]
        # No lower and no higher than what it smooths: at the ends a quadratic would be.
        fitted[i, 0] = fitted[i, 0].clip(y[near].min(), y[near].max())
    return fitted[:, 0], fitted[:, 1]


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
