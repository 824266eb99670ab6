"""One run from built objects: train, evaluate, summarise. `gdtrain` and `gdtrain.fit` share it."""

from __future__ import annotations

import csv
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger

from gdtrain.callbacks import BestAndLast, Interrupt, LossCurves
from gdtrain.callbacks.interrupt import OwnSignals, as_keyboard_interrupt
from gdtrain.data import DataModule
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.resuming import check_resumes
from gdtrain.lightning.strategy import ExactDDP, alone_in
from gdtrain.runs.checkpoints import check_fits, is_over, restoring
from gdtrain.runs.folder import complete, holds
from gdtrain.runs.result import Result, log_result, log_text, summarise, why_it_ended
from gdtrain.schedules import ReduceOnPlateau

__all__ = ["quiet_libraries", "run"]

_log = logging.getLogger("gdtrain")


def run(
    module: SupervisedModule,
    data: DataModule,
    *,
    trainer: Callable[..., Trainer],
    callbacks: Sequence[Any] = (),
    loggers: Sequence[Callable[..., Logger]] = (),
    directory: str | Path | None = None,
    variant: str = "",
    seed: int = 0,
    checkpoint: str | Path | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    description: dict[str, Any] | None = None,
) -> Result:
    """Fit, evaluate on every part, and leave a summary in `directory`, if there is one.

    `trainer`, `loggers`, and callbacks that write files, are functions that the run calls. `seed`
    is of torch's own random layers: order and gdtrain's dropout follow the data module's.
    """
    folder = None if directory is None else Path(directory)
    data.use_loss(module.loss)
    data.setup()
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
    module.description = {**(description or module.describe(data)), "variant": variant}
    built = [c for c in callbacks if isinstance(c, Callback)]
    if folder is not None:
        makers = [c for c in callbacks if not isinstance(c, Callback)]
        built += [make(directory=folder / "checkpoints") for make in makers]
    curves = next((c for c in built if isinstance(c, LossCurves)), None)
    if curves is None:
        built.append(curves := LossCurves())
    if not any(isinstance(c, Interrupt) for c in built):
        built.append(OwnSignals())
    with quiet_libraries(), alone_in(folder, trainer) as make_trainer:
        made_loggers = [] if folder is None else [make(save_dir=folder) for make in loggers]
        if folder is not None and checkpoint is not None and holds(folder, checkpoint):
            _keep_metrics(made_loggers, folder / "metrics.csv")
        lightning = make_trainer(
            callbacks=built,
            logger=made_loggers or False,
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in built),
        )
        if not isinstance(lightning, Trainer):
            raise ValueError(
                f"trainer must make a lightning.Trainer. Received: {type(lightning).__name__}."
            )
        if lightning.world_size > 1 and not isinstance(lightning.strategy, ExactDDP):
            raise ValueError(
                f"Several devices train together with trainer=ddp, which divides each update's "
                f"examples exactly. Received: {type(lightning.strategy).__name__} for "
                f"{lightning.world_size} processes."
            )
        _check_monitors(built, module, data)
        if checkpoint is not None:
            check_resumes(state, module, lightning, data, checkpoint)
            check_fits(state["state_dict"], module, checkpoint)
            if is_over(state, data.planned_updates(lightning), Path(checkpoint)):
                lightning.callbacks.insert(0, _Finish(state["gdtrain"]["stop"]))  # type: ignore[attr-defined]
            for callback in built:
                if isinstance(callback, BestAndLast) and lightning.is_global_zero:
                    callback.take_over(Path(checkpoint))
        seed_everything(seed, verbose=False)
        if folder is not None and (folder / "config.yaml").is_file():
            config = (folder / "config.yaml").read_text(encoding="utf-8")
            log_text(lightning, "configuration", f"```yaml\n{config}```", module.updates)
        with as_keyboard_interrupt(), restoring(checkpoint):
            lightning.fit(module, datamodule=data, ckpt_path=checkpoint)
        seconds, stop = curves.seconds, why_it_ended(lightning, module)
        metrics = {}
        parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
        for part in parts:
            if data.count(part):
                loader = data.evaluation_loader(part, lightning.global_rank, lightning.world_size)
                metrics.update(module.evaluate(loader, part))
        summary = summarise(lightning, module, data, stop, metrics, seconds, variant, seed)
        if lightning.is_global_zero:
            log_result(lightning, module, data, summary, metrics, hyperparameters or {})
        for logger in made_loggers:
            logger.finalize("success")
    if folder is not None and lightning.is_global_zero:
        with complete(folder / "summary.json") as new:
            new.write_bytes(f"{json.dumps(summary, indent=2, allow_nan=False)}\n".encode())
        np.savez_compressed(folder / "split.npz", allow_pickle=False, **data.split)
    return Result(module, data, curves.history, stop, summary, folder)


def _check_monitors(
    callbacks: Sequence[Callback], module: SupervisedModule, data: DataModule
) -> None:
    """Early stopping and plateau schedules need a validation metric that will be there."""
    tags = module.tags("val")
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if isinstance(monitor, str) and monitor not in tags:  # else something of its own
            raise ValueError(
                f"{type(callback).__name__} can monitor {', '.join(tags)}. Received: "
                f"monitor={monitor}."
            )
    stops = any(isinstance(callback, EarlyStopping) for callback in callbacks)
    if not data.count("val") and (stops or isinstance(module.schedule, ReduceOnPlateau)):
        raise ValueError(
            f"{'Early stopping' if stops else 'schedule=reduce_on_plateau'} needs a validation "
            f"part. Received: val_fraction=0, or too few examples for one."
        )


def _keep_metrics(loggers: Sequence[Logger], path: Path) -> None:
    """Lightning's logger would take away the curves of a run that is finished."""
    logger = next((one for one in loggers if isinstance(one, CSVLogger)), None)
    if logger is None or not path.is_file():
        return
    with open(path, encoding="utf-8", newline="") as file:
        rows: list[Any] = [row for row in csv.DictReader(file) if not row.get("loss/test")]
    logger.experiment.metrics += rows
    logger.save()


class _Finish(Callback):
    """Ends a run without another update, through all that stands at the end of one."""

    def __init__(self, stop: Mapping[str, Any] | None) -> None:
        interrupted = stop is not None and stop["reason"] == StopReason.INTERRUPTED.value
        self._stop = None if interrupted else stop
        self._limits = (-1, -1)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning leaves the hooks out where it sees beforehand that nothing is to be done."""
        _log.info("All updates were made: evaluating them.")
        loop: Any = trainer.fit_loop
        self._limits = (loop.max_epochs, loop.epoch_loop.max_steps)
        loop.max_epochs = loop.epoch_loop.max_steps = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the hooks of the others."""
        loop: Any = trainer.fit_loop
        loop.max_epochs, loop.epoch_loop.max_steps = self._limits
        module: Any = pl_module
        loader: Any = trainer.train_dataloader
        plan = getattr(loader, "plan", loader)  # of batches from a loader of torch's
        plan.total = cast(Any, trainer).datamodule.planned_updates(trainer)
        if self._stop is not None:
            module.stop = Stop.from_state_dict(self._stop)
        trainer.should_stop = True


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep from the screen what a user of gdtrain cannot act on."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for message in (
            r".*isinstance\(treespec, LeafSpec\).*",  # Lightning with a newer torch
            r".*Experiment logs directory .* exists and is not empty.*",  # holds config.yaml
            r".*does not have many workers.*",  # resident tensors need none
            r".*smaller than the logging interval.*",  # curves are logged by updates
            r".*sync_dist=True.*",  # metrics are added up over the ranks already
            r".*is already configured with.*",  # devices=1 beside a GPU that is not used
            r".*callbacks used to create the checkpoint need to be provided.*",  # only ours were
            r".*Total length of `list` across ranks is zero.*",  # no validation part: as asked
        ):
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
