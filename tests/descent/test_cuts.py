"""Where sweeps end: at every declared update, and nowhere that matters.

Parameters, history and the last update must be the same, bit for bit.
"""

import hashlib
import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from watched_runs import QUIET

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, Convergence, Divergence, LossCurves
from gdtrain.data import ArrayDataModule, EmbeddedDataModule
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.models import MLP, Linear
from gdtrain.schedules import Constant, Cosine, InverseTime, ReduceOnPlateau

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of .list. across ranks is zero"),
    pytest.mark.filterwarnings("ignore:You defined a .validation_step. but have no"),
]
CUTS = [(1, 1.0), (7, 1.0), (1258, 1.0), ("auto", 100.0), ("auto", 0.01)]  # how fast clocks run
OPTIMIZERS = {1: SGD, "full": GD}


def iris(cut, callbacks, *, batch_size=1, lr=0.05, schedule=None, hidden=(), **options):
    """A run on flowers, ready to start: a module, its data and arguments for the trainer."""
    kind = partial(OPTIMIZERS.get(batch_size, MiniBatchSGD), lr=lr, momentum=options.pop("mu", 0.0))
    data = EmbeddedDataModule("iris", batch_size=batch_size, updates_per_sweep=cut)
    model = MLP((4,), 3, hidden=list(hidden)) if hidden else Linear((4,), 3)
    module = SupervisedModule(model, CrossEntropy(), kind, schedule or Constant())
    return module, data, {"callbacks": callbacks, "max_epochs": 2, **options}


def line(cut, callbacks, *, batch_size=1, lr=0.1, weight_decay=0.0, schedule=None, **options):
    """A line with noise: at one η SGD has a floor, GD converges."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = x @ [1.0, -2.0, 0.5] + rng.normal(size=200)
    kind = partial(OPTIMIZERS[batch_size], lr=lr, weight_decay=weight_decay)
    data = ArrayDataModule(
        x, y, batch_size=batch_size, val_fraction=0, test_fraction=0, dtype="float64",
        updates_per_sweep=cut,
    )  # fmt: skip
    module = SupervisedModule(Linear((3,), 1).double(), SquaredError(), kind, schedule)
    arguments = {"callbacks": callbacks, "max_epochs": 60, "precision": "64-true"}
    return module, data, arguments | options


def divergence(cut, folder, batch_size, lr, **options):
    return iris(
        cut, [Divergence(**options)], batch_size=batch_size, lr=lr, hidden=[32], mu=0.5,
        max_epochs={1: 3, 16: 12, "full": 100}[batch_size], check_val_every_n_epoch=3,
    )  # fmt: skip


def nan_in_the_data(cut, folder):
    module, data, arguments = iris(cut, [Divergence()], max_epochs=20)
    data.setup()
    data.examples("train")[0][77, 2] = float("nan")
    return module, data, arguments


def stopped_early(cut, folder):
    stop = EarlyStopping("loss/val", patience=1)
    return iris(cut, [Divergence(), stop], lr=1.0, max_epochs=40, check_val_every_n_epoch=2)


def on_a_plateau(cut, folder):
    schedule, options = ReduceOnPlateau(gamma=0.5, patience=0), {"max_epochs": 8, "hidden": [32]}
    return iris(cut, [Divergence()], batch_size=8, lr=100.0, schedule=schedule, **options)


def converges(cut, folder, **options):
    return line(cut, [Convergence(1e-4)], batch_size="full", **options)


def converges_by_the_gap(cut, folder):
    check, options = Convergence(None, gap=1e-6), {"weight_decay": 0.1, "max_epochs": 9000}
    return line(cut, [check], batch_size="full", **options)


def floor(cut, folder, max_epochs=60, **options):
    return line(cut, [Convergence(**options)], max_epochs=max_epochs)


def stalled(cut, folder):
    return iris(cut, [Convergence(patience=2)], lr=2.0, max_epochs=40)


def checkpoints(cut, folder):
    """The best, whatever the clock says when the last is written."""
    return iris(cut, [Divergence(), BestAndLast(folder, seconds_between=0.0)], schedule=Cosine())


# By name: from a cut and a folder to a module, its data and the trainer's arguments. What the
# folder holds at the end must be the same, too. The second part is what must have happened.
ROWS = {
    "a recovery, B = 1": (partial(divergence, batch_size=1, lr=10.0), "events"),
    "a recovery, B = 16": (partial(divergence, batch_size=16, lr=30.0), "events"),
    "a recovery, B = N": (partial(divergence, batch_size="full", lr=100.0), "events"),
    "a stop": (partial(divergence, batch_size=1, lr=10.0, action="stop"), "DIVERGED"),
    "a NaN in the data": (nan_in_the_data, "NON_FINITE"),
    "converged by tolerance": (partial(converges, max_epochs=3000), "CONVERGED"),
    "converged by the gap": (converges_by_the_gap, "CONVERGED"),
    "a floor of noise": (partial(floor, share=0.5, max_epochs=200), "NOISE_FLOOR"),
    "checks every 130 updates": (partial(floor, every=130), "NOISE_FLOOR"),
    "stopped early": (stopped_early, "early"),
    "stalled": (stalled, "STALLED"),
    "a plateau": (on_a_plateau, "events"),
    "without a planned end": (
        partial(converges, max_epochs=-1, schedule=InverseTime(k=1e-3, warmup=20)),
        "CONVERGED",
    ),
    "the best checkpoint": (checkpoints, "best.ckpt"),
}


def digest(*tensors):
    made = hashlib.sha256()
    for tensor in tensors:
        made.update(tensor.detach().cpu().numpy().tobytes())
    return made.hexdigest()


def without_clock(value):
    """The same without what a clock has told."""
    if isinstance(value, dict):
        return {k: without_clock(v) for k, v in value.items() if "second" not in k}
    return [without_clock(v) for v in value] if isinstance(value, list) else value


def train(make, cut, folder, further=(), checkpoint=None):
    """What a run came to: by a name, what must be equal."""
    seed_everything(0, verbose=False)
    module, data, arguments = make(cut, folder)
    curves = LossCurves()
    callbacks = [curves, *arguments.pop("callbacks"), *further]
    saves = {"enable_checkpointing": any(isinstance(c, BestAndLast) for c in callbacks)}
    quiet = {**QUIET, **saves, "num_sanity_val_steps": 0}
    trainer = Trainer(callbacks=callbacks, **quiet, **arguments)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    stop = None if module.stop is None else asdict(module.stop)
    events = [e for c in callbacks if isinstance(c, Divergence) for e in c.events]
    early = [c.stopped_epoch for c in callbacks if isinstance(c, EarlyStopping)]
    files = {}
    for path in sorted(Path(folder).iterdir()):
        if path.name != "last.ckpt":
            state = torch.load(path, weights_only=True)["state_dict"]
            files[path.name] = digest(*state.values())
    return {
        "updates": module.updates,
        "parameters": digest(*module.model.parameters()),
        "history": json.dumps(without_clock(asdict(curves.history))),
        "stop": json.dumps(without_clock(stop)),
        "events": json.dumps(events),
        "early": early,
        "files": files,
        "certificate": json.dumps(without_clock(module.certificate)),
    }


def happened(made, what):
    """That the row shows what it is there for."""
    if what == "events":
        return made["events"] != "[]"
    if what == "early":
        return made["early"][0] > 0
    if what.endswith(".ckpt"):
        return what in made["files"]
    return what in made["stop"]


@pytest.mark.parametrize("name", ROWS)
def test_nothing_depends_on_where_sweeps_end_nor_on_the_clock(name, tmp_path, monkeypatch):
    make, what = ROWS[name]
    clocks = {clock: getattr(time, clock) for clock in ("perf_counter", "monotonic")}
    expected = None
    for cut, speed in CUTS:
        for clock, real in clocks.items():
            monkeypatch.setattr(time, clock, lambda real=real, speed=speed: speed * real())
        folder = tmp_path / f"{cut} {speed}"
        folder.mkdir()
        made = train(make, cut, folder)
        expected = expected or made
        assert made == expected, (cut, speed)
    assert happened(expected, what), expected


# ---------------------------------------------------------------------- resumed


class SaveAt(Callback):
    """Saves after so many updates, in the middle of whatever goes on."""

    def __init__(self, folder, updates):
        self.folder, self.updates = folder, updates

    def next_update(self, update):
        return min((u for u in self.updates if u > update), default=None)

    def on_train_batch_end(self, trainer, pl_module, *args):
        if pl_module.updates in self.updates:
            trainer.save_checkpoint(self.folder / f"{pl_module.updates}.ckpt")


@pytest.mark.parametrize(
    ("name", "updates"),
    [
        ("a recovery, B = 1", [5, 16, 37, 250]),
        ("converged by the gap", [3, 50, 250]),
        ("a floor of noise", [1000, 2500, 4097]),
    ],
)
def test_a_run_is_resumed_as_the_same_run_from_any_update(name, updates, tmp_path):
    """Between stations and between checks, too: what was gathered is in the checkpoint."""
    for folder in ("saved", "whole", *map(str, updates)):
        (tmp_path / folder).mkdir()
    make, _ = ROWS[name]
    expected = train(make, 64, tmp_path / "whole", [SaveAt(tmp_path / "saved", updates)])
    for update in updates:
        path = tmp_path / "saved" / f"{update}.ckpt"
        made = train(make, "auto", tmp_path / str(update), checkpoint=path)
        assert made == expected, update
