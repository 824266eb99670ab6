"""Trajectory: which updates it keeps, that it changes nothing, what it leaves and takes up."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
import watched_runs
from lightning import Callback
from torch import nn
from watched_runs import StopAt, small, weights

import gdtrain.callbacks.trajectory as trajectory_module
from gdtrain import GD, SGD
from gdtrain.analysis.trajectory import Snapshots
from gdtrain.callbacks import BestAndLast, Divergence
from gdtrain.callbacks.trajectory import Trajectory
from gdtrain.data import ArrayDataModule
from gdtrain.losses import SquaredError
from gdtrain.models import Linear

fit = partial(watched_runs.fit, batch=16, updates=200, momentum=0.5)


class States(Callback):
    """θ after each sweep, by update."""

    def __init__(self):
        self.seen = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.setdefault(pl_module.updates, vector(pl_module))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen[pl_module.updates] = vector(pl_module)


def vector(module):
    return weights(module).numpy()


def line(*callbacks, updates=70, bias=False, optimizer=GD, **options):
    """A run with one or two parameters."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 1))
    y = 2 * x[:, 0] + rng.normal(size=60)
    batch = "full" if optimizer is GD else 1
    data = ArrayDataModule(x, y, task="regression", batch_size=batch)
    model, loss = partial(Linear, (1,), 1, bias=bias), SquaredError()
    options = {"data": data, "loss": loss, "optimizer": optimizer, **options}
    return watched_runs.fit(*callbacks, updates=updates, model=model, **options)


# ------------------------------------------------------------------ which updates


@pytest.mark.parametrize(("batch", "sweep"), [("full", "auto"), (1, "auto"), (16, 3)])
def test_copies_lie_evenly_from_the_start_to_the_end_and_are_the_states_of_the_run(
    tmp_path, batch, sweep
):
    kept, states = Trajectory(tmp_path / "checkpoints", points=20), States()
    module = fit(kept, states, batch=batch, sweep=sweep)
    found = Snapshots.load(tmp_path / "trajectory.npz")
    assert found.updates.tolist() == kept.updates
    assert (kept.updates[0], kept.updates[-1]) == (0, 200)
    assert 10 <= len(kept.updates) <= 22  # of which a fast run has 16
    assert max(np.diff(kept.updates)) <= 40
    for update, theta in zip(found.updates.tolist(), found.parameters, strict=True):
        assert np.array_equal(theta, states.seen[update])
    assert np.array_equal(found.parameters[-1], vector(module))
    assert found.parameters.dtype == np.float32
    found.check(module.model, "trajectory.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["trajectory.npz"]


@pytest.mark.parametrize("batch", ["full", 16, 1])
def test_it_changes_no_update(tmp_path, batch):
    alone, watched = (
        vector(fit(*callbacks, batch=batch, updates=60))
        for callbacks in ((), (Trajectory(tmp_path / "checkpoints"),))
    )
    assert np.array_equal(alone, watched)
    assert not np.array_equal(alone, vector(fit(batch=batch, updates=59)))


@pytest.mark.parametrize(
    ("rule", "bias"),
    [
        ({"momentum": 0.9}, False),
        ({"rule": "auto"}, True),
        ({"optimizer": SGD}, True),
        ({"optimizer": SGD, "rule": "auto"}, False),
    ],
)
def test_a_line_shows_its_first_steps_one_by_one_and_they_are_those_of_the_run(
    tmp_path, bias, rule
):
    kept, states = Trajectory(tmp_path / "checkpoints", points=30), States()
    watched = line(kept, states, bias=bias, **rule)
    assert np.array_equal(vector(watched), vector(line(bias=bias, **rule)))
    assert kept.updates[:31] == list(range(31))
    assert kept.updates[-1] == 70
    found = Snapshots.load(tmp_path / "trajectory.npz")
    path = dict(zip(found.updates.tolist(), found.parameters, strict=True))
    compared = [update for update in states.seen if update in path]
    assert len(compared) > 5
    for update in compared:
        assert np.array_equal(path[update], states.seen[update])
    if rule != {"optimizer": SGD, "rule": "auto"}:  # whose race depends on the planned updates
        assert np.array_equal(path[7], vector(line(bias=bias, updates=7, **rule)))


def test_steps_that_the_run_has_taken_back_are_not_kept(tmp_path):
    kept, states = Trajectory(tmp_path / "checkpoints", points=50), States()
    module = line(Divergence(), kept, states, lr=50.0, updates=300)
    assert module.rate_cut < 1  # it has recovered
    found = Snapshots.load(tmp_path / "trajectory.npz")
    assert np.isfinite(found.parameters).all()
    for update, theta in zip(found.updates.tolist(), found.parameters, strict=True):
        if update in states.seen:
            assert np.array_equal(theta, states.seen[update])
    assert float(np.abs(found.parameters[-1]).max()) < 100


def test_a_run_that_is_longer_than_planned_is_thinned(tmp_path):
    class Planned(Callback):
        """The plan is known too low when the trajectory looks, and right afterwards."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.total, pl_module.total_updates = pl_module.total_updates, 40

    class After(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            pl_module.total_updates = before.total

    before = Planned()
    kept = Trajectory(tmp_path / "checkpoints", points=10)
    fit(before, kept, After(), updates=600, batch=1)
    assert len(kept.updates) <= 12
    assert (kept.updates[0], kept.updates[-1]) == (0, 600)
    assert max(np.diff(kept.updates)) < 200


# ------------------------------------------------------------------ memory


@pytest.mark.parametrize(("copies", "least", "most"), [(200, 14, 52), (20, 12, 20), (8, 6, 8)])
def test_memory_bounds_how_many_are_kept(tmp_path, copies, least, most):
    size = 4 * sum(p.numel() for p in small().parameters())
    kept = Trajectory(tmp_path / "checkpoints", megabytes=(copies + 0.5) * size / 2**20)
    fit(kept, updates=800, batch=1)
    found = Snapshots.load(tmp_path / "trajectory.npz")
    assert least <= len(found.updates) <= most
    assert found.parameters.nbytes <= copies * size
    assert found.updates[[0, -1]].tolist() == [0, 800]


@pytest.mark.parametrize(
    ("updates", "spacing"),
    [(1, 20), (50, 50), (10**6, 63)],  # T/points; what pays; T/16
)
def test_cheap_updates_get_fewer_copies(tmp_path, monkeypatch, updates, spacing):
    """A copy is worth the operations of so many updates: six for each parameter."""
    operations = 6 * sum(p.numel() for p in small().parameters())
    monkeypatch.setattr(trajectory_module, "_PAYS", updates * operations)
    kept = Trajectory(tmp_path / "checkpoints")
    fit(kept, updates=1000, batch=1)
    assert kept.updates == sorted({*range(0, 1000, spacing), 1000})


def test_where_eight_copies_do_not_fit_none_is_kept_and_it_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="gdtrain")
    kept = Trajectory(tmp_path / "checkpoints", megabytes=0.0015)
    fit(kept, updates=20)
    assert kept.updates == []
    assert list(tmp_path.iterdir()) == []
    assert "none is kept, since 8 copies of 51 parameters take more than 0.0015 MB" in caplog.text


def test_frozen_parameters_are_left_out_and_a_model_without_others_has_no_path(tmp_path):
    model = small()
    next(model.parameters()).requires_grad_(False)
    kept = Trajectory(tmp_path / "checkpoints")
    fit(kept, updates=30, model=model)
    assert Snapshots.load(tmp_path / "trajectory.npz").parameters.shape[1] == 51 - 24


# ------------------------------------------------------------------ the file


def test_a_resumed_run_goes_on_with_the_path(tmp_path):
    (tmp_path / "whole").mkdir()
    whole, states = Trajectory(tmp_path / "whole" / "checkpoints", points=10), States()
    end = fit(whole, states)
    first = tmp_path / "first" / "checkpoints"

    fit(BestAndLast(first), Trajectory(first, points=10), StopAt(85))
    assert Snapshots.load(first.parent / "trajectory.npz").updates[-1] == 85
    folder = tmp_path / "second" / "checkpoints"
    second = Trajectory(folder, points=10)
    resumed = fit(second, BestAndLast(folder), ckpt_path=first / "last.ckpt")
    assert np.array_equal(vector(resumed), vector(end))
    found = Snapshots.load(tmp_path / "second" / "trajectory.npz")
    uncut = Snapshots.load(tmp_path / "whole" / "trajectory.npz")
    assert found.updates.tolist() == uncut.updates.tolist() == list(range(0, 201, 20))
    assert np.array_equal(found.parameters, uncut.parameters)
    # The file of another model is not gone on with.
    Snapshots(np.arange(2), np.zeros((2, 3), np.float32), ["w"], [3]).save(
        first.parent / "trajectory.npz"
    )
    folder = tmp_path / "third" / "checkpoints"
    other = Trajectory(folder, points=10)
    fit(other, BestAndLast(folder), ckpt_path=first / "last.ckpt")
    assert other.updates[0] == 85


def test_it_is_written_beside_a_checkpoint_that_comes_late_and_when_a_run_fails(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(trajectory_module, "_SECONDS", 0.0)
    there = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "x.ckpt")
            there.append(Snapshots.load(tmp_path / "trajectory.npz").updates[-1])
            if pl_module.updates > 40:
                raise RuntimeError("the machine fails")

    with pytest.raises(RuntimeError, match="the machine fails"):
        fit(Trajectory(tmp_path / "checkpoints"), Look())
    assert there[0] < there[-1]
    found = Snapshots.load(tmp_path / "trajectory.npz")
    assert found.updates[-1] == there[-1] == 39  # of 13 × 3
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert not any("Trajectory" in name for name in state["callbacks"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 7}, "points must be .* at least 8. Received: points=7"),
        ({"points": True}, "points must be .* at least 8. Received: points=True"),
        ({"points": 9.5}, "points must be .* at least 8. Received: points=9.5"),
        ({"megabytes": 0}, r"megabytes must be .* in \(0, ∞\). Received: megabytes=0"),
        ({"megabytes": float("nan")}, r"megabytes must be .* in \(0, ∞\). Received: megabytes=nan"),
    ],
)
def test_what_is_out_of_range_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        Trajectory("checkpoints", **options)


def test_convolutions_are_kept_in_the_order_of_the_model(tmp_path):
    """Training may lay them out with the channels last."""
    model = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())
    kept, states = Trajectory(tmp_path / "checkpoints"), States()
    fit(kept, states, updates=30, model=model)
    found = Snapshots.load(tmp_path / "trajectory.npz")
    assert np.array_equal(found.parameters[0], states.seen[0])
