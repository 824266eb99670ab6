"""Why a run ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
    """The gradient, or the duality gap, is as small as was asked."""
    NOISE_FLOOR = "NOISE_FLOOR"
    """Stationary at this step size: a smaller one would go on. Not the optimum."""
    STALLED = "STALLED"
    """The monitored metric stopped improving."""
    DIVERGED = "DIVERGED"
    """The loss is finite and the run is lost: it grew, or the units died or saturated."""
    NON_FINITE = "NON_FINITE"
    """A loss, a gradient, a parameter or an example became infinite or not a number."""
    INTERRUPTED = "INTERRUPTED"
    """The user stopped it."""


@dataclass(frozen=True)
class Stop:
    """A reason, with its numbers and the next thing to try.

    Args:
        reason: Which.
        message: One sentence or two for the user.
        numbers: What the reason rests on, by name: plain floats, integers, strings, and lists of
            them, so that they can be written as JSON.
        advice: The next thing to try, one sentence; "": there is nothing to try.

    Example:
        >>> stop = Stop(StopReason.CONVERGED, "The gradient is small.", {"gradient_norm": 1e-7},
        ...     "Nothing is left to gain.")
        >>> print(stop)
        CONVERGED: The gradient is small. Nothing is left to gain.
        >>> print(Stop(StopReason.BUDGET, "All 100 updates were made."))
        BUDGET: All 100 updates were made.
    """

    reason: StopReason
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)
    advice: str = ""

    def __str__(self) -> str:
        """Reason, message and advice, in one line."""
        return f"{self.reason.value}: {' '.join(filter(None, (self.message, self.advice)))}"

    def state_dict(self) -> dict[str, Any]:
        """Plain containers, for a checkpoint."""
        return {**vars(self), "reason": self.reason.value, "numbers": dict(self.numbers)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Stop:
        """The inverse of `state_dict`."""
        return cls(**{**state, "reason": StopReason(state["reason"])})
