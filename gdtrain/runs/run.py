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
from gdtrain.runs.folder import holds, write_file
from gdtrain.runs.result import Result
from gdtrain.runs.summary import log_result, log_text, summarise, why_it_ended
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
    """Fit, evaluate on every part, and leave a summary.

    Args:
        module: To train.
        data: To train on.
        trainer: From `callbacks=`, `logger=` and `enable_checkpointing=` to a trainer.
        callbacks: Callbacks, or functions from `directory=` (for checkpoints) to one.
        loggers: Functions from `save_dir=` to a logger.
        directory: The run's folder; None: nothing is written.
        variant: For the summary.
        seed: Of torch's own random layers, and whatever else draws while training. (The order of
            the examples and gdtrain's dropout follow the data module's seed.)
        checkpoint: Go on from this checkpoint.
        hyperparameters: Shown in TensorBoard's HParams tab.
        description: Kept in checkpoints, so that a model can be built again from them.

    Returns:
        The finished run.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The checkpoint, or the data, does not fit.

    Example:
        >>> from functools import partial
        >>> from gdtrain import GD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import Linear
        >>> data = EmbeddedDataModule("iris", batch_size="full")
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(GD, lr=0.5))
        >>> result = run(module, data, callbacks=[LossCurves()],
        ...     trainer=partial(Trainer, max_epochs=100, accelerator="cpu",
        ...         enable_progress_bar=False, enable_model_summary=False))
        >>> result.summary["updates"]
        100
    """
    folder = None if directory is None else Path(directory)
    data.use_loss(module.loss)
    data.setup()
    if checkpoint is not None:
        state = load_checkpoint(checkpoint)
    description = module.describe(data) if description is None else description
    module.description = {**description, "variant": variant}
    built = _build_callbacks(callbacks, folder)
    curves = next((c for c in built if isinstance(c, LossCurves)), None)
    if curves is None:
        curves = LossCurves()
        built.append(curves)
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
        seconds = curves.seconds
        stop = why_it_ended(lightning, module)
        metrics = {}
        rank, ranks = lightning.global_rank, lightning.world_size
        parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
        for part in parts:
            if data.count(part):
                loader = data.evaluation_loader(part, rank, ranks)
                metrics.update(module.evaluate(loader, part))
        if lightning.is_global_zero:
            log_result(lightning, module, data, stop, metrics, seconds, hyperparameters or {})
        for logger in made_loggers:
            logger.finalize("success")
    summary = summarise(lightning, module, data, stop, metrics, seconds, variant, seed)
    if folder is not None and lightning.is_global_zero:
        content = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        write_file(folder / "summary.json", lambda file: file.write(content.encode()))
        np.savez_compressed(folder / "split.npz", allow_pickle=False, **data.split)
    return Result(module, data, curves.history, stop, summary, folder)


def _build_callbacks(callbacks: Sequence[Any], folder: Path | None) -> list[Callback]:
    built: list[Callback] = []
    for callback in callbacks:
        if isinstance(callback, Callback):
            built.append(callback)
        elif folder is not None:  # a factory: what it makes writes files
            built.append(callback(directory=folder / "checkpoints"))
    return built


def _check_monitors(
    callbacks: Sequence[Callback], module: SupervisedModule, data: DataModule
) -> None:
    """Early stopping and plateau schedules need a validation metric that will be there."""
    validated = data.count("val") > 0
    tags = module.tags("val")
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str):  # no tag: something of the callback's own
            continue
        if monitor not in tags:
            raise ValueError(
                f"{type(callback).__name__} can monitor {', '.join(tags)}. Received: "
                f"monitor={monitor}."
            )
        if isinstance(callback, EarlyStopping) and not validated:
            raise ValueError(
                "Early stopping needs a validation part. Received: val_fraction=0, or too few "
                "examples for one."
            )
    if isinstance(module.schedule, ReduceOnPlateau) and not validated:
        raise ValueError(
            "schedule=reduce_on_plateau needs a validation part. Received: val_fraction=0, or too "
            "few examples for one."
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
    """Keep from the screen what a user of gdtrain cannot act on.

    Example:
        >>> with quiet_libraries():
        ...     warnings.warn("The dataloader does not have many workers.", stacklevel=1)
    """
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
