"""The order of callbacks has no meaning: a run that diverges and recovers is the same in each."""

import hashlib
import io
import itertools
import json
import signal
import tempfile
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from watched_runs import QUIET

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, Convergence, Divergence, Interrupt, LossCurves
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP
from gdtrain.schedules import Constant

OPTIMIZERS = {1: SGD, "full": GD}


class Saves(Callback):
    """A checkpoint whenever it is called, as callbacks of users do, at the places of the list."""

    def __init__(self):
        self.saved = []

    def next_update(self, update):
        return (update // 7 + 1) * 7

    def _save(self, trainer):
        state = trainer._checkpoint_connector.dump_checkpoint()
        state["gdtrain"]["settings"] = sorted(state["gdtrain"]["settings"].items())
        # Who ends the run, and what callbacks remember of the update at hand, is their own affair.
        del state["gdtrain"]["stop"], state["callbacks"]
        file = io.BytesIO()
        torch.save(state, file)
        self.saved.append((trainer.global_step, hashlib.sha256(file.getvalue()).hexdigest()))

    def on_train_batch_start(self, trainer, pl_module, *_):
        self._save(trainer)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._save(trainer)

    def on_train_end(self, trainer, pl_module):
        pl_module.settle()  # as all do who look at the end
        self._save(trainer)


class Signals(Callback):
    """Ctrl-C after an update."""

    def next_update(self, update):
        return 200 if update < 200 else None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.updates == 200:
            signal.raise_signal(signal.SIGINT)


class Poisons(Callback):
    """Spoils a parameter between two stations, and stops the run: only its end can tell."""

    def next_update(self, update):
        return 21 if update < 21 else None

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.updates == 21:
            with torch.no_grad():
                next(pl_module.model.parameters()).fill_(float("nan"))
            trainer.should_stop = True


# By name: batch size, η, epochs, what the callbacks are told, further ones, and what must happen.
RUNS = {
    "recovers, B = 16": (16, 100.0, 20, {}, [], "BUDGET"),
    "recovers, B = 1": (1, 10.0, 3, {}, [], "BUDGET"),
    "recovers, B = N": ("full", 100.0, 80, {}, [], "BUDGET"),
    "stops": (1, 10.0, 3, {"action": "stop"}, [], "DIVERGED"),
    "is interrupted": (1, 10.0, 3, {}, [Signals], "INTERRUPTED"),
    "fails at its end": (16, 0.1, 20, {}, [Poisons], "NON_FINITE"),
}
ORDERS = list(itertools.permutations(range(5)))


def train(name, order, folder):
    """All that must not depend on the order."""
    batch_size, lr, epochs, options, further, _ = RUNS[name]
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("iris", batch_size=batch_size, updates_per_sweep=9)
    module = SupervisedModule(
        MLP((4,), 3, hidden=[16]),
        CrossEntropy(),
        partial(OPTIMIZERS.get(batch_size, MiniBatchSGD), lr=lr, momentum=0.5),
        Constant(),
    )
    curves, watch, saves = LossCurves(), Divergence(**options), Saves()
    made = [curves, watch, Convergence(every=14), Interrupt(), saves]
    trainer = Trainer(
        callbacks=[*(made[i] for i in order), *(f() for f in further), BestAndLast(folder)],
        max_epochs=epochs,
        check_val_every_n_epoch=3,
        **{**QUIET, "enable_checkpointing": True},
    )
    trainer.fit(module, datamodule=data)
    history = asdict(curves.history)
    for part in history.values():
        part.pop("seconds", None)
    files = {}
    for path in sorted(folder.iterdir()):
        state = torch.load(path, weights_only=True)["state_dict"]
        files[path.name] = [hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in state.values()]
    return {
        "saved": saves.saved,
        "history": json.dumps(history),
        "events": json.dumps(watch.events),
        "stop": None if module.stop is None else (module.stop.reason.value, module.stop.message),
        "cut": module.rate_cut,
        "files": files,
    }


@cache
def expected(name):
    with tempfile.TemporaryDirectory() as folder:
        return train(name, ORDERS[0], Path(folder))


def cases():
    """One run in all orders: reversed, each first, each last, the others slow; the rest in two."""
    whole, name = ORDERS[0], "recovers, B = 16"
    some = {whole[::-1]}
    for i in whole:
        others = [k for k in whole if k != i]
        some |= {(i, *others), (*others, i)}
    for order in ORDERS[1:]:
        yield pytest.param(name, order, marks=[] if order in some else pytest.mark.slow)
    rest = [other for other in RUNS if other != name]
    yield from itertools.product(rest, [whole[::-1], (2, 4, 0, 3, 1)])


@pytest.mark.parametrize(("name", "order"), list(cases()))
def test_a_run_is_the_same_in_any_order(tmp_path, name, order):
    found, reason = expected(name), RUNS[name][-1]
    assert train(name, order, tmp_path) == found
    # There is something to see.
    assert (found["stop"] or ("BUDGET",))[0] == reason
    assert bool(json.loads(found["events"])) == (reason in ("BUDGET", "INTERRUPTED"))
    assert len({update for update, _ in found["saved"]}) > 3
