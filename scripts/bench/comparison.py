"""What the benchmarks share: alternating repetitions, ratios, the table, the JSON file.

A *contender* is a function without arguments that does a piece of work once and returns what one
unit of it cost: seconds per update (or per run, per call), or bytes. `alternate` runs all
contenders in turn, repetition after repetition, in one process, so that whatever slows the machine
slows them all; a `Row` compares the medians of two of them. The ratio is always baseline / ours:
2 means that ours takes half as long. A script of this folder reads:

    arguments = parser(__doc__).parse_args()
    use_threads(arguments.threads)
    costs = alternate({"torch": lambda: per_call(theirs.step), "gdtrain": lambda: ...}, 5)
    rows = [Row("SGD.step(), MLP", "torch", costs["torch"], costs["gdtrain"], asked=1.7, unit="µs")]
    report("Optimizer step", rows, environment(arguments), arguments.json)
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numba
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

__all__ = [
    "Row",
    "Unit",
    "alternate",
    "at_least_one",
    "environment",
    "in_child",
    "parser",
    "peak_memory",
    "per_call",
    "report",
    "resident_memory",
    "selected",
    "shown",
    "synchronize",
    "use_threads",
    "write_json",
]

Contender = Callable[[], float]
Unit = Literal["updates/s", "s", "ms", "µs", "ns", "MB"]

_PACKAGES = ("gdtrain", "torch", "lightning", "numba", "numpy", "scikit-learn", "tensorboard")


# ---------------------------------------------------------------------------- measuring


def alternate(
    contenders: Mapping[str, Contender], repetitions: int, say: Callable[[str], None] | None = None
) -> dict[str, list[float]]:
    """Run every contender once, then every contender once more, and so on.

    Args:
        contenders: By name, in the order in which they run; warm-up is theirs to do beforehand.
        repetitions: How often, range [1, ∞).
        say: Told what runs next.

    Returns:
        For each name the costs, one for each repetition.

    Raises:
        ValueError: `repetitions` is out of range, or a contender returned no positive number.
    """
    if repetitions < 1:
        raise ValueError(f"repetitions must be at least 1. Received: {repetitions}.")
    costs: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions):
        for name, run in contenders.items():
            if say is not None:
                say(f"{name} ({repetition + 1}/{repetitions})")
            cost = run()
            if not 0 < cost < math.inf:
                raise ValueError(f"{name} must return a positive cost. Received: {cost}.")
            costs[name].append(cost)
    return costs


def per_call(
    function: Callable[[], object],
    seconds: float = 0.2,
    device: torch.device | str = "cpu",
    least: int = 5,
) -> float:
    """Mean time of one call, over as many calls as fit into `seconds`.

    The clock is read once around a run of calls, not once per call, and a tenth of the time goes
    to a warm-up first.

    Args:
        function: What is timed; its result is dropped.
        seconds: How long, range (0, ∞).
        device: Where its work is done; a GPU is waited for before the clock is read.
        least: Calls at least.

    Returns:
        Seconds per call.
    """

    def timed(calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize(device)
        return time.perf_counter() - started

    calls, elapsed = 1, timed(1)
    while elapsed < seconds / 10:
        calls *= 2
        elapsed = timed(calls)
    calls = max(least, round(calls * seconds / max(elapsed, 1e-9)))
    return timed(calls) / calls


def synchronize(device: torch.device | str) -> None:
    """Wait for a GPU; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def use_threads(threads: int | None) -> int:
    """Give torch, BLAS and Numba the same number of threads; None: as many as there are.

    Returns:
        How many they have.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = threads or available or 1
    if count < 1:
        raise ValueError(f"threads must be at least 1. Received: {threads}.")
    torch.set_num_threads(count)
    threadpool_limits(count)
    numba.set_num_threads(min(count, int(vars(numba.config)["NUMBA_NUM_THREADS"])))
    return count


# ---------------------------------------------------------------------------- memory


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, so that its memory is of nobody else.

    Args:
        function: Of a module, and not of `__main__` only.
        arguments: Its; copied.

    Returns:
        What it returned.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(function: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """How far memory rose above what was in use before, while a function ran.

    On a CPU the process's resident memory: where Linux does not allow its high-water mark to be
    reset, call this before anything large was freed.

    Args:
        function: What is measured, warmed up already.
        device: Whose memory.

    Returns:
        Bytes, at least 0.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = resident_memory()
    function()
    return max(resident_memory(peak=True) - before, 0)


def resident_memory(peak: bool = False) -> int:
    """Resident memory of this process, bytes.

    Linux's VmRSS and VmHWM; elsewhere `ru_maxrss`, the peak, for both. (On Linux a child starts
    with the `ru_maxrss` of its parent.)

    Args:
        peak: The most since the start, or since `peak_memory` was last called; else now.
    """
    name = "VmHWM" if peak else "VmRSS"
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


# ---------------------------------------------------------------------------- results


@dataclass
class Row:
    """One line of a table: two contenders, and by how much ours is ahead.

    Args:
        work: What was done.
        against: Name of the baseline.
        baseline: Its costs, one for each repetition.
        ours: Ours, from the same repetitions.
        asked: The ratio that is asked for; None: none.
        unit: How costs are shown; "updates/s" shows their inverse.
        engine: The engine that made our updates.
        note: What a reader must know: how it was timed, what was left out.
        details: More numbers, for the JSON file.
    """

    work: str
    against: str
    baseline: Sequence[float]
    ours: Sequence[float]
    asked: float | None = None
    unit: Unit = "updates/s"
    engine: str = ""
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Median cost of the baseline / median cost of ours."""
        return statistics.median(self.baseline) / statistics.median(self.ours)

    @property
    def verdict(self) -> str:
        """Ok, below, or nothing where nothing was asked."""
        if self.asked is None:
            return ""
        return "ok" if self.ratio >= self.asked else "below"

    def numbers(self) -> dict[str, Any]:
        """Everything, in plain containers; costs in seconds or bytes."""
        pairs = [b / o for b, o in zip(self.baseline, self.ours, strict=False)]
        return {
            "work": self.work,
            "against": self.against,
            "engine": self.engine,
            "unit": self.unit,
            "baseline": statistics.median(self.baseline),
            "ours": statistics.median(self.ours),
            "ratio": self.ratio,
            "ratio_range": [min(pairs), max(pairs)],
            "asked": self.asked,
            "verdict": self.verdict,
            "baseline_repetitions": list(self.baseline),
            "ours_repetitions": list(self.ours),
            "note": self.note,
            "details": self.details,
        }


def shown(cost: float, unit: Unit) -> str:
    """A cost as the table shows it.

    Args:
        cost: Seconds, or bytes.
        unit: Of the text.
    """
    value = 1 / cost if unit == "updates/s" else cost * _PER[unit]
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


_PER = {"s": 1.0, "ms": 1e3, "µs": 1e6, "ns": 1e9, "MB": 1e-6}


def environment(arguments: argparse.Namespace | None = None) -> dict[str, Any]:
    """What the figures depend on: versions, processor, threads, card.

    Args:
        arguments: Of the command line, noted as they are.
    """
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    options = {} if arguments is None else vars(arguments)
    return {
        "versions": versions,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "options": {name: _plain(value) for name, value in options.items()},
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def report(
    title: str,
    rows: Sequence[Row],
    where: Mapping[str, Any],
    path: Path | None = None,
    console: Console | None = None,
) -> None:
    """Print the table, and write the JSON file.

    Args:
        title: Of the table.
        rows: Its lines.
        where: What `environment` returned.
        path: Of the JSON file; None: none.
        console: Where the table is printed; None: on the screen.
    """
    if console is None:
        console = Console()
        if not console.is_terminal:  # a file or a pipe: wide enough for a table
            console = Console(width=180)
    table = Table(title=title, caption=_caption(where), show_lines=False)
    for name in ("work", "against", "engine"):
        table.add_column(name)
    for name in ("unit", "baseline", "ours", "ratio", "pairs", "asked"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        low, high = row.numbers()["ratio_range"]
        table.add_row(
            row.work,
            row.against,
            row.engine,
            row.unit,
            shown(statistics.median(row.baseline), row.unit),
            shown(statistics.median(row.ours), row.unit),
            f"{row.ratio:.3g}×",
            f"{low:.3g}–{high:.3g}",
            "" if row.asked is None else f"{row.asked:.3g}×",
            {"ok": "[green]ok", "below": "[red]below"}.get(row.verdict, ""),
        )
    console.print(table)
    for note in dict.fromkeys(f"{row.work}: {row.note}" for row in rows if row.note):
        console.print(note, style="dim", highlight=False)
    if path is not None:
        write_json(path, title, [row.numbers() for row in rows], where)


def write_json(path: Path, title: str, rows: Sequence[Any], where: Mapping[str, Any]) -> None:
    """Write `{"title", "environment", "rows"}`; infinities and NaN are errors.

    Args:
        path: Of the file.
        title: Of the benchmark.
        rows: Plain containers.
        where: What `environment` returned.
    """
    content = {"title": title, "environment": dict(where), "rows": list(rows)}
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def _caption(where: Mapping[str, Any]) -> str:
    names = ("torch", "lightning", "numba", "scikit-learn")
    parts = [f"{name} {where['versions'][name]}" for name in names]
    card = [where["card"]] if where["card"] else []
    return ", ".join([str(where["processor"]), *card, f"{where['threads']} threads", *parts])


# ---------------------------------------------------------------------------- command line


def parser(description: str | None, repetitions: int = 5, seconds: float = 3.0) -> Any:
    """The options that all benchmarks have; a script adds its own.

    Args:
        description: Docstring of the script.
        repetitions: Default of --repetitions.
        seconds: Default of --seconds.

    Returns:
        An `argparse.ArgumentParser`.
    """
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--threads", type=at_least_one, help="of everybody (default: all)")
    made.add_argument(
        "--repetitions",
        type=at_least_one,
        default=repetitions,
        help=f"alternating repetitions (default: {repetitions})",
    )
    made.add_argument(
        "--seconds",
        type=_positive,
        default=seconds,
        help=f"how long one repetition of a baseline may run (default: {seconds:g})",
    )
    made.add_argument("--only", metavar="NAME[,NAME]", help="which rows (default: all)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    made.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda, cuda:1")
    return made


def at_least_one(text: str) -> int:
    """An option's text as a whole number.

    Args:
        text: From the command line.

    Raises:
        argparse.ArgumentTypeError: It is none, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, received {text}")
    return int(text)


def _device(text: str) -> str:
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        message = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used: {message}") from None
    return text


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, received {text}")
    return value


def selected(names: Iterable[str], only: str | None) -> list[str]:
    """The rows that `--only` names, in the order of the benchmark.

    Args:
        names: All rows.
        only: The option's text; None: all.

    Raises:
        SystemExit: A name is unknown; the known ones are printed. Exit code 2.
    """
    known = list(names)
    if only is None:
        return known
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        print(
            f"--only must name rows out of {', '.join(known)}. Received: {only}.", file=sys.stderr
        )
        raise SystemExit(2)
    return [name for name in known if name in wanted]
