"""What callbacks and others ask of a run: where it stands, what is planned, who makes its updates;
and what its checkpoints hold beside parameters and optimizer.

B examples per update, K updates in one sweep, T planned updates, U updates per epoch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from gdtrain.data.loader import IndexLoader, PairLoader
from gdtrain.descent.loop import Loop
from gdtrain.descent.plan import Plan
from gdtrain.descent.race import Race
from gdtrain.descent.recovery import Guard
from gdtrain.descent.state import State
from gdtrain.descent.stopping import Stop
from gdtrain.lightning.description import describe, describe_data
from gdtrain.lightning.evaluation import EvaluatedModule
from gdtrain.lightning.resuming import check_resumes, settings
from gdtrain.losses import Loss
from gdtrain.objective import Objective
from gdtrain.schedules import Schedule

__all__ = ["RunView"]


def _of_state(name: str, doc: str) -> Any:
    """An attribute that the descent's state holds."""
    return property(
        lambda self: getattr(self.state, name),
        lambda self, value: setattr(self.state, name, value),
        doc=doc,
    )


class RunView(EvaluatedModule):
    """A module whose descent can be asked, before, while and after it trains."""

    updates: int = _of_state("updates", "Made so far.")
    examples_seen: int = _of_state("examples_seen", "In these updates.")
    rate_cut: float = _of_state("rate_cut", "A factor on η, by recoveries from divergence.")
    race: Race | None = _of_state("race", "What found η; None: no race was held.")
    schedule: Schedule = _of_state("schedule", "The factor on η.")
    stop: Stop | None = _of_state("stop", "Why the run ends early; None: it does not.")
    total_updates: int | None = _of_state("total_updates", "T; None: no end is planned.")
    updates_per_epoch: int = _of_state("updates_per_epoch", "U.")

    checks_data = True
    """Whether a resumed run's data are compared here, with all else."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        state: State,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(model, loss, metrics)
        self.state = state
        self.guard: Guard | None = None  # of the loop that comes next
        self.certificate: dict[str, Any] | None = None
        self.description: dict[str, Any] | None = None
        self.noted_settings: dict[str, str] = {}
        self.from_file = False  # its model was built as a file says, which may be anybody's
        self._loop: Loop | None = None

    @property
    def loop(self) -> Loop:
        """The descent, once training has begun."""
        assert self._loop is not None, "training has not begun"
        return self._loop

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self.optimizers(use_pl_optimizer=False)
        if not isinstance(optimizer, Optimizer):
            raise ValueError("SupervisedModule trains with one optimizer.")
        return optimizer

    @property
    def plan(self) -> Plan | None:
        """Which examples make which update, where a gdtrain data module knows."""
        loader = self.trainer.train_dataloader
        if isinstance(loader, PairLoader):
            return loader.plan
        return loader if isinstance(loader, IndexLoader) else None

    @property
    def objective(self) -> Objective | None:
        """J over the training examples, once training on a gdtrain data module has begun."""
        return None if self._loop is None else self._loop.objective

    @property
    def micro_batch_size(self) -> int | None:
        """M, once training has begun; None: a whole batch, or a rank's part of it."""
        return None if self.objective is None else self.objective.micro_batch_size

    @property
    def micro_batch_size_is_automatic(self) -> bool:
        """Whether M was chosen here, by `Objective.automatic_size`."""
        return self.objective is not None and self.objective.automatic

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that makes the updates, once training has begun."""
        return self.state.engine_before or self.state.engine

    @property
    def engine_reason(self) -> str:
        """Why that engine makes them."""
        return "" if self._loop is None else self._loop.engine.reason

    @property
    def validation_is_planned(self) -> bool:
        """Whether the validation at hand belongs to the run: Lightning validates once more where it
        is stopped between two planned ones, which a resumed run does not have.
        """
        planned = self.total_updates, self.next_validation(self.updates - 1)
        return self.plan is None or self.updates in planned

    def next_validation(self, update: int) -> int | None:
        """The smallest update number above one at which the run validates; None: it never does."""
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self.plan is None or not trainer.enable_validation or not data.count("val"):
            return None
        every = (trainer.check_val_every_n_epoch or 1) * self.updates_per_epoch
        return (update // every + 1) * every

    def rate_factors(self, first: int, count: int) -> Tensor:
        """(K,), float64: the schedule's factors from update `first` on, times `rate_cut`."""
        return (self._loop or self.state).rate_factors(first, count)

    @contextmanager
    def in_a_step(self) -> Iterator[None]:
        """As within `training_step`: with gradients, in the trainer's precision."""
        with torch.enable_grad(), self.trainer.strategy.precision_plugin.train_step_context():
            yield

    def settle(self) -> None:
        """Let the guard read what it has not read: the run ends here. Again, it changes nothing.

        For callbacks that look at the model in `on_train_end`, in which it may be set back.
        """
        with self.in_a_step():
            self.loop.settle()

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the parameters are the average that the step-size rule keeps, if it does."""
        return nullcontext() if self._loop is None else self._loop.average.shown()

    # ------------------------------------------------------------------ checkpoints

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

        `make` is the function that has made the model, `sizes` what it was called with.
        """
        model, loss = self.model, self.loss
        return {
            "model": describe(model, make, sizes) or {"own": type(model).__qualname__},
            "loss": describe(loss) or {"own": type(loss).__qualname__},
            "data": describe_data(data),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the next update depends on beside parameters and optimizer."""
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
        """Go on from what `on_save_checkpoint` added."""
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
        return {**super().__getstate__(), "_loop": None, "guard": None}
