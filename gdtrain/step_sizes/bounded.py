"""Rules that an engine can apply by itself: η from f and ‖d‖² alone, for a stretch of updates."""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from gdtrain.step_sizes.base import StepSize

__all__ = ["Bound", "BoundedStep", "last_share"]


class Bound(NamedTuple):
    """What an engine needs to know of a rule for a stretch of updates, in units of η₀.

        share = min(most, inverse · (f − least) / (‖d‖² η₀), reach / (√Σ‖d‖² η₀))

    and, where growth > 0, most = growth · share after an update whose share is above 0. Where d is
    0, the share is `most` if that alone is finite, else 0. All are floats, as compiled loops want.
    """

    inverse: float = 0.0  # 1/c; 0: there is no bound
    least: float = 0.0  # f*
    growth: float = 0.0  # of the share from update to update, at most; 0: `most` is fixed
    most: float = 1.0  # the largest share at the first update
    reach: float = inf  # over the root of all squared norms; inf: does not bound
    total: float = 0.0  # Σ‖d‖² of the updates before these


class BoundedStep(StepSize):
    """A rule whose η is a share of η₀, bounded as `Bound` says, so that every engine has it."""

    @property
    def by_engines(self) -> bool:
        """Whether with these options it is such a rule."""
        return True

    def bound(self, optimizer: torch.optim.Optimizer) -> Bound:
        """For the updates to come, as many as `stretch` says."""
        raise NotImplementedError

    def stretch(self, optimizer: torch.optim.Optimizer, updates: int) -> int:
        """How many of so many updates the bound is good for."""
        return updates

    def remember(
        self, optimizer: torch.optim.Optimizer, losses: Tensor, shares: Tensor, total: float
    ) -> None:
        """An engine has made updates: J before each (K,), its share of η₀ (K,), and Σ‖d‖²."""
        raise NotImplementedError


def last_share(shares: Tensor, before: float = 0.0) -> float:
    """The last share of η₀ above 0, from which a bound grows; else that of before."""
    positive = shares[shares > 0]
    return float(positive[-1]) if len(positive) else before
