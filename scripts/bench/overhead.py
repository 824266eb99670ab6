"""What a choice of the configuration costs a run: the same run with and without it, in turn.

    python scripts/bench/overhead.py                                  # all rows, digits
    python scripts/bench/overhead.py --only auto --mnist FOLDER       # and MNIST
    python scripts/bench/overhead.py --only curvature --variants gd

Whole runs of `scripts/train.py` with its default callbacks and loggers, of equal updates. The ratio
is time without / time with it: 0.95 is a cost of 5%.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from comparison import Row, alternate, environment, parser, report, selected, use_threads
from hydra import compose, initialize_config_dir
from throughput import mnist

from gdtrain.runs.configuration import conf_directory
from gdtrain.runs.result import Result
from gdtrain.runs.train import train

# What each row has, beside a run at a constant rate without instruments; and the ratio that is
# asked for, by variant.
ADDED: dict[str, tuple[list[str], dict[str, float]]] = {
    "auto": (
        ["instruments=off", "optimizer.lr=auto"],
        {"gd": 1 / 1.35, "minibatch": 1 / 1.15, "sgd": 1 / 1.15},
    ),
    "light": (["instruments=light"], {"gd": 0.95, "minibatch": 0.95, "sgd": 0.95}),
    "full": (["instruments=full"], {"gd": 0.5, "minibatch": 0.5, "sgd": 0.5}),
    "curvature": (
        ["instruments=off", "+callbacks.curvature._target_=gdtrain.callbacks.Curvature"],
        {"gd": 0.95, "minibatch": 0.95, "sgd": 0.95},
    ),
}
# Seconds a run that are not felt, whatever their ratio.
FREE = {"light": 0.3}
VARIANTS = ("gd", "minibatch", "sgd")
MODELS = ("mlp", "cnn")
DESCENDING = 200  # updates of GD
FEWEST = 4  # updates of a run
RATES = {"gd": 0.1, "minibatch": 0.05, "sgd": 0.005}


def once(words: Sequence[str], updates: int) -> Result:
    """One run, in a folder that is gone afterwards.

    Args:
        words: Overrides.
        updates: That it makes.
    """
    fixed = [
        f"trainer.max_steps={updates}",
        "trainer.max_epochs=100000000",
        "trainer.check_val_every_n_epoch=1000000",
        "callbacks.convergence.tolerance=null",  # all runs make all updates
        "callbacks.convergence.noise_floor=false",
        "callbacks.progress=null",
    ]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("train", [*words, *fixed])
    with tempfile.TemporaryDirectory() as folder:
        return train(config, Path(folder) / "run")


def rows(
    name: str, data: list[str], shown: str, variant: str, model: str, given: argparse.Namespace
) -> list[Row]:
    """One task with and without.

    Args:
        name: In `ADDED`.
        data: Overrides that choose the examples.
        shown: Their name.
        variant: "gd", "minibatch" or "sgd".
        model: "mlp" or "cnn".
        given: Options.
    """
    added, asked = ADDED[name]
    words = [*data, f"optimizer={variant}", f"model={model}", f"optimizer.lr={RATES[variant]}"]
    updates = FEWEST
    once([*words, *added], updates)  # warms up
    while True:  # as many updates as take the time
        pilot = once([*words, "instruments=off"], updates)
        if pilot.summary["fit_seconds"] > given.seconds / 3 or updates >= 10**7:
            break
        updates *= 4
    updates = max(FEWEST, int(updates * given.seconds / pilot.summary["fit_seconds"]))
    if variant == "gd":  # before it has converged: at the minimum a line search finds nothing
        updates = min(updates, DESCENDING)

    def contender(words: list[str]) -> Callable[[], float]:
        def run() -> float:
            result = once(words, updates)
            assert result.summary["updates"] == updates, result.stop
            return float(result.summary["fit_seconds"]) / updates

        return run

    pair = {
        "without": contender([*words, "instruments=off"]),
        "with": contender([*words, *added]),
    }
    costs = alternate(pair, given.repetitions)
    work = f"{name}: {shown}, {model}, {variant}"
    made = [Row(f"{work}, whole", "without", costs["without"], costs["with"], asked[variant])]
    for row in made:
        seconds = updates * statistics.median(row.baseline)
        more = updates * (statistics.median(row.ours) - statistics.median(row.baseline))
        row.note = f"{updates} updates; {seconds:.2f} s without, {more:+.2f} s with"
        row.details["seconds_more"] = more
        if name in FREE and more <= FREE[name]:
            row.asked = None  # the ratio is asked of runs that are long enough to feel it
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--mnist", type=Path, metavar="FOLDER", help="IDX files, .gz or not")
    options.add_argument("--variants", default=",".join(VARIANTS), help="with commas")
    options.add_argument("--models", default=",".join(MODELS), help="with commas")
    given: Any = options.parse_args(arguments)
    names = selected(ADDED, given.only)
    variants, models = selected(VARIANTS, given.variants), selected(MODELS, given.models)
    use_threads(given.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("gdtrain").setLevel(logging.ERROR)
    made: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"digits": ["data=digits"]}
        if given.mnist is not None:
            try:
                x, y = mnist(given.mnist)
            except FileNotFoundError as error:
                options.error(str(error))
            folder = Path(scratch)
            np.save(folder / "x.npy", x.reshape(-1, 1, 28, 28))
            np.save(folder / "y.npy", y)
            sources["MNIST"] = ["data=npy", f"data.path={folder}/x.npy"]
            sources["MNIST"] += [f"data.target_path={folder}/y.npy"]
        try:
            for name in names:
                for shown, data in sources.items():
                    for variant in variants:
                        for model in models:
                            made += rows(name, data, shown, variant, model, given)
                            print(f"  {made[-1].work}: {made[-1].ratio:.3f}", file=sys.stderr)
        finally:  # what was measured before an error is shown all the same
            report("Cost of a choice", made, environment(given), given.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
