"""How far a run has come from where it started."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from lightning import LightningModule, Trainer
from torch import Tensor

from gdtrain.analysis.gradients import dot
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument
from gdtrain.lightning.module import SupervisedModule

__all__ = ["Distance"]

_SAVED = 2**22  # numbers that a checkpoint may keep of the start


class Distance(Instrument):
    """Logs ‖θ − θ₀‖, θ₀ the parameters before the first update.

    Tags: `distance/from_start`, and `distance/relative`, the same divided by ‖θ₀‖. Checkpoints keep
    θ₀ of models with up to about four million parameters; of a larger one, a resumed run logs no
    distance.

    Args:
        every: As for `Instrument`.
        looks: Likewise.
        share: Likewise.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Distance(every=50)], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "distance/from_start": "‖θ − θ₀‖, θ₀ the parameters before the first update.",
        "distance/relative": "‖θ − θ₀‖/‖θ₀‖.",
    }

    def forget(self) -> None:
        """Be as before the first update."""
        super().forget()
        self._start: list[Tensor] | None = None

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the start; look, if it is time."""
        if trainer.global_step == 0 and self._start is None and self.is_looking:
            model = cast(SupervisedModule, pl_module).model
            self._start = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The distance."""
        start = self._start
        if start is None:
            return {}
        way = [p - old.to(p) for p, old in zip(update.params, start, strict=True)]
        distance, length = math.sqrt(dot(way, way)), math.sqrt(dot(start, start))
        relative = {"distance/relative": distance / length} if length > 0 else {}
        return {"distance/from_start": distance, **relative}

    def state_dict(self) -> dict[str, Any]:
        """Plain containers only."""
        small = self._start is not None and sum(t.numel() for t in self._start) <= _SAVED
        return {"start": self._start if small else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._start = state_dict["start"]
