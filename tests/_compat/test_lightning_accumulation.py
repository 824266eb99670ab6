"""The loop of Lightning still asks the names that we touch."""

import pytest
import torch
from lightning import LightningModule, Trainer
from torch.utils.data import DataLoader

from gdtrain._compat.lightning_accumulation import (
    decide_steps,
    ends_epoch,
    leave_steps,
    only_forward,
    steps_are_decided,
)


class Mean(LightningModule):
    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(0.0))
        self.last = []

    def training_step(self, x):
        self.last.append(ends_epoch(self.trainer))
        assert not only_forward(self.trainer)
        return (self.theta - x).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("steps", "made"), [(lambda: True, 3), (lambda: False, 0), (None, 3)])
def test_who_decides_the_steps(steps, made):
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    if steps is not None:
        decide_steps(trainer, steps)
    assert steps_are_decided(trainer) == (steps is not None)
    module = Mean()
    trainer.fit(module, DataLoader(torch.ones(3)))
    assert trainer.global_step == made
    assert module.last == [False, False, True]
    if steps is not None:
        leave_steps(trainer)
    assert not steps_are_decided(trainer)
