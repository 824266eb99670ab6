"""The reference sweep: K whole updates, one after the other, for any module and any optimizer.

B examples per update. Faster engines do the same and are tested against this one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.engines.engine import LookAhead, rates_by_schedule
from gdtrain.generators import RandomStates
from gdtrain.models.dropout import Dropout
from gdtrain.objective import Objective, untouched
from gdtrain.optim.protocol import step_size_of

__all__ = ["Eager"]


class Eager:
    """Makes K updates, as `gdtrain.engines.engine.Engine` says.

    Args:
        objective: J.
        optimizer: Of the objective's parameters; its groups have "initial_lr".

    Example:
        >>> from torch import nn
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> optimizer = SGD([{"params": model.parameters(), "initial_lr": 0.5}])
        >>> sweep = Eager(Objective(model, SquaredError(), x, y), optimizer)
        >>> sweep(indices=torch.tensor([[0], [1]]), factors=torch.tensor([1.0, 0.5]))
        tensor([0.5000, 0.5000])
        >>> model.weight.item()  # 0.5·1·1, then 0.5 + 0.25·1·2
        1.0
    """

    name: ClassVar[str] = "eager"

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective, self.optimizer = objective, optimizer
        self.rates = torch.zeros(0, dtype=torch.float64)
        self.evaluations = 0
        self._ahead = LookAhead()
        self._draws = any(isinstance(m, Dropout) for m in objective.model.modules())

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses, as in `Engine`."""
        losses, rates = [], []
        objective, groups = self.objective, self.optimizer.param_groups
        self.rates = rates_by_schedule(self.optimizer, factors)
        rule = step_size_of(self.optimizer)
        for k, factor in enumerate(factors.tolist()):
            for group in groups:
                group["lr"] = group["initial_lr"] * factor
            looks = rule is not None and rule.needs.elsewhere
            before = self._random_states() if looks else None
            found = self._ahead.begin(objective.params, indices[k]) if looks else None
            if found is None:
                value, gradient = objective.value_and_grad(indices[k], draw + k)
            else:
                self.evaluations -= 1
                value, gradient, buffers = found
                for buffer, new in zip(objective.model.buffers(), buffers, strict=True):
                    buffer.copy_(new)
            losses.append(value)
            for p, g in zip(objective.params, gradient, strict=True):
                p.grad = g
            if rule is None:
                self.optimizer.step()
            else:
                rates.append(self._step_by_rule(value, indices[k], draw + k, before))
        if rates:
            self.rates = torch.tensor(rates, dtype=torch.float64)
        made = torch.stack(losses)
        return made.to(torch.promote_types(made.dtype, torch.float32))

    def _step_by_rule(
        self, value: Tensor, indices: Tensor, draw: int, before: RandomStates | None
    ) -> float:
        """One update whose length a rule decides.

        It may evaluate J elsewhere, with the same random numbers; that leaves no trace.
        """
        optimizer: Any = self.optimizer
        objective = self.objective
        if before is None:
            optimizer.step_by_rule(value, _nowhere)
            return float(optimizer.last_rate)

        @contextmanager
        def again() -> Iterator[None]:
            self.evaluations += 1
            with untouched(objective.model):
                before.restore()
                yield

        def evaluate() -> float:
            with again():
                if not (self._repeats(indices) and self._ahead.wanted()):
                    return float(objective.value(indices, draw))
                with torch.enable_grad():
                    value, gradient = objective.value_and_grad(indices, draw)
                if self._random_states() == before:
                    buffers = [b.clone() for b in objective.model.buffers()]
                    self._ahead.keep(objective.params, indices, (value, gradient, buffers))
                return float(value)

        def differentiate() -> None:
            with again(), torch.enable_grad():
                gradient = objective.value_and_grad(indices, draw)[1]
            for p, g in zip(objective.params, gradient, strict=True):
                p.grad = g

        optimizer.step_by_rule(value, evaluate, differentiate)
        return float(optimizer.last_rate)

    def _random_states(self) -> RandomStates:
        return RandomStates.now([self.objective.params[0].device])

    def _repeats(self, indices: Tensor) -> bool:
        """Whether the next update will see the same function, as far as can be known before."""
        objective = self.objective
        whole = len(indices) == len(objective.targets)
        return whole and objective.ranks == 1 and not self._draws


def _nowhere() -> float:
    raise AssertionError("a rule that looks elsewhere must say so")
