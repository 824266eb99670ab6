"""Checkpoints and saved models: found, loaded, compared with the run that is to go on."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdtrain._compat.lightning_training import restores
from gdtrain.callbacks import History
from gdtrain.data import Preprocessing
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.data.reading import printable, read_json
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.resuming import check_model
from gdtrain.losses import Loss
from gdtrain.runs.descriptions import (
    build_loss,
    build_model,
    check_description,
    default_loss,
    first_difference,
)
from gdtrain.runs.result import Result

__all__ = [
    "DataOfFile",
    "Trained",
    "check_fits",
    "find_checkpoint",
    "is_over",
    "load",
    "load_trained",
    "restoring",
    "unfinished",
]

_LARGEST = 2**27  # numbers in an example which a checkpoint may ask for


@dataclass
class Trained:
    """A model from a checkpoint, and what it needs to answer.

    Args:
        module: With the trained weights.
        preprocessing: As learnt in training.
        state: The checkpoint.
        trust: Further packages whose classes may be built.
        data: What the data module has put into it.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> module = SupervisedModule(nn.Linear(1, 1), SquaredError(), lambda params: None)
        >>> Trained(module, Preprocessing(), {}).preprocessing.classes is None
        True
    """

    module: SupervisedModule
    preprocessing: Preprocessing
    state: dict[str, Any]
    trust: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


def find_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint of a run.

    Args:
        folder: The run's, or its `checkpoints`.

    Returns:
        The path of `last.ckpt`.

    Raises:
        FileNotFoundError: There is no such folder, or no checkpoint in it.

    Example:
        >>> find_checkpoint("missing")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no folder missing. ...
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. A run's is outputs/<name>/<time>.")
    for path in (folder / "checkpoints" / "last.ckpt", folder / "last.ckpt"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder} holds no run: expected checkpoints/last.ckpt in it. Received: "
        f"{', '.join(sorted(os.listdir(folder))[:5]) or 'an empty folder'}."
    )


def load_trained(
    path: str | Path,
    trust: tuple[str, ...] = (),
    model: nn.Module | Callable[[Any, int], nn.Module] | None = None,
    loss: Loss | None = None,
) -> Trained:
    """Build the model of a checkpoint or of a file of `Result.save`, and load its weights.

    Building calls what the file names. Only gdtrain, torch.nn and torchvision models are called,
    unless `trust` names more: a file may come from anybody.

    Args:
        path: Of the file.
        trust: Further packages whose classes may be called, such as ("mypackage",).
        model: To be filled, where the file does not say how its model is built: a module, or a
            function from (input_shape, num_outputs) to one.
        loss: Likewise.

    Returns:
        The model, ready to answer.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, names a class that is not trusted, or holds a model of
            somebody's own class, which must be given, or another one than was given.

    Example:
        >>> load_trained("missing.ckpt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: There is no checkpoint missing.ckpt. ...
    """
    state = load_checkpoint(path)
    description = state["gdtrain"].get("description")
    if not isinstance(description, Mapping):
        raise ValueError(f"{path} does not say how its model is built.")
    for part, given in (("model", model), ("loss", loss)):
        _check_given(description.get(part), part, given, path)
    try:
        check_description(description, trust)
        data = _data_state(state)
        preprocessing = Preprocessing.from_state_dict(data["preprocessing"])
        weights = _weights(state)
        if loss is None:
            named = description.get("loss")
            loss = build_loss(named, trust) if named else default_loss(data["num_classes"])
        shape = tuple(data["input_shape"])

        def outputs() -> int:
            return loss.outputs(data["num_classes"], data["num_targets"])

        if model is None:
            sized = description["model"].get("_partial_")
            own = {k.removeprefix("model."): v for k, v in weights.items() if k[:6] == "model."}
            made = build_model(description["model"], shape, outputs() if sized else 0, own, trust)
        else:
            made = model if isinstance(model, nn.Module) else model(shape, outputs())
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    module = SupervisedModule(made, loss, lambda params: None)  # type: ignore[arg-type,return-value]
    floating = [v.dtype for v in weights.values() if v.is_floating_point()]
    module.to(floating[0] if floating else None)
    if model is not None:
        check_model(state["gdtrain"].get("settings", {}), module.model, path)
    check_fits(weights, module, path)
    _check_weights(weights, module, path)
    module.load_state_dict(weights)
    module.description = {**description}
    module.from_file = model is None and not trust
    module.noted_settings = dict(state["gdtrain"].get("settings", {}))
    module.updates = state["gdtrain"].get("updates", 0)
    module.examples_seen = state["gdtrain"].get("examples_seen", 0)
    module.eval()
    return Trained(module, preprocessing, state, trust, data)


def _check_weights(weights: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Raise where a parameter is not of finite floating-point numbers, as those that answer are.

    A buffer may hold infinite ones, such as a mask of -inf.
    """
    for name, own in module.named_parameters():
        found = weights[name]
        if own.is_floating_point() and not found.is_floating_point():
            raise ValueError(
                f"{path} cannot be used: expected {name} in floating point. Received: "
                f"{found.dtype}."
            )
        if not torch.isfinite(found).all():
            raise ValueError(
                f"{path} cannot be used: its weights are not finite numbers, in {name}. Use a "
                f"checkpoint from before the run diverged, such as best.ckpt."
            )


def _check_given(found: Any, part: str, given: Any, path: str | Path) -> None:
    """Raise where a model or a loss of somebody's own class is not given."""
    if given is None and isinstance(found, Mapping) and "own" in found:
        name = printable(found["own"])
        raise ValueError(
            f"{path} holds the weights of a {part} of your own class, {name}, and no code comes "
            f"from a file. Build the {part} and give it: gdtrain.load({str(path)!r}, "
            f"{part}={name}(…))."
        )


def _weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the module: averaged, where a step-size rule averages."""
    weights = {k: v for k, v in state["state_dict"].items() if not k.startswith("evaluation.")}
    average = state["gdtrain"].get("average") or {}
    weights |= average if isinstance(average, dict) else {"average": average}
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"its weights must be tensors. Received: {name!r:.80}.")
        if value.is_complex():
            raise ValueError(
                f"its weights must be real numbers. Received: {printable(name)} of {value.dtype}."
            )
    return weights


def _data_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What the data module has put in; of batches from a loader nothing is known."""
    keys = {"preprocessing", "input_shape", "num_classes", "num_targets"}
    found = [v for v in state.values() if isinstance(v, Mapping) and keys <= v.keys()]
    if not found and not state["gdtrain"]["description"].get("data"):
        return {"preprocessing": {}, "input_shape": [], "num_classes": None, "num_targets": 1}
    if not found or not isinstance(found[0]["preprocessing"], Mapping):
        raise ValueError("it holds no preprocessing: no gdtrain data module was trained on.")
    data = found[0]
    shape, classes, columns = (
        data.get(key) for key in ("input_shape", "num_classes", "num_targets")
    )
    sizes = list(shape) if isinstance(shape, list | tuple) else [None]
    counts = [columns] if classes is None else [columns, classes]
    if not all(type(n) is int and n >= 1 for n in (*sizes, *counts)) or math.prod(sizes) > _LARGEST:  # type: ignore[arg-type]
        raise ValueError(
            f"input_shape, num_classes and num_targets must be sizes of examples. Received: "
            f"{shape!r:.80}, {classes!r:.40} and {columns!r:.40}."
        )
    _check_preprocessing(data["preprocessing"], sizes, data)
    return dict(data)


def _check_preprocessing(state: Mapping[str, Any], shape: Sequence[Any], data: Any) -> None:
    """Raise unless it was learnt from such examples, so that its use makes nothing large."""
    known = {field.name for field in fields(Preprocessing)}
    columns = [data["num_targets"]]
    of = {"mean": shape, "scale": shape, "target_mean": columns, "target_scale": columns}
    lengths = {"classes": data["num_classes"], "feature_names": math.prod(shape)}
    for name, value in state.items():
        if name in of:
            right = value is None or (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.ndim <= len(of[name])
                and all(
                    n in (1, size)
                    for n, size in zip(value.shape[::-1], of[name][::-1], strict=False)
                )
            )
        elif name in lengths:
            right = value is None or (
                isinstance(value, list)
                and len(value) == lengths[name]
                and all(isinstance(x, bool | int | float | str) for x in value)
            )
        elif name == "input_shape":
            right = value is None or list(value) == list(shape)
        else:
            right = name in known and (value is None or isinstance(value, bool | int | float | str))
        if not right:
            raise ValueError(f"its preprocessing is damaged: {name!r:.80} does not fit the data.")


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
    found = first_difference(module, state)
    if found is not None:
        name, own, saved = found
        raise ValueError(
            f"The checkpoint {path} does not match the model: expected {name} of shape {own}, "
            f"received {saved}. Resume with the model that it was trained with."
        )


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


def is_over(state: Mapping[str, Any], planned: int | None, path: Path) -> bool:
    """Whether only the evaluation and the summary are left of a run, which was killed then.

    Args:
        state: Of its last checkpoint.
        planned: Updates of the run that goes on; None: there is no end to them.
        path: Of the checkpoint.

    Raises:
        ValueError: Nothing is left to do: the run has its summary.

    Example:
        >>> is_over({"gdtrain": {"updates": 9, "stop": None}}, 20, Path("checkpoints/last.ckpt"))
        False
    """
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


@contextmanager
def restoring(checkpoint: str | Path | None) -> Iterator[None]:
    """Say of a checkpoint from which Lightning cannot restore the run which part is damaged.

    Args:
        checkpoint: Its path; None: the run starts anew.

    Raises:
        ValueError: It is damaged.

    Example:
        >>> with restoring(None):
        ...     pass
    """
    try:
        yield
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        steps = [frame.f_code.co_name for frame in frames if restores(frame)]
        if not steps or str(checkpoint) in str(error):
            raise
        owners = (type(frame.f_locals.get("self")).__name__ for frame in reversed(frames))
        part = next((name for name in owners if name != "NoneType"), "")
        raise ValueError(
            f"{checkpoint} cannot be resumed from: it is damaged, and {steps[-1].strip('_')} fails "
            f"in its part for {part} ({type(error).__name__}). Use another checkpoint of the run, "
            f"best.ckpt or last.ckpt."
        ) from error


class DataOfFile:
    """What a file tells of the data that its model was trained on; the examples are not in it.

    Args:
        preprocessing: As learnt in training, with classes and feature names.
        state: What the data module has put into the file.

    Example:
        >>> DataOfFile(Preprocessing(classes=["no", "yes"]), {}).preprocessing.classes
        ['no', 'yes']
    """

    def __init__(self, preprocessing: Preprocessing, state: Mapping[str, Any]) -> None:
        self.preprocessing = preprocessing
        self._state = dict(state)

    def state_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return self._state


def load(
    path: str | Path,
    *,
    model: nn.Module | Callable[[Any, int], nn.Module] | None = None,
    loss: Loss | None = None,
    trust: tuple[str, ...] = (),
) -> Result:
    """Read a trained model, with all that it needs to answer.

    No code comes from the file: models by name, and those of layers of `torch.nn`, are built again
    from their description; one of your own class must be given, and is filled.

    Args:
        path: Of a file that `Result.save` has made, or of a checkpoint, `best.ckpt` or `last.ckpt`
            in the `checkpoints` of a run.
        model: For a model of your own class: a module of the same structure, which is filled, or a
            function from (input_shape, num_outputs) to one.
        loss: For a loss of your own class.
        trust: Further packages whose classes the file may name, such as ("mypackage",).

    Returns:
        As `fit` returns it: `model`, `predict`, `metrics`, `history`, `stop`, `summary`, `plot`.
        Its `data` has the preprocessing alone. A checkpoint has no `metrics` and no `stop`, unless
        it is that of the run's end, and its `summary.json` lies there.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no such file, or its model must be given, or is another one than that
            which was given.

    Example:
        >>> import gdtrain, tempfile
        >>> from sklearn.datasets import load_wine
        >>> X, y = load_wine(return_X_y=True)
        >>> result = gdtrain.fit("mlp", X, y, variant="minibatch", epochs=5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = result.save(Path(folder) / "wine.pt")
        ...     again = load(path)
        >>> bool((again.predict(X) == result.predict(X)).all()), again.metrics == result.metrics
        (True, True)
    """
    path = Path(path)
    trained = load_trained(path, trust, model, loss)
    own, callbacks = trained.state["gdtrain"], trained.state.get("callbacks") or {}
    curves = own.get("history") or callbacks.get("LossCurves") or {}
    summary = own.get("summary") or _summary(trained, path)
    stop = Stop.from_state_dict(own["stop"]) if own.get("stop") else _stop(summary)
    folder = path.parent.parent if path.parent.name == "checkpoints" else None
    return Result(
        trained.module,
        DataOfFile(trained.preprocessing, trained.data),  # type: ignore[arg-type]
        History(curves.get("train", {}), curves.get("val", {})),
        stop,  # type: ignore[arg-type]
        summary,
        folder,
    )


def _summary(trained: Trained, path: Path) -> dict[str, Any]:
    """That of the run, where the checkpoint is of its end; else what the checkpoint tells."""
    own = trained.state["gdtrain"]
    try:
        found = read_json(path.parent.parent / "summary.json")
        if found["updates"] == own.get("updates"):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # a run that is under way, or a checkpoint that was moved
    variant = own["description"].get("variant", "")
    told = {name: own.get(name, 0) for name in ("updates", "examples_seen")}
    return {"variant": variant, **told, "metrics": {}}


def _stop(summary: Mapping[str, Any]) -> Stop | None:
    if "stop_reason" not in summary:
        return None
    parts = (summary.get(f"stop_{name}") for name in ("message", "numbers", "advice"))
    message, numbers, advice = parts
    return Stop(StopReason(summary["stop_reason"]), message or "", numbers or {}, advice or "")
