"""One update, made on trial and taken back: what the instruments of a run measure.

B examples per update, N training examples, θ parameters, g the gradient of an update, s its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.analysis.gradients import dot, layers
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.trial import staying, trial
from gdtrain.engines import Eager
from gdtrain.generators import seed_all
from gdtrain.objective import Objective, untouched

__all__ = ["TrialUpdate"]

_PASS = 32  # examples that a pass over others than the batch has, where B is smaller


class TrialUpdate:
    """An update as it will be, before the run makes it; what is computed once is there for all.

    It is made by autograd and the run's own optimizer (whose groups have "initial_lr"), with the
    schedule's `factor` (1,), and taken back: parameters, buffers, optimizer, generators and `.grad`
    stay as they are, the model in its mode. `draw` names the random numbers of the run's update 0.
    """

    def __init__(
        self,
        objective: Objective,
        optimizer: Optimizer,
        plan: IndexLoader,
        number: int,
        factor: Tensor | None = None,
        *,
        draw: int = 0,
        with_next: bool = False,
    ) -> None:
        self.optimizer, self.plan, self.number = optimizer, plan, number
        self._factor = torch.ones(1, dtype=torch.float64) if factor is None else factor
        self._draw, self._with_next = draw, with_next
        self.indices = plan.block(number, 1)[0].to(objective.targets.device)
        micro: int | Literal["auto"] | None = objective.micro_batch_size
        if objective.automatic and micro is None:
            micro = "auto"
        # Objectives of its own: the run's remembers what it measured, and what it warned of.
        own = (objective.model, objective.loss, objective.inputs, objective.targets)
        self.objective = _Recording(*own, micro)  # J over all N examples
        self._wide = Objective(*own)
        self.layers = layers(objective.model)

    @property
    def params(self) -> list[Tensor]:
        """θ."""
        return [p.detach() for p in self.objective.params]

    @property
    def gradient(self) -> list[Tensor | None]:
        """g, for each parameter; None where J does not depend on it."""
        return self._made[0]

    @property
    def step(self) -> list[Tensor]:
        """s, as optimizer, schedule and step-size rule make it."""
        return self._made[1]

    @property
    def next_gradient(self) -> list[Tensor | None] | None:
        """The gradient of the next update at θ + s; None without `with_next`."""
        return self._made[2]

    @property
    def is_finite(self) -> bool:
        """Whether g and s are: elsewhere there is nothing to measure."""
        return all(math.isfinite(dot(v, v)) for v in (self.gradient, self.step))

    def gradient_on(self, indices: Tensor, draw: int) -> list[Tensor | None]:
        """∇J at what the parameters are, on other examples; `draw` is apart from those of training.

        Passes are wider than the run's, where B is small.
        """
        _ = self._made  # after which an automatic micro-batch size is known
        indices = indices.to(self.objective.targets.device)
        size = max(_PASS, self.objective.micro_batch_size or len(self.indices))
        while len(indices) % size == 1 and size < len(indices):
            size += 1  # BatchNorm takes no pass of one example
        self._wide.micro_batch_size = size
        named = self._draw + 2**31 + draw % 2**31
        with untouched(self.objective.model):
            # For layers that draw from the generators of torch, Python and NumPy.
            seed_all(named * 1_000_003 + self.plan.seed, self.objective.params[0].device)
            return self._wide.value_and_grad(indices, named)[1]

    @contextmanager
    def after(self) -> Iterator[None]:
        """Within it the parameters are θ + s."""
        step = self.step
        with staying(self.params):
            for p, s in zip(self.params, step, strict=True):
                p.add_(s)
            yield

    @cached_property
    def _made(self) -> tuple[list[Tensor | None], list[Tensor], list[Tensor | None] | None]:
        own, following = self.objective, None
        draw = self._draw + self.number
        before = [p.clone() for p in self.params]
        with trial(own, self.optimizer):
            Eager(own, self.optimizer)(self.indices[None], self._factor, draw)
            step = [p - old for p, old in zip(self.params, before, strict=True)]
            if self._with_next:
                indices = self.plan.block(self.number + 1, 1)[0].to(self.indices.device)
                following = own.value_and_grad(indices, draw + 1)[1]
        assert own.first is not None
        return own.first, step, following


class _Recording(Objective):
    """Keeps the first gradient that it was asked for: that of the update."""

    first: list[Tensor | None] | None = None

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        value, gradient = super().value_and_grad(indices, draw)
        if self.first is None:
            self.first = [None if g is None else g.clone() for g in gradient]
        return value, gradient
