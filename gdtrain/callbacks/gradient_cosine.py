"""Whether successive gradients point the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from gdtrain.callbacks.instrument import Instrument, Look
from gdtrain.instruments import cosine

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
        >>> from functools import partial
        >>> from lightning import Trainer
        >>> from gdtrain import SGD, SupervisedModule
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import Linear
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(SGD, lr=0.1))
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     callbacks=[GradientCosine(every=50)])
        >>> trainer.fit(module, datamodule=EmbeddedDataModule("iris", batch_size=1))
    """

    needs_next: ClassVar[bool] = True
    meaning: ClassVar[Mapping[str, str]] = {
        "gradient/cosine": "Cosine between the gradients of an update and of the next: 1, a "
        "straight way; −1, from wall to wall of a valley; near 0, noise.",
    }

    def see(self, look: Look) -> dict[str, float]:
        """The cosine."""
        following = look.next_gradient
        found = None if following is None else cosine(look.gradient, following)
        return {} if found is None else {"gradient/cosine": found}
