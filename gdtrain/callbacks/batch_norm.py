"""Exact BatchNorm statistics at the end of a run."""

from __future__ import annotations

from typing import Any

from lightning import Callback

from gdtrain.models import exact_batch_norm_
from gdtrain.ranges import Whole

__all__ = ["ExactBatchNorm"]


class ExactBatchNorm(Callback):
    """Recomputes BatchNorm's evaluation statistics over the training set, once training ends.

    The last checkpoint, the summary and the trained model then have the exact ones, see
    `gdtrain.models.exact_batch_norm_`. Needs a gdtrain data module. No state.

    Args:
        batch_size: Examples in one pass, range [1, ∞).

    Example:
        >>> ExactBatchNorm().batch_size
        1024
    """

    decisive = ()  # a resumed run must have the same

    def __init__(self, batch_size: int = 1024) -> None:
        self.batch_size = Whole(1).check("batch_size", batch_size)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recompute, once the run was validated as it was trained."""
        pl_module.settle()
        pl_module.validate_at_the_end()
        loader = trainer.datamodule.evaluation_loader("train", batch_size=self.batch_size)
        exact_batch_norm_(pl_module.model, lambda: (pl_module.to_model(x) for x, _ in loader))
