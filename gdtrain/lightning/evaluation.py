"""Loss and metrics of a part of the data: which there are, how they are fed, what they give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanAbsoluteError, R2Score

from gdtrain.data.module import DataModule
from gdtrain.losses import Loss
from gdtrain.objective import evaluating, prediction_of

__all__ = ["EvaluatedModule", "MeanLoss", "compute_metrics"]


class MeanLoss(Metric):
    """Mean of losses per example, in their own precision, and NaN where one is."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, losses: Tensor) -> None:
        """Take losses in."""
        dtype = torch.promote_types(losses.dtype, torch.float32)
        self.total = self.total + losses.sum(dtype=dtype)
        self.count = self.count + losses.numel()

    def compute(self) -> Tensor:
        """Their mean."""
        return self.total / self.count


def compute_metrics(metrics: Any, part: str) -> dict[str, float]:
    """Values by tag, over all ranks; the metrics start anew.

    R² of a single example, which does not exist, is left out.
    """
    values = {}
    for name, metric in metrics.items():
        try:
            values[_tag(name, part)] = float(metric.compute())
        except ValueError:
            if not isinstance(metric, R2Score):
                raise
        metric.reset()
    return values


def _tag(name: str, part: str) -> str:
    return f"loss/{part}" if name == "loss" else f"metric/{name}/{part}"


class EvaluatedModule(LightningModule):
    """A model with a loss and metrics, as Lightning validates, tests and predicts with it.

    Metrics are fed with `loss.decide(prediction)` and the targets; without any, they are accuracy
    for classes, R² and mean absolute error for numbers.
    """

    def __init__(self, model: nn.Module, loss: Loss, metrics: Mapping[str, Metric] | None) -> None:
        super().__init__()
        if not isinstance(loss, Loss):
            raise ValueError(
                f"loss must be a gdtrain.losses.Loss, which gives one value per example (subclass "
                f"it for one of your own). Received: {type(loss).__name__}."
            )
        self.model, self.loss = model, loss
        self._metrics = None if metrics is None else dict(metrics)
        self.evaluation = nn.ModuleDict()
        self._target_scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The model's predictions."""
        return prediction_of(self.model(x))

    def setup(self, stage: str) -> None:
        """Take from the data module the units of the target, and make the metrics."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, DataModule):  # what the targets are may have been settled without us
            self.loss.outputs(data.num_classes, data.num_targets)
        preprocessing = getattr(data, "preprocessing", None)
        self.use_target_scale(getattr(preprocessing, "target_scale", None))
        for part in ("val", "test"):
            if part not in self.evaluation:
                self.evaluation[part] = self._new_metrics()

    def use_target_scale(self, scale: Any) -> None:
        """Compute the metrics of a regression in the units that the target was divided by."""
        self._target_scale = None if scale is None else torch.as_tensor(scale, dtype=torch.float64)

    def _new_metrics(self) -> nn.ModuleDict:
        """The loss and the metrics, by name, that have seen nothing yet."""
        made: dict[str, Metric]
        if self._metrics is not None:
            made = {name: metric.clone() for name, metric in self._metrics.items()}
        elif self.loss.task == "regression":
            made = {"r2": R2Score(), "mae": MeanAbsoluteError()}
        else:
            # Over decided classes, the count of classes does not matter to plain accuracy.
            made = {"accuracy": MulticlassAccuracy(2, average="micro", validate_args=False)}
        return nn.ModuleDict({"loss": MeanLoss(), **made})

    def tags(self, part: str) -> list[str]:
        """Of the loss and the metrics of "train", "val" or "test"."""
        return [_tag(name, part) for name in self._new_metrics()]

    def to_model(self, tensor: Any) -> Any:
        """On the model's device; in its dtype if it holds floating-point numbers."""
        dtype = next((p.dtype for p in self.model.parameters()), torch.float32)
        return tensor.to(self.device, dtype if tensor.is_floating_point() else None)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one slice of the validation part in."""
        self._take(self.evaluation["val"], *batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Take one slice of the test part in."""
        self._take(self.evaluation["test"], *batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Classes (B,), or numbers (B, C), for `Trainer.predict`."""
        inputs = batch[0] if isinstance(batch, list | tuple) else batch
        return self.loss.decide(self(self.to_model(inputs)))

    def on_test_epoch_end(self) -> None:
        """Publish the test metrics."""
        self.log_dict(compute_metrics(self.evaluation["test"], "test"))

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the parameters are those that the model answers with."""
        return nullcontext()

    @torch.no_grad()
    def evaluate(
        self, batches: Iterable[tuple[Tensor, Tensor]], part: str = "train"
    ) -> dict[str, float]:
        """Mean loss and metrics over pairs of inputs and targets, outside Lightning's loops.

        In evaluation mode; by tag, `loss/<part>` and `metric/<name>/<part>`.
        """
        metrics = self._new_metrics().to(self.device)
        with evaluating(self.model), self.averaged():
            for inputs, targets in batches:
                self._take(metrics, inputs, targets)
        return compute_metrics(metrics, part)

    def _take(self, metrics: Any, inputs: Tensor, targets: Tensor) -> None:
        """Let the metrics see some examples."""
        if not len(inputs):
            return
        prediction, loss = self(self.to_model(inputs)), self.loss
        targets = loss.as_targets(self.to_model(targets), prediction.shape[-1])
        losses, decided = loss(prediction, targets), loss.decide(prediction)
        if loss.task == "regression":
            if decided.device.type != "mps":  # R² is a difference of sums of squares
                decided, targets = decided.double(), targets.double()
            targets = targets.reshape(decided.shape)
            if self._target_scale is not None:
                scale = self._target_scale.to(decided)
                decided, targets = decided * scale, targets * scale
            decided, targets = decided.squeeze(1), targets.squeeze(1)
        for name, metric in metrics.items():
            metric.update(*((losses,) if name == "loss" else (decided, targets)))
