"""A finished run: the trained model, its answers, its curves, and what is told of it."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from numpy.typing import ArrayLike, NDArray
from torch import nn

from gdtrain.callbacks import Divergence, History, Instrument
from gdtrain.data import DataModule
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.data.frames import features
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import evaluating
from gdtrain.optim.protocol import step_size_of
from gdtrain.reporting.tensorboard import described, hyperparameter_row
from gdtrain.runs.descriptions import check_outputs
from gdtrain.runs.folder import complete

__all__ = [
    "Result",
    "log_result",
    "log_text",
    "loss_name",
    "predict",
    "rows",
    "summarise",
    "why_it_ended",
]

_PASS = 1024  # examples


@dataclass
class Result:
    """A finished run.

    Args:
        module: The trained module; `model` is the trained model.
        data: The data module, with the preprocessing; of a file, what it tells of the data.
        history: The curves.
        stop: Why it ended; None, where a checkpoint does not tell.
        summary: What `summary.json` holds.
        directory: The run's folder, if it has one.

    Example:
        >>> import gdtrain
        >>> from sklearn.datasets import load_iris
        >>> result = gdtrain.fit("linear", *load_iris(return_X_y=True), variant="gd", epochs=200)
        >>> result.stop.reason.value, result.summary["updates"]
        ('BUDGET', 200)
        >>> result.predict([[5.1, 3.5, 1.4, 0.2]])
        array([0])
    """

    module: SupervisedModule
    data: DataModule
    history: History
    stop: Stop
    summary: dict[str, Any]
    directory: Path | None = None

    @property
    def model(self) -> nn.Module:
        """The trained model, on standardised inputs."""
        return self.module.model

    @property
    def metrics(self) -> dict[str, float]:
        """Final losses and metrics by tag."""
        return self.summary["metrics"]

    def predict(self, inputs: ArrayLike) -> NDArray[Any]:
        """Labels, or numbers in the target's units, for raw examples.

        Args:
            inputs: (N, D) or (N, C, H, W), not standardised. Flat images (N, C·H·W) are taken too.
                A table's columns are matched by name, where training had names, and others left
                out; what has no names is taken by position.

        Returns:
            (N,), or (N, K) for several targets.

        Raises:
            ValueError: The examples do not have the training data's shape.
        """
        return predict(self.module, self.data.preprocessing, inputs)

    def save(self, path: str | Path) -> Path:
        """Keep the model in one file, for `gdtrain.load` and for the commands; returns the path.

        The file holds weights, how the model is built, loss, preprocessing, history, stop and
        summary: numbers and texts alone, no code. The examples are not in it, nor is the
        optimizer's state: training goes on from the checkpoints of `directory=…`.

        Args:
            path: Of the file; one that is there is replaced.

        Raises:
            ValueError: Something is not plain, such as labels that are dates. Nothing was written.
        """
        module, path = self.module, Path(path)
        weights = {k: v for k, v in module.state_dict().items() if not k.startswith("evaluation.")}
        content = {
            "state_dict": weights,
            type(self.data).__qualname__: self.data.state_dict(),
            "gdtrain": {
                "updates": module.updates,
                "examples_seen": module.examples_seen,
                "settings": module.noted_settings,
                "description": module.description or module.describe(self.data),
                "history": {"train": self.history.train, "val": self.history.val},
                "stop": None if self.stop is None else self.stop.state_dict(),
                "summary": self.summary,
            },
        }
        with complete(path) as new:
            with open(new, "wb") as file:
                torch.save(content, file)
            try:
                load_checkpoint(new)
            except ValueError:
                raise ValueError(
                    "Only numbers, texts and tensors can be kept, and something is neither: "
                    "labels, feature names, or buffers of the model. Train with labels that are "
                    "texts or numbers."
                ) from None
        return path

    def plot(self, by: Literal["update", "examples", "epoch", "seconds"] = "update") -> Any:
        """Training and validation loss; the band is the smallest and largest of an interval.

        A matplotlib figure, whose horizontal axis is `by`; `.savefig(path)` keeps it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        x, low, high = (self.history.array("train", name) for name in (by, "min", "max"))
        if (low < high).any():
            axes.fill_between(x, low, high, alpha=0.2, linewidth=0, label="smallest to largest")
        drawn = np.empty(0)
        for part, tag, style in (("train", "loss", "-"), ("val", "loss/val", "--")):
            x, y = self.history.array(part, by), self.history.array(part, tag)
            drawn = np.append(drawn, y)
            if len(y):
                axes.plot(x, y, style, label={"train": "training", "val": "validation"}[part])
        label = {"update": "updates", "examples": "examples seen", "epoch": "epochs"}.get(by, by)
        axes.set(xlabel=label, ylabel="loss", title=f"{self.summary['variant']}: loss")
        if len(drawn) and (drawn > 0).all():
            axes.set_yscale("log")
            axes.set_ylim(bottom=drawn.min() / 2)  # the smallest of one example may be far below
        axes.legend()
        return figure


def predict(module: SupervisedModule, preprocessing: Any, inputs: ArrayLike) -> NDArray[Any]:
    """Answers of a trained module for raw examples, as `Result.predict`."""
    model = module.model
    parameter = next(model.parameters())
    raw = features(inputs, preprocessing.feature_names)
    x = preprocessing.inputs(raw, parameter.dtype)
    with torch.no_grad(), evaluating(model):
        if module.from_file and len(x):
            check_outputs(model, next(iter(x.split(1))))
        decided = [module.loss.decide(module(part.to(parameter.device))) for part in x.split(_PASS)]
    return preprocessing.answers(torch.cat(decided))


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
    """What `summary.json` holds: plain containers. `seconds` are those of the fit."""
    instruments = [c.summary() for c in trainer.callbacks if isinstance(c, Instrument)]  # type: ignore[attr-defined]
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
        "instruments": _jsonable({k: v for shown in instruments for k, v in shown.items()}),
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


def _rate(module: SupervisedModule) -> str | None:
    """The rule that lr=auto stood for."""
    return repr(step_size_of(module.loop.optimizer)) if module.step_size == "auto" else None


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
    """The reason for a run's end, with what the callbacks add to it."""
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
    """The loss, with its units where they are not the target's."""
    scale = getattr(data.preprocessing, "target_scale", None)
    return "loss" if scale is None else "loss (standardised units)"


def rows(metrics: Mapping[str, float], loss: str, digits: int) -> list[list[str]]:
    """Final losses and metrics as a table: a row for each, a column for each part of the data."""
    parts = [part for part in ("train", "val", "test") if f"loss/{part}" in metrics]
    names = sorted({t.split("/")[1] for t in metrics if t.startswith("metric/")})
    made = [["", *parts]]
    for name, tag in ((loss, "loss"), *((name, f"metric/{name}") for name in names)):
        values = (metrics.get(f"{tag}/{part}") for part in parts)
        made.append([name, *("–" if v is None else f"{v:.{digits}g}" for v in values)])
    return made


def _report(summary: Mapping[str, Any], metrics: Mapping[str, float], loss: str) -> str:
    """How the run ended, as Markdown."""
    head, *lines = rows(metrics, loss, digits=6)
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *lines))
    why = f"**{summary['stop_reason']}**: {summary['stop_message']}"
    work = (
        f"{summary['updates']:,} updates, {summary['examples_seen']:,} examples seen, "
        f"{summary['fit_seconds']:.1f} s, engine {summary['engine']}."
    )
    return "\n\n".join(filter(None, (why, summary["stop_advice"], table, work)))


def log_text(trainer: Trainer, tag: str, markdown: str, step: int) -> None:
    """Write a text into TensorBoard, once for all processes."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(tag, markdown, step)


def log_result(
    trainer: Trainer,
    module: SupervisedModule,
    data: DataModule,
    summary: Mapping[str, Any],
    metrics: Mapping[str, float],
    hyperparameters: Mapping[str, Any],
) -> None:
    """Write how a run ended into its loggers: a report, final metrics, hyperparameters."""
    if not trainer.loggers:
        return
    log_text(trainer, "result", _report(summary, metrics, loss_name(data)), module.updates)
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
            made = {"examples": summary["examples_seen"], "epoch": summary["epochs"]}
            logger.log_metrics({**made, **tested}, step=module.updates)
            logger.log_hyperparams(plain)
