"""Checkpoints and saved models: found, loaded, compared with the run that is to go on."""

from __future__ import annotations

import math
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdtrain import models
from gdtrain._compat.lightning_training import restores
from gdtrain.callbacks import History
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.reading import printable, read_json
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.lightning.module import SupervisedModule
from gdtrain.lightning.resuming import check_model
from gdtrain.losses import Loss
from gdtrain.runs.descriptions import (
    build_model,
    build_part,
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
class DataOfFile:
    """What a file tells of the data that its model was trained on; the examples are not in it."""

    preprocessing: Preprocessing
    state: dict[str, Any]

    def state_dict(self) -> dict[str, Any]:
        """As the file has it."""
        return self.state


@dataclass
class Trained:
    """A model from a checkpoint, and what it needs to answer; `state` is the whole checkpoint."""

    path: Path
    module: SupervisedModule
    data: DataOfFile
    state: dict[str, Any]
    trust: tuple[str, ...]

    @property
    def described_data(self) -> dict[str, Any]:
        """How the data module was made; empty for arrays."""
        return (self.module.description or {}).get("data") or {}


def find_checkpoint(folder: str | Path) -> Path:
    """The last checkpoint of a run, or of its folder `checkpoints`."""
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
    unless `trust` names more packages: a file may come from anybody. A `model` (or a function from
    input_shape and num_outputs to one) and a `loss` that are given are filled instead.
    """
    state = load_checkpoint(path)
    description = state["gdtrain"].get("description")
    if not isinstance(description, Mapping):
        raise ValueError(f"{path} does not say how its model is built.")
    settings = dict(state["gdtrain"].get("settings", {}))
    for part, given in (("model", model), ("loss", loss)):
        if given is None:
            _check_buildable(description.get(part), part, path)
    try:
        check_description(description, trust)
        data = _data_state(state)
        preprocessing = Preprocessing.from_state_dict(data["preprocessing"])
        weights = _weights(state)
        if loss is None:
            named = description.get("loss")
            loss = build_part("loss", named, trust) if named else default_loss(data["num_classes"])
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
        check_model(settings, module.model, path)
    check_fits(weights, module, path)
    _check_weights(weights, module, path)
    module.load_state_dict(weights)
    module.description = {**description}
    module.from_file = model is None and not trust
    module.noted_settings = settings
    module.updates = state["gdtrain"].get("updates", 0)
    module.examples_seen = state["gdtrain"].get("examples_seen", 0)
    module.eval()
    return Trained(Path(path), module, DataOfFile(preprocessing, data), state, trust)


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


def _check_buildable(found: Any, part: str, path: str | Path) -> None:
    """Raise on a model or a loss that has something of somebody's own, and must be given."""
    if not isinstance(found, Mapping) or "own" not in found:
        return
    name = printable(found["own"])
    what = f"a {part} of your own class, {name}"
    if hasattr(models, name) or hasattr(nn, name):
        what = f"a {part}, {name}, with something of your own in it: an activation, a layer, a hook"
    raise ValueError(
        f"{path} holds the weights of {what}, and no code comes from a file. Build the {part} as "
        f"it was trained and give it: gdtrain.load({str(path)!r}, {part}={name}(…))."
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
    shape, classes, columns = data["input_shape"], data["num_classes"], data["num_targets"]
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
        if value is None and name in known:
            continue
        if name in of:
            right = (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and value.ndim <= len(of[name])
                and all(
                    n in (1, m) for n, m in zip(value.shape[::-1], of[name][::-1], strict=False)
                )
            )
        elif name in lengths:
            right = (
                isinstance(value, list)
                and len(value) == lengths[name]
                and all(isinstance(x, bool | int | float | str) for x in value)
            )
        elif name == "input_shape":
            right = list(value) == list(shape)
        else:
            right = name in known and isinstance(value, bool | int | float | str)
        if not right:
            raise ValueError(f"its preprocessing is damaged: {name!r:.80} does not fit the data.")


def check_fits(state: Mapping[str, Tensor], module: nn.Module, path: str | Path) -> None:
    """Raise where the tensors of a checkpoint and of a module differ in name or shape."""
    found = first_difference(module, state)
    if found is not None:
        name, own, saved = found
        raise ValueError(
            f"The checkpoint {path} does not match the model: expected {name} of shape {own}, "
            f"received {saved}. Resume with the model that it was trained with."
        )


def unfinished(checkpoint: str | Path, max_epochs: int | None, max_steps: int) -> Path | None:
    """The folder of a run of which only the evaluation and the summary are left.

    None: it is finished, or a trainer with these limits (-1: none) has updates left to make.
    """
    own = load_checkpoint(checkpoint)["gdtrain"]
    place = Path(checkpoint).parent
    folder = place.parent
    is_run = place.name == "checkpoints" and (folder / "config.yaml").is_file()
    if not is_run or (folder / "summary.json").exists():
        return None
    then, planned = own.get("settings") or {}, own.get("planned")
    limits = [str(then.get(f"trainer.{name}")) for name in ("max_epochs", "max_steps")]
    same = [{"None": "-1"}.get(n, n) for n in limits] == [repr(max_epochs or -1), repr(max_steps)]
    made = same and planned is not None and own["updates"] >= planned
    return folder if made or _stopped(own) else None


def is_over(state: Mapping[str, Any], planned: int | None, path: Path) -> bool:
    """Whether only the evaluation and the summary are left of a run of T `planned` updates.

    `state` is its last checkpoint, at `path`. Raises where nothing is left to do.
    """
    own = state["gdtrain"]
    made = planned is not None and own["updates"] >= planned
    finished = (path.parent.parent / "summary.json").is_file()
    if finished and made:
        raise ValueError(
            f"The run of {path} has made all its {own['updates']} updates: there is nothing left "
            f"to do. Raise trainer.max_epochs (of gdtrain.fit: epochs) to train on."
        )
    return not finished and (made or _stopped(own))


def _stopped(own: Mapping[str, Any]) -> bool:
    """Whether a checkpoint tells why its run ended, other than at the user's wish."""
    stop = own.get("stop")
    return stop is not None and stop["reason"] != StopReason.INTERRUPTED.value


@contextmanager
def restoring(checkpoint: str | Path | None) -> Iterator[None]:
    """Say of a checkpoint from which Lightning cannot restore the run which part is damaged."""
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


def load(
    path: str | Path,
    *,
    model: nn.Module | Callable[[Any, int], nn.Module] | None = None,
    loss: Loss | None = None,
    trust: tuple[str, ...] = (),
) -> Result:
    """Read a trained model, with all that it needs to answer.

    No code comes from the file: models of gdtrain and of layers of `torch.nn` are built again from
    their description; one with something of your own in it must be given, and is filled.

    Args:
        path: Of a file that `Result.save` has made, or of a checkpoint, `best.ckpt` or `last.ckpt`
            in the `checkpoints` of a run.
        model: For one with something of your own in it: a module of the same structure, or a
            function from (input_shape, num_outputs) to one.
        loss: For a loss of your own class.
        trust: Further packages whose classes the file may name, such as ("mypackage",).

    Returns:
        As `fit` returns it, but `data` has the preprocessing alone. A checkpoint has no `metrics`
        and no `stop`, unless it is that of the run's end, and its `summary.json` lies there.

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
        ...     again = gdtrain.load(result.save(Path(folder) / "wine.pt"))
        >>> bool((again.predict(X) == result.predict(X)).all())
        True
    """
    trained = load_trained(path, trust, model, loss)
    own, callbacks = trained.state["gdtrain"], trained.state.get("callbacks") or {}
    curves = own.get("history") or callbacks.get("LossCurves") or {}
    summary = own.get("summary") or _summary(trained)
    stop = Stop.from_state_dict(own["stop"]) if own.get("stop") else _stop(summary)
    place = trained.path.parent
    return Result(
        trained.module,
        trained.data,  # type: ignore[arg-type]
        History(curves.get("train", {}), curves.get("val", {})),
        stop,  # type: ignore[arg-type]
        summary,
        place.parent if place.name == "checkpoints" else None,
    )


def _summary(trained: Trained) -> dict[str, Any]:
    """That of the run, where the checkpoint is of its end; else what the checkpoint tells."""
    own = trained.state["gdtrain"]
    try:
        found = read_json(trained.path.parent.parent / "summary.json")
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
    message, numbers, advice = (summary.get(f"stop_{n}") for n in ("message", "numbers", "advice"))
    return Stop(StopReason(summary["stop_reason"]), message or "", numbers or {}, advice or "")
