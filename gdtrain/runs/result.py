"""A finished run: the trained model, its answers, its curves, and how it is kept in a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from gdtrain.callbacks import History
from gdtrain.data import DataModule, features
from gdtrain.data.checkpoint_reading import load_checkpoint
from gdtrain.descent.stopping import Stop
from gdtrain.lightning.module import SupervisedModule
from gdtrain.objective import evaluating
from gdtrain.runs.descriptions import check_outputs
from gdtrain.runs.folder import write_file

__all__ = ["Result", "predict"]


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
            >>> import gdtrain, tempfile
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
        write_file(path, lambda file: torch.save(content, file), _check_plain)
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
