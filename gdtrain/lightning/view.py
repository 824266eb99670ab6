"""What callbacks and others ask of a run: where it stands, what is planned, who makes its updates.

B examples per update, K updates in one sweep, T planned updates, U updates per epoch.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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
from gdtrain.lightning.evaluation import EvaluatedModule
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
    """A module whose descent can be asked, before, while and after it trains.

    Args:
        model: (B, …) to (B, C).
        loss: Per example.
        state: Where the run stands.
        metrics: By name; None: those of the task.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> view = RunView(nn.Linear(1, 1), SquaredError(), State(total_updates=10))
        >>> view.updates, view.total_updates, view.engine_in_use, view.rate_factors(0, 2).tolist()
        (0, 10, 'eager', [1.0, 1.0])
    """

    updates: int = _of_state("updates", "Made so far.")
    examples_seen: int = _of_state("examples_seen", "In these updates.")
    rate_cut: float = _of_state("rate_cut", "A factor on η, by recoveries from divergence.")
    race: Race | None = _of_state("race", "What found η; None: no race was held.")
    schedule: Schedule = _of_state("schedule", "The factor on η.")
    total_updates: int | None = _of_state("total_updates", "T; None: no end is planned.")
    updates_per_epoch: int = _of_state("updates_per_epoch", "U.")

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        state: State,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__(model, loss, metrics)
        self.state = state
        self.stop: Stop | None = None
        self.guard: Guard | None = None  # sees each sweep before anybody else, in any callback
        self.certificate: dict[str, Any] | None = None
        self._loop: Loop | None = None
        self._constant: frozenset[str] = frozenset()  # buffers that were not finite at the start

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
    def validation_is_planned(self) -> bool:
        """Whether the validation at hand belongs to the run, or only to its interruption.

        Lightning validates once more where a run is stopped between two planned validations. What
        depends on validations (a plateau schedule, the history, the best checkpoint) leaves that
        one out, so that the resumed run is the same run.
        """
        if self.plan is None:
            return True
        epoch, position = divmod(self.updates, self.updates_per_epoch)
        every = self.trainer.check_val_every_n_epoch or 1
        return self.updates == self.total_updates or (position == 0 and epoch % every == 0)

    def note_constants(self) -> None:
        """Leave the buffers that are not finite now out of what is watched."""
        self._constant = frozenset(
            name for name, b in self.model.named_buffers() if not torch.isfinite(b).all()
        )

    def watched(self) -> dict[str, Tensor]:
        """What stays finite in a sound run, by name: trainable parameters, and buffers.

        A buffer that was not finite when training began, such as a causal mask of −∞, is left out.
        """
        return {
            **{name: p for name, p in self.model.named_parameters() if p.requires_grad},
            **{n: b for n, b in self.model.named_buffers() if n not in self._constant},
        }

    @property
    def micro_batch_size(self) -> int | None:
        """M, once training has begun; None: a whole batch, or a rank's part of it."""
        return None if self.objective is None else self.objective.micro_batch_size

    @property
    def objective(self) -> Objective | None:
        """J over the training examples, once training on a gdtrain data module has begun."""
        return None if self._loop is None else self._loop.objective

    @property
    def micro_batch_size_is_automatic(self) -> bool:
        """Whether M was chosen here, by `Objective.automatic_size`."""
        return self.objective is not None and self.objective.automatic

    def next_update(self, update: int) -> int | None:
        """The smallest update number above one at which a callback must see the run.

        A sweep ends there. A callback that acts on batches, and knows that a batch may be a sweep
        of several updates, declares at which updates it must see the state, by a method
        `next_update(update)` of the same meaning (None: wherever sweeps end will do). It must be a
        function of the update number alone, and of what is fixed before training or carried in its
        state in checkpoints: a block is fetched before the one before it is trained on. For other
        callbacks that act on batches, a batch is one update.

        Args:
            update: Number of updates made, range [0, ∞).

        Returns:
            None: there is no such update.

        Raises:
            ValueError: A callback names an update that is not above the one asked about.
        """
        return None if self._loop is None or self.plan is None else self.plan.next_update(update)

    def next_validation(self, update: int) -> int | None:
        """The smallest update number above one at which the run validates; None: it never does.

        Args:
            update: Number of updates made, range [0, ∞).
        """
        trainer: Any = self.trainer
        data = trainer.datamodule
        if self.plan is None or not trainer.enable_validation or not data.count("val"):
            return None
        every = (trainer.check_val_every_n_epoch or 1) * self.updates_per_epoch
        return (update // every + 1) * every

    def rate_factors(self, first: int, count: int) -> Tensor:
        """The schedule's factors for updates first … first + count − 1, times `rate_cut`.

        Args:
            first: Update number, from 0.
            count: K.

        Returns:
            (K,), float64.
        """
        return (self._loop or self.state).rate_factors(first, count)

    def settle(self) -> None:
        """Let the guard read what it has not read: the run ends here. Again, it changes nothing.

        For callbacks that look at the model in `on_train_end`, in which it may be set back.
        """
        if self.guard is not None:
            self.guard.end()

    @property
    def rates(self) -> Tensor:
        """(K,), float64: η of the first group at each of the updates that were made last."""
        return self.loop.engine.rates

    def follow_callbacks(self) -> None:
        """Go on with what a callback has changed, see `Loop.follow_changes`."""
        self.loop.follow_changes()

    def draw_of(self, update: int) -> int:
        """Names the random numbers of an update, for `Objective`.

        Args:
            update: From 0.
        """
        return self.loop.draw_of(update)

    @property
    def engine_in_use(self) -> str:
        """Name of the engine that makes the updates, once training has begun."""
        return self.state.engine_before or self.state.engine

    @property
    def engine_reason(self) -> str:
        """Why that engine makes them."""
        return "" if self._loop is None else self._loop.engine.reason

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the parameters are the average that the step-size rule keeps, if it does."""
        return nullcontext() if self._loop is None else self._loop.average.shown()
