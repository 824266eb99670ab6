"""Whether successive gradients point the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from gdtrain.analysis.gradients import cosine
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument

__all__ = ["GradientCosine"]


class GradientCosine(Instrument):
    """Logs the cosine between the gradients of an update and of the next, at θ and at θ + s.

    On the full batch, 1 is a straight way and −1 is a jump from wall to wall of a valley. Where an
    update sees few examples, values near 0 say that noise outweighs the gradient.

    Tag: `gradient/cosine`. Where one of the gradients is 0, and at the last update, there is none.

    Args:
        every: As for `Instrument`.
        looks: Likewise.
        share: Likewise.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradientCosine(every=50)], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    needs_next: ClassVar[bool] = True
    meaning: ClassVar[Mapping[str, str]] = {
        "gradient/cosine": "Cosine between the gradients of an update and of the next: 1, a "
        "straight way; −1, from wall to wall of a valley; near 0, noise.",
    }

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The cosine."""
        following = update.next_gradient
        found = None if following is None else cosine(update.gradient, following)
        return {} if found is None else {"gradient/cosine": found}
