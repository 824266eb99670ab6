"""Step-size rules against the best of 13 constant rates, at equal passes over the data.

    python scripts/bench/step_sizes.py                        # lr=auto, all tasks
    python scripts/bench/step_sizes.py --rules auto,dowg,sps,armijo,bb,polyak --plot profiles.png
    python scripts/bench/step_sizes.py --only digits --part unseen
    python scripts/bench/step_sizes.py --part generated       # further tasks, on generated data

A task is a data set, a scaling of its features, a model and B. Each rate of the grid 10^(−4), …,
10² makes the whole budget from three seeds; the winner and each rule are scored on five others. A
pass is N examples in a forward (and backward) pass: what a race or a line search looks at counts.

    gap = (f − f_best) / (f₀ − f*)

f the objective on all training examples at the end, its mean over the seeds; f_best that of the
grid's winner, f₀ at the start, f* an exact solver's (0 for networks). The winner's own score on
fresh seeds, against that on its own, is the noise of the measure.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from comparison import at_least_one, environment, use_threads, write_json
from lightning import Callback, Trainer
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize
from sklearn import datasets
from sklearn.svm import SVC
from torch import Tensor, nn

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.data import ArrayDataModule
from gdtrain.losses import CrossEntropy, Hinge, Logistic, Loss, SquaredError
from gdtrain.models import CNN, MLP, Linear
from gdtrain.optim.protocol import step_size_of
from gdtrain.schedules import Constant
from gdtrain.step_sizes import (
    Armijo,
    BarzilaiBorwein,
    DoG,
    DoWG,
    Polyak,
    ScheduleFree,
    StochasticLineSearch,
    StochasticPolyak,
)

GRID = [10 ** (power / 2) for power in range(-8, 5)]
PASSES = {"full": 400, 1: 10, 32: 30, 128: 30}
CNN_PASSES = {"full": 60, 1: 2, 32: 8, 128: 10}
POINTS = 25  # at which the objective is looked at during a run
TARGET = 0.05  # of the way to f*, above the best rate's end: a profile's target


@dataclass(frozen=True)
class Task:
    """What is learnt.

    Args:
        data: "digits", "breast_cancer", "wine", "diabetes" or "iris"; or a name in `GENERATED`.
        scaling: "standard", or "bad": columns times factors from 0.1 to 3.
        model: "linear", "svm", "relu", "tanh" or "cnn".
        batch_size: B.
    """

    data: str
    scaling: Literal["standard", "bad"]
    model: str
    batch_size: int | Literal["full"]

    @property
    def name(self) -> str:
        """For the table."""
        size = "N" if self.batch_size == "full" else self.batch_size
        return f"{self.data}, {self.scaling}, {self.model}, B = {size}"

    @property
    def passes(self) -> int:
        """The budget."""
        return (CNN_PASSES if self.model == "cnn" else PASSES)[self.batch_size]


def _tasks() -> list[Task]:
    made = []
    for data in ("digits", "breast_cancer", "wine", "diabetes"):
        for scaling in ("standard", "bad"):
            for model in ("linear", "svm", "relu", "tanh", "cnn"):
                if model == "svm" and data != "breast_cancer":
                    continue
                if model == "cnn" and (data != "digits" or scaling == "bad"):
                    continue
                for size in ("full", 1, 32, 128):
                    if size == 128 and data == "wine":
                        continue  # all of its examples but a few
                    made.append(Task(data, scaling, model, size))  # type: ignore[arg-type]
    return made


def _more_tasks() -> list[Task]:
    return [
        Task(data, "standard", model, size)  # type: ignore[arg-type]
        for data in (*GENERATED, "iris")
        for model in ("linear", "relu", "tanh")
        for size in ("full", 1, 32, 128)
        if not (data == "iris" and size == 128)
    ]


# Noisy or ill-conditioned, unlike most of the embedded data.
GENERATED: dict[str, Callable[[], tuple[Any, Any]]] = {
    "noisy": lambda: datasets.make_regression(500, 20, n_informative=8, noise=80, random_state=0),
    "low rank": lambda: datasets.make_regression(
        500, 30, noise=5, effective_rank=5, random_state=0
    ),
    "friedman": lambda: datasets.make_friedman1(800, 10, noise=1, random_state=0),
    "two classes": lambda: datasets.make_classification(
        600, 20, n_informative=5, flip_y=0.1, random_state=0
    ),
    "five classes": lambda: datasets.make_classification(
        1500, 40, n_informative=10, n_classes=5, flip_y=0.05, random_state=0
    ),
    "moons": lambda: datasets.make_moons(400, noise=0.2, random_state=0),
}
TASKS, MORE = _tasks(), _more_tasks()
# Every third task was kept unseen until the rules of lr=auto were fixed.
UNSEEN = [
    TASKS[i] for i in np.random.default_rng(0).permutation(len(TASKS))[: len(TASKS) // 3].tolist()
]


@functools.lru_cache(maxsize=16)
def _examples(data: str, scaling: str) -> tuple[Tensor, Tensor, int | None]:
    load = GENERATED.get(data) or partial(getattr(datasets, f"load_{data}", None), return_X_y=True)
    x, y = load()
    task = "classification" if np.issubdtype(y.dtype, np.integer) else "regression"
    module = ArrayDataModule(x, y, val_fraction=0, test_fraction=0.2, task=task)
    module.setup()
    inputs, targets = module.examples("train")
    assert isinstance(inputs, Tensor)
    if scaling == "bad":
        columns = inputs.shape[1]
        order = torch.randperm(columns, generator=torch.Generator().manual_seed(1))
        inputs = inputs * 10 ** torch.linspace(-1, 0.5, columns)[order]
    return inputs, targets, module.num_classes


def _problem(task: Task, seed: int) -> tuple[ArrayDataModule, nn.Module, Loss, float]:
    """Data, model, loss and weight decay; initial weights and the order follow the seed."""
    inputs, targets, classes = _examples(task.data, task.scaling)
    options: dict[str, Any] = {
        "task": "regression" if classes is None else "classification",
        "val_fraction": 0,
        "test_fraction": 0,
        "standardize": False,
        "standardize_targets": False,
    }
    if task.model == "cnn":
        inputs = inputs.reshape(-1, 1, 8, 8)
    data = ArrayDataModule(
        inputs.numpy(), targets.numpy(), batch_size=task.batch_size, seed=seed, **options
    )
    data.setup()
    loss: Loss
    if task.model == "svm":
        loss = Hinge()
    elif classes is None:
        loss = SquaredError()
    else:
        loss = Logistic() if classes == 2 and task.model == "linear" else CrossEntropy()
    outputs = loss.outputs(classes)
    torch.manual_seed(seed)
    if task.model in ("linear", "svm"):
        return data, Linear(data.input_shape, outputs), loss, 1e-3
    if task.model == "cnn":
        return data, CNN(data.input_shape, outputs, channels=[8, 16]), loss, 0.0
    return data, MLP(data.input_shape, outputs, hidden=[32], activation=task.model), loss, 0.0


@functools.lru_cache(maxsize=256)
def optimum(data: str, scaling: str, model: str) -> float:
    """f*: of linear models by L-BFGS in float64, of the SVM by scikit-learn; 0 for networks.

    Args:
        data: As for `Task`.
        scaling: As for `Task`.
        model: As for `Task`.
    """
    if model not in ("linear", "svm"):
        return 0.0
    problem, net, loss, decay = _problem(Task(data, scaling, model, "full"), 0)  # type: ignore[arg-type]
    inputs, targets = problem.examples("train")
    assert isinstance(inputs, Tensor)
    net, x = net.double(), inputs.double()
    y = targets.double() if targets.is_floating_point() else targets
    params = list(net.parameters())

    def value(point: Any) -> tuple[float, Any]:
        parts = torch.from_numpy(point).split([p.numel() for p in params])
        with torch.no_grad():
            for p, part in zip(params, parts, strict=True):
                p.copy_(part.view_as(p))
        made = loss(net(x), y).mean() + 0.5 * decay * params[0].square().sum()
        gradient = torch.autograd.grad(made, params)
        return made.item(), torch.cat([g.reshape(-1) for g in gradient]).numpy()

    if model == "svm":
        exact = SVC(C=1 / (decay * len(x)), kernel="linear", tol=1e-9).fit(x.numpy(), y.numpy())
        return value(np.concatenate([exact.coef_.ravel(), exact.intercept_]))[0]
    start = np.zeros(sum(p.numel() for p in params))
    options = {"maxiter": 20_000, "maxfun": 40_000, "ftol": 1e-15, "gtol": 1e-9}
    return float(minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun)


class Watch(Callback):
    """Looks at the objective on all examples now and then, and ends the run at its budget."""

    def __init__(self, passes: float) -> None:
        self.passes = passes
        self.at: list[float] = []
        self.values: list[float] = []
        self._every = 1  # updates from look to look

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Plan the looks: an update of a rule that searches may take many passes."""
        rule = step_size_of(trainer.optimizers[0])
        searches = rule is not None and rule.needs.elsewhere
        data = trainer.datamodule
        updates = self.passes * data.num_train / data.examples_per_update
        self._every = max(1, int(updates / POINTS / (20 if searches else 1)))

    def next_update(self, update: int) -> int:
        """The next look."""
        return (update // self._every + 1) * self._every

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """The first look; a race has been held."""
        if self.at:
            return
        race = pl_module.race
        self._examples = len(pl_module.objective.inputs)
        self._before = race.examples / self._examples if race is not None else 0.0
        self.look(trainer, pl_module, self._before)

    def spent(self, module: Any) -> float:
        """Passes so far."""
        evaluated = module.loop.engine.evaluations
        size = module.trainer.datamodule.examples_per_update
        return self._before + (module.examples_seen + evaluated * size) / self._examples

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if a share of the budget is spent."""
        spent = self.spent(pl_module)
        if spent >= self.passes * len(self.at) / POINTS:
            self.look(trainer, pl_module, spent)
        # An update of a rule that evaluates costs up to two passes and more.
        per_update = trainer.datamodule.examples_per_update / self._examples
        if spent + 2 * per_update > self.passes and pl_module.step_size is not None:
            trainer.should_stop = True

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The last look."""
        self.look(trainer, pl_module, self.spent(pl_module))

    @torch.no_grad()
    def look(self, trainer: Any, module: Any, spent: float) -> None:
        """f, with the penalty, at an average of θ where the rule keeps one."""
        optimizer = trainer.optimizers[0]
        rule = step_size_of(optimizer)
        shows = rule is not None and rule.average is not None
        if shows and module.updates:
            rule.eval(optimizer)
        rows = torch.arange(self._examples)
        value = float(module.objective.value(rows))
        for group in optimizer.param_groups:
            value += sum(
                0.5 * group["weight_decay"] * float(p.square().sum()) for p in group["params"]
            )
        if shows and module.updates:
            rule.train(optimizer)
        self.at.append(spent)
        self.values.append(value if math.isfinite(value) else math.inf)


def train(task: Task, seed: int, how: float | str) -> Watch:
    """One run.

    Args:
        task: What is learnt.
        seed: Of initial weights and order.
        how: A constant rate, or a rule of `RULES`.

    Returns:
        What the objective was.
    """
    data, model, loss, decay = _problem(task, seed)
    per_epoch = -(-data.num_train // data.examples_per_update)
    updates = task.passes * per_epoch
    kind: Any = {"full": GD, 1: SGD}.get(task.batch_size, MiniBatchSGD)
    watch = Watch(task.passes)
    if isinstance(how, str):
        rule, schedule = RULES[how]
        if rule == "lr_find":
            how, schedule = lightning_suggestion(task, seed), Constant()
        elif rule == "auto" and not (kind is GD and loss.smooth):
            updates = int(updates / 1.1)  # the race takes its part of the budget
    if isinstance(how, str):
        module = SupervisedModule(
            model, loss, partial(kind, weight_decay=decay), schedule, step_size=rule
        )
    else:
        module = SupervisedModule(model, loss, partial(kind, lr=how, weight_decay=decay))
    searching = isinstance(how, str) and (kind is GD or RULES[how][0] != "auto")
    data.updates_per_sweep = max(1, updates // POINTS // (20 if searching else 1))
    trainer = Trainer(
        max_steps=max(updates, 1),
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    trainer.fit(module, datamodule=data)
    return watch


def lightning_suggestion(task: Task, seed: int) -> float:
    """What Lightning's `lr_find` proposes, with its defaults, on an ordinary loader."""
    from lightning import LightningModule
    from lightning.pytorch.tuner import Tuner
    from torch.utils.data import DataLoader, TensorDataset

    data, model, loss, decay = _problem(task, seed)

    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lr = model, 1e-3

        def training_step(self, batch: Any, index: int) -> Any:
            return loss(self.model(batch[0]), batch[1]).mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, weight_decay=decay)

    inputs, targets = data.examples("train")
    loader = DataLoader(
        TensorDataset(inputs, targets),  # type: ignore[arg-type]
        batch_size=data.examples_per_update,
        shuffle=True,
    )
    trainer = Trainer(
        max_epochs=100,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with contextlib.redirect_stderr(io.StringIO()):  # it draws a bar
        found = Tuner(trainer).lr_find(Plain(), loader)
    suggestion = None if found is None else found.suggestion()
    return 1e-3 if suggestion is None else float(suggestion)


_CONSTANT = Constant()
# Rule and schedule.
RULES: dict[str, tuple[Any, Any]] = {
    "auto": ("auto", "auto"),
    "bb": (BarzilaiBorwein(), _CONSTANT),  # the textbook's, without Polyak's proposals
    "armijo": (Armijo(), _CONSTANT),
    "polyak": (Polyak(f_star="estimate"), _CONSTANT),
    "sps": (StochasticPolyak(max_lr=1.0), _CONSTANT),
    "sls": (StochasticLineSearch(), _CONSTANT),
    "dog": (DoG(), _CONSTANT),
    "dowg": (DoWG(), _CONSTANT),
    "schedule-free": (ScheduleFree(StochasticPolyak(max_lr=1.0)), _CONSTANT),
    "lr_find": ("lr_find", _CONSTANT),
}
FULL_ONLY = ("bb", "armijo", "polyak")


@dataclass
class Score:
    """One task.

    Args:
        task: Its name.
        batch_size: B.
        optimum: f*.
        start: f₀.
        best_rate: Of the grid.
        chosen: The winner's f on the seeds that chose it.
        best: The winner's f on fresh seeds.
        ends: f of each rule, by seed.
        refused: Why, where a rule refused the task.
        curves: Passes and f of the winner and of each rule, on the first seed.
    """

    task: str
    batch_size: int | str
    optimum: float
    start: float
    best_rate: float
    chosen: float
    best: float
    ends: dict[str, list[float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def gap(self, end: float) -> float:
        """As the head of this file says."""
        return (end - self.best) / (self.start - self.optimum)

    @property
    def noise(self) -> float:
        """The gap between the winner's score and itself on the seeds that chose it."""
        return (self.best - self.chosen) / (self.start - self.optimum)


def score(task: Task, rules: Sequence[str], choosing: int = 3, scoring: int = 5) -> Score:
    """The grid, then the rules.

    Args:
        task: What is learnt.
        rules: Names in `RULES`.
        choosing: Seeds that choose the grid's winner.
        scoring: Further seeds that score it and the rules.
    """
    ends = {
        rate: statistics.mean(train(task, seed, rate).values[-1] for seed in range(choosing))
        for rate in GRID
    }
    best = min(ends, key=lambda rate: ends[rate])
    seeds = range(choosing, choosing + scoring)
    own = [train(task, seed, best) for seed in seeds]
    made = Score(
        task.name,
        task.batch_size,
        optimum(task.data, task.scaling, task.model),
        statistics.mean(watch.values[0] for watch in own),
        best,
        ends[best],
        statistics.mean(watch.values[-1] for watch in own),
        curves={"best rate": [own[0].at, own[0].values]},
    )
    for name in rules:
        if name in FULL_ONLY and task.batch_size != "full":
            continue
        try:
            runs = [train(task, seed, name) for seed in seeds]
        except ValueError as error:
            made.refused[name] = str(error)
            continue
        made.ends[name] = [watch.values[-1] for watch in runs]
        made.curves[name] = [runs[0].at, runs[0].values]
    return made


def summary(scores: Sequence[Score], rules: Sequence[str]) -> Table:
    """Shares of the tasks, for full batches and for the others."""
    shown = Table(title=f"Rules against the best of {len(GRID)} constant rates, equal passes")
    for name in ("updates", "rule", "tasks", "at or below", "gap ≤ 0.01", "gap ≤ 0.05"):
        shown.add_column(name)
    for name in ("worst gap", "above start", "refused"):
        shown.add_column(name)
    for kind, belongs in (
        ("full batch", lambda s: s.batch_size == "full"),
        ("stochastic", lambda s: s.batch_size != "full"),
    ):
        own = [s for s in scores if belongs(s)]
        if not own:
            continue
        noise = [s.noise for s in own]
        shown.add_row(
            kind, "best rate, fresh seeds", str(len(own)), "", f"{_share(noise, 0.01):.0%}",
            f"{_share(noise, 0.05):.0%}", f"{max(noise):.3f}", "", "",
        )  # fmt: skip
        for rule in rules:
            able = [s for s in own if rule in s.ends]
            refused = sum(rule in s.refused for s in own)
            if not able:
                if refused:
                    shown.add_row(kind, rule, "0", "", "", "", "", "", str(refused))
                continue
            gaps = [s.gap(statistics.mean(s.ends[rule])) for s in able]
            above = sum(end > s.start for s in able for end in s.ends[rule])
            shown.add_row(
                kind, rule, str(len(able)), f"{_share(gaps, 1e-6):.0%}",
                f"{_share(gaps, 0.01):.0%}", f"{_share(gaps, 0.05):.0%}", f"{max(gaps):.3f}",
                str(above), str(refused),
            )  # fmt: skip
    return shown


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(gaps: Sequence[float], bound: float) -> float:
    return statistics.mean(gap <= bound for gap in gaps)


def profiles(scores: Sequence[Score], path: Path) -> None:
    """Performance profiles (Dolan and Moré, 2002): passes to the target, over the least of all.

    Args:
        scores: With curves.
        path: Of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, full in zip(figure.subplots(1, 2), (True, False), strict=True):
        own = [s for s in scores if (s.batch_size == "full") == full]
        names = sorted({name for s in own for name in s.curves})
        needed: dict[str, list[float]] = {name: [] for name in names}
        for s in own:
            target = s.best + TARGET * (s.start - s.optimum)
            for name in names:
                at, values = s.curves.get(name, [[], []])
                reached = [x for x, v in zip(at, values, strict=True) if v <= target]
                needed[name].append(reached[0] if reached else math.inf)
        least = [min(needed[name][i] for name in names) for i in range(len(own))]
        styles = ["-", "--", ":", "-."]
        for k, name in enumerate(names):
            ratios = [
                a / max(b, 1e-9) if math.isfinite(a) else math.inf
                for a, b in zip(needed[name], least, strict=True)
            ]
            x = np.geomspace(1, 30, 200)
            y = [np.mean([ratio <= r for ratio in ratios]) if ratios else 0 for r in x]
            axes.plot(x, y, styles[k % 4], label=name)
        axes.set(
            xscale="log", ylim=(0, 1.02), xlabel="passes / fewest passes of any",
            ylabel="share of tasks at the target",
            title="full batch" if full else "one example and mini-batch",
        )  # fmt: skip
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rules", default="auto", help=f"of {', '.join(RULES)}, with commas")
    options.add_argument("--only", default="", help="tasks whose name holds this text")
    options.add_argument("--part", choices=("all", "seen", "unseen", "generated"), default="all")
    options.add_argument("--choosing", type=at_least_one, default=3, help="seeds of the grid")
    options.add_argument("--scoring", type=at_least_one, default=5, help="seeds of the scores")
    options.add_argument("--threads", type=at_least_one, default=1)
    options.add_argument("--plot", type=Path, metavar="PNG", help="performance profiles")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    given = options.parse_args(arguments)
    rules = given.rules.split(",")
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        options.error(f"--rules must be of {', '.join(RULES)}. Received: {unknown[0]}")
    tasks = [
        task
        for task in (MORE if given.part == "generated" else TASKS)
        if given.only in task.name
        and (given.part in ("all", "generated") or (task in UNSEEN) == (given.part == "unseen"))
    ]
    if not tasks:
        options.error(f"No task's name holds {given.only!r}. They are: {TASKS[0].name}, …")
    use_threads(given.threads)
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "gdtrain"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scores = []
    for task in tasks:
        made = score(task, rules, given.choosing, given.scoring)
        gaps = {name: round(made.gap(statistics.mean(e)), 4) for name, e in made.ends.items()}
        print(
            f"  {made.task}: best lr {made.best_rate:.3g}, f₀ {made.start:.3g}, f* "
            f"{made.optimum:.3g}, best {made.best:.4g}; gaps {gaps}",
            file=sys.stderr,
            flush=True,
        )
        scores.append(made)
    (Console() if sys.stdout.isatty() else Console(width=140)).print(summary(scores, rules))
    if given.plot is not None:
        profiles(scores, given.plot)
    if given.json is not None:
        where = environment(given)
        write_json(given.json, "Step sizes", [_plain(asdict(s)) for s in scores], where)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
