"""The engine of a run: the one that was asked for, or the fastest that applies, or eager after all.

B examples per update, K updates in one sweep.
"""

from __future__ import annotations

import logging
import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.descent.state import State
from gdtrain.engines import ENGINES, Eager, Engine, EngineName, NotApplicableError, choose
from gdtrain.objective import Objective

__all__ = ["EngineChoice", "check_engine"]

_log = logging.getLogger("gdtrain")


def check_engine(name: str) -> None:
    """Raise where there is no such engine, and it is not "auto"."""
    if name not in ("auto", *ENGINES):
        raise ValueError(f"engine must be one of auto, {', '.join(ENGINES)}. Received: {name!r}.")


class EngineChoice:
    """Makes updates with an engine that is chosen at the first of them, and named in the state.

    Without an objective of the run, each sweep has its own, and eager makes its updates.
    """

    def __init__(
        self, objective: Objective | None, optimizer: Optimizer, wanted: EngineName, state: State
    ) -> None:
        check_engine(wanted)
        self.objective, self.optimizer = objective, optimizer
        self.wanted, self.state = wanted, state
        self.reason = ""
        self.rates = torch.zeros(0, dtype=torch.float64)
        """(K,): η of the first group at each of the updates that were made last."""
        self._engine: Engine | None = None
        if state.engine_before is None:
            state.engine = "eager"  # until one is chosen

    @property
    def evaluations(self) -> int:
        """How often a rule has looked at J or its gradient elsewhere, by the engine in use."""
        return 0 if self._engine is None else self._engine.evaluations

    def choose_again(self) -> None:
        """Before the next update, for parameters or groups have changed."""
        self._engine, self.state.engine = None, "eager"

    def run(self, objective: Objective, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        """Make K updates, on indices (K, B) with the schedule's factors (K,), float64.

        `draw` names the random numbers of the first. Returned is (K,), J on each update's examples
        before it.
        """
        if objective is not self.objective:  # of one batch
            return self._run_on(Eager(objective, self.optimizer), indices, factors, draw)
        if self._engine is None:
            self._engine = self._choose(objective)
        try:
            return self._run_on(self._engine, indices, factors, draw)
        except NotApplicableError as error:  # found out only by trying, as a compiler does
            if self.wanted != "auto":
                raise ValueError(
                    f"engine={self.wanted} does not apply: {error}. Use engine=auto, which "
                    f"takes the fastest that does."
                ) from error
            self.reason = f"not {self._engine.name}: {error}"
            warnings.warn(
                f"The {self._engine.name} engine does not apply, and eager goes on: {error}",
                stacklevel=2,
            )
            self._engine = Eager(objective, self.optimizer)
            return self._run_on(self._engine, indices, factors, draw)

    def _run_on(self, engine: Engine, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        losses = engine(indices, factors, draw)
        self.rates, self.state.engine = engine.rates, engine.name
        return losses

    def _choose(self, objective: Objective) -> Engine:
        before, self.state.engine_before = self.state.engine_before, None
        if self.wanted == "auto" and before is not None:
            # A resumed run goes on with the engine that it had, so that it is the same run.
            try:
                engine, _ = choose(before, objective, self.optimizer)  # type: ignore[arg-type]
                self.reason = "as before"
                return engine
            except ValueError as error:
                warnings.warn(
                    f"The run goes on equal to rounding, not bit for bit: {error}", stacklevel=2
                )
        planned = self.state.total_updates
        engine, self.reason = choose(self.wanted, objective, self.optimizer, planned)
        if objective.rank == 0:
            _log.info("engine: %s (%s)", engine.name, self.reason)
        return engine
