"""What callbacks see and log is the same however updates are put into sweeps, and at any speed."""

import tempfile
import time
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import Numbers, fit, weights

from gdtrain import GD, SGD, MiniBatchSGD
from gdtrain.analysis.trajectory import Snapshots
from gdtrain.callbacks import (
    Curvature,
    Distance,
    GradientCosine,
    GradientNoise,
    GradientNorms,
    Histograms,
    LossCurves,
    StepTest,
    Trajectory,
    UpdateRatio,
)

UPDATES = 100
CUTS = [(7, 1.0), (1258, 1.0), ("auto", 100.0), ("auto", 0.01)]
CALLBACKS = {
    "gradient norms": GradientNorms,
    "update ratio": UpdateRatio,
    "distance": Distance,
    "cosine": GradientCosine,
    "noise": partial(GradientNoise, size=4),
    "step test": partial(StepTest, probe=64),
    "histograms": Histograms,
    "every 11": partial(GradientNorms, every=11),
    "curvature": Curvature,
    "curvature every 13": partial(Curvature, every=13),
    "curves": partial(LossCurves, points=9),
    "trajectory": None,
}
OPTIMIZERS = {1: SGD, 8: partial(MiniBatchSGD, momentum=0.9), "full": GD}


def run(folder, names, batch, sweep, speed=1.0):
    """θ, and all that callbacks left but for times."""
    made = [
        Trajectory(folder / "checkpoints", points=10) if name == "trajectory" else CALLBACKS[name]()
        for name in names
    ]
    loggers = [Numbers(), TensorBoardLogger(folder, name="", version="")]
    with pytest.MonkeyPatch.context() as patch:
        for clock in ("perf_counter", "monotonic"):
            real = getattr(time, clock)
            patch.setattr(time, clock, lambda real=real: speed * real())
        module = fit(
            *made, batch=batch, updates=UPDATES, sweep=sweep, optimizer=OPTIMIZERS[batch], lr=0.05,
            logger=loggers if set(names) & {"curves", "histograms"} else loggers[:1],
        )  # fmt: skip
    logged = {tag: v for tag, v in loggers[0].found.items() if not tag.startswith("time/")}
    logged.pop("seconds", None)
    left = {"updates": module.updates, "stop": module.stop, "logged": logged}
    left["parameters"] = weights(module).numpy()
    for callback in made:
        if isinstance(callback, Curvature):
            left["curvature"] = callback.looks
        if isinstance(callback, Trajectory):
            path = Snapshots.load(callback.path)
            left["path"] = path.updates.tolist(), path.parameters.tobytes()
        if isinstance(callback, LossCurves):
            rows = callback.history.train
            left["history"] = {name: rows[name] for name in rows if name != "seconds"}
    if loggers[1] in module.trainer.loggers:
        left["events"] = events_of(folder)
    return left


def events_of(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()
    found = {}
    for tag in events.Tags()["scalars"]:
        # Where a point lies on the axis of time is a time; the losses themselves are none.
        by_time = tag.startswith("by_millisecond/")
        if not tag.startswith("time/"):
            found[tag] = [(None if by_time else e.step, e.value) for e in events.Scalars(tag)]
    for tag in events.Tags()["histograms"]:
        found[tag] = [(e.step, e.histogram_value) for e in events.Histograms(tag)]
    return found


@cache
def one_by_one(names, batch):
    """The run whose sweeps are single updates."""
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder), names, batch, 1)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for part, value in expected.items():
        if isinstance(value, dict):
            assert found[part].keys() == value.keys(), part
            for tag in value:
                np.testing.assert_equal(found[part][tag], value[tag], err_msg=f"{part} {tag}")
        else:
            np.testing.assert_equal(found[part], value, err_msg=part)


@pytest.mark.parametrize("name", list(CALLBACKS))
@pytest.mark.parametrize(("sweep", "speed"), CUTS)
def test_a_callback_by_itself(tmp_path, monkeypatch, name, sweep, speed):
    monkeypatch.setattr("gdtrain.descent.work._PASS", 2**22)  # or few looks are paid for
    expected = one_by_one((name,), 8)
    assert_equal(run(tmp_path, (name,), 8, sweep, speed), expected)
    seen = {
        "curves": lambda: len(expected["history"]["loss"]),
        "trajectory": lambda: len(expected["path"][0]),
        "histograms": lambda: len(next(iter(expected["events"].values()))),
    }.get(name, lambda: max(map(len, expected["logged"].values())))()
    assert seen >= 5  # there is something to compare


@pytest.mark.parametrize("batch", [1, "full"])
@pytest.mark.parametrize(("sweep", "speed"), [(7, 1.0), ("auto", 100.0)])
def test_all_together(tmp_path, batch, sweep, speed):
    names = tuple(name for name in CALLBACKS if "every" not in name)
    assert_equal(run(tmp_path, names, batch, sweep, speed), one_by_one(names, batch))
