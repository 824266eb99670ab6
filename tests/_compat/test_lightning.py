"""Lightning's private names exist, and do what we rely on."""

import traceback
from datetime import timedelta

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from gdtrain._compat.lightning_training import (
    average_holds_batch_norm,
    decide_steps,
    ends_epoch,
    fetch_again,
    keep_batch_norm,
    leave_steps,
    only_forward,
    restores,
    saves_by_time,
    saves_every,
    set_logged_step,
    steps_are_decided,
)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        self.automatic_optimization = False
        self.seen = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(int(batch))
        set_logged_step(self.trainer, 10 * len(self.seen))
        self.log("x", 1.0, on_step=True)


class Numbers:
    """Yields 0, 1, 2, from what `first` is when a number is asked for."""

    first = 0

    def __iter__(self):
        for i in range(3):
            yield torch.tensor(self.first + i)


def trainer_with(*callbacks, logger=False):
    return Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )


class Mean(LightningModule):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(0.0))
        self.last = []

    def training_step(self, x):
        self.last.append(ends_epoch(self.trainer))
        assert not only_forward(self.trainer)
        return (self.theta - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("steps", "made"), [(lambda: True, 3), (lambda: False, 0), (None, 3)])
def test_who_decides_the_steps(steps, made):
    trainer = trainer_with()
    if steps is not None:
        decide_steps(trainer, steps)
    assert steps_are_decided(trainer) == (steps is not None)
    module = Mean()
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(3)))
    assert trainer.global_step == made
    assert module.last == [False, False, True]
    if steps is not None:
        leave_steps(trainer)
    assert not steps_are_decided(trainer)


def test_the_batch_that_was_fetched_beforehand_is_fetched_again():
    class Changes(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.train_dataloader.first = 5
            fetch_again(trainer)

    module = Model()
    trainer_with(Changes()).fit(module, Numbers())
    assert module.seen == [5, 6, 7]


class Steps(DummyLogger):
    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found.append(step)


def test_the_step_of_loggers():
    logger = Steps()
    trainer_with(logger=logger).fit(Model(), Numbers())
    assert logger.found == [9, 19, 29]  # while the batch lasts: one less


def test_what_a_checkpoint_callback_saves_by():
    assert saves_every(ModelCheckpoint(every_n_train_steps=7)) == 7
    assert saves_every(ModelCheckpoint(every_n_epochs=1)) == 0
    assert not saves_by_time(ModelCheckpoint(every_n_train_steps=7))
    assert saves_by_time(ModelCheckpoint(train_time_interval=timedelta(seconds=1)))


def test_averaging_of_weights_leaves_the_statistics_alone():
    class Takes(Callback):
        found = None

        def on_train_start(self, trainer, pl_module):
            averaging = trainer.callbacks[0]
            self.found = average_holds_batch_norm(averaging)
            keep_batch_norm(averaging)
            assert not average_holds_batch_norm(averaging)
            trainer.should_stop = True

    takes = Takes()
    trainer_with(StochasticWeightAveraging(swa_lrs=0.1), takes).fit(Model(), Numbers())
    assert takes.found


@pytest.mark.filterwarnings("ignore")
def test_a_failure_within_restoring_is_told_from_others(tmp_path):
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "bad.ckpt")
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(BoringModel(), ckpt_path=tmp_path / "bad.ckpt")
    steps = [
        f.f_code.co_name for f, _ in traceback.walk_tb(caught.value.__traceback__) if restores(f)
    ]
    assert "restore_model" in steps
