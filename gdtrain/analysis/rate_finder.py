"""Find a learning rate: descend with a growing η, look where the loss falls and where it turns.

N examples, B examples per update, J mean training loss. Over T updates η grows geometrically,

    η_k = η_min (η_max/η_min)^(k/(T−1)),  k = 0 … T−1,

and J is read at up to 100 of them, always on the same examples, so that the curve has no noise from
the choice of a batch. Where B < N the test is made several times in different orders and averaged.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.data import DataModule
from gdtrain.data.loader import IndexLoader
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.optimizer import parameter_groups
from gdtrain.engines import choose
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import Objective, prediction_of, untouched
from gdtrain.optim import GD, SGD, MiniBatchSGD

__all__ = ["RateCurve", "find_lr", "suggest"]

_log = logging.getLogger("gdtrain")

_POINTS = 100  # at which J is read
_SAMPLE = 4096  # examples on which it is read, at most
_PASS = 1024  # of them in one forward pass
_BANDWIDTH = 0.35  # decades, of the local polynomial
_EXPLODED = 4  # times the start's loss, above the best
_GONE = 0.01  # of the start's loss: below it there is nothing left to turn
_FALL = 0.001  # of the start's loss: the least that counts as a fall
# The turn is divided by it. Full batch: the loss reacts late, since what grows beyond the limit
# starts from nearly nothing. B < N: noise turns the curve before any limit does.
_MARGIN_FULL, _MARGIN_BATCH = 4.0, 2.0
_DESCENTS = (GD, SGD, MiniBatchSGD, torch.optim.SGD)


@dataclass
class RateCurve:
    """What a range test found. P points.

    Args:
        rates: η, (P,), growing.
        losses: J after the update with that η, mean over the repetitions, (P,).
        errors: Standard error of that mean, (P,); 0 for one repetition.
        smoothed: J by local quadratic regression on log₁₀ η, (P,).
        slopes: dJ/d log₁₀ η of it, (P,), loss per decade.
        start: J before any update.
        suggestion: η; None: the loss nowhere falls.
        basis: Why that one, in words and numbers.
        steepest: η at which the smoothed loss falls fastest; None as for `suggestion`.
        turn: The largest η before the loss turns; None as for `suggestion`.
        limit: Stability limit at the start, 2/λ for plain descent; None where there is none.
        sharpness: λ, the largest eigenvalue of the objective's Hessian at the start; None where
            `limit` is.
        details: Updates, repetitions, batch size, engine and the like; plain values.

    Example:
        >>> flat = np.ones(2)
        >>> curve = RateCurve(np.array([0.1, 1.0]), flat, 0 * flat, flat, 0 * flat, 1.0, None, "")
        >>> curve.to_dict()["rates"]
        [0.1, 1.0]
    """

    rates: NDArray[np.float64]
    losses: NDArray[np.float64]
    errors: NDArray[np.float64]
    smoothed: NDArray[np.float64]
    slopes: NDArray[np.float64]
    start: float
    suggestion: float | None
    basis: str
    steepest: float | None = None
    turn: float | None = None
    limit: float | None = None
    sharpness: float | None = None
    details: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers, in plain containers; None for what is not finite."""
        return {name: _plain(value) for name, value in vars(self).items()}

    def rows(self) -> dict[int, str]:
        """Points for a table, about two in each decade, and what is found near some of them.

        Returns:
            Their numbers, ascending, with words such as "turn", or nothing.
        """
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
        """Loss and its slope against η.

        Returns:
            A matplotlib figure; `.savefig(path)` keeps it.
        """
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
        what = details.get("name", "")
        count = details.get("repetitions", 1)
        size = details.get("batch_size")
        parts = [
            what or "learning rate range test",
            f"B = {size}" if size else "",
            f"{details['updates']:,} updates" if "updates" in details else "",
            f"mean of {count} orders" if count > 1 else "",
        ]
        return ", ".join(part for part in parts if part)

    def save(self, folder: str | Path) -> None:
        """Write `find_lr.json`, `find_lr.png` and TensorBoard events.

        Args:
            folder: Made if it is not there.
        """
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
            writer.add_image("find_lr/curve", _pixels(figure), dataformats="HWC")


def find_lr(
    module: SupervisedModule,
    data: DataModule,
    *,
    min_lr: float = 1e-6,
    max_lr: float = 1e2,
    updates: int | None = None,
    repetitions: int | None = None,
    curvature: bool = True,
) -> RateCurve:
    """Range test of a module on its training data, which leaves both as they were.

    The updates are made on copies of the model, the loss and the optimizer, with loaders of its
    own; the random states are put back. A test ends early where the loss is no longer finite, or
    4 times the start's loss above the best. The module's schedule takes no part.

    Args:
        module: As for training; its optimizer's lr is not used (with several groups: their
            ratios).
        data: The training part, its batch size and its seed.
        min_lr: η_min, range (0, max_lr).
        max_lr: η_max, range (min_lr, ∞).
        updates: T of one test, range [20, ∞); None: 200 for B = N, else 5000/B, at least 1000.
        repetitions: Tests in different orders, range [1, ∞); None: 1 for B = N, else 3.
        curvature: Whether to measure λ at the start, where B = N: the limit is drawn in.

    Returns:
        The curve, with the suggestion (see `suggest`) and its basis.

    Raises:
        ValueError: An argument is out of range; the optimizer computes η by itself; the loss is
            not finite before any update; model, loss and data do not fit.

    Example:
        >>> from functools import partial
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import Linear
        >>> data = EmbeddedDataModule("iris", batch_size="full")
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(GD, lr=1.0))
        >>> curve = find_lr(module, data, curvature=False)
        >>> 1 < curve.suggestion < 10
        True

    References:
        Smith, Cyclical learning rates for training neural networks, 2017, arXiv 1506.01186.
    """
    _check_arguments(min_lr, max_lr, updates, repetitions)
    data.setup()
    with untouched(module.model):
        test = _Test(module, data)
        full = test.full
        count = updates or (200 if full else max(1000, 5000 // test.batch_size))
        times = repetitions or (1 if full else 3)
        rates = np.geomspace(min_lr, max_lr, count)
        cuts = np.unique(np.linspace(0, count, min(_POINTS, count) + 1).round().astype(int))[1:]
        started = test.loss_at_start()
        runs = [test.run(rates, cuts, started, number) for number in range(times)]
        sharpness, limit, words = test.limit() if curvature and full else (None, None, "")
    points = max(len(run) for run in runs)
    losses, errors = _average(runs, points, started)
    curve = suggest(rates[cuts[:points] - 1], losses, started, errors=errors, full_batch=full)
    curve.limit, curve.sharpness = limit, sharpness
    curve.basis += words
    curve.details = {
        "updates": count,
        "updates_made": int(sum(cuts[len(run) - 1] for run in runs)),
        "repetitions": times,
        "batch_size": test.batch_size,
        "examples": test.num_examples,
        "min_lr": min_lr,
        "max_lr": max_lr,
        "engine": test.engine,
    }
    return curve


def suggest(
    rates: NDArray[np.float64],
    losses: NDArray[np.float64],
    start: float,
    *,
    errors: NDArray[np.float64] | None = None,
    full_batch: bool = True,
) -> RateCurve:
    """The rule that reads a curve of a range test.

    The loss, cut off above J₀ + |J₀|, is smoothed by a quadratic in log₁₀ η, fitted at each point
    with tricube weights over 0.35 decades to both sides, times 1/(s² + median s²) for standard
    errors s. Then

        turn     = the η of the lowest smoothed loss, before it has first risen again by half of
                   its fall; or the first η with J < 0.01 J₀ if that comes before (there is nothing
                   left then that could turn)
        steepest = the η up to the turn at which dJ/d log₁₀ η is lowest
        η        = max(turn/c, min(steepest, turn/2)),  c = 4 for B = N, 2 for B < N.

    The turn is a property of the problem. The steepest point, which other finders suggest, is one
    of the test: it lies where η × (updates per e-fold of η) is about 1/λ, so that twice the updates
    halve it. It serves as a lower bound only. A fall counts from 0.001 |J₀| on, and from three
    times the noise, which is the larger of median s and 1.48 times the median distance of the
    losses from the smoothed ones. Without such a fall there is no suggestion.

    Args:
        rates: η, (P,), growing, P ≥ 10.
        losses: J, (P,); what is not finite counts as cut off.
        start: J₀, finite.
        errors: Standard errors of the losses, (P,); None: 0.
        full_batch: Whether B = N.

    Returns:
        The curve, smoothed, with suggestion and basis.

    Raises:
        ValueError: Fewer than 10 points, or arrays of different lengths.

    Example:
        >>> rates = np.geomspace(1e-4, 10, 60)
        >>> losses = np.where(rates < 1, 1 / (1 + 20 * rates), 5.0)
        >>> curve = suggest(rates, losses, 1.0)
        >>> 0.1 < curve.suggestion < 0.5
        True

    References:
        Cleveland, Robust locally weighted regression and smoothing scatterplots, 1979.
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
    curve = RateCurve(rates, losses, s, smoothed, slopes, start, None, "")
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
    curve.suggestion = _two_digits(max(turn / margin, bound))
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


# ---------------------------------------------------------------------- the test


class _Test:
    """Copies of all that an update changes, and the examples that J is read on."""

    def __init__(self, module: SupervisedModule, data: DataModule) -> None:
        self.module, self.data = module, data
        parameter = next((p for p in module.model.parameters() if p.requires_grad), None)
        if parameter is None:
            raise ValueError("The model has no parameter to train.")
        inputs, targets = objective_examples(data)
        self.inputs, self.targets = (
            t.to(parameter.device, parameter.dtype if t.is_floating_point() else None)
            for t in (inputs, targets)
        )
        self.num_examples = len(self.inputs)
        self.batch_size = min(data.examples_per_update, self.num_examples)
        self.full = data.examples_per_update == data.num_train and data.sampling != "replacement"
        generator = np.random.default_rng(data.seed)
        picked = generator.permutation(self.num_examples)[:_SAMPLE]
        self.sample = torch.from_numpy(np.sort(picked)).to(parameter.device)
        self.engine = ""
        self._check()

    def _check(self) -> None:
        """Run two examples, so that a misfit is told in words."""
        model = copy.deepcopy(self.module.model).eval()
        flat = self.targets.reshape(len(self.targets), -1)[:, 0]
        extremes = torch.stack([flat.argmin(), flat.argmax()])
        with torch.no_grad():
            try:
                output = model(self.inputs[extremes])
            except RuntimeError as error:
                raise ValueError(
                    f"The model does not take examples of shape {tuple(self.inputs.shape[1:])}: "
                    f"{error}"
                ) from error
            self.module.loss.check(prediction_of(output), self.targets[extremes])

    def _copies(self) -> tuple[Objective, Optimizer]:
        """A model like the module's, with an optimizer of its parameters."""
        source = (self.module.model, self.module.loss, self.module._make_optimizer)
        model, loss, made = copy.deepcopy(source)  # together: an optimizer holds parameters
        if not model.training:
            model.train()
        optimizer = (
            made
            if isinstance(made, Optimizer)
            else made(parameter_groups(model, self.module.decay_biases))
        )
        rule = getattr(optimizer, "step_size", None)
        if self.module.step_size not in (None, "auto"):
            rule = self.module.step_size
        if rule is not None:
            raise ValueError(
                f"There is no rate to find where a rule computes the step size. Received: "
                f"step_size={rule!r}. Give the optimizer a number: lr=1.0."
            )
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        if not all(float(g["initial_lr"]) > 0 for g in optimizer.param_groups):
            raise ValueError(
                "lr must be > 0 in each parameter group: the test scales it. Received: "
                f"lr={[float(g['initial_lr']) for g in optimizer.param_groups]}."
            )
        micro: Any = self.data.micro_batch_size
        if micro is None and isinstance(self.inputs, MappedInputs):
            micro = "auto"
        if micro is None and isinstance(self.inputs, SparseInputs):
            most = self.inputs.rows_at_once
            micro = most if self.batch_size > most else None
        return Objective(model, loss, self.inputs, self.targets, micro), optimizer

    def _value(self, objective: Objective) -> float:
        """J on the sample, with the same random numbers each time."""
        size = _PASS
        if isinstance(self.inputs, SparseInputs):
            size = min(size, self.inputs.rows_at_once)
        total = 0.0
        for part in self.sample.split(size):
            total += float(objective.losses(part, draw=self.data.seed & (2**30 - 1)).sum())
        return total / len(self.sample)

    def loss_at_start(self) -> float:
        value = self._value(self._copies()[0])
        if not math.isfinite(value):
            raise ValueError(
                f"The mean training loss must be finite before any update. Received: {value}. "
                f"Look for such numbers in the data and the model's weights."
            )
        return value

    def run(
        self,
        rates: NDArray[np.float64],
        cuts: NDArray[np.int64],
        start: float,
        number: int,
    ) -> list[float]:
        """J after the updates before each cut, up to the first that exploded, which is included."""
        objective, optimizer = self._copies()
        # A compiler would take longer than these few updates.
        name = "auto" if self.module.engine == "compiled" else self.module.engine
        engine, why = choose(name, objective, optimizer, len(rates))
        if not self.engine:
            self.engine = engine.name
            _log.info("engine: %s (%s)", engine.name, why)
        unit = float(optimizer.param_groups[0]["initial_lr"])
        factors = torch.from_numpy(rates / unit)
        blocks = self._blocks(len(rates), number)
        pending = torch.empty(0, 1, dtype=torch.int64)
        draw = (self.data.seed + number & (2**30 - 1)) << 32
        values: list[float] = []
        best, t = start, 0
        for cut in cuts.tolist():
            finite = True
            while t < cut and finite:
                if not len(pending):
                    pending = next(blocks)
                now, pending = pending[: cut - t], pending[cut - t :]
                finite = bool(engine(now, factors[t : t + len(now)], draw + t).isfinite().all())
                t += len(now)
            value = self._value(objective) if finite else math.inf
            values.append(value)
            best = min(best, value)
            if not math.isfinite(value) or value > best + _EXPLODED * max(abs(start), start - best):
                break
        return values

    def _blocks(self, total: int, number: int) -> Iterator[Tensor]:
        loader = IndexLoader(
            self.num_examples,
            self.batch_size,
            sampling=self.data.sampling,
            seed=self.data.seed + number,
            total=total,
            updates_per_sweep=4096,
        )
        loader.epochs_per_iteration = None
        return iter(loader)

    def limit(self) -> tuple[float | None, float | None, str]:
        """λ and the limit of the rule at hand, in words; None where there is none."""
        objective, optimizer = self._copies()
        group = optimizer.param_groups[0]
        same = ("initial_lr", "momentum", "dampening", "nesterov")
        if (
            not isinstance(optimizer, _DESCENTS)
            or any(g["maximize"] for g in optimizer.param_groups)
            or any(g[name] != group[name] for g in optimizer.param_groups for name in same)
        ):
            return None, None, ""
        from gdtrain.analysis.curvature import sharpness, stability_limit

        try:
            found = sharpness(objective, optimizer=optimizer)
        except ValueError as error:  # such as a layer without a second derivative
            return None, None, f" No stability limit: {error}"
        limit = stability_limit(
            found, *(float(group["momentum"]), bool(group["nesterov"]), float(group["dampening"]))
        )
        if not math.isfinite(limit):
            return None, None, f" No stability limit: λ = {found.value:.3g} at the start."
        return (
            found.value,
            limit,
            f" Stability limit {limit:.3g}, from λ = {found.value:.3g} at the start.",
        )


def objective_examples(data: DataModule) -> tuple[Any, Tensor]:
    """The training examples; of a Dataset that is fetched one by one, as many as J is read on.

    (For B = N all of them, which make one batch.)
    """
    loader = data.train_dataloader()
    if isinstance(loader, IndexLoader):
        return data.examples("train")
    pairs: list[tuple[Tensor, Tensor]] = []
    try:
        for pair in loader:
            pairs.append(pair)
            if sum(len(y) for _, y in pairs) >= min(_SAMPLE, data.num_train):
                break
    finally:
        loader.close()
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def _check_arguments(
    min_lr: Any, max_lr: Any, updates: int | None, repetitions: int | None
) -> None:
    for name, rate in (("min_lr", min_lr), ("max_lr", max_lr)):
        number = isinstance(rate, int | float) and not isinstance(rate, bool)
        if not number or not 0 < rate < math.inf:
            raise ValueError(f"{name} must be finite and > 0. Received: {name}={rate}.")
    if not min_lr < max_lr:
        raise ValueError(
            f"min_lr must be below max_lr. Received: min_lr={min_lr:g}, max_lr={max_lr:g}."
        )
    for name, count, least in (("updates", updates, 20), ("repetitions", repetitions, 1)):
        if count is None:
            continue
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(
                f"{name} must be a whole number of at least {least}. Received: {name}={count}."
            )


# ---------------------------------------------------------------------- the curve


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


def _two_digits(x: float) -> float:
    return float(f"{x:.1e}")


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(v) for v in value.tolist()]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _pixels(figure: Any) -> NDArray[np.uint8]:
    """(height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
