"""How long the gradient is, in all and layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from gdtrain.analysis.gradients import norms
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument

__all__ = ["GradientNorms"]


class GradientNorms(Instrument):
    """Logs ‖g‖ of the update's gradient, g = ∇J on its B examples, without weight decay.

    Tags: `gradient/norm`, and `gradient/norm/<layer>` for the parameters of each module that has
    some of its own.

    Args:
        every: As for `Instrument`.
        looks: Likewise.
        share: Likewise.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[GradientNorms(every=50)], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "gradient/norm": "‖g‖ of an update's gradient, before it is made: of all parameters, or of "
        "the layer that is named.",
    }

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The norms."""
        whole, by_layer = norms(update.gradient, update.layers)
        parts = {f"gradient/norm/{name}": norm for name, norm in by_layer.items()}
        return {"gradient/norm": whole, **parts}
