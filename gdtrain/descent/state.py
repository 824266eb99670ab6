"""Where a run stands: all that its next update depends on beside the model and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdtrain.descent.stopping import Stop
from gdtrain.generators import RandomStates
from gdtrain.schedules import Constant, ReduceOnPlateau, Schedule

__all__ = ["State"]

_ENDLESS = 2**62  # updates of a run without a planned end


@dataclass
class State:
    """Where a run stands, and what is planned. Only the loop counts here; a checkpoint holds it."""

    schedule: Schedule = field(default_factory=Constant)  # a plateau schedule has its own state
    total_updates: int | None = None  # T; None: no end is planned
    updates_per_epoch: int = 1
    updates: int = 0  # made so far
    examples_seen: int = 0  # in these updates
    rate_cut: float = 1.0  # a factor on η beside the schedule's, by recoveries from divergence
    micro_batch_size: int | None = None  # M; None: a whole batch, or not known yet
    engine: str = "eager"  # that made the last updates
    engine_before: str | None = None  # of the run that is resumed, until an engine is chosen
    random: RandomStates | None = None  # of the run that is resumed, until it goes on
    stop: Stop | None = None  # why the run ends before T; not part of its state in a checkpoint

    def rate_factors(self, first: int, count: int) -> Tensor:
        """(K,), float64: the schedule's factors for K updates from `first` on, times `rate_cut`."""
        total = _ENDLESS if self.total_updates is None else max(self.total_updates, 1)
        updates = torch.from_numpy(np.arange(first, first + count, dtype=np.float64))
        made = self.schedule(updates, total, self.updates_per_epoch)
        return made if self.rate_cut == 1.0 else made * self.rate_cut

    def check_end(self) -> None:
        """Raise where no end is planned, and η depends on one."""
        if self.total_updates is not None:
            return
        updates = (2.0 ** torch.arange(-1, 40, dtype=torch.float64)).floor()
        size = self.updates_per_epoch
        if not torch.equal(*(self.schedule(updates, total, size) for total in (2**20, 2**30))):
            raise ValueError(
                f"{self.schedule!r} is a function of the planned updates. Received: max_epochs=-1 "
                f"and max_steps=-1, which plan no end. Set one of them, or take schedule=constant."
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint; with all generators as they are now."""
        plateau = isinstance(self.schedule, ReduceOnPlateau)
        return {
            "updates": self.updates,
            "examples_seen": self.examples_seen,
            "rate_cut": self.rate_cut,
            "random_state": RandomStates.now().state_dict(),
            "micro_batch_size": self.micro_batch_size,
            "engine": self.engine_before or self.engine,
            "schedule": self.schedule.state_dict() if plateau else None,  # type: ignore[attr-defined]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned; further keys do not matter."""
        self.updates, self.examples_seen = state["updates"], state["examples_seen"]
        self.rate_cut = state.get("rate_cut", 1.0)
        self.random = RandomStates.from_state_dict(state["random_state"])
        self.micro_batch_size = state["micro_batch_size"]
        self.engine = self.engine_before = state["engine"]
        if isinstance(self.schedule, ReduceOnPlateau) and state["schedule"] is not None:
            self.schedule.load_state_dict(state["schedule"])
