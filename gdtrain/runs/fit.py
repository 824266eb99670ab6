"""`gdtrain.fit`: one training run on arrays, without Hydra."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from numpy.typing import ArrayLike
from torch import nn

from gdtrain.callbacks import (
    BestAndLast,
    Convergence,
    Divergence,
    Interrupt,
    LossCurves,
    ProgressLine,
)
from gdtrain.data import ArrayDataModule
from gdtrain.descent.stopping import StopReason
from gdtrain.engines import EngineName
from gdtrain.lightning.module import SupervisedModule
from gdtrain.losses import Loss
from gdtrain.models import CNN, MLP, Linear
from gdtrain.optim import GD, SGD, MiniBatchSGD
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.checkpoints import unfinished
from gdtrain.runs.configuration import read_defaults
from gdtrain.runs.descriptions import default_loss
from gdtrain.runs.folder import holds, reserved
from gdtrain.runs.result import Result
from gdtrain.runs.run import run
from gdtrain.schedules import Schedule
from gdtrain.step_sizes import StepSize

__all__ = ["fit"]

_OPTIMIZERS = {"gd": GD, "sgd": SGD, "minibatch": MiniBatchSGD}
_MODELS = {"linear": Linear, "mlp": MLP, "cnn": CNN}
_log = logging.getLogger("gdtrain")


def fit(
    model: str | nn.Module | Callable[[Sequence[int], int], nn.Module],
    X: ArrayLike,  # noqa: N803 (scikit-learn's name)
    y: ArrayLike,
    *,
    variant: Literal["gd", "sgd", "minibatch"] = "sgd",
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
        X: (N, D), or images (N, C, H, W).
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
        schedule: The factor on η; None: "auto" of `SupervisedModule`.
        step_size: A rule that computes η, with `lr="auto"`; None: the automatic one.
        seed: Of initial weights (if the model is built here), order and dropout.
        engine: How updates are made, see `SupervisedModule`.
        directory: Folder for TensorBoard events, `metrics.csv`, checkpoints and `summary.json`;
            None: nothing is written. It must not hold a run, but the one of `checkpoint` where all
            its updates were made, and only the evaluation is left.
        checkpoint: Go on with its run. All that the next update depends on must be the same; more
            epochs are taken where the schedule is not stretched over them.
        progress: Whether to draw a progress bar on a terminal.
        interruptible: Whether at the first Ctrl-C or SIGTERM the run ends in good order, and the
            result says INTERRUPTED; else signals are the program's.
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
    double = torch.get_default_dtype() == torch.float64
    if isinstance(model, nn.Module):
        double = any(p.dtype == torch.float64 for p in model.parameters())
    if dtype is not None or double:
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
    options: dict[str, Any] = {"momentum": momentum, "nesterov": nesterov}
    options["weight_decay"] = weight_decay
    if lr != "auto":
        options["lr"] = lr
        try:
            Interval(0, math.inf).check("lr", lr)
        except ValueError as error:
            raise ValueError(f"{error} Or set lr='auto'.") from None
    if lr != "auto" and step_size is not None and not step_size.needs.lr:
        raise ValueError(
            f"step_size={step_size!r} computes the step size, and lr sets it: give one of them. "
            f"Received: lr={lr!r}."
        )
    module = SupervisedModule(
        built,
        loss,
        partial(_OPTIMIZERS[variant], **options),
        schedule if schedule is not None else "auto",
        step_size=step_size if step_size is not None or lr != "auto" else "auto",
        engine=engine,
    )
    arguments = {**read_defaults("trainer/default"), **defaults["trainer"]}
    arguments.pop("_target_"), arguments.pop("_partial_")
    if epochs is not None:
        arguments["max_epochs"] = Whole(1).check("epochs", epochs)
    callbacks: list[Any] = [Divergence(), LossCurves(), Convergence()]
    if interruptible:
        callbacks.append(Interrupt())
    if progress:
        callbacks.append(ProgressLine())
    loggers: list[Any] = []
    hyperparameters = {"variant": variant, "lr": lr, "momentum": momentum, "seed": seed}
    if directory is not None:
        callbacks.append(BestAndLast)
        loggers = [partial(c, name="", version="") for c in (TensorBoardLogger, CSVLogger)]
        loggers[0].keywords.update(default_hp_metric=False, max_queue=1000)
    finishes = (
        checkpoint is not None
        and directory is not None
        and holds(directory, checkpoint)
        and unfinished(checkpoint, arguments["max_epochs"], -1) is not None
    )

    def keep(error: BaseException) -> bool:
        return module.total_updates is not None and module.updates > 0

    config = None if finishes else {**hyperparameters, "epochs": arguments["max_epochs"]}
    with nullcontext() if directory is None else reserved(Path(directory), config, keep):
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
