"""Where sweeps end: at every declared update, and nowhere that matters."""

from functools import partial

import pytest
from lightning import Callback, Trainer

from gdtrain import SGD, SupervisedModule
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import Linear


def fit(callbacks=(), *, updates=100, optimizer=None, batch_size=1, **options):
    data = EmbeddedDataModule("iris", batch_size=batch_size, **options)
    module = SupervisedModule(Linear((4,), 3), CrossEntropy(), optimizer or partial(SGD, lr=0.01))
    trainer = Trainer(
        callbacks=list(callbacks),
        max_epochs=-1,
        max_steps=updates,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return module, trainer


class Sees(Callback):
    def __init__(self, every):
        self.every, self.seen = every, []

    def next_update(self, update):
        return (update // self.every + 1) * self.every

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(pl_module.updates)


def test_sweeps_end_at_every_update_that_a_callback_declares():
    callbacks = Sees(7), Sees(32)
    fit(callbacks, updates_per_sweep=1000)
    ends = [*sorted({*range(7, 101, 7), *range(32, 101, 32)}), 100]
    assert callbacks[0].seen == callbacks[1].seen == ends


def test_an_update_that_is_over_cannot_be_declared():
    late = Sees(7)
    late.next_update = lambda update: update
    with pytest.raises(ValueError, match=r"next_update\(0\) must be above 0.* Received: 0"):
        fit([late])
