"""Find a learning rate: descend with a growing η, look where the loss falls and where it turns.

N examples, B examples per update, J mean training loss. Over T updates η grows geometrically,

    η_k = η_min (η_max/η_min)^(k/(T−1)),  k = 0 … T−1,

and J is read at up to 100 of them, always on the same examples, so that the curve has no noise from
the choice of a batch. Where B < N the test is made several times in different orders and averaged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from gdtrain.analysis.curvature import sharpness, stability_limit
from gdtrain.analysis.rate_curve import RateCurve, suggest
from gdtrain.data.loader import IndexLoader
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.trial import Snapshot
from gdtrain.engines import EngineName, choose
from gdtrain.generators import RandomStates
from gdtrain.objective import Objective, evaluating, prediction_of
from gdtrain.optim.protocol import step_size_of, update_rules
from gdtrain.ranges import Interval, Whole

__all__ = ["find_lr"]

_log = logging.getLogger("gdtrain")

_POINTS = 100  # at which J is read
_SAMPLE = 4096  # examples on which it is read, at most
_PASS = 1024  # of them in one forward pass
_EXPLODED = 4  # times the start's loss, above the best
_POSITIVE = Interval(0, math.inf)


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

    Parameters, buffers, gradients, the optimizer's state and the generators are put back. A test
    ends early where the loss is no longer finite, or 4 times the start's loss above the best.

    Args:
        objective: J on the training examples.
        optimizer: Of its parameters; its lr is not used (with several groups: their ratios).
        plan: Which examples make which update: N, B, sampling and seed.
        engine: As for `gdtrain.engines.choose`; "compiled" is taken for "auto", since a compiler
            would take longer than these few updates.
        min_lr: η_min, range (0, max_lr).
        max_lr: η_max, range (min_lr, ∞).
        updates: Of one test, range [20, ∞); None: 200 for B = N, else 5000/B, at least 1000.
        repetitions: Tests in different orders, range [1, ∞); None: 1 for B = N, else 3.
        curvature: Whether to measure λ at the start, where B = N: the limit is drawn in.
        total: N, where the objective has only some of the training examples.

    Returns:
        The curve, with the suggestion (see `gdtrain.analysis.rate_curve.suggest`) and its basis.

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
    test = _RangeTest(objective, optimizer, plan, "auto" if engine == "compiled" else engine)
    with test.training():
        _check_fit(objective)
        start = test.value_at_start()
        runs = [test.run(rates, cuts, start, number) for number in range(repetitions)]
        largest, limit, words = test.limit() if curvature and full else (None, None, "")
    points = max(len(run) for run in runs)
    losses, errors = _average(runs, points, start)
    curve = suggest(rates[cuts[:points] - 1], losses, start, errors=errors, full_batch=full)
    curve.limit, curve.sharpness = limit, largest
    curve.basis += words
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


def _check_fit(objective: Objective) -> None:
    """Run two examples, so that a misfit is told in words."""
    inputs, targets = objective.inputs, objective.targets
    flat = targets.reshape(len(targets), -1)[:, 0]
    extremes = torch.stack([flat.argmin(), flat.argmax()])
    with evaluating(objective.model), torch.no_grad():
        try:
            output = objective.model(inputs[extremes])
        except RuntimeError as error:
            raise ValueError(
                f"The model does not take examples of shape {tuple(inputs[:1].shape[1:])}: {error}"
            ) from error
        objective.loss.check(prediction_of(output), targets[extremes])  # type: ignore[attr-defined]


class _RangeTest:
    """Descents from one start with a growing η, and J on the examples that it is read on."""

    def __init__(
        self, objective: Objective, optimizer: Optimizer, plan: IndexLoader, engine: EngineName
    ) -> None:
        self.objective, self.optimizer, self.plan = objective, optimizer, plan
        self.device = objective.targets.device
        generator = np.random.default_rng(plan.seed)
        picked = generator.permutation(plan.num_examples)[:_SAMPLE]
        self.sample = torch.from_numpy(np.sort(picked)).to(self.device)
        self.engine: str = ""  # its name, once there is one
        self._asked = engine
        self._start: Snapshot

    @contextmanager
    def training(self) -> Iterator[None]:
        """The model in training mode; in the end all that a test changes is as it was."""
        model = self.objective.model
        modes = [(module, module.training) for module in model.modules()]
        self._start = Snapshot(self.objective, self.optimizer)
        try:
            if not model.training:
                model.train()
            yield
        finally:
            self._start.give_back()
            for module, mode in modes:
                module.training = mode

    def value(self) -> float:
        """J on the sample, with the same random numbers each time."""
        size = _PASS
        if isinstance(self.objective.inputs, SparseInputs):
            size = min(size, self.objective.inputs.rows_at_once)
        total = 0.0
        for part in self.sample.split(size):
            total += float(self.objective.losses(part, draw=self.plan.seed & (2**30 - 1)).sum())
        return total / len(self.sample)

    def value_at_start(self) -> float:
        value = self.value()
        if not math.isfinite(value):
            raise ValueError(
                f"The mean training loss must be finite before any update. Received: {value}. "
                f"Look for such numbers in the data and the model's weights."
            )
        return value

    def run(
        self, rates: NDArray[np.float64], cuts: NDArray[np.int64], start: float, number: int
    ) -> list[float]:
        """J after the updates before each cut, up to the first that exploded, which is included."""
        self._back_to_start()
        engine, why = choose(self._asked, self.objective, self.optimizer, len(rates))
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
        self._start.give_back()
        states.restore()
        for p in self.objective.params:
            p.grad = None
        for group in self.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def limit(self) -> tuple[float | None, float | None, str]:
        """λ and the limit of the rule at hand, in words; None where there is none."""
        self._back_to_start()
        groups = self.optimizer.param_groups
        group = groups[0]
        same = ("initial_lr", "momentum", "dampening", "nesterov")
        if (
            update_rules(self.optimizer) is None
            or any(g["maximize"] for g in groups)
            or any(g[name] != group[name] for g in groups for name in same)
        ):
            return None, None, ""
        try:
            found = sharpness(self.objective, optimizer=self.optimizer)
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
