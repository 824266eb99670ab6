"""Weights and gradients of each layer, as TensorBoard draws them."""

from __future__ import annotations

import torch

from gdtrain.analysis.trial_update import TrialUpdate
from gdtrain.callbacks.instrument import Instrument

__all__ = ["Histograms"]


class Histograms(Instrument):
    """Draws the parameters and the gradient of each layer as histograms in TensorBoard.

    Tags: `weights/<layer>`, `gradients/<layer>`. It is in no preset, for its events take space:
    `+instruments.histograms._target_=gdtrain.callbacks.Histograms`. Without a TensorBoard logger it
    draws nothing.

    Args:
        every: As for `Instrument`.
        looks: Likewise.
        share: Likewise.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Histograms(every=50)], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
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
