"""What is timed: ours, and one function for each baseline.

N examples, B examples per update. All get the same tensors, the same initial parameters (each
trains a copy) and the same η; checkpoints are off everywhere. Baselines run for a given time, and
their time per update stands for a longer run.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from comparison import synchronize
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import NDArray
from sklearn.linear_model import SGDClassifier
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from gdtrain import SGD, SupervisedModule
from gdtrain.callbacks import Divergence, Interrupt, LossCurves, ProgressLine
from gdtrain.data import DataModule
from gdtrain.engines import EngineName
from gdtrain.losses import Loss

__all__ = ["Timing", "fit", "plain_lightning", "plain_loop", "scikit_learn"]

MeanLoss = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Timing:
    """What a contender took.

    Args:
        seconds: From the end of the first step (of Lightning, or of the loop) to the end.
        updates: Made in that time.
        whole_seconds: Of the whole call, set-up included.
        whole_updates: Made in it.
        model: As it was trained.
        engine: That made the updates.
        reason: Why that one.
        micro_batch_size: M.
    """

    seconds: float
    updates: int
    whole_seconds: float
    whole_updates: int
    model: nn.Module
    engine: str = ""
    reason: str = ""
    micro_batch_size: int | None = None

    @property
    def per_update(self) -> float:
        """Seconds per update, without set-up; with it, if there was one step only."""
        return self.seconds / self.updates if self.updates else self.whole_per_update

    @property
    def whole_per_update(self) -> float:
        """Seconds per update, with set-up."""
        return self.whole_seconds / self.whole_updates


# ---------------------------------------------------------------------------- ours


def fit(
    model: nn.Module,
    loss: Loss,
    data: DataModule,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    engine: EngineName = "auto",
    epochs: int | None = None,
    updates: int | None = None,
    seconds: float | None = None,
    logged: bool = True,
    device: torch.device | str = "cpu",
) -> Timing:
    """Train with `SupervisedModule` and an ordinary `Trainer.fit`.

    Args:
        model: Copied; on CPU.
        loss: Per example.
        data: Set up already, so that what is timed is training.
        lr: η.
        momentum: μ.
        weight_decay: λ, on weights, not on biases.
        engine: "auto", "native", "compiled" or "eager".
        epochs: Passes over the data.
        updates: Or updates.
        seconds: Or time, from the end of the first Lightning step.
        logged: With TensorBoard and `LossCurves`; else without any logger. The other callbacks of
            `conf/callbacks/default.yaml` are on in both, but for the checkpoints.
        device: Where.

    Returns:
        The timing.
    """
    device, trained = torch.device(device), copy.deepcopy(model)
    optimizer = partial(SGD, lr=lr, momentum=momentum, weight_decay=weight_decay)
    module = SupervisedModule(trained, loss, optimizer, engine=engine)
    clock = _Clock(seconds=seconds)
    with tempfile.TemporaryDirectory() as folder, quiet():
        trainer = _trainer(
            device,
            folder if logged else None,
            [*([LossCurves()] if logged else []), Divergence(), Interrupt(), ProgressLine(), clock],
            epochs=epochs,
            updates=updates,
            enable_progress_bar=False,
            max_queue=1000,
        )
        timing = _timed(trainer, module, clock, trained, datamodule=data)
    timing.engine, timing.reason = module.engine_in_use, module.engine_reason
    timing.micro_batch_size = module.micro_batch_size
    return timing


# ---------------------------------------------------------------------------- Lightning


class PlainModule(LightningModule):
    """What anybody would write: automatic optimization, and the loss logged at each step.

    Args:
        model: Trained in place.
        loss: Mean over a batch.
        optimizer: Of its parameters.
    """

    def __init__(self, model: nn.Module, loss: MeanLoss, optimizer: Optimizer) -> None:
        super().__init__()
        self.model, self.loss, self._optimizer = model, loss, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean loss of a batch."""
        x, y = batch
        loss = self.loss(self.model(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Optimizer:
        """torch's SGD."""
        return self._optimizer


def plain_lightning(
    model: nn.Module,
    loss: MeanLoss,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    seconds: float | None = None,
    updates: int | None = None,
    device: torch.device | str = "cpu",
) -> Timing:
    """Train with automatic optimization and `DataLoader(TensorDataset(x, y), shuffle=True)`.

    With TensorBoard, the progress bar, and `self.log` at each step.

    Args:
        model: Copied.
        loss: Mean over a batch.
        x: (N, …), on CPU.
        y: (N,), on CPU.
        batch_size: B.
        lr: η.
        momentum: μ.
        seconds: Ends the run, from the end of the first step.
        updates: Or a number of updates does.
        device: Where.

    Returns:
        The timing.
    """
    device, trained = torch.device(device), copy.deepcopy(model)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=momentum)
    module = PlainModule(trained, loss, optimizer)
    clock = _Clock(seconds=seconds)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=True)
    with tempfile.TemporaryDirectory() as folder, quiet():
        # Lightning's own default, unless rich happens to be installed.
        callbacks = [TQDMProgressBar(), clock]
        trainer = _trainer(device, folder, callbacks, epochs=None, updates=updates)
        return _timed(trainer, module, clock, trained, train_dataloaders=loader)


def _trainer(
    device: torch.device,
    folder: str | None,
    callbacks: list[Callback],
    *,
    epochs: int | None,
    updates: int | None,
    enable_progress_bar: bool = True,
    max_queue: int = 10,
) -> Trainer:
    on_card = device.type == "cuda"
    return Trainer(
        accelerator="gpu" if on_card else "cpu",
        devices=[device.index or 0] if on_card else 1,
        logger=False if folder is None else TensorBoardLogger(folder, max_queue=max_queue),
        callbacks=callbacks,
        enable_progress_bar=enable_progress_bar,
        max_epochs=-1 if epochs is None else epochs,
        max_steps=-1 if updates is None else updates,
        enable_checkpointing=False,
        enable_model_summary=False,
    )


def _timed(
    trainer: Trainer, module: LightningModule, clock: _Clock, model: nn.Module, **data: Any
) -> Timing:
    started = time.perf_counter()
    trainer.fit(module, **data)
    synchronize(module.device)
    assert clock.began is not None, "the trainer made no step"
    return Timing(
        clock.ended - clock.began,
        clock.last - clock.first,
        time.perf_counter() - started,
        clock.last,
        model,
    )


class _Clock(Callback):
    """Notes when the steps after the first began and ended; ends a run after `seconds`."""

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = seconds
        self.began: float | None = None
        self.ended = 0.0
        self.first = self.last = 0

    def next_update(self, update: int) -> None:
        """Nowhere must a sweep end for a clock: it is no reason for one update a step."""

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        now = time.perf_counter()
        if self.began is None:
            synchronize(pl_module.device)
            self.began, self.first = time.perf_counter(), trainer.global_step
        elif self.seconds is not None and now - self.began >= self.seconds:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        synchronize(pl_module.device)
        self.ended, self.last = time.perf_counter(), trainer.global_step


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Throw away what Lightning writes: the bar is drawn, and nobody sees it.

    Warnings that say something about the run, such as an engine that does not apply, are shown.
    """
    screen = sys.stderr

    def show(message: Warning | str, *place: Any, **more: Any) -> None:
        print(f"warning: {message}", file=screen)

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stderr(nowhere),
        contextlib.redirect_stdout(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.showwarning = show
        for message in (
            r".*isinstance\(treespec, LeafSpec\).*",  # Lightning with a newer torch
            r".*does not have many workers.*",
            r".*smaller than the logging interval.*",
            r".*GPU available but not used.*",
            r".*Total length of `list` across ranks is zero.*",  # no validation part: as meant
            r".*is already configured with.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


# ---------------------------------------------------------------------------- a plain loop


def plain_loop(
    model: nn.Module,
    loss: MeanLoss,
    x: Tensor,
    y: Tensor,
    *,
    batch_size: int,
    lr: float,
    momentum: float = 0.0,
    seconds: float | None = None,
    updates: int | None = None,
) -> Timing:
    """Train as in a tutorial, on resident tensors: a permutation, `x[indices]`, `backward`, `step`.

    A full batch takes the tensors as they are.

    Args:
        model: Copied, to the tensors' device.
        loss: Mean over a batch.
        x: (N, …).
        y: (N,).
        batch_size: B.
        lr: η.
        momentum: μ.
        seconds: Ends the run, from the end of the first update.
        updates: Or a number of updates does.

    Returns:
        The timing.
    """
    trained = copy.deepcopy(model).to(x.device)
    optimizer = torch.optim.SGD(trained.parameters(), lr=lr, momentum=momentum)
    started = time.perf_counter()
    began = 0.0
    made = 0
    for indices in _batches(len(x), batch_size, x.device):
        inputs, targets = (x, y) if indices is None else (x[indices], y[indices])
        optimizer.zero_grad()
        loss(trained(inputs), targets).backward()
        optimizer.step()
        made += 1
        if made == 1:
            synchronize(x.device)
            began = time.perf_counter()
        elif seconds is not None and time.perf_counter() - began >= seconds:
            break
        if made == updates:
            break
    synchronize(x.device)
    ended = time.perf_counter()
    return Timing(ended - began, made - 1, ended - started, made, trained)


def _batches(n: int, batch_size: int, device: torch.device) -> Iterator[Tensor | None]:
    while True:
        if batch_size >= n:
            yield None
        else:
            yield from torch.randperm(n, device=device).split(batch_size)


# ---------------------------------------------------------------------------- scikit-learn


def scikit_learn(
    x: Any,
    y: NDArray[Any],
    *,
    loss: str,
    lr: float,
    weight_decay: float,
    epochs: int,
    seed: int = 0,
) -> tuple[float, SGDClassifier]:
    """Fit `SGDClassifier` for a fixed number of passes, at constant η, without averaging.

    More than two classes are fitted one against all others, one fit after the other, which is its
    default.

    Args:
        x: (N, D), float32 or float64, dense or CSR: it takes both as they are.
        y: (N,).
        loss: "log_loss" or "hinge".
        lr: η.
        weight_decay: λ; its penalty is λ/2 ‖w‖², not on the intercept.
        epochs: Passes.
        seed: Of the order.

    Returns:
        Seconds, and the fitted estimator.
    """
    estimator = SGDClassifier(
        loss=loss,
        penalty="l2" if weight_decay else None,
        alpha=weight_decay,
        learning_rate="constant",
        eta0=lr,
        max_iter=epochs,
        tol=None,
        shuffle=True,
        random_state=seed,
    )
    started = time.perf_counter()
    estimator.fit(x, y)
    return time.perf_counter() - started, estimator
