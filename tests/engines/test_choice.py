"""Which engine a run takes, how long its sweeps are, and that neither changes an update."""

import logging
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from torch import nn
from watched_runs import SILENT, StopAt, weights

import gdtrain
from gdtrain import SGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, Divergence, LossCurves
from gdtrain.data import EmbeddedDataModule
from gdtrain.engines import Compiled, Eager, Native, NotApplicableError, choose
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP, Linear
from gdtrain.objective import Objective
from gdtrain.runs.run import run
from gdtrain.schedules import Cosine


class Scaled(nn.Module):
    """A layer that no engine knows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return 2 * self.layer(x)


def make(model=None, engine="auto", batch_size=1, **options):
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("iris", batch_size=batch_size, **options)
    module = SupervisedModule(
        MLP((4,), 3, hidden=[8]) if model is None else model(),
        CrossEntropy(),
        partial(SGD, lr=0.02, momentum=0.9),
        Cosine(),
        engine=engine,
    )
    return module, data


def train(module, data, folder=None, checkpoint=None, callbacks=(), **arguments):
    return run(
        module,
        data,
        trainer=partial(Trainer, **{"max_epochs": 3, **SILENT, **arguments}),
        callbacks=[LossCurves(), *([BestAndLast] if folder else []), *callbacks],
        directory=folder,
        checkpoint=checkpoint,
    )


class Lengths(Callback):
    def __init__(self):
        self.counts = []

    def next_update(self, update):
        return None  # it knows sweeps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.counts.append(len(batch))


def test_the_fastest_that_applies_is_taken_and_said(caplog):
    with caplog.at_level(logging.INFO, "gdtrain"):
        result = train(*make())
    assert result.summary["engine"] == "native"
    assert "written by hand" in result.summary["engine_reason"]
    said = [r.message.split(" (")[0] for r in caplog.records]
    assert said == ["target: 3 classes", "engine: native"]
    result = train(*make(Scaled))
    assert result.summary["engine"] == "eager"
    assert "backward pass of Scaled" in result.summary["engine_reason"]
    assert "not compiled: 315 updates" in result.summary["engine_reason"]


def objective_of(model):
    objective = Objective(model, CrossEntropy(), torch.zeros(3, 4), torch.zeros(3).long())
    return objective, SGD([{"params": model.parameters(), "initial_lr": 0.1}])


def test_a_long_run_is_worth_a_compiler():
    assert isinstance(choose("auto", *objective_of(Scaled()), updates=1000)[0], Eager)
    assert isinstance(choose("auto", *objective_of(Scaled()), updates=10**6)[0], Compiled)
    assert isinstance(choose("auto", *objective_of(nn.Linear(4, 3)), updates=10)[0], Native)


def test_an_engine_that_does_not_apply_ends_the_run_before_it_begins(tmp_path):
    module, data = make(Scaled, "native")
    with pytest.raises(ValueError, match=r"engine=native does not apply: .*Scaled.*engine=auto"):
        train(module, data)
    with pytest.raises(
        ValueError, match=r"one of auto, eager, compiled, native\. Received: 'fast'"
    ):
        make(engine="fast")
    with pytest.raises(ValueError, match="engine=native does not apply"):
        gdtrain.fit(Scaled(), torch.zeros(9, 4), [0, 1, 2] * 3, engine="native", directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_batches_of_another_loader_are_done_by_autograd():
    module, _ = make(engine="native")
    batches = [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer = Trainer(max_epochs=1, logger=False, enable_checkpointing=False, **SILENT)
    with pytest.raises(ValueError, match="engine=native needs the blocks of indices"):
        trainer.fit(module, loader, loader)


def test_a_compiler_that_fails_is_told_and_the_run_goes_on(monkeypatch):
    def fails(*_):
        raise NotApplicableError("no compiler was found")

    monkeypatch.setattr(Compiled, "__call__", fails)
    module, data = make(Scaled)
    monkeypatch.setattr("gdtrain.engines.choice._WORTH_COMPILING", 1)
    with pytest.warns(UserWarning, match="compiled engine does not apply.*no compiler was found"):
        result = train(module, data)
    assert result.summary["engine"] == "eager"
    assert result.summary["engine_reason"] == "not compiled: no compiler was found"
    expected, data = make(Scaled, "eager")
    train(expected, data)
    assert torch.equal(weights(module), weights(expected))
    module, data = make(Scaled, "compiled")
    with pytest.raises(ValueError, match="engine=compiled does not apply: no compiler"):
        train(module, data)


def test_sweeps_grow_to_a_tenth_of_a_second():
    lengths = Lengths()
    module, data = make()
    train(module, data, callbacks=[lengths], max_epochs=30)
    assert sum(lengths.counts) == 30 * data.num_train
    assert lengths.counts[0] == 16
    assert lengths.counts[-1] == data.num_train  # an epoch at once: 105 updates take 1 ms
    lengths = Lengths()
    module, data = make(updates_per_sweep=10)
    train(module, data, callbacks=[lengths], max_epochs=1)
    assert set(lengths.counts) == {10, data.num_train % 10}


@pytest.mark.parametrize(("engine", "then"), [("native", "auto"), ("eager", "auto")])
def test_a_resumed_run_goes_on_with_its_engine(tmp_path, engine, then):
    whole, data = make(engine=engine, updates_per_sweep=10)
    train(whole, data)
    half, data = make(engine=engine, updates_per_sweep=10)
    train(half, data, tmp_path / "half", callbacks=[StopAt(140)])
    rest, data = make(engine=then, updates_per_sweep=10)
    checkpoint = tmp_path / "half" / "checkpoints" / "last.ckpt"
    result = train(rest, data, tmp_path / "rest", checkpoint)
    assert result.summary["engine"] == engine
    assert torch.equal(weights(rest), weights(whole))


def test_an_engine_that_no_longer_applies_is_replaced_aloud(tmp_path):
    half, data = make()
    train(half, data, tmp_path / "half", callbacks=[StopAt(140)])
    checkpoint = tmp_path / "half" / "checkpoints" / "last.ckpt"
    rest, data = make()
    rest.model.layers[1].register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="equal to rounding, not bit for bit.*Linear has hooks"):
        result = train(rest, data, tmp_path / "rest", checkpoint)
    assert result.summary["engine"] == "eager"


class EveryEpoch(Callback):
    """Its hook makes Lightning see the end of each epoch."""

    def __init__(self):
        self.epochs = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(trainer.current_epoch)


class Epochs(Callback):
    """Notes what Lightning takes for the epoch, after each sweep and validation."""

    def __init__(self):
        self.at = []
        self.validated = []

    def next_update(self, update):
        return None  # it knows sweeps

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.at.append((pl_module.updates, trainer.current_epoch))

    def on_validation_end(self, trainer, pl_module):
        self.validated.append((pl_module.updates, trainer.current_epoch))


@pytest.mark.parametrize("batch_size", [1, 8, 105, "full"])
@pytest.mark.parametrize("sampling", ["reshuffle", "replacement"])
def test_epochs_that_nobody_asks_for_are_not_ended(batch_size, sampling):
    runs = []
    for callbacks in ([Epochs()], [Epochs(), EveryEpoch()]):
        module, data = make(batch_size=batch_size, sampling=sampling)
        result = train(module, data, callbacks=callbacks, max_epochs=10, check_val_every_n_epoch=4)
        runs.append((weights(module), result, callbacks))
    (merged, result, (epochs,)), (single, other, (every, hooks)) = runs
    assert torch.equal(merged, single)
    assert result.metrics == other.metrics
    assert hooks.epochs == list(range(10))
    per_epoch = result.module.updates_per_epoch
    planned = [(4 * per_epoch, 3), (8 * per_epoch, 7)]  # the last is made after the run
    assert epochs.validated == every.validated == planned
    for noted in (epochs, every):
        assert all(epoch == (updates - 1) // per_epoch for updates, epoch in noted.at)
    assert len(epochs.at) < len(every.at)
    assert result.module.trainer.current_epoch == other.module.trainer.current_epoch == 10
    assert result.history.val["update"] == [4 * per_epoch, 8 * per_epoch, 10 * per_epoch]
    for column in ("update", "examples", "lr"):
        assert result.history.train[column] == other.history.train[column]
    assert result.history.train["loss"] == pytest.approx(other.history.train["loss"], rel=1e-12)


def test_full_batch_updates_are_made_many_at_a_time():
    lengths = Lengths()
    module, data = make(batch_size="full", val_fraction=0)
    train(module, data, callbacks=[lengths], max_epochs=2000)
    assert sum(lengths.counts) == module.trainer.global_step == 2000
    assert len(lengths.counts) < 40


@pytest.mark.parametrize("batch_size", [1, 16, "full"])
def test_a_run_stopped_among_merged_epochs_is_resumed_bit_for_bit(tmp_path, batch_size):
    options = {"max_epochs": 12, "check_val_every_n_epoch": 5}
    kind = {"batch_size": batch_size, "updates_per_sweep": 3}
    whole, data = make(**kind)
    expected = train(whole, data, **options)
    half, data = make(**kind)
    stop = 7 * expected.module.updates_per_epoch + 2
    train(half, data, tmp_path / "half", callbacks=[StopAt(stop)], **options)
    assert half.updates < whole.updates
    rest, data = make(**kind)
    checkpoint = tmp_path / "half" / "checkpoints" / "last.ckpt"
    result = train(rest, data, tmp_path / "rest", checkpoint, **options)
    assert torch.equal(weights(rest), weights(whole))
    assert result.metrics == expected.metrics
    assert result.history.val["update"] == expected.history.val["update"]
    assert result.history.train["loss"] == pytest.approx(expected.history.train["loss"], rel=1e-12)


def test_early_stopping_sees_its_validations():
    updates = []
    for callbacks in ([], [EveryEpoch()]):
        module, data = make(batch_size="full")
        stopping = EarlyStopping("loss/val", patience=1, min_delta=0.05)
        budget = {"max_epochs": 200, "check_val_every_n_epoch": 5}
        result = train(module, data, callbacks=[stopping, *callbacks], **budget)
        updates.append(result.summary["updates"])
        assert result.summary["stop_reason"] == "STALLED"
    assert updates[0] == updates[1] < 200


@pytest.mark.parametrize("engine", ["eager", "compiled", "native"])
def test_what_does_not_fit_is_told_alike_on_each_engine(engine):
    module, data = make(partial(Linear, (4,), 2), engine)
    with pytest.raises(ValueError, match=r"CrossEntropy expects integer labels 0 … 1.*from 0 to 2"):
        train(module, data)
    module, data = make(partial(Linear, (5,), 3), engine)
    with pytest.raises(ValueError, match=r"The model does not take examples of shape \(4,\)"):
        train(module, data)


def test_a_loss_that_is_no_number_is_told_alike_on_each_engine():
    messages = []
    for engine in ("eager", "native"):
        module, data = make(partial(Linear, (4,), 3), engine, updates_per_sweep=50)
        with torch.no_grad():
            module.model.linear.weight.fill_(1e38)
            module.model.linear.weight[0] = -1e38
        result = train(module, data, callbacks=[Divergence()])
        assert result.summary["stop_reason"] == "NON_FINITE"
        messages.append(result.summary["stop_message"])
    assert messages[0] == messages[1]
