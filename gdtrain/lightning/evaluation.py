"""Loss and metrics of a part of the data: which there are, how they are fed, what they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, R2Score

from gdtrain.losses import Loss

__all__ = ["MeanLoss", "compute_metrics", "make_metrics", "tag_of", "update_metrics"]


class MeanLoss(Metric):
    """Mean of losses per example, in their own precision, and NaN where one is.

    Example:
        >>> mean = MeanLoss()
        >>> mean.update(torch.tensor([1.0, 2.0]))
        >>> mean.update(torch.tensor([6.0]))
        >>> mean.compute()
        tensor(3.)
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Take losses in.

        Args:
            losses: (B,).
        """
        dtype = torch.promote_types(losses.dtype, torch.float32)
        self.total = self.total + losses.sum(dtype=dtype)
        self.count = self.count + losses.numel()

    def compute(self) -> Tensor:
        """Their mean."""
        return self.total / self.count


def tag_of(name: str, part: str) -> str:
    """Under which a metric is logged.

    Args:
        name: "loss", or of the metric.
        part: "train", "val" or "test".

    Example:
        >>> tag_of("loss", "val"), tag_of("accuracy", "test")
        ('loss/val', 'metric/accuracy/test')
    """
    return f"loss/{part}" if name == "loss" else f"metric/{name}/{part}"


def make_metrics(loss: Loss, given: Mapping[str, Metric] | None = None) -> nn.ModuleDict:
    """The loss and the metrics, by name, that have seen nothing yet.

    Args:
        loss: Tells the task.
        given: Metrics to copy; None: accuracy for classes, R² and mean absolute error for numbers.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> list(make_metrics(SquaredError()))
        ['loss', 'r2', 'mae']
    """
    made: dict[str, Metric]
    if given is not None:
        made = {name: metric.clone() for name, metric in given.items()}
    elif loss.task == "regression":
        made = {"r2": R2Score(), "mae": MeanAbsoluteError()}
    else:
        # Over decided classes, the count of classes does not matter to plain accuracy.
        made = {"accuracy": MulticlassAccuracy(2, average="micro", validate_args=False)}
    return nn.ModuleDict({"loss": MeanLoss(), **made})


def update_metrics(
    metrics: Any, loss: Loss, prediction: Tensor, targets: Tensor, scale: Tensor | None = None
) -> None:
    """Take the predictions of some examples in.

    Args:
        metrics: From `make_metrics`.
        loss: Which decides.
        prediction: (B, C).
        targets: (B, …).
        scale: (K,), by which numbers are multiplied, so that metrics have the target's units.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> metrics = make_metrics(SquaredError())
        >>> update_metrics(metrics, SquaredError(), torch.ones(2, 1), torch.tensor([1.0, 3.0]))
        >>> compute_metrics(metrics, "val")["metric/mae/val"]
        1.0
    """
    targets = loss.as_targets(targets, prediction.shape[-1])
    losses = loss(prediction, targets)
    decided = loss.decide(prediction)
    if loss.task == "regression":
        if decided.device.type != "mps":  # R² is a difference of sums of squares
            decided, targets = decided.double(), targets.double()
        targets = targets.reshape(decided.shape)
        if scale is not None:
            scale = scale.to(decided)
            decided, targets = decided * scale, targets * scale
        decided, targets = decided.squeeze(1), targets.squeeze(1)
    for name, metric in metrics.items():
        metric.update(*((losses,) if name == "loss" else (decided, targets)))


def compute_metrics(metrics: Any, part: str) -> dict[str, float]:
    """Values by tag, over all ranks; the metrics start anew.

    Args:
        metrics: From `make_metrics`.
        part: Last word of the tags.

    Returns:
        Without R² of a single example, which does not exist.

    Example:
        >>> metrics = nn.ModuleDict({"loss": MeanLoss()})
        >>> metrics["loss"].update(torch.tensor([2.0]))
        >>> compute_metrics(metrics, "val")
        {'loss/val': 2.0}
    """
    values = {}
    for name, metric in metrics.items():
        try:
            values[tag_of(name, part)] = float(cast(Metric, metric).compute())
        except ValueError:
            if not isinstance(metric, R2Score):
                raise
        metric.reset()
    return values
