"""What a checkpoint holds beside parameters and optimizer, and how a run goes on from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric

from gdtrain.descent.state import State
from gdtrain.lightning.description import describe_run
from gdtrain.lightning.resuming import check_resumes, settings
from gdtrain.lightning.view import RunView
from gdtrain.losses import Loss

__all__ = ["ResumableModule"]


class ResumableModule(RunView):
    """A module whose checkpoints hold all that the next update depends on, and what the run is.

    Args:
        model: (B, …) to (B, C).
        loss: Per example.
        state: Where the run stands.
        metrics: By name; None: those of the task.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> module = ResumableModule(nn.Linear(1, 1), SquaredError(), State(updates=7))
        >>> module.noted_settings, checkpoint = {"loss": "SquaredError"}, {}
        >>> module.on_save_checkpoint(checkpoint)
        >>> again = ResumableModule(nn.Linear(1, 1), SquaredError(), State())
        >>> again.on_load_checkpoint(checkpoint)
        >>> again.updates
        7
    """

    checks_data = True
    """Whether a resumed run's data are compared here, with all else."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        state: State,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(model, loss, state, metrics)
        self.description: dict[str, Any] | None = None
        self.noted_settings: dict[str, str] = {}
        self.from_file = False  # its model was built as a file says, which may be anybody's

    def note_settings(self) -> None:
        """What the run is, before anything of it changes: for its checkpoints."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        self.noted_settings = settings(self, self.trainer, data)
        if self.description is None:
            self.description = self.describe(data)

    def describe(
        self, data: Any = None, make: Any = None, sizes: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """How model, loss and data are built again; what cannot be is named under "own".

        Args:
            data: The data module, if there is one of gdtrain.
            make: The function that has made the model.
            sizes: What that was called with.

        Returns:
            Plain containers.
        """
        return describe_run(self.model, self.loss, data, make, sizes)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next update depends on beside parameters and optimizer.

        Args:
            checkpoint: Lightning's; changed in place.
        """
        if not self.noted_settings:
            self.note_settings()
        checkpoint["gdtrain"] = {
            **self.state.state_dict(),
            "settings": self.noted_settings,
            "planned": self.total_updates,
            "stop": None if self.stop is None else self.stop.state_dict(),
            "updates_per_epoch": self.updates_per_epoch,
            "description": self.description,
            "average": self._average(),
        }

    def _average(self) -> dict[str, Tensor] | None:
        """The averaged parameters, which are what a model from the checkpoint answers with."""
        if self._loop is None or not self._loop.average.is_hidden:
            return None
        with self.averaged():
            return {name: p.detach().clone() for name, p in self.named_parameters()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from what `on_save_checkpoint` added.

        Args:
            checkpoint: Lightning's.
        """
        state = checkpoint.get("gdtrain")
        if state is None:
            return
        trainer = self._trainer
        if trainer is not None and trainer.state.fn == "fit":
            path = trainer.ckpt_path or "the checkpoint"
            check_resumes(checkpoint, self, trainer, trainer.datamodule, path)  # type: ignore[attr-defined]
        self.state.load_state_dict(state)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the trainer, and the loop that it had."""
        return {**super().__getstate__(), "_loop": None}
