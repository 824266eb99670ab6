"""One update of a run, written out in full."""

from __future__ import annotations

from typing import Any

from lightning import Callback, Trainer

from gdtrain.analysis.explanation import Explanation, check_explainable, explain_made
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
        >>> callback = ExplainUpdate(7)  # of a Trainer; after its fit, print(callback.found)
    """

    needs_every_epoch = False

    def __init__(self, update: int = 0) -> None:
        self.update = Whole(0).check("update", update)
        self.found: Explanation | None = None

    def next_update(self, update: int) -> int | None:
        """The update itself comes alone."""
        return next((n for n in (self.update, self.update + 1) if n > update), None)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Refuse what cannot be explained, before anything is trained."""
        check_explainable(pl_module.model, pl_module.loss, trainer.optimizers[0])

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Explain the update, if it is the one."""
        module: SupervisedModule = pl_module
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

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Say if there was no such update."""
        if self.found is None:
            raise ValueError(f"The run ended before update {self.update}.")
