"""Exact BatchNorm statistics at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from gdtrain.lightning.module import SupervisedModule
from gdtrain.models import exact_batch_norm_
from gdtrain.ranges import Whole

__all__ = ["ExactBatchNorm"]


class ExactBatchNorm(Callback):
    """Recomputes BatchNorm's evaluation statistics over the training set, once training ends.

    The last checkpoint, the summary and the trained model then have the exact ones, see
    `gdtrain.models.exact_batch_norm_`. Needs a gdtrain data module. No state.

    Args:
        batch_size: Examples in one pass, range [1, ∞).

    Raises:
        ValueError: `batch_size` is out of range.

    Example:
        >>> ExactBatchNorm().batch_size
        1024
    """

    decisive = ()  # a resumed run must have the same

    def __init__(self, batch_size: int = 1024) -> None:
        self.batch_size = Whole(1).check("batch_size", batch_size)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Recompute, once the run was validated as it was trained."""
        module = cast(SupervisedModule, pl_module)
        module.settle()
        module.validate_at_the_end()
        data = cast(Any, trainer).datamodule
        parameter = next(module.model.parameters())

        def batches() -> Iterator[Tensor]:
            for x, _ in data.evaluation_loader("train", batch_size=self.batch_size):
                yield x.to(parameter.device, parameter.dtype)

        exact_batch_norm_(module.model, batches)
