"""lr=auto, and other step-size rules, against the best constant and decayed rates, at equal passes.

    python scripts/bench/step_sizes.py --only logistic --opponents rates.json
    python scripts/bench/step_sizes.py --rules auto,dowg,sps,armijo,bb,polyak --every 4
    python scripts/bench/step_sizes.py --every 2 --offset 1 --json second.json   # half of the tasks
    python scripts/bench/step_sizes.py --summary first.json second.json
    python scripts/bench/step_sizes.py --part sealed --sealed-seed …

A task is a data set, a model, B, a budget of passes, momentum and weight decay, drawn at random
(step_size_tasks.py). Opponents make the whole budget: SGD with 13 rates from 10^(−4) to 10²,
constant, and with linear and cosine decay to 0, and Adam with 7 rates, constant and with linear
decay. Three seeds choose the best constant rate, the best decayed one and the best of Adam; they,
SGD with 0.01, Adam with 0.001, and each rule are scored on five others. A pass is N examples in a
forward (and backward) pass: what a line search looks at counts.

    gap = (f − f_best) / (f₀ − f*)

f the training objective at the end, its mean over the seeds; f_best that of an opponent, f₀ at the
start, f* an exact solver's (0 for networks, and the least value seen for losses with kinks). What
`--opponents FILE` holds is not made again. The sealed tasks are as many, of a seed that is kept
apart until the rules are settled.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from comparison import at_least_one, environment, use_threads, write_json
from rich.console import Console
from rich.table import Table
from stacked_training import Measure, Member, optimum, train_together
from step_size_tasks import Task, tasks

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.analysis.guard import DivergenceGuard
from gdtrain.descent.training import make_loop
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

OPEN = tasks(0)
SEALED = "24ad757f383c1e7037aa754b80d8f6c94ec4197fd38569d186c00307a2739f6e"
"""SHA-256 of the decimal digits of the seed of the sealed tasks."""

GRID = [10 ** (power / 2) for power in range(-8, 5)]
ADAM = [10 ** (power / 2) for power in range(-8, -1)]
FAMILIES: dict[str, list[Member]] = {
    "constant": [Member("sgd", rate) for rate in GRID],
    "decayed": [Member("sgd", rate, how) for how in ("linear", "cosine") for rate in GRID],
    "adam": [Member("adam", rate, how) for how in ("constant", "linear") for rate in ADAM],
}
FIXED = {"sgd 0.01": Member("sgd", 0.01), "adam 0.001": Member("adam", 1e-3)}
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
}
SAME, SPREAD = 1e-4, 10.0  # gap of what counts as equal; of rates over seeds, largest over least


# ---------------------------------------------------------------------------- opponents


def opponents(task: Task, choosing: int, scoring: int) -> dict[str, Any]:
    """The best of each family, and the fixed ones, scored.

    Args:
        task: What is learnt.
        choosing: Seeds that choose.
        scoring: Further seeds that score.

    Returns:
        "start", "optimum", "seconds", and by name of the opponent how it is trained and its f.
    """
    began = time.perf_counter()
    all_members = [member for family in FAMILIES.values() for member in family]
    ends = dict(zip(all_members, train_together(task, all_members, range(choosing)), strict=True))
    means = {member: statistics.fmean(values) for member, values in ends.items()}
    best = {name: min(family, key=means.__getitem__) for name, family in FAMILIES.items()} | FIXED
    seeds = range(choosing, choosing + scoring)
    scored = train_together(task, list(best.values()), seeds)
    starts = [_start(task, seed) for seed in seeds]
    least = optimum(task)
    if least is None:
        least = min(min(values) for values in (*ends.values(), *scored, starts))
    return {
        "start": statistics.fmean(starts),
        "optimum": least,
        "best": {
            name: {**asdict(member), "chosen": means[member], "f": values}
            for (name, member), values in zip(best.items(), scored, strict=True)
        },
        "seconds": time.perf_counter() - began,
    }


def _start(task: Task, seed: int) -> float:
    measure = Measure(task.build(seed), task.weight_decay)
    return measure(measure.of_model())


# ---------------------------------------------------------------------------- rules


def train(task: Task, seed: int, name: str) -> dict[str, Any]:
    """One run of a rule, as a user has it: with the guard.

    Args:
        task: What is learnt.
        seed: Of initial weights and order.
        name: In `RULES`.

    Returns:
        "f", "start", the "rate" of the last update before the schedule's factor, "recoveries",
        their "causes", whether the guard has "stopped" it, "passes" that were spent, "seconds".

    Raises:
        ValueError: The rule refuses the task.
    """
    problem, (rule, schedule) = task.build(seed), RULES[name]
    measure = Measure(problem, task.weight_decay)
    start, began = measure(measure.of_model()), time.perf_counter()
    kind: Any = {"full": GD, 1: SGD}.get(task.batch_size, MiniBatchSGD)
    options = {"momentum": task.momentum, "nesterov": task.nesterov}
    guard = DivergenceGuard()

    def loop_of(updates: int, **more: Any) -> Any:
        return make_loop(
            problem.model.train(), problem.loss, problem.inputs, problem.targets,
            partial(kind, weight_decay=task.weight_decay, **options), schedule,
            batch_size=task.batch_size, updates=updates, step_size=rule, seed=seed, guard=guard,
            **more,
        )  # fmt: skip

    loop = loop_of(task.updates)
    own = step_size_of(loop.optimizer)
    searches = own is not None and own.needs.elsewhere
    if searches:
        loop = loop_of(task.updates, updates_per_sweep=1)
    budget, size = task.passes * task.examples, task.per_update
    spent = 0
    # An update of a rule that evaluates costs up to two passes and more.
    while not loop.done and not (searches and spent + 2 * size > budget):
        loop.advance()
        spent = loop.state.examples_seen + loop.engine.evaluations * size
    loop.finish()
    rates = loop.optimizer.param_groups[0].get("step_size", {})
    return {
        "f": measure(measure.of_model()),
        "start": start,
        "rate": rates.get("last"),
        "recoveries": len(guard.events),
        "causes": [event["cause"] for event in guard.events],
        "stopped": loop.state.stop is not None,
        "passes": spent / task.examples,
        "seconds": time.perf_counter() - began,
    }


def judged(task: Task, known: dict[str, Any], rules: Sequence[str], seeds: Sequence[int]) -> Any:
    """A row of the results: the task, its opponents, and what each rule does.

    Args:
        task: What is learnt.
        known: What `opponents` returned.
        rules: Names in `RULES`.
        seeds: That score.
    """
    row: dict[str, Any] = {"task": task.name, "key": task.key, **asdict(task), **known, "rules": {}}
    for name in rules:
        try:
            runs = [train(task, seed, name) for seed in seeds]
        except ValueError as error:
            row["rules"][name] = {"refused": str(error)}
        else:
            row["rules"][name] = {key: [run[key] for run in runs] for key in runs[0]}
    return row


# ---------------------------------------------------------------------------- summary


def gap(row: dict[str, Any], values: Sequence[float | None], against: str) -> float:
    """As the head of this file says; infinite where a run is not finite.

    Args:
        row: What `judged` returned.
        values: f of each seed.
        against: Name of the opponent.
    """
    end, best = _mean(values), _mean(row["best"][against]["f"])
    if not math.isfinite(end):
        return math.inf
    return (end - best) / max(row["start"] - row["optimum"], 1e-12)


def _mean(values: Sequence[float | None]) -> float:
    """In JSON, None stands for infinity."""
    return statistics.fmean(math.inf if value is None else value for value in values)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson, 1927).

    Example:
        >>> low, high = wilson(9, 10)
        >>> round(low, 2), round(high, 2)
        (0.6, 0.98)
    """
    z = 1.96
    middle, half = hits + z**2 / 2, z * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    return (middle - half) / (count + z**2), (middle + half) / (count + z**2)


def figures(rows: Sequence[dict[str, Any]], rule: str) -> dict[str, Any]:
    """What a rule reaches on some tasks: shares with their intervals, and counts.

    Args:
        rows: What `judged` returned.
        rule: Its name.
    """
    able = [row for row in rows if "f" in row["rules"].get(rule, {})]
    made: dict[str, Any] = {
        "tasks": len(able),
        "refused": sum("refused" in row["rules"].get(rule, {}) for row in rows),
    }
    if not able:
        return made
    own = [row["rules"][rule] for row in able]
    constant, both, adam = [], [], []
    for row, runs in zip(able, own, strict=True):
        gaps = {name: gap(row, runs["f"], name) for name in row["best"]}
        constant.append(gaps["constant"])
        both.append(max(gaps["constant"], gaps["decayed"]))
        adam.append(gaps["adam 0.001"])

    def share(gaps: Sequence[float], bound: float) -> list[float]:
        hits = sum(value <= bound for value in gaps)
        return [hits / len(gaps), *wilson(hits, len(gaps))]

    runs = [
        (math.inf if f is None else f, start)
        for r in own
        for f, start in zip(r["f"], r["start"], strict=True)
    ]
    return {
        **made,
        "constant ≤ 0.01": share(constant, 0.01),
        "constant ≤ 0.05": share(constant, 0.05),
        "at or below": share(constant, SAME),
        "decayed ≤ 0.01": share(both, 0.01),
        "decayed ≤ 0.05": share(both, 0.05),
        "below Adam": share(adam, 0),
        "worst gap": max(constant),
        "above start": sum(f > start for f, start in runs),
        "recovered": sum(count > 0 for r in own for count in r["recoveries"]),
        "stopped": sum(sum(r["stopped"]) for r in own),
        "uneven η": sum(_uneven(row, r) for row, r in zip(able, own, strict=True)),
    }


def _uneven(row: dict[str, Any], runs: dict[str, Any]) -> bool:
    """Whether seeds find rates far apart, and it matters."""
    rates = [rate for rate in runs["rate"] if rate]
    ends = [math.inf if f is None else f for f in runs["f"]]
    apart = max(ends) - min(ends) > 0.01 * (row["start"] - row["optimum"])
    return bool(rates) and max(rates) > SPREAD * min(rates) and apart


GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "B < N": lambda row: row["batch_size"] != "full" and row["momentum"] == 0,
    "B < N, momentum": lambda row: row["batch_size"] != "full" and row["momentum"] > 0,
    "full batch": lambda row: row["batch_size"] == "full" and row["momentum"] == 0,
    "full batch, momentum": lambda row: row["batch_size"] == "full" and row["momentum"] > 0,
    "all": lambda row: True,
}


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`figures` of each rule, in groups and by family of kinds.

    Args:
        rows: What `judged` returned.
    """
    families = sorted({_family(row) for row in rows})
    rules = list(dict.fromkeys(rule for row in rows for rule in row["rules"]))
    made = []
    for group, belongs in GROUPS.items():
        own = [_with_opponents(row) for row in rows if belongs(row)]
        compared = dict.fromkeys(rule for row in own for rule in row["rules"])
        made += [{"group": group, "rule": rule, **figures(own, rule)} for rule in compared]
    for family in families:
        own = [row for row in rows if _family(row) == family]
        made += [{"group": family, "rule": rule, **figures(own, rule)} for rule in rules]
    return made


def _with_opponents(row: dict[str, Any]) -> dict[str, Any]:
    """Opponents beside the rules: what they would reach, were they rules."""
    empty: dict[str, list[float]] = {"rate": [], "recoveries": [], "stopped": []}
    runs = {
        name: {"f": best["f"], "start": [row["start"]] * len(best["f"]), **empty}
        for name, best in row["best"].items()
        if name != "constant"
    }
    return {**row, "rules": row["rules"] | runs}


def _family(row: dict[str, Any]) -> str:
    name: str = row["kind"].split(",")[0]
    first = name.split()[0]
    return first if first in ("MLP", "ResNet") else name


def table(made: Sequence[dict[str, Any]], count: int) -> Table:
    """For the screen; beside each share its interval, in percent."""
    shown = Table(title=f"{count} tasks, equal passes; shares in %, with 95% intervals")
    keys = dict.fromkeys(key for line in made for key in line)
    for key in keys:
        shown.add_column(key)
    for line in made:
        if line["tasks"] or line["refused"]:
            shown.add_row(*[_cell(line.get(key, "")) for key in keys])
    return shown


def _cell(value: Any) -> str:
    if isinstance(value, list):
        share, low, high = (100 * part for part in value)
        return f"{share:.0f} ({low:.0f}–{high:.0f})"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------- command line


def _plain(value: Any) -> Any:
    """For JSON, which has no infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _chosen(given: argparse.Namespace, options: argparse.ArgumentParser) -> list[Task]:
    drawn = OPEN
    if given.part == "sealed":
        text = "" if given.sealed_seed is None else str(given.sealed_seed)
        if hashlib.sha256(text.encode()).hexdigest() != SEALED:
            options.error(f"--sealed-seed is not that of the sealed tasks. Received: {text}")
        drawn = tasks(given.sealed_seed)
    some = [task for task in drawn[given.offset :: given.every] if given.only in task.name]
    if not some:
        options.error(f"No task's name holds {given.only!r}. They are: {drawn[0].name}, …")
    return some


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--rules", default="auto", help=f"of {', '.join(RULES)}; none: opponents")
    options.add_argument("--only", default="", help="tasks whose name holds this text")
    options.add_argument("--part", choices=("open", "sealed"), default="open")
    options.add_argument("--sealed-seed", type=int, metavar="S", help="of the sealed tasks")
    options.add_argument("--every", type=at_least_one, default=1, help="each so many tasks, one")
    options.add_argument("--offset", type=int, default=0, help="the first of them")
    options.add_argument("--choosing", type=at_least_one, default=3, help="seeds that choose")
    options.add_argument("--scoring", type=at_least_one, default=5, help="seeds that score")
    options.add_argument("--threads", type=at_least_one, default=1)
    options.add_argument("--opponents", type=Path, metavar="FILE", help="read, and written")
    options.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options.add_argument("--summary", type=Path, nargs="+", metavar="FILE", help="of --json files")
    given = options.parse_args(arguments)
    rules = [] if given.rules == "none" else given.rules.split(",")
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        options.error(f"--rules must be of {', '.join(RULES)}. Received: {unknown[0]}")
    if given.summary:
        rows = [row for file in given.summary for row in json.loads(file.read_text())["rows"]]
    else:
        some = _chosen(given, options)
        use_threads(given.threads)
        warnings.filterwarnings("ignore")
        logging.getLogger("gdtrain").setLevel(logging.ERROR)
        rows = _rows(some, rules, given)
    made = summary(rows)
    (Console() if sys.stdout.isatty() else Console(width=220)).print(table(made, len(rows)))
    if given.json is not None:
        where = environment(given) | {"summary": _plain(made)}
        write_json(given.json, "Step sizes", rows, where)
    return 0


def _rows(some: Sequence[Task], rules: Sequence[str], given: argparse.Namespace) -> list[Any]:
    """A row for each task, told on stderr as they come."""
    file: Path | None = given.opponents
    known = json.loads(file.read_text()) if file is not None and file.exists() else {}
    rows = []
    for task in some:
        key = f"{task.key} {given.choosing}+{given.scoring}"
        if key not in known:
            known[key] = _plain(opponents(task, given.choosing, given.scoring))
            if file is not None:
                file.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")
        seeds = range(given.choosing, given.choosing + given.scoring)
        row = _plain(judged(task, known[key], rules, seeds))
        gaps = {
            name: "refused" if "refused" in runs else round(gap(row, runs["f"], "constant"), 4)
            for name, runs in row["rules"].items()
        }
        best = {name: f"{b['rate']:.2g} → {_mean(b['f']):.3g}" for name, b in row["best"].items()}
        print(
            f"  {task.name}: T {task.updates}, f₀ {row['start']:.3g}, f* {row['optimum']:.3g}; "
            f"{best}; {row['seconds']:.1f} s; gaps {gaps}",
            file=sys.stderr,
            flush=True,
        )
        rows.append(row)
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
