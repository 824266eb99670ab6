"""Callbacks that act on batches: one update a step, exact cuts, or a refusal that says why."""

import logging
from datetime import timedelta
from functools import partial
from itertools import pairwise

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Checkpoint,
    DeviceStatsMonitor,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    OnExceptionCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from watched_runs import QUIET, weights

from gdtrain import SGD, SupervisedModule
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import Linear
from gdtrain.step_sizes import StochasticPolyak

UPDATES = 60


def start(callbacks=(), *, kind=SupervisedModule, optimizer=None, updates=UPDATES, **options):
    torch.manual_seed(0)
    data = EmbeddedDataModule("iris", batch_size=1, updates_per_sweep=1000)
    module = kind(Linear((4,), 3), CrossEntropy(), optimizer or partial(SGD, lr=0.05))
    saves = {"enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks)}
    arguments = {**QUIET, **saves, "max_epochs": -1, "max_steps": updates, **options}
    return module, data, Trainer(callbacks=list(callbacks), **arguments)


def fit(callbacks=(), **options):
    module, data, trainer = start(callbacks, **options)
    trainer.fit(module, datamodule=data)
    return module


def saved(file):
    """The number of updates in a checkpoint, and θ."""
    state = torch.load(file, weights_only=True)
    assert state["global_step"] == state["gdtrain"]["updates"]
    theta = [p.flatten() for name, p in state["state_dict"].items() if name.startswith("model")]
    return state["global_step"], torch.cat(theta)


def path():
    """θ before and after each of the updates, by a plain loop."""
    module, data, _ = start()
    data.setup()
    x, y = data.examples("train")
    order = data.train_dataloader().block(0, UPDATES)[:, 0].tolist()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    made = [weights(module)]
    for i in order:
        optimizer.zero_grad()
        nn.functional.cross_entropy(module.model(x[i : i + 1]), y[i : i + 1]).backward()
        optimizer.step()
        made.append(weights(module))
    return made


class Log(DummyLogger):
    def __init__(self):
        super().__init__()
        self.steps = []

    def log_metrics(self, metrics, step=None):
        self.steps.append(step)


# ---------------------------------------------------------------------- one update a step


def test_an_average_of_every_update_is_that(caplog):
    average = EMAWeightAveraging(decay=0.9)
    with caplog.at_level(logging.INFO, "gdtrain"):
        module = fit([average])
    expected, *rest = path()[1:]  # Lightning begins with the first update's
    for theta in rest:
        expected = 0.9 * expected + 0.1 * theta
    assert int(average._average_model.n_averaged) == UPDATES
    assert torch.allclose(weights(module), expected, atol=1e-6)
    assert "one update a step, because EMAWeightAveraging acts on batches" in caplog.text


class Saves(ModelCheckpoint):
    """A user's: nobody knows what it compares."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.seen.append(trainer.global_step - 1)


class Seeing(SupervisedModule):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.seen = []


class OwnStep(Seeing):
    def training_step(self, batch, batch_idx):
        self.seen.append(self.updates)
        return super().training_step(batch, batch_idx)


class OwnHook(Seeing):
    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(outputs["first"])


def told(hook):
    """A function that is given as a hook."""
    return LambdaCallback(**{hook: lambda trainer, pl, *_: pl.seen.append(trainer.global_step)})


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (partial(told, "on_train_batch_start"), Seeing),
        (partial(told, "on_before_zero_grad"), Seeing),  # as many exponential averages do
        (partial(Saves, save_top_k=0), Seeing),
        (Callback, OwnStep),
        (Callback, OwnHook),
    ],
)
def test_a_batch_is_an_update(make, kind):
    assert fit([make()], kind=kind).seen == list(range(UPDATES))


def test_the_ends_of_epochs_are_seen_by_functions_too():
    module = fit([told("on_train_epoch_end")], kind=Seeing, updates=250)
    assert module.seen == [module.updates_per_epoch, 2 * module.updates_per_epoch, 250]


# ---------------------------------------------------------------------- hooks of a step


class Gradients(Callback):
    """Sees the gradient of each update, before it."""

    def __init__(self):
        self.before, self.norms, self.after = [], [], []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.before.append(weights(pl_module))

    def on_after_backward(self, trainer, pl_module):
        self.norms.append(float(sum(p.grad.square().sum() for p in pl_module.parameters())))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        assert optimizer is trainer.optimizers[0]
        self.after.append(weights(pl_module))


class Clips(SupervisedModule):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


def test_hooks_of_each_step_are_called_truly():
    kept = Gradients()
    module = fit([kept])
    thetas = path()
    assert module.engine_in_use == "eager"
    for seen in (kept.before, kept.after):
        assert torch.allclose(torch.stack(seen), torch.stack(thetas[:-1]), atol=1e-6)
    squares = [float((b - a).square().sum()) / 0.05**2 for a, b in pairwise(thetas)]
    assert kept.norms == pytest.approx(squares, rel=1e-3)


def test_a_modules_own_hook_acts_on_each_step():
    """The longest step is η times the bound on the gradient."""
    kept = Gradients()
    module = fit([kept], kind=Clips)
    thetas = torch.stack([*kept.after, weights(module)])
    assert thetas.diff(dim=0).norm(dim=1).max() == pytest.approx(0.05 * 0.1, rel=1e-4)


# ---------------------------------------------------------------------- exact cuts, or indifferent


@pytest.mark.parametrize("every", [1, 7, 20])
def test_checkpoints_every_so_many_updates(tmp_path, every):
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=every, save_top_k=-1)
    fit([saving])
    thetas, found = path(), dict(map(saved, tmp_path.iterdir()))
    assert sorted(found) == list(range(every, UPDATES + 1, every))
    assert all(torch.allclose(theta, thetas[t], atol=1e-6) for t, theta in found.items())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (partial(LearningRateMonitor, logging_interval="step"), [19, 39, 59]),
        (LearningRateMonitor, [0, 19, 39, 59]),
        (DeviceStatsMonitor, [19, 19, 39, 39, 59, 59]),
    ],
)
def test_monitors_log_at_their_points(make, expected, monkeypatch):
    lightning = "lightning.pytorch"
    monkeypatch.setattr(f"{lightning}.callbacks.device_stats_monitor._PSUTIL_AVAILABLE", True)
    monkeypatch.setattr(
        f"{lightning}.accelerators.cpu.CPUAccelerator.get_device_stats", lambda *_: {"x": 1.0}
    )
    log = Log()
    fit([make()], logger=[log], log_every_n_steps=20)
    assert [step for step in log.steps if step is not None] == expected


@pytest.mark.parametrize(
    "make",
    [
        partial(Timer, duration=timedelta(hours=1)),
        ModelSummary,
        partial(ModelCheckpoint, save_top_k=0),
        TQDMProgressBar,
        RichProgressBar,
        partial(LearningRateMonitor, logging_interval="epoch"),
    ],
)
def test_who_only_looks_on_costs_nothing(make):
    ends = told("on_train_batch_end")
    ends.next_update = lambda update: None  # it knows sweeps
    options = {"enable_progress_bar": True, "logger": [Log()]}
    assert fit([make(), ends], kind=Seeing, **options).seen == [UPDATES]


@pytest.mark.filterwarnings("ignore:.*ckpt_path=")
def test_what_an_exception_saves_is_the_state_that_is_counted(tmp_path, monkeypatch):
    """An exception in the middle of a sweep: three updates are made, and none is counted."""
    saving = OnExceptionCheckpoint(tmp_path, "saved")
    module, data, trainer = start([saving])
    module.engine = "eager"
    step, made = SGD.step, []

    def fail(self, *args, **kwargs):
        if len(made) == 3:
            raise RuntimeError("in an update")
        made.append(step(self, *args, **kwargs))

    monkeypatch.setattr(SGD, "step", fail)
    with pytest.raises(RuntimeError, match="in an update"):
        trainer.fit(module, datamodule=data)
    updates, theta = saved(tmp_path / "saved.ckpt")
    assert (len(made), updates) == (3, 0)
    assert torch.equal(theta, path()[0])


# ---------------------------------------------------------------------- refused


def own(hook):
    """A module with a hook of its own."""
    return {"kind": type("Own", (SupervisedModule,), {hook: lambda *arguments: None})}


@pytest.mark.parametrize(
    ("callback", "options", "message"),
    [
        (lambda: ModelCheckpoint(train_time_interval=timedelta(seconds=1)), {}, "every_n_train_st"),
        (BatchSizeFinder, {}, "data.micro_batch_size"),
        (LearningRateFinder, {}, "lr=auto"),
        (lambda: GradientAccumulationScheduler({0: 2}), {}, "data.micro_batch_size"),
        (lambda: LambdaCallback(on_before_backward=print), {}, "acts on on_before_backward"),
        (Callback, own("on_before_backward"), "Own acts on on_before_backward"),
        (Callback, own("configure_gradient_clipping"), "acts on configure_gradient_clipping"),
        (Callback, own("optimizer_step"), "acts on optimizer_step"),
        (
            Gradients,
            {"optimizer": partial(SGD, lr=1.0, step_size=StochasticPolyak())},
            "Gradients acts on on_before_zero_grad, and a rule computes the step size",
        ),
    ],
)
def test_what_cannot_be_given_is_refused(callback, options, message):
    with pytest.raises(ValueError, match=message):
        fit([callback()], **options)
