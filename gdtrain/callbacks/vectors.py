"""The instruments of an update's vectors: its gradient g, its step s, and the parameters θ.

Their arguments are those of `Instrument`; `meaning` says what each tag shows. A layer is a module
that has parameters of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning import Trainer
from torch import Tensor

from gdtrain.analysis.gradients import cosine, dot, norms
from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument

__all__ = ["Distance", "GradientCosine", "GradientNorms", "Histograms", "UpdateRatio"]

_SAVED = 2**22  # numbers that a checkpoint may keep of the start


class GradientNorms(Instrument):
    """Logs ‖g‖ of the update's gradient, g = ∇J on its B examples, without weight decay.

    Tags: `gradient/norm`, and `gradient/norm/<layer>`.

    Example:
        >>> callback = GradientNorms(every=50)
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


class GradientCosine(Instrument):
    """Logs the cosine between the gradients of an update and of the next, at θ and at θ + s.

    Tag: `gradient/cosine`. Where one of the gradients is 0, and at the last update, there is none.

    Example:
        >>> callback = GradientCosine(every=50)
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


class UpdateRatio(Instrument):
    """Logs ‖s‖/‖θ‖, s the step that the update makes: with momentum, schedule and all.

    Tags: `step/norm`, `step/ratio`, and `step/ratio/<layer>` where not all its parameters are 0.

    Example:
        >>> callback = UpdateRatio(every=50)
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


class Distance(Instrument):
    """Logs ‖θ − θ₀‖, θ₀ the parameters before the first update.

    Tags: `distance/from_start`, and `distance/relative`. Checkpoints keep θ₀ of models with up to
    about four million parameters; of a larger one, a resumed run logs no distance.

    Example:
        >>> callback = Distance(every=50)
    """

    meaning: ClassVar[Mapping[str, str]] = {
        "distance/from_start": "‖θ − θ₀‖, θ₀ the parameters before the first update.",
        "distance/relative": "‖θ − θ₀‖/‖θ₀‖.",
    }

    def forget(self) -> None:
        """Be as before the first update."""
        self._start: list[Tensor] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        """Keep the start; look, if it is time."""
        if trainer.global_step == 0 and self._start is None and self.is_looking:
            parameters = pl_module.model.parameters()
            self._start = [p.detach().clone() for p in parameters if p.requires_grad]
        super().on_train_batch_start(trainer, pl_module)

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


class Histograms(Instrument):
    """Draws the parameters and the gradient of each layer as histograms in TensorBoard.

    Tags: `weights/<layer>`, `gradients/<layer>`. It is in no preset, for its events take space:
    `+instruments.histograms._target_=gdtrain.callbacks.Histograms`. Without a TensorBoard logger it
    draws nothing.

    Example:
        >>> callback = Histograms(every=50)
    """

    def __init__(self, every: int | None = None, looks: int = 20, share: float = 0.01) -> None:
        super().__init__(every, looks, share)

    def measure(self, update: TrialUpdate) -> dict[str, float]:
        """The histograms."""
        for name, places in update.layers.items():
            weights = [update.params[i] for i in places]
            gradients = [g for i in places if (g := update.gradient[i]) is not None]
            for tag, parts in (("weights", weights), ("gradients", gradients)):
                if parts:
                    numbers = torch.cat([p.flatten() for p in parts]).float().cpu()
                    self.draw(update, f"{tag}/{name}", numbers)
        return {}
