"""A trained model back from its file: of `Result.save`, or a checkpoint of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from gdtrain.callbacks import History
from gdtrain.data import Preprocessing
from gdtrain.data.reading import read_json
from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.losses import Loss
from gdtrain.runs.fit import Result
from gdtrain.runs.run import Trained, load_trained

__all__ = ["DataOfFile", "load"]


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
