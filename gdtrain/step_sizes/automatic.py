"""The rule that lr="auto" stands for."""

from __future__ import annotations

from gdtrain.step_sizes.barzilai_borwein import BarzilaiBorwein
from gdtrain.step_sizes.base import StepSize
from gdtrain.step_sizes.distance import DoWG

__all__ = ["automatic"]


def automatic(full_batch: bool) -> StepSize:
    """The rule that lr="auto" stands for.

    `BarzilaiBorwein(memory=30)`; where updates average fewer than all examples,
    `DoWG(cap=2.0, decay="linear")`, which asks the optimizer for total_updates.

    Example:
        >>> automatic(full_batch=True)
        BarzilaiBorwein(short=False, initial=1.0, memory=30, ...)
    """
    return BarzilaiBorwein(memory=30) if full_batch else DoWG(cap=2.0, decay="linear")
