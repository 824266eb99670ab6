"""Why a run ended."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Stop", "StopReason"]


class StopReason(str, Enum):
    """The reasons for which a run ends.

    Example:
        >>> StopReason.BUDGET.value
        'BUDGET'
    """

    BUDGET = "BUDGET"
    """All planned updates were made."""
    CONVERGED = "CONVERGED"
    """The gradient is as small as was asked."""
    STALLED = "STALLED"
    """The monitored metric stopped improving."""
    NON_FINITE = "NON_FINITE"
    """The loss became infinite or not a number."""
    INTERRUPTED = "INTERRUPTED"
    """The user stopped it."""


@dataclass(frozen=True)
class Stop:
    """A reason, with its numbers and the next thing to try.

    Args:
        reason: Which.
        message: One sentence or two for the user.

    Example:
        >>> Stop(StopReason.BUDGET, "All 100 updates were made.").reason.value
        'BUDGET'
    """

    reason: StopReason
    message: str
