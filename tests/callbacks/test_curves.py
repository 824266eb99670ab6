"""Curves: what a point, a band and an epoch are, whatever the sweeps; what is on disk, and when."""

import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_iris
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from watched_runs import Losses, fit

import gdtrain
from gdtrain.callbacks import LossCurves
from gdtrain.data import ArrayDataModule
from gdtrain.models import Linear


def trained(folder, batch, updates, points, **options):
    losses, curves = Losses(), LossCurves(points=points)
    iris = load_iris(return_X_y=True)
    data = ArrayDataModule(*iris, batch_size=batch, test_fraction=0, **options)
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    model = partial(Linear, (4,), 3)
    fit(losses, curves, batch=batch, updates=updates, model=model, data=data, logger=logger)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return np.array(losses.seen), curves.history, events


def values(events, tag):
    return [event.step for event in events.Scalars(tag)], [e.value for e in events.Scalars(tag)]


def test_a_point_is_the_mean_between_smallest_and_largest(tmp_path):
    losses, history, events = trained(tmp_path, 1, 405, points=20, val_fraction=0.1)
    assert len(losses) == 405
    parts = np.split(losses, range(21, 405, 21))  # ⌈405/20⌉ = 21 updates each
    for column, tag, reduce in (
        ("loss", "loss/train", np.mean),
        ("loss", "spread/loss/train/mean", np.mean),
        ("min", "spread/loss/train/min", np.min),
        ("max", "spread/loss/train/max", np.max),
    ):
        expected = [reduce(part) for part in parts]
        assert history.train[column] == pytest.approx(expected, rel=1e-12)
        steps, written = values(events, tag)
        assert steps == history.train["update"] == [*range(21, 405, 21), 405]
        assert written == pytest.approx(expected, rel=1e-6)
    assert history.train["epoch"] == pytest.approx(np.array(steps) / 135)
    tags = events.Tags()["scalars"]
    assert len(tags) == 14
    for tag in tags:  # each chart says what it shows
        assert events.SummaryMetadata(tag).summary_description, tag


def test_an_epoch_is_the_mean_of_its_examples(tmp_path):
    losses, history, events = trained(tmp_path, 32, 20, points=7, val_fraction=15)
    # 135 examples: 4 batches of 32, and one of 7.
    expected = losses.reshape(4, 5) @ [32, 32, 32, 32, 7] / 135
    steps, written = values(events, "by_epoch/loss/train")
    assert steps == [1, 2, 3, 4]
    assert written == pytest.approx(expected, rel=1e-6)
    assert values(events, "by_epoch/loss/val") == ([1, 2, 3, 4], values(events, "loss/val")[1])
    assert history.val["epoch"] == [1, 2, 3, 4]


@pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero")
def test_the_full_batch_has_no_band_where_each_update_is_a_point(tmp_path):
    losses, history, events = trained(tmp_path / "each", "full", 20, points=20, val_fraction=0)
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("spread/")]
    assert history.train["min"] == history.train["max"] == history.train["loss"]
    assert values(events, "by_epoch/loss/train") == values(events, "loss/train")
    _, history, events = trained(tmp_path / "five", "full", 20, points=4, val_fraction=0)
    assert values(events, "spread/loss/train/max")[1] == pytest.approx(losses[::5], rel=1e-6)
    assert values(events, "by_epoch/loss/train")[0] == [5, 10, 15, 20]


def test_events_carry_the_time_of_their_update(tmp_path):
    _, history, events = trained(tmp_path, 1, 2700, points=50, val_fraction=0.1)
    walls = np.array([event.wall_time for event in events.Scalars("loss/train")])
    seconds = history.array("train", "seconds")
    assert walls - walls[0] == pytest.approx(seconds - seconds[0], abs=0.05)
    assert (np.diff(walls) > 0).all()
    for part, column in (("train", seconds), ("val", history.array("val", "seconds"))):
        steps, written = values(events, f"by_millisecond/loss/{part}")
        assert steps == [round(1000 * s) for s in column]
        assert written == values(events, f"loss/{part}")[1]
    assert min(values(events, "time/updates_per_second")[1]) > 0


def test_history_plots_against_epochs_with_a_band():
    result = gdtrain.fit("linear", *load_iris(return_X_y=True), epochs=5, progress=False)
    (axes,) = result.plot(by="epoch").axes
    (band,) = axes.collections
    corners = band.get_paths()[0].vertices
    assert corners[:, 0].max() == pytest.approx(5)
    assert corners[:, 1].max() == pytest.approx(max(result.history.train["max"]))
    assert axes.get_xlabel() == "epochs"


# ------------------------------------------------------------------ without training


def fed(sweeps, total=None, per_epoch=10, size=1, points=3, resume_after=()):
    """A `LossCurves` after sweeps of these losses; into a new one, where it is resumed."""
    trainer = SimpleNamespace(loggers=[], is_global_zero=True)
    module = SimpleNamespace(total_updates=total, updates_per_epoch=per_epoch, examples_seen=0)
    curves, first = LossCurves(points=points), 0
    for number, losses in enumerate(sweeps):
        module.examples_seen += size * len(losses)
        outputs = {
            "losses": torch.tensor(losses, dtype=torch.float64),
            "rates": torch.ones(len(losses)),
            "seconds": 0.0,
            "first": first,
            "examples": size,
        }
        curves.on_train_batch_end(trainer, module, outputs, None, number)
        first += len(losses)
        if number in resume_after:
            state = curves.state_dict()
            curves = LossCurves(points=points)
            curves.load_state_dict(state)
    return curves


@pytest.mark.parametrize("cut", [[40], [1] * 40, [7, 13, 20], [39, 1]])
def test_points_do_not_depend_on_sweeps_and_resuming(cut):
    losses = np.random.default_rng(0).random(40)
    whole = fed([losses], total=40)
    parts = np.split(losses, np.cumsum(cut)[:-1])
    other = fed(parts, total=40, resume_after=range(len(parts)))
    for column in ("update", "examples", "epoch", "lr", "min", "max"):
        assert other.history.train[column] == whole.history.train[column]
    assert other.history.train["loss"] == pytest.approx(whole.history.train["loss"], rel=1e-14)
    assert whole.history.train["update"] == [14, 28, 40]


def test_points_become_rarer_where_no_end_is_planned():
    curves = fed([np.ones(1000)], total=None, per_epoch=1, points=10)
    updates = np.array(curves.history.train["update"])
    for start in (20, 40, 80, 160, 320):
        assert ((updates > start) & (updates <= 2 * start)).sum() == 10
    assert updates[:20].tolist() == list(range(1, 21))


def test_a_loss_that_is_no_number_does_not_hide():
    curves = fed([[1.0, math.nan, 2.0, 3.0]], total=4, points=1)
    assert math.isnan(curves.history.train["min"][0])
    assert math.isnan(curves.history.train["max"][0])


@pytest.mark.parametrize("points", [0, -1, 1.5, True])
def test_points_must_be_a_count(points):
    with pytest.raises(ValueError, match="points must be a whole number of at least 1"):
        LossCurves(points=points)
