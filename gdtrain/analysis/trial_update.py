"""One update, made on trial and taken back: what the instruments of a run measure.

B examples per update, N training examples, θ parameters, g the gradient of an update, s its step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.analysis.gradients import dot, layers
from gdtrain.data.loader import IndexLoader
from gdtrain.descent.trial import Snapshot, staying
from gdtrain.engines import Eager
from gdtrain.generators import seed_all
from gdtrain.objective import Objective, untouched

__all__ = ["TrialUpdate", "is_full_batch"]

_PASS = 32  # examples that a pass over others than the batch has, where B is smaller


class TrialUpdate:
    """An update as it will be, before the run makes it; what is computed once is there for all.

    It is made by autograd and the run's own optimizer, and taken back: whatever is asked for,
    parameters, buffers, optimizer, generators and `.grad` stay as they are, and the model stays in
    the mode that it is in.

    Args:
        objective: J of the run, on one process.
        optimizer: Of its parameters; its groups have "initial_lr".
        plan: Which examples make which update.
        number: Of the update, from 0.
        factor: (1,), the schedule's at this update.
        draw: Names the random numbers of the run's first update.
        with_next: Whether the gradient of the update after it will be asked for.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.losses import SquaredError
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> objective = Objective(model, SquaredError(), torch.ones(2, 1), torch.ones(2))
        >>> optimizer = GD([{"params": [*model.parameters()], "initial_lr": 0.5}])
        >>> update = TrialUpdate(objective, optimizer, IndexLoader(2, 2), number=0)
        >>> update.gradient[0].item(), update.step[0].item(), model.weight.item()
        (-1.0, 0.5, 0.0)
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
        self._recording = _Recording(*own, micro)
        self._wide = Objective(*own)
        self._made: tuple[list[Tensor | None], list[Tensor], list[Tensor | None] | None] | None
        self._made = None
        self.layers = layers(objective.model)

    @property
    def objective(self) -> Objective:
        """J, over all N examples."""
        return self._recording

    @property
    def params(self) -> list[Tensor]:
        """θ."""
        return [p.detach() for p in self.objective.params]

    @property
    def gradient(self) -> list[Tensor | None]:
        """g, for each parameter; None where J does not depend on it."""
        return self._make()[0]

    @property
    def step(self) -> list[Tensor]:
        """s, as optimizer, schedule and step-size rule make it."""
        return self._make()[1]

    @property
    def next_gradient(self) -> list[Tensor | None] | None:
        """The gradient of the next update at θ + s; None without `with_next`."""
        return self._make()[2]

    @property
    def is_full_batch(self) -> bool:
        """Whether it averages all N examples."""
        return is_full_batch(self.plan)

    @property
    def is_finite(self) -> bool:
        """Whether g and s are: elsewhere there is nothing to measure."""
        vectors = ([g for g in self.gradient if g is not None], self.step)
        return all(math.isfinite(dot(v, v)) for v in vectors)

    def gradient_on(self, indices: Tensor, draw: int) -> list[Tensor | None]:
        """∇J at what the parameters are, on other examples.

        Args:
            indices: (n,), int64.
            draw: Names random numbers, from 0; apart from those of training.
        """
        self._make()  # after which an automatic micro-batch size is known
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

    def _make(self) -> tuple[list[Tensor | None], list[Tensor], list[Tensor | None] | None]:
        """Make the update, and go back."""
        if self._made is None:
            own, following = self._recording, None
            before = [p.clone() for p in self.params]
            snapshot = Snapshot(own, self.optimizer)
            try:
                engine = Eager(own, self.optimizer)
                engine(self.indices[None], self._factor, self._draw + self.number)
                step = [p - old for p, old in zip(self.params, before, strict=True)]
                if self._with_next:
                    indices = self.plan.block(self.number + 1, 1)[0].to(self.indices.device)
                    following = own.value_and_grad(indices, self._draw + self.number + 1)[1]
            finally:
                snapshot.give_back()
            assert own.first is not None
            self._made = own.first, step, following
        return self._made


def is_full_batch(plan: IndexLoader) -> bool:
    """Whether each update averages all N examples.

    Args:
        plan: Of a run.

    Example:
        >>> is_full_batch(IndexLoader(5, 5)), is_full_batch(IndexLoader(5, 4))
        (True, False)
    """
    return plan.batch_size == plan.num_examples and plan.sampling != "replacement"


class _Recording(Objective):
    """Keeps the first gradient that it was asked for: that of the update."""

    first: list[Tensor | None] | None = None

    def value_and_grad(self, indices: Tensor, draw: int = 0) -> tuple[Tensor, list[Tensor | None]]:
        value, gradient = super().value_and_grad(indices, draw)
        if self.first is None:
            self.first = [None if g is None else g.clone() for g in gradient]
        return value, gradient
