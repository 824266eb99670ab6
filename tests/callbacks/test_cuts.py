"""What callbacks see and log is the same however updates are put into sweeps, and at any speed."""

import hashlib
import time
from functools import cache, partial

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
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
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP

UPDATES = 100
CUTS = [(7, 1.0), (64, 1.0), (1258, 1.0), ("auto", 100.0), ("auto", 0.01)]
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


class Numbers(DummyLogger):
    """All that is logged, by tag and update."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def log_metrics(self, metrics, step):
        for tag, value in metrics.items():
            if tag != "seconds" and not tag.startswith("time/"):
                self.found.setdefault(tag, []).append((step, value))


def run(folder, names, batch, sweep, speed=1.0, updates=UPDATES):
    """Hash of θ, and all that callbacks left but for times."""
    torch.manual_seed(0)
    made = [
        Trajectory(folder / "checkpoints", points=10) if name == "trajectory" else CALLBACKS[name]()
        for name in names
    ]
    loggers = [Numbers(), TensorBoardLogger(folder, name="", version="")]
    trainer = Trainer(
        max_epochs=None,
        max_steps=updates,
        callbacks=made,
        logger=loggers if set(names) & {"curves", "histograms"} else loggers[:1],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = SupervisedModule(
        MLP((4,), 3, hidden=[6]), CrossEntropy(), partial(OPTIMIZERS[batch], lr=0.05)
    )
    data = EmbeddedDataModule("iris", batch_size=batch, updates_per_sweep=sweep)
    with pytest.MonkeyPatch.context() as patch:
        for clock in ("perf_counter", "monotonic"):
            real = getattr(time, clock)
            patch.setattr(time, clock, lambda real=real: speed * real())
        trainer.fit(module, datamodule=data)
    left = {"updates": module.updates, "stop": module.stop, "logged": loggers[0].found}
    theta = torch.cat([p.detach().flatten() for p in module.model.parameters()])
    left["parameters"] = hashlib.sha256(theta.numpy().tobytes()).hexdigest()
    for callback in made:
        if isinstance(callback, Curvature):
            left["curvature"] = callback.looks
        if isinstance(callback, Trajectory):
            path = Snapshots.load(callback.path)
            left["path"] = path.updates.tolist(), path.parameters.tobytes()
        if isinstance(callback, LossCurves):
            rows = callback.history.train
            left["history"] = {name: rows[name] for name in rows if name != "seconds"}
    if loggers[1] in trainer.loggers:
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
    import tempfile
    from pathlib import Path

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
def test_a_callback_by_itself(tmp_path, name, sweep, speed):
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
