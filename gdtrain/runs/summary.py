"""What is told of a finished run: why it ended, its numbers, in files and in TensorBoard."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gdtrain.callbacks import Divergence, Instrument
from gdtrain.data import DataModule
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.reporting.tensorboard import described, hyperparameter_row

__all__ = ["log_result", "log_text", "loss_name", "rows", "summarise", "why_it_ended"]


def summarise(
    trainer: Trainer,
    module: SupervisedModule,
    data: DataModule,
    stop: Stop,
    metrics: Mapping[str, float],
    seconds: float,
    variant: str,
    seed: int,
) -> dict[str, Any]:
    """What `summary.json` holds.

    Args:
        trainer: That has run.
        module: Trained.
        data: It was trained on.
        stop: Why the run ended.
        metrics: Final losses and metrics by tag.
        seconds: Of the fit.
        variant: Of the optimizer.
        seed: Of the run.

    Returns:
        Plain containers, as JSON can hold them.

    Example:
        >>> import gdtrain
        >>> from sklearn.datasets import load_iris
        >>> result = gdtrain.fit("linear", *load_iris(return_X_y=True), variant="gd", epochs=9)
        >>> result.summary["stop_reason"], result.summary["examples_seen"]
        ('BUDGET', 945)
    """
    return {
        "variant": variant,
        "updates": module.updates,
        "examples_seen": module.examples_seen,
        "epochs": module.updates / module.updates_per_epoch,
        "fit_seconds": round(seconds, 3),
        "stop_reason": stop.reason.value,
        "stop_message": stop.message,
        "stop_numbers": _jsonable(stop.numbers),
        "certificate": _jsonable(module.certificate),
        "instruments": _shown(trainer),
        "lr": _rate(module),
        "stop_advice": stop.advice,
        "metrics": {tag: value if math.isfinite(value) else None for tag, value in metrics.items()},
        "seed": seed,
        "batch_size": data.examples_per_update,
        "micro_batch_size": module.micro_batch_size,
        "engine": module.engine_in_use,
        "engine_reason": module.engine_reason,
        "parameters": sum(p.numel() for p in module.model.parameters()),
        "data": {
            "train": data.num_train,
            "val": data.count("val"),
            "test": data.count("test"),
            "split_seed": data.split_seed,
            "split_fingerprint": data.split_fingerprint,
        },
        "device": str(module.device),
        "processes": trainer.world_size,
        "versions": _versions(),
    }


def _jsonable(value: Any) -> Any:
    """As JSON can hold it: a number that is not finite becomes a string."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(trainer: Trainer) -> dict[str, Any]:
    """What the instruments tell of the run, by name."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Instrument):
            found |= callback.summary()
    return _jsonable(found)


def _rate(module: SupervisedModule) -> dict[str, Any] | None:
    """What lr=auto found, and on what grounds."""
    if module.race is None:
        return None
    race = module.race
    return {
        "found": race.rate,
        "scale": race.scale,
        "tried": race.rates,
        "losses": _jsonable(race.losses),
        "updates_each": race.updates,
        "examples": race.examples,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    names = ("gdtrain", "torch", "lightning", "torchvision", "hydra-core", "tensorboard", "numpy")
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def why_it_ended(trainer: Trainer, module: SupervisedModule) -> Stop:
    """The reason for a run's end, with what the callbacks add to it.

    Args:
        trainer: That has run.
        module: Trained.

    Returns:
        The reason.

    Example:
        >>> import gdtrain
        >>> from sklearn.datasets import load_iris
        >>> result = gdtrain.fit("linear", *load_iris(return_X_y=True), variant="gd", epochs=9)
        >>> result.stop.message
        'All 9 planned updates were made.'
    """
    stop = _reason(trainer, module)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Divergence):
            stop = callback.annotate(stop)
    return stop


def _reason(trainer: Trainer, module: SupervisedModule) -> Stop:
    if module.stop is not None:
        return module.stop
    if module.total_updates is not None and module.updates >= module.total_updates:
        return Stop(StopReason.BUDGET, f"All {module.updates} planned updates were made.")
    for callback in trainer.early_stopping_callbacks:
        if callback.stopped_epoch:
            return Stop(
                StopReason.STALLED,
                f"{callback.monitor} did not improve for {callback.patience} validations.",
                {"monitor": callback.monitor, "best": float(callback.best_score)},
                "checkpoints/best.ckpt holds the best model, if checkpoints are kept.",
            )
    return Stop(StopReason.BUDGET, f"The trainer's budget ended after {module.updates} updates.")


def loss_name(data: DataModule) -> str:
    """The loss, with its units where they are not the target's.

    Args:
        data: Set up.

    Returns:
        A heading for its values.

    Example:
        >>> from gdtrain.data import EmbeddedDataModule
        >>> data = EmbeddedDataModule("diabetes", batch_size="full", standardize_targets=True)
        >>> data.setup()
        >>> loss_name(data)
        'loss (standardised units)'
    """
    scale = getattr(data.preprocessing, "target_scale", None)
    return "loss" if scale is None else "loss (standardised units)"


def rows(metrics: Mapping[str, float], loss: str, digits: int) -> list[list[str]]:
    """Final losses and metrics as a table: a row for each, a column for each part of the data.

    Args:
        metrics: By tag.
        loss: Its heading.
        digits: Of each number.

    Returns:
        The rows, the first with the names of the parts.

    Example:
        >>> rows({"loss/train": 0.25, "loss/test": 1 / 3}, "loss", digits=3)
        [['', 'train', 'test'], ['loss', '0.25', '0.333']]
    """
    parts = [part for part in ("train", "val", "test") if f"loss/{part}" in metrics]
    names = sorted({t.split("/")[1] for t in metrics if t.startswith("metric/")})
    made = [["", *parts]]
    for name, tag in ((loss, "loss"), *((name, f"metric/{name}") for name in names)):
        values = (metrics.get(f"{tag}/{part}") for part in parts)
        made.append([name, *("–" if v is None else f"{v:.{digits}g}" for v in values)])
    return made


def _report(
    stop: Stop,
    metrics: Mapping[str, float],
    module: SupervisedModule,
    seconds: float,
    loss: str,
) -> str:
    """How the run ended, as Markdown."""
    head, *lines = rows(metrics, loss, digits=6)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))
    work = (
        f"{module.updates:,} updates, {module.examples_seen:,} examples seen, {seconds:.1f} s, "
        f"engine {module.engine_in_use}."
    )
    return "\n\n".join(
        filter(None, (f"**{stop.reason.value}**: {stop.message}", stop.advice, table, work))
    )


def log_text(trainer: Trainer, tag: str, markdown: str, step: int) -> None:
    """Write a text into TensorBoard, once for all processes.

    Args:
        trainer: Of the run.
        tag: Of the text.
        markdown: The text.
        step: The update.

    Example:
        >>> log_text(Trainer(accelerator="cpu", logger=False), "result", "**BUDGET**", step=9)
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(tag, markdown, step)


def log_result(
    trainer: Trainer,
    module: SupervisedModule,
    data: DataModule,
    stop: Stop,
    metrics: Mapping[str, float],
    seconds: float,
    hyperparameters: Mapping[str, Any],
) -> None:
    """Write how a run ended into its loggers: a report, final metrics, hyperparameters.

    Args:
        trainer: That has run.
        module: Trained.
        data: It was trained on.
        stop: Why the run ended.
        metrics: Final losses and metrics by tag.
        seconds: Of the fit.
        hyperparameters: Shown in TensorBoard's HParams tab.

    Example:
        >>> from gdtrain.data import EmbeddedDataModule
        >>> data = EmbeddedDataModule("iris", batch_size="full")
        >>> log_result(Trainer(accelerator="cpu", logger=False), None, data, None, {}, 0.0, {})
    """
    if not trainer.loggers:
        return
    text = _report(stop, metrics, module, seconds, loss_name(data))
    log_text(trainer, "result", text, module.updates)
    tested = {t: v for t, v in metrics.items() if t.endswith("/test")}
    shown = {t: v for t, v in metrics.items() if t.endswith(("/val", "/test"))}
    plain = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in hyperparameters.items()
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(plain)
            writer = logger.experiment.file_writer  # open again for the text, since fit closed it
            missing = tested if module.validated_at == module.updates else shown
            writer.add_summary(described(missing, set()), module.updates)
            for part in hyperparameter_row(plain, shown):
                writer.add_summary(part, module.updates)
        else:
            logger.log_metrics(
                {
                    "examples": module.examples_seen,
                    "epoch": module.updates / module.updates_per_epoch,
                    **tested,
                },
                step=module.updates,
            )
            logger.log_hyperparams(plain)
