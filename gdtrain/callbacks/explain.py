"""One update of a run, written out in full."""

from __future__ import annotations

from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from gdtrain.analysis.explanation import check_explainable, explain_made
from gdtrain.analysis.explanation_text import Explanation
from gdtrain.lightning.module import SupervisedModule
from gdtrain.ranges import Whole

__all__ = ["ExplainUpdate"]


class ExplainUpdate(Callback):
    """Writes one update of a run out in full, and ends the run after it.

    The update is made on trial, taken back, worked out by hand, and compared; the run then makes it
    as it would have without. State in checkpoints: none.

    Args:
        update: Which, counted from 0, range [0, T).

    Raises:
        ValueError: The argument is out of range; later, there is no such update, or it cannot be
            explained.

    Example:
        >>> from functools import partial
        >>> from gdtrain import SGD
        >>> from gdtrain.data import EmbeddedDataModule
        >>> from gdtrain.losses import CrossEntropy
        >>> from gdtrain.models import Linear
        >>> explained = ExplainUpdate(7)
        >>> module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(SGD, lr=0.1))
        >>> trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        ...     callbacks=[explained])
        >>> trainer.fit(module, datamodule=EmbeddedDataModule("iris", batch_size=1))
        >>> found = explained.found
        >>> found.rate, found.losses.item() > found.losses_after.item(), found.gap < 1e-6
        (0.1, True, True)
    """

    needs_every_epoch = False

    def __init__(self, update: int = 0) -> None:
        self.update = Whole(0).check("update", update)
        self.found: Explanation | None = None

    def next_update(self, update: int) -> int | None:
        """The update itself comes alone.

        Args:
            update: Number of updates made.
        """
        return next((n for n in (self.update, self.update + 1) if n > update), None)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be explained, before anything is trained."""
        module = cast(SupervisedModule, pl_module)
        check_explainable(module.model, module.loss, trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Explain the update, if it is the one."""
        module = cast(SupervisedModule, pl_module)
        total = module.total_updates
        if total is not None and self.update >= total:
            raise ValueError(
                f"update must be one of the run's {total}, counted from 0: range [0, {total - 1}]. "
                f"Received: update={self.update}."
            )
        if module.updates != self.update:
            return
        loop = module.loop
        objective, indices = module.named(batch)

        def make() -> float:
            loop.make_updates(objective, indices, self.update)
            return float(loop.engine.rates[0])

        draw = loop.draw_of(self.update)
        self.found = explain_made(objective, loop.optimizer, indices[0], make, draw=draw)
        trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say if there was no such update."""
        if self.found is None:
            raise ValueError(f"The run ended before update {self.update}.")
