"""Short runs on iris that callbacks look at, and what they leave, in memory."""

from functools import partial

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers.logger import DummyLogger

from gdtrain import GD, SGD, MiniBatchSGD, SupervisedModule
from gdtrain.data import EmbeddedDataModule
from gdtrain.losses import CrossEntropy
from gdtrain.models import MLP

N = 105  # training examples of iris
SILENT = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
QUIET = {**SILENT, "logger": False, "enable_checkpointing": False}  # it leaves nothing


class Numbers(DummyLogger):
    """All that is logged, by tag and update."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def log_metrics(self, metrics, step):
        for tag, value in metrics.items():
            self.found.setdefault(tag, {})[step] = value


class Losses(Callback):
    """Each update's."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.seen += outputs["losses"].double().tolist()


class StopAt(Callback):
    """Ends a run at an update; with a path, it leaves a checkpoint there."""

    def __init__(self, update, path=None):
        self.update, self.path = update, path

    def next_update(self, update):
        return self.update if update < self.update else None

    def on_train_batch_end(self, trainer, pl_module, *_):
        if pl_module.updates == self.update:
            trainer.should_stop = True
            if self.path is not None:
                trainer.save_checkpoint(self.path)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.model.parameters()])


def small():
    return MLP((4,), 3, hidden=[6], activation="tanh")


def fit(*callbacks, batch=8, updates=24, model=small, data=None, loss=None, schedule=None,
        rule=None, engine="auto", optimizer=None, double=False, sweep="auto", micro=None,
        ckpt_path=None, logger=False, precision=None, **options):  # fmt: skip
    """The module, and by it the trainer and the data, after its training from one seed."""
    torch.manual_seed(0)
    kind = optimizer or {"full": GD, 1: SGD}.get(batch, MiniBatchSGD)
    rate = {"lr": 0.1} if rule is None else {}
    module = SupervisedModule(
        model if isinstance(model, torch.nn.Module) else model(),
        loss or CrossEntropy(),
        partial(kind, **{**rate, **options}),
        schedule,
        engine=engine,
        step_size=rule,
    )
    trainer = Trainer(
        max_epochs=-1,
        max_steps=updates,
        callbacks=list(callbacks),
        precision=precision or ("64-true" if double else "32-true"),
        **{
            **QUIET,
            "logger": logger,
            "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        },
    )
    data = data or EmbeddedDataModule(
        "iris",
        batch_size=batch,
        updates_per_sweep=sweep,
        micro_batch_size=micro,
        dtype="float64" if double else "float32",
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module
