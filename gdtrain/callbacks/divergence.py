"""Ends a run whose loss is no longer a number."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer

from gdtrain.module import SupervisedModule
from gdtrain.stopping import Stop, StopReason

__all__ = ["Divergence"]


class Divergence(Callback):
    """Stops training at the sweep in which the loss became infinite or not a number.

    The message names the update. No state.

    Example:
        >>> from lightning import Trainer
        >>> trainer = Trainer(callbacks=[Divergence()], logger=False, accelerator="cpu",
        ...     enable_checkpointing=False)
    """

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the losses of the sweep."""
        losses = outputs["losses"]
        bad = ~torch.isfinite(losses)
        if not bad.any():
            return
        module = cast(SupervisedModule, pl_module)
        k = int(bad.nonzero()[0])
        update = outputs["first"] + k
        groups = trainer.optimizers[0].param_groups
        rate = float(module.rate_factors(update, 1)) * float(groups[0]["initial_lr"])
        module.stop = Stop(
            StopReason.NON_FINITE,
            f"The loss was {losses[k].item()} at update {update} (counted from 0) with "
            f"lr={rate:.4g}: the steps are too long. Set optimizer.lr to a tenth of it.",
        )
        trainer.should_stop = True
