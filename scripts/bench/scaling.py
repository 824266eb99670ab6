"""How the time of one example grows with N, and the time of one update with the parameters.

    python scripts/bench/scaling.py                          # N up to 10⁷, about five minutes
    python scripts/bench/scaling.py --max-n 100000 --only examples --json scaling.json

examples: one-example SGD on a linear model of 16 features, squared error, in whole `Trainer.fit`s
    from resident data, N = 10³ … 10⁷: as many passes as make about --updates updates. Each point
    is measured in a process of its own: the time of one example from the end of the first
    Lightning step on; how far the process's resident memory rose during the fit above what it was
    with the data in it, which must not grow with N; and the peak of the process, less the data
    that training reads (an array of the user's own that is kept beside them counts here). Time is
    allowed to grow as the data leave the caches: a random row of 64 bytes is one cache line, found
    in L2 up to about 10⁴ rows, in L3 up to about 10⁵ or 10⁶, and in memory beyond. At N = 10³ a
    pass, which is one epoch of Lightning's, has 1,000 examples only to share its fixed cost.
parameters: one update of an MLP of 64 inputs, two hidden layers of equal width and 10 classes,
    B = 1 and 64, against the same loop written in torch, in turn.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from comparison import (
    Row,
    alternate,
    at_least_one,
    environment,
    in_child,
    parser,
    peak_memory,
    report,
    resident_memory,
    selected,
    use_threads,
    write_json,
)
from contenders import Timing, fit, plain_loop
from rich.console import Console
from rich.table import Table
from throughput import FIRST, planned, resident
from torch.nn import functional as F

from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP, Linear

FEATURES = 16
SIZES = tuple(10**k for k in range(3, 8))
WIDTHS = (16, 64, 256, 1024)
FROM, TO, AT_MOST = 10**4, 10**7, 3.0  # time at TO is at most AT_MOST times that at FROM
CONSTANT = 64e6  # bytes that a fit may take, whatever N is


@dataclass
class Point:
    """One N.

    Args:
        n: N.
        updates: Made in one repetition.
        seconds: Per example, each repetition.
        whole_seconds: Per example with set-up, each repetition.
        memory: Bytes by which memory rose during the first fit after the warm-up.
        process: Peak of the process during that fit, bytes.
        data: Bytes of inputs and targets.
        engine: That made the updates.
    """

    n: int
    updates: int
    seconds: list[float]
    whole_seconds: list[float]
    memory: int
    process: int
    data: int
    engine: str


def point(
    n: int, updates: int, repetitions: int, device: str = "cpu", threads: int | None = None
) -> Point:
    """Measure one N; in a process of its own, for the memory to be this point's.

    Args:
        n: N, range [2, ∞).
        updates: About how many in one repetition; whole passes are made.
        repetitions: How often.
        device: Where.
        threads: As for `use_threads`.
    """
    use_threads(threads)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, FEATURES), dtype=np.float32)
    y = x @ rng.standard_normal(FEATURES, dtype=np.float32)
    model = Linear((FEATURES,), 1, init="zeros")
    data = resident(x, y, 1, task="regression", standardize_targets=False)
    del x, y
    few = resident(
        np.ones((64, FEATURES), np.float32),
        np.ones(64, np.float32),
        1,
        task="regression",
        standardize_targets=False,
    )
    passes = max(1, round(updates / n))

    def run(examples: Any = data, epochs: int = passes) -> Timing:
        return fit(model, SquaredError(), examples, lr=0.005, epochs=epochs, device=device)

    run(few, 20)  # what is loaded and compiled once is not the point's
    timings: list[Timing] = []
    memory = peak_memory(lambda: timings.append(run()), device)
    process = resident_memory(peak=True)
    while len(timings) < repetitions:
        timings.append(run())
    inputs, targets = data.examples("train")
    assert isinstance(inputs, torch.Tensor)
    return Point(
        n,
        timings[0].whole_updates,
        [timing.per_update for timing in timings],
        [timing.whole_per_update for timing in timings],
        memory,
        process,
        inputs.nbytes + targets.nbytes,
        timings[0].engine,
    )


def points(options: argparse.Namespace, sizes: Sequence[int], say: Callable[[str], None]) -> Any:
    """All N up to --max-n, one after the other."""
    made = []
    for n in sizes:
        if n <= options.max_n:
            say(f"N = {n:,}")
            made.append(
                in_child(
                    point, n, options.updates, options.repetitions, options.device, options.threads
                )
            )
    return made


def growth(made: Sequence[Point]) -> float | None:
    """Time of one example at N = 10⁷ over that at 10⁴; None if one was not measured."""
    times = {p.n: statistics.median(p.seconds) for p in made}
    return times[TO] / times[FROM] if {FROM, TO} <= times.keys() else None


def parameters(
    widths: Sequence[int],
    batch_size: int,
    seconds: float,
    repetitions: int,
    device: str = "cpu",
    n: int = 8192,
    say: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Time of one update against the number of parameters.

    Args:
        widths: Of the two hidden layers.
        batch_size: B.
        seconds: Of one repetition.
        repetitions: Alternating.
        device: Where.
        n: N.
        say: Told what runs.
    """
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, n)
    x = (rng.standard_normal((10, 64))[y] + rng.standard_normal((n, 64))).astype(np.float32)
    data = resident(x, y, batch_size)
    there = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
    rows = []
    for width in widths:
        torch.manual_seed(0)
        model = MLP((64,), 10, hidden=(width, width))
        count = sum(p.numel() for p in model.parameters())
        name = f"{count:,} parameters ({width}–{width}), B = {batch_size}"
        say(name)
        first = fit(
            model, CrossEntropy(), data, lr=0.01, updates=FIRST, seconds=seconds / 4, device=device
        )
        updates = planned(seconds, first.per_update, -(-n // batch_size))
        costs = alternate(
            {
                "loop": lambda model=model: (
                    plain_loop(  # type: ignore[misc]
                        model,
                        F.cross_entropy,
                        *there,
                        batch_size=batch_size,
                        lr=0.01,
                        seconds=seconds,
                    ).per_update
                ),
                "ours": lambda model=model, updates=updates: (
                    fit(  # type: ignore[misc]
                        model, CrossEntropy(), data, lr=0.01, updates=updates, device=device
                    ).per_update
                ),
            },
            repetitions,
        )
        rows.append(
            Row(
                name,
                "plain torch loop",
                costs["loop"],
                costs["ours"],
                unit="µs",
                engine=first.engine,
                details={"parameters": count, "batch_size": batch_size, "updates": updates},
            )
        )
    return rows


def table(made: Sequence[Point]) -> Table:
    """The points by N."""
    shown = Table(title=f"One-example SGD, linear model, {FEATURES} features, by N")
    for name in (
        "N",
        "updates",
        "ns/example",
        "whole fit",
        "data, MB",
        "fit, MB",
        "process − data, MB",
        "engine",
    ):
        shown.add_column(name, justify="right")
    for p in made:
        shown.add_row(
            f"{p.n:,}",
            f"{p.updates:,}",
            f"{statistics.median(p.seconds) * 1e9:,.0f}",
            f"{statistics.median(p.whole_seconds) * 1e9:,.0f}",
            f"{p.data * 1e-6:,.1f}",
            f"{p.memory * 1e-6:,.1f}",
            f"{(p.process - p.data) * 1e-6:,.0f}",
            p.engine,
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__, repetitions=3, seconds=1.0)
    options.add_argument(
        "--max-n", type=at_least_one, default=SIZES[-1], help="largest N (default: 10⁷)"
    )
    options.add_argument(
        "--updates",
        type=at_least_one,
        default=10**6,
        help="of one repetition at each N (default: 10⁶)",
    )
    given: argparse.Namespace = options.parse_args(arguments)
    names = selected(("examples", "parameters"), given.only)
    given.threads = use_threads(given.threads)

    def say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    where, rows = environment(given), []
    numbers: list[dict[str, Any]] = []
    if "examples" in names:
        made = points(given, SIZES, say)
        console = Console() if sys.stdout.isatty() else Console(width=120)
        console.print(table(made))
        numbers = [asdict(p) for p in made]
        if made:
            more = max(p.memory for p in made)
            console.print(
                f"memory of a fit: at most {more * 1e-6:.0f} MB (at most "
                f"{CONSTANT * 1e-6:.0f}): {'ok' if more <= CONSTANT else 'above'}"
            )
            beside = [p.process - p.data for p in made]
            grown_by = max(beside) - min(beside)
            console.print(
                f"process beside the data: differs by {grown_by * 1e-6:.0f} MB over all N (at most "
                f"{CONSTANT * 1e-6:.0f}): {'ok' if grown_by <= CONSTANT else 'above'}"
            )
        grown = growth(made)
        if grown is not None:
            verdict = "ok" if grown <= AT_MOST else "above"
            console.print(f"time at N = 10⁷ / at 10⁴: {grown:.2f} (at most {AT_MOST:g}): {verdict}")
            where["growth"] = grown
    if "parameters" in names:
        for batch_size in (1, 64):
            rows += parameters(
                WIDTHS, batch_size, given.seconds, given.repetitions, given.device, say=say
            )
        report("One update, by the number of parameters", rows, where)
    if given.json is not None:
        write_json(given.json, "Scaling", [*numbers, *(row.numbers() for row in rows)], where)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
