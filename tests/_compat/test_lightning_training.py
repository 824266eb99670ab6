"""Lightning's private names exist, and do what we rely on."""

from datetime import timedelta

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn

from gdtrain._compat.lightning_training import (
    average_holds_batch_norm,
    fetch_again,
    keep_batch_norm,
    saves_by_time,
    saves_every,
    set_logged_step,
)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
        self.automatic_optimization = False
        self.seen, self.steps = [], []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        self.seen.append(int(batch))
        set_logged_step(self.trainer, 10 * len(self.seen))
        self.log("x", 1.0, on_step=True)


class Numbers:
    """Yields 0, 1, …, from what `first` is when a number is asked for."""

    first = 0

    def __iter__(self):
        for i in range(3):
            yield torch.tensor(self.first + i)


def fit(*callbacks, logger=False):
    module, loader = Model(), Numbers()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks],
    )
    trainer.fit(module, loader)
    return module, trainer


def test_the_batch_that_was_fetched_beforehand_is_fetched_again():
    class Changes(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.train_dataloader.first = 5
            fetch_again(trainer)

    module, _ = fit(Changes())
    assert module.seen == [5, 6, 7]


class Steps(DummyLogger):
    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found.append(step)


def test_the_step_of_loggers():
    logger = Steps()
    fit(logger=logger)
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
    fit(StochasticWeightAveraging(swa_lrs=0.1), takes)
    assert takes.found
