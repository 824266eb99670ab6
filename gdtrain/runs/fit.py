"""One training run from built objects: fit, evaluate, summarise. The command and `fit` share it."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import numpy as np
import torch
import yaml
from lightning import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from numpy.typing import ArrayLike, NDArray
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import Tensor, nn
from torch.utils.tensorboard.summary import hparams

from gdtrain.callbacks import (
    BestAndLast,
    Convergence,
    Divergence,
    History,
    Instrument,
    Interrupt,
    LossCurves,
    ProgressLine,
)
from gdtrain.callbacks.curves import described
from gdtrain.callbacks.interrupt import OwnSignals, as_keyboard_interrupt
from gdtrain.data import ArrayDataModule, DataModule, features
from gdtrain.data.reading import load_checkpoint
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.engines import EngineName
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.resuming import check_resumes
from gdtrain.lightning.strategy import ExactDDP, alone_in
from gdtrain.losses import CrossEntropy, Loss, SquaredError
from gdtrain.models import CNN, MLP, Linear
from gdtrain.objective import evaluating
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.runs.builder import check_outputs
from gdtrain.runs.configuration import read_defaults
from gdtrain.schedules import ReduceOnPlateau, Schedule
from gdtrain.step_sizes import StepSize

__all__ = [
    "Result",
    "check_fits",
    "claim",
    "default_loss",
    "fit",
    "leave",
    "loss_name",
    "predict",
    "run",
    "unfinished",
]

Variant = Literal["gd", "sgd", "minibatch"]
_OPTIMIZERS = {"gd": GD, "sgd": SGD, "minibatch": MiniBatchSGD}
_log = logging.getLogger("gdtrain")
_TELLING = ("variant", "optimizer.lr", "lr", "data.batch_size", "schedule", "seed")
_MODELS = {"linear": Linear, "mlp": MLP, "cnn": CNN}


@dataclass
class Result:
    """A finished run.

    Args:
        module: The trained module; `model` is the trained model.
        data: The data module, with the preprocessing; of a run that `gdtrain.load` has read, what
            the file tells of the data.
        history: The curves.
        stop: Why it ended. (None, where `gdtrain.load` has read a checkpoint that does not tell.)
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
            inputs: (N, D) or (N, C, H, W), not standardised.

        Returns:
            (N,), or (N, K) for several targets.
        """
        return predict(self.module, self.data.preprocessing, inputs)

    def save(self, path: str | Path) -> Path:
        """Keep the model in one file, for `gdtrain.load` and for the commands.

        The file holds the weights, how the model is built, the loss, the preprocessing with
        classes and feature names, history, stop and summary: numbers and texts alone, no code. The
        examples are not in it, nor is the optimizer's state: training goes on from the checkpoints
        of `directory=…`.

        Args:
            path: Of the file; one that is there is replaced.

        Returns:
            The path.

        Raises:
            ValueError: Something is not plain, such as labels that are dates. Nothing was written.

        Example:
            >>> import gdtrain
            >>> from sklearn.datasets import load_iris
            >>> result = gdtrain.fit("linear", *load_iris(return_X_y=True), variant="gd", epochs=9)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     again = gdtrain.load(result.save(Path(folder) / "iris.pt"))
            >>> again.predict([[5.1, 3.5, 1.4, 0.2]])
            array([0])
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
        _write(path, lambda file: torch.save(content, file), _check_plain)
        return path

    def plot(self, by: Literal["update", "examples", "epoch", "seconds"] = "update") -> Any:
        """Training and validation loss; the band is the smallest and largest of an interval.

        Args:
            by: The horizontal axis.

        Returns:
            A matplotlib figure; `.savefig(path)` keeps it.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        x, low, high = (self.history.array("train", name) for name in (by, "min", "max"))
        if (low < high).any():
            axes.fill_between(x, low, high, alpha=0.2, linewidth=0, label="smallest to largest")
        for part, tag, style in (("train", "loss", "-"), ("val", "loss/val", "--")):
            x, y = self.history.array(part, by), self.history.array(part, tag)
            if len(y):
                axes.plot(x, y, style, label={"train": "training", "val": "validation"}[part])
        labels = {
            "update": "updates",
            "examples": "examples seen",
            "epoch": "epochs",
            "seconds": "seconds",
        }
        axes.set(xlabel=labels[by], ylabel="loss", title=f"{self.summary['variant']}: loss")
        drawn = np.append(
            self.history.array("train", "loss"), self.history.array("val", "loss/val")
        )
        if len(drawn) and (drawn > 0).all():
            axes.set_yscale("log")
            axes.set_ylim(bottom=drawn.min() / 2)  # the smallest of one example may be far below
        axes.legend()
        return figure


def fit(
    model: str | nn.Module | Callable[[Sequence[int], int], nn.Module],
    X: ArrayLike,  # noqa: N803 (scikit-learn's name)
    y: ArrayLike,
    *,
    variant: Variant = "sgd",
    lr: float | Literal["auto"] = "auto",
    epochs: int | None = None,
    batch_size: int | None = None,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    loss: Loss | None = None,
    schedule: Schedule | None = None,
    step_size: StepSize | None = None,
    seed: int = 0,
    engine: EngineName = "auto",
    directory: str | Path | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    interruptible: bool = False,
    **data_options: Any,
) -> Result:
    """Train a model on arrays: the same run as the command, without Hydra.

    Args:
        model: "linear", "mlp" or "cnn", sized from the data; a module; or a function from
            (input_shape, num_outputs) to one.
        X: (N, D), or images (N, C, H, W). The columns of a DataFrame are matched by name at
            `predict`.
        y: (N,) classes or numbers, or (N, K) numbers; which of them, the log says (logger
            "gdtrain"), and `task` or a loss decides: see `gdtrain.data.targets.decide`.
        variant: "gd" (an update averages all examples), "sgd" (one) or "minibatch".
        lr: η, range (0, ∞); "auto": found before and while training, see `SupervisedModule`.
        epochs: Passes over the data, range [1, ∞); None: the variant's.
        batch_size: For "minibatch", range [1, N]; None: the variant's.
        momentum: μ, range [0, ∞).
        nesterov: Nesterov momentum.
        weight_decay: λ, range [0, ∞); not on biases.
        loss: None: cross-entropy for classes, squared error for numbers.
        schedule: The factor on η; None: a warm-up and a decay to zero, but constant where a rule
            finds the length of full-batch steps ("auto" of `SupervisedModule`).
        step_size: A rule that computes η, with `lr="auto"`; None: the automatic one.
        seed: Of initial weights (if the model is built here), order and dropout.
        engine: How updates are made, see `SupervisedModule`.
        directory: Folder for TensorBoard events, `metrics.csv`, checkpoints and `summary.json`;
            None: nothing is written. It must not hold a run, but the one of `checkpoint` where all
            its updates were made, and only the evaluation is left.
        checkpoint: Go on with the run of this checkpoint. All that its next update depends on must
            be the same; more epochs are taken where the schedule is not stretched over them.
        progress: Whether to draw a progress bar on a terminal.
        interruptible: True: at the first Ctrl-C or SIGTERM the run ends in good order, and the
            result says INTERRUPTED. False: signals are the program's; Ctrl-C is a
            KeyboardInterrupt, and SIGTERM ends the process.
        **data_options: As for `ArrayDataModule`: `val_fraction`, `test_fraction`, `task`, `test`,
            `sampling`, `standardize`, `dtype` (in which all is trained; None: the model's), …

    Returns:
        The trained model, the history, the reason for the end, `predict` and `plot`.

    Raises:
        ValueError: An argument is out of range, or contradicts the variant.

    Example:
        >>> import gdtrain
        >>> from sklearn.datasets import load_wine
        >>> result = gdtrain.fit("mlp", *load_wine(return_X_y=True), variant="minibatch")
        >>> result.metrics["metric/accuracy/test"] > 0.9
        True
    """
    if variant not in _OPTIMIZERS:
        raise ValueError(f"variant must be gd, sgd or minibatch. Received: variant={variant!r}.")
    defaults = read_defaults(f"optimizer/{variant}")
    own_size = defaults["data"]["batch_size"]
    if batch_size is not None and variant != "minibatch" and batch_size != own_size:
        raise ValueError(
            f"variant={variant!r} averages {'all examples' if variant == 'gd' else 'one example'} "
            f"in each update. Received: batch_size={batch_size}. Use variant='minibatch'."
        )
    if loss is not None and not isinstance(loss, Loss):
        raise ValueError(
            f"loss must be one of gdtrain.losses, such as Hinge(), or a Loss of your own. "
            f"Received: {loss!r}."
        )
    if isinstance(model, str) and model not in _MODELS:
        raise ValueError(f"model must be one of {', '.join(_MODELS)}. Received: {model!r}.")
    dtype = data_options.pop("dtype", None)
    if dtype is not None or _is_double(model):
        data_options["dtype"] = "float64" if dtype is None else dtype
    data = ArrayDataModule(
        X,
        y,
        batch_size=own_size if batch_size is None else batch_size,
        seed=seed,
        **data_options,
    )
    data.use_loss(loss)
    data.setup()
    loss = loss if loss is not None else default_loss(data.num_classes)
    outputs = loss.outputs(data.num_classes, data.num_targets)
    seed_everything(seed, verbose=False)
    make = _MODELS[model] if isinstance(model, str) else model
    built = make if isinstance(make, nn.Module) else make(data.input_shape, outputs)
    if dtype is not None:
        built = built.to(data.dtype)
    if not built.training:  # as a loaded model is
        built.train()
    if lr != "auto" and (
        isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf
    ):
        raise ValueError(f"lr must be finite and > 0, or 'auto'. Received: lr={lr!r}.")
    if lr != "auto" and step_size is not None and step_size.owns_rate:
        raise ValueError(
            f"step_size={step_size!r} computes the step size, and lr sets it: give one of them. "
            f"Received: lr={lr!r}."
        )
    module = SupervisedModule(
        built,
        loss,
        partial(
            _OPTIMIZERS[variant],
            **({} if lr == "auto" else {"lr": lr}),
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=weight_decay,
        ),
        schedule if schedule is not None else "auto",
        step_size=step_size if step_size is not None or lr != "auto" else "auto",
        engine=engine,
    )
    arguments = {**read_defaults("trainer/default"), **defaults["trainer"]}
    arguments.pop("_target_"), arguments.pop("_partial_")
    if epochs is not None:
        if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
            raise ValueError(f"epochs must be a whole number of at least 1. Received: {epochs!r}.")
        arguments["max_epochs"] = epochs
    callbacks: list[Any] = [Divergence(), LossCurves(), Convergence()]
    if interruptible:
        callbacks.append(Interrupt())
    loggers: list[Any] = []
    if progress:
        callbacks.append(ProgressLine())
    hyperparameters = {"variant": variant, "lr": lr, "momentum": momentum, "seed": seed}
    if directory is not None:
        callbacks.append(BestAndLast)
        loggers = [partial(c, name="", version="") for c in (TensorBoardLogger, CSVLogger)]
        loggers[0].keywords.update(default_hp_metric=False, max_queue=1000)
    config = {**hyperparameters, "epochs": arguments["max_epochs"]}
    finishes = (
        checkpoint is not None
        and directory is not None
        and _is_of(checkpoint, directory)
        and unfinished(checkpoint, arguments["max_epochs"], -1) is not None
    )
    with nullcontext() if finishes else _claimed(directory, config, module):
        result = run(
            module,
            data,
            trainer=partial(Trainer, **arguments),
            callbacks=callbacks,
            loggers=loggers,
            directory=directory,
            variant=variant,
            seed=seed,
            checkpoint=checkpoint,
            hyperparameters=hyperparameters,
            description=module.describe(
                data, make, {"input_shape": list(data.input_shape), "num_outputs": outputs}
            ),
        )
    lost = result.stop.reason in (StopReason.DIVERGED, StopReason.NON_FINITE)
    _log.log(logging.WARNING if lost else logging.INFO, "%s", result.stop)
    return result


def _is_double(model: Any) -> bool:
    """Whether it is a module in float64, or will be made in it."""
    if not isinstance(model, nn.Module):
        return torch.get_default_dtype() == torch.float64
    return any(p.dtype == torch.float64 for p in model.parameters())


@contextmanager
def _claimed(
    directory: str | Path | None, config: Mapping[str, Any], module: SupervisedModule
) -> Iterator[None]:
    """Make a folder this run's; take away what was put into it where no update was made."""
    if directory is None:
        yield
        return
    folder = Path(directory)
    before = set(os.listdir(folder)) if folder.is_dir() else None
    claim(folder, config)
    try:
        yield
    except BaseException:
        if module.total_updates is None or module.updates == 0:
            leave(folder, before)
        raise


def leave(folder: Path, before: set[str] | None) -> None:
    """Take away what a run that did not start has put into its folder.

    Args:
        folder: Of the run.
        before: The names that were in it; None: it was not there.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = Path(root) / "run"
        ...     claim(folder, {"lr": 0.1})
        ...     leave(folder, None)
        ...     folder.exists()
        False
    """
    for name in set(os.listdir(folder)) - (before or set()):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if before is None and not os.listdir(folder):
        folder.rmdir()


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


def default_loss(num_classes: int | None) -> Loss:
    """Cross-entropy for classes, squared error for numbers.

    Args:
        num_classes: Of the data; None for numbers.

    Returns:
        The loss.

    Example:
        >>> default_loss(num_classes=3), default_loss(num_classes=None)
        (CrossEntropy(), SquaredError())
    """
    return SquaredError() if num_classes is None else CrossEntropy()


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
        >>> from gdtrain.data import EmbeddedDataModule
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
    with _quiet(), alone_in(folder, trainer) as make_trainer:
        made_loggers = [] if folder is None else [make(save_dir=folder) for make in loggers]
        if folder is not None and checkpoint is not None and _is_of(checkpoint, folder):
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
            if _is_over(state, data.planned_updates(lightning), Path(checkpoint)):
                lightning.callbacks.insert(0, _Finish(state["gdtrain"]["stop"]))  # type: ignore[attr-defined]
            for callback in built:
                if isinstance(callback, BestAndLast) and lightning.is_global_zero:
                    callback.take_over(Path(checkpoint))
        seed_everything(seed, verbose=False)
        if folder is not None and (folder / "config.yaml").is_file():
            config = (folder / "config.yaml").read_text(encoding="utf-8")
            _log_text(lightning, "configuration", f"```yaml\n{config}```", module.updates)
        with as_keyboard_interrupt(), _restoring(checkpoint):
            lightning.fit(module, datamodule=data, ckpt_path=checkpoint)
        seconds = curves.seconds
        stop = _why(lightning, module)
        metrics = {}
        rank, ranks = lightning.global_rank, lightning.world_size
        parts: tuple[Literal["train", "val", "test"], ...] = ("train", "val", "test")
        for part in parts:
            if data.count(part):
                loader = data.evaluation_loader(part, rank, ranks)
                metrics.update(module.evaluate(loader, part))
        if lightning.is_global_zero:
            report = _report(stop, metrics, module, seconds, loss_name(data))
            _log_text(lightning, "result", report, module.updates)
            _log_final(lightning, module, metrics, hyperparameters or {})
        for logger in made_loggers:
            logger.finalize("success")
    summary = _summary(lightning, module, data, stop, metrics, seconds, variant, seed)
    if folder is not None and lightning.is_global_zero:
        content = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        _write(folder / "summary.json", lambda file: file.write(content.encode()))
        np.savez_compressed(folder / "split.npz", allow_pickle=False, **data.split)
    return Result(module, data, curves.history, stop, summary, folder)


def predict(
    module: SupervisedModule, preprocessing: Any, inputs: ArrayLike, batch_size: int = 1024
) -> NDArray[Any]:
    """Answers of a trained module for raw examples.

    Args:
        module: Trained.
        preprocessing: Learnt with it.
        inputs: (N, D) or (N, C, H, W), not standardised. Flat images (N, C·H·W) are taken too. A
            table's columns are matched by name, where training had names, and others left out;
            what has no names is taken by position.
        batch_size: Examples in one pass, range [1, ∞).

    Returns:
        (N,) labels or numbers, or (N, K) numbers.

    Raises:
        ValueError: The examples do not have the training data's shape.

    Example:
        >>> import gdtrain
        >>> from sklearn.datasets import load_diabetes
        >>> X, y = load_diabetes(return_X_y=True)
        >>> result = gdtrain.fit("linear", X, y, variant="gd", epochs=300)
        >>> bool(abs(predict(result.module, result.data.preprocessing, X) - y).mean() < 60)
        True
    """
    model = module.model
    parameter = next(model.parameters())
    raw = features(inputs, preprocessing.feature_names)
    x = preprocessing.inputs(raw, parameter.dtype)
    with torch.no_grad(), evaluating(model):
        if module.from_file and len(x):
            check_outputs(model, next(iter(x.split(1))))
        decided = [
            module.loss.decide(module(part.to(parameter.device))) for part in x.split(batch_size)
        ]
    return preprocessing.answers(torch.cat(decided))


def _check_plain(path: Path) -> None:
    try:
        load_checkpoint(path)
    except ValueError:
        raise ValueError(
            "Only numbers, texts and tensors can be kept, and something is neither: labels, "
            "feature names, or buffers of the model. Train with labels that are texts or numbers."
        ) from None


@contextmanager
def _restoring(checkpoint: str | Path | None) -> Iterator[None]:
    """Say of a checkpoint from which Lightning cannot restore the run which part is damaged."""
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        steps = [frame.f_code.co_name for frame in frames if _restores(frame)]
        if not steps or str(checkpoint) in str(error):
            raise
        owners = (type(frame.f_locals.get("self")).__name__ for frame in reversed(frames))
        part = next((name for name in owners if name != "NoneType"), "")
        raise ValueError(
            f"{checkpoint} cannot be resumed from: it is damaged, and {steps[-1].strip('_')} fails "
            f"in its part for {part} ({type(error).__name__}). Use another checkpoint of the run, "
            f"best.ckpt or last.ckpt."
        ) from error


def _restores(frame: FrameType) -> bool:
    connector = isinstance(frame.f_locals.get("self"), _CheckpointConnector)
    return connector and "restore" in frame.f_code.co_name


def check_fits(state: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Raise where the tensors of a checkpoint and of a module differ in name or shape.

    Args:
        state: The checkpoint's "state_dict".
        module: To be filled from it.
        path: Of the checkpoint, for the message.

    Raises:
        ValueError: They differ.

    Example:
        >>> check_fits({"weight": torch.ones(2, 2)}, nn.Linear(2, 1, bias=False), "last.ckpt")
        Traceback (most recent call last):
        ...
        ValueError: The checkpoint last.ckpt does not match the model: expected weight of shape ...
    """
    own = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    saved = {
        k: tuple(v.shape) if isinstance(v, Tensor) else f"a {type(v).__name__}"
        for k, v in state.items()
    }
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"The checkpoint {path} does not match the model: expected {name} of shape "
                f"{own.get(name, '(none)')}, received {saved.get(name, '(none)')}. Resume with the "
                f"model that it was trained with."
            )


def _is_over(state: Mapping[str, Any], planned: int | None, path: Path) -> bool:
    """Whether only the evaluation and the summary are left of a run, which was killed then."""
    summary = path.parent.parent / "summary.json"
    made = planned is not None and state["gdtrain"]["updates"] >= planned
    if summary.is_file():
        if made:
            count = state["gdtrain"]["updates"]
            raise ValueError(
                f"The run of {path} has made all its {count} updates: there is nothing left to do. "
                f"Raise trainer.max_epochs (of gdtrain.fit: epochs) to train on."
            )
        return False
    return made or _stopped(state["gdtrain"])


def _stopped(own: Mapping[str, Any]) -> bool:
    """Whether a checkpoint tells why its run ended, other than at the user's wish."""
    stop = own.get("stop")
    return stop is not None and stop["reason"] != StopReason.INTERRUPTED.value


def unfinished(checkpoint: str | Path, max_epochs: int | None, max_steps: int) -> Path | None:
    """The folder of a run of which only the evaluation and the summary are left.

    Args:
        checkpoint: In `checkpoints`, in the run's folder.
        max_epochs: Of the trainer that is to go on.
        max_steps: Likewise; -1: as many as the epochs have.

    Returns:
        Where the run is to be finished; None: it is finished, or there are updates left.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: It cannot be used.

    Example:
        >>> unfinished("missing.ckpt", 1, -1)
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    own = load_checkpoint(checkpoint)["gdtrain"]
    place = Path(checkpoint).parent
    folder = place.parent
    if place.name != "checkpoints" or not (folder / "config.yaml").is_file():
        return None
    if (folder / "summary.json").exists():
        return None
    then, planned = own.get("settings") or {}, own.get("planned")
    limits = [str(then.get(f"trainer.{name}")) for name in ("max_epochs", "max_steps")]
    same = [{"None": "-1"}.get(n, n) for n in limits] == [repr(max_epochs or -1), repr(max_steps)]
    made = same and planned is not None and own["updates"] >= planned
    return folder if made or _stopped(own) else None


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
        module.plan.total = cast(Any, trainer).datamodule.planned_updates(trainer)
        if self._stop is not None:
            module.stop = Stop.from_state_dict(self._stop)
        trainer.should_stop = True


def _check_monitors(
    callbacks: Sequence[Callback], module: SupervisedModule, data: DataModule
) -> None:
    """Early stopping and plateau schedules need a validation metric that will be there."""
    validated = data.count("val") > 0
    tags = module.tags("val")
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None:
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


def claim(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml, which makes a folder this run's: no two runs ever share one.

    Args:
        folder: Of the run; made if it is not there.
        config: Plain containers.

    Raises:
        ValueError: The folder holds a run already, or cannot be made.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     claim(Path(folder) / "run", {"lr": 0.1})
        ...     claim(Path(folder) / "run", {"lr": 0.2})
        Traceback (most recent call last):
        ...
        ValueError: .../run already holds a run. ...
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            yaml.safe_dump(dict(config), file, sort_keys=False, allow_unicode=True)
    except FileExistsError:
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file, and a run needs a folder.") from None
        hint = "; what goes on from a checkpoint is left in a folder of its own."
        if config.get("ckpt_path") is None:
            hint = f"; to go on with that run, set ckpt_path={folder}/checkpoints/last.ckpt."
        raise ValueError(
            f"{folder} already holds a run. Choose another folder (hydra.run.dir=…){hint}"
        ) from None
    except OSError as error:
        raise ValueError(
            f"The run's folder {folder} cannot be made: {error.strerror or error}. Choose another."
        ) from None


def _is_of(checkpoint: str | Path, folder: str | Path) -> bool:
    """Whether it is a checkpoint of the run in a folder."""
    return Path(checkpoint).resolve().parent.parent == Path(folder).resolve()


def _keep_metrics(loggers: Sequence[Logger], path: Path) -> None:
    """Lightning's logger would take away the curves of a run that is finished."""
    logger = next((one for one in loggers if isinstance(one, CSVLogger)), None)
    if logger is None or not path.is_file():
        return
    with open(path, encoding="utf-8", newline="") as file:
        rows: list[Any] = [row for row in csv.DictReader(file) if not row.get("loss/test")]
    logger.experiment.metrics += rows
    logger.save()


def _build_callbacks(callbacks: Sequence[Any], folder: Path | None) -> list[Callback]:
    built: list[Callback] = []
    for callback in callbacks:
        if isinstance(callback, Callback):
            built.append(callback)
        elif folder is not None:  # a factory: what it makes writes files
            built.append(callback(directory=folder / "checkpoints"))
    return built


def _why(trainer: Trainer, module: SupervisedModule) -> Stop:
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


def _log_final(
    trainer: Trainer,
    module: SupervisedModule,
    metrics: Mapping[str, float],
    hyperparameters: Mapping[str, Any],
) -> None:
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
            for part in hparams(plain, shown):
                writer.add_summary(_telling_first(part), module.updates)
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


def _telling_first(summary: Summary) -> Summary:
    """TensorBoard's table shows five hyperparameters: those that "differ" first, then by name."""
    plugin = summary.value[0].metadata.plugin_data
    data = HParamsPluginData.FromString(plugin.content)
    for info in data.experiment.hparam_infos:
        info.differs = info.name in _TELLING
    plugin.content = data.SerializeToString()
    return summary


def _log_text(trainer: Trainer, tag: str, markdown: str, step: int) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(tag, markdown, step)


def _report(
    stop: Stop,
    metrics: Mapping[str, float],
    module: SupervisedModule,
    seconds: float,
    loss: str = "loss",
) -> str:
    """How the run ended, as Markdown."""
    parts = [part for part in ("train", "val", "test") if f"loss/{part}" in metrics]
    names = ["loss", *sorted({t.split("/")[1] for t in metrics if t.startswith("metric/")})]
    rows = [["", *parts], ["---"] * (1 + len(parts))]
    for name in names:
        tags = [f"loss/{p}" if name == "loss" else f"metric/{name}/{p}" for p in parts]
        shown = (f"{metrics[tag]:.6g}" if tag in metrics else "–" for tag in tags)
        rows.append([loss if name == "loss" else name, *shown])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    work = (
        f"{module.updates:,} updates, {module.examples_seen:,} examples seen, {seconds:.1f} s, "
        f"engine {module.engine_in_use}."
    )
    return "\n\n".join(
        filter(None, (f"**{stop.reason.value}**: {stop.message}", stop.advice, table, work))
    )


def _summary(
    trainer: Trainer,
    module: SupervisedModule,
    data: DataModule,
    stop: Stop,
    metrics: Mapping[str, float],
    seconds: float,
    variant: str,
    seed: int,
) -> dict[str, Any]:
    return {
        "variant": variant,
        "updates": module.updates,
        "examples_seen": module.examples_seen,
        "epochs": module.updates / module.updates_per_epoch,
        "fit_seconds": round(seconds, 3),
        "stop_reason": stop.reason.value,
        "stop_message": stop.message,
        "stop_numbers": _plain(stop.numbers),
        "certificate": _plain(module.certificate),
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


def _plain(value: Any) -> Any:
    """As JSON can hold it: a number that is not finite becomes a string."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _shown(trainer: Trainer) -> dict[str, Any]:
    """What the instruments tell of the run, by name."""
    found: dict[str, Any] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Instrument):
            found |= callback.summary()
    return _plain(found)


def _rate(module: SupervisedModule) -> dict[str, Any] | None:
    """What lr=auto found, and on what grounds."""
    if module.race is None:
        return None
    race = module.race
    return {
        "found": race.rate,
        "scale": race.scale,
        "tried": race.rates,
        "losses": _plain(race.losses),
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


def _write(
    path: Path, write: Callable[[Any], Any], check: Callable[[Path], Any] | None = None
) -> None:
    """All of a file or nothing; `check` reads it first, and raises if it cannot be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        if check is not None:
            check(Path(name))
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
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
