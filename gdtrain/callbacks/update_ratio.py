"""How far an update moves the parameters, beside how long they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from gdtrain.analysis.gradients import norms
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument

__all__ = ["UpdateRatio"]


class UpdateRatio(Instrument):
    """Logs ‖s‖/‖θ‖, s the step that the update makes: with momentum, schedule and all.

    Tags: `step/norm`, ‖s‖; `step/ratio`, and `step/ratio/<layer>` for the parameters of each module
    that has some of its own. A layer whose parameters are all 0 has no ratio.

    Args:
        every: As for `Instrument`.
        looks: Likewise.
        share: Likewise.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[UpdateRatio(every=50)], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "step/norm": "‖s‖, the length of the step that an update makes.",
        "step/ratio": "‖s‖/‖θ‖: how far an update moves the parameters, beside how long they are; "
        "of all, or of the layer that is named.",
    }

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The ratios."""
        step, steps = norms(update.step, update.layers)
        length, lengths = norms(update.params, update.layers)
        found = {"step/norm": step}
        if length > 0:
            found["step/ratio"] = step / length
        for name, own in lengths.items():
            if own > 0:
                found[f"step/ratio/{name}"] = steps[name] / own
        return found
