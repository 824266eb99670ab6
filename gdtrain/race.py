"""A short race of step sizes, which finds η where an update sees only some of the examples.

    m = median over the first batches of f_B / ‖g_B‖²            the scale of Polyak's step
    candidates  m · 10^(−2), m · 10^(−1.5), …, m · 10^(½)        six, a factor of √10 apart
    each makes R updates  η_t = min(η, 2 f_B/‖g_B‖²) (1 − t/R)   from the same start, same batches
    η = 2 · (the candidate with the lowest J on a probe of training examples), 4 · if R < 8

N training examples, B examples per update, T planned updates. The race takes at most a tenth of the
examples that the run itself will see, and leaves parameters, buffers, momentum and random numbers
as they were.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.objective import Objective

__all__ = ["Race", "race"]

_MULTIPLES = [10**power for power in (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5)]
_DOUBLED = 2.0  # the winner of a race is cautious for the run, whose steps decay later
_FEW, _QUADRUPLED = 8, 4.0  # the more so, the fewer updates the race had
_UNRACED = 1.0  # multiple where there is no room for a race
_SCALES = 32  # batches from which the scale is read
_PROBE = 1024  # examples on which the candidates are compared, at most
_PROBING = 0.25  # share of the race that is spent on them, at most


@dataclass(frozen=True)
class Race:
    """What a race found.

    Args:
        rate: η.
        scale: m, the median of f_B / ‖g_B‖² at the start.
        rates: The candidates; empty where there was no room for a race.
        losses: J on the probe after each; infinite where it was not finite.
        updates: That each candidate made.
        examples: That were looked at in all.

    Example:
        >>> Race(0.2, 0.1, [], [], 0, 32).rate
        0.2
    """

    rate: float
    scale: float
    rates: list[float]
    losses: list[float]
    updates: int
    examples: int

    @property
    def _best(self) -> float:
        return self.rates[min(range(len(self.rates)), key=lambda i: self.losses[i])]

    @property
    def basis(self) -> str:
        """What η rests on, in words."""
        polyak = f"median f/‖g‖² of the first batches {self.scale:.3g}"
        if not self.rates:
            return f"({polyak}; too few updates are planned for a race)"
        return (
            f"({self.rate / self._best:.2g} times the best of {len(self.rates)} rates from "
            f"{self.rates[0]:.3g} to "
            f"{self.rates[-1]:.3g} after {self.updates} updates each; {polyak})"
        )


def race(
    engine: Callable[[Tensor, Tensor, int], Tensor],
    objective: Objective,
    optimizer: Optimizer,
    block: Callable[[int, int], Tensor],
    planned: int,
    batch_size: int,
    *,
    share: float = 0.1,
    draw: int = 0,
) -> Race:
    """Find η for an optimizer with `StochasticPolyak`, whose groups' "initial_lr" is set to it.

    Args:
        engine: Makes updates, called as an engine of `gdtrain.sweep` is.
        objective: J.
        optimizer: Of its parameters, with `step_size=StochasticPolyak()`; before its first update.
        block: From an update number and a count to indices (K, B), as the run will see them; it may
            give fewer than were asked for.
        planned: T, updates of the run.
        batch_size: B.
        share: Of the examples of the run, that the race may take, range [0, 1].
        draw: Names random numbers, as for the engine.

    Returns:
        η, and what it rests on.

    Raises:
        ValueError: The loss or its gradient is not finite at the start, or the gradient is 0.

    Example:
        >>> from torch import nn
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.step_sizes import StochasticPolyak
        >>> from gdtrain.sweep import Eager
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> model = nn.Linear(1, 1)
        >>> objective = Objective(model, SquaredError(), x, 3 * x[:, 0] + 1)
        >>> optimizer = SGD(model.parameters(), lr=1.0, step_size=StochasticPolyak())
        >>> optimizer.param_groups[0]["initial_lr"] = 1.0
        >>> order = torch.arange(100)[:, None]
        >>> found = race(Eager(objective, optimizer), objective, optimizer,
        ...     lambda update, count: order[update % 100 :][:count], planned=1000, batch_size=1)
        >>> 0.1 < found.rate < 10, found.updates
        (True, 11)
    """
    many = len(objective.inputs)
    allowed = share * planned * batch_size
    batches = max(1, min(_SCALES, int(0.1 * allowed / batch_size)))
    if batch_size == many:
        batches = 1  # all are the same
    scale, looked_at = _scale(objective, block, min(batches, planned), draw)
    probe = min(many, _PROBE, int(_PROBING * allowed / len(_MULTIPLES)))
    updates = int((allowed - looked_at) / len(_MULTIPLES) - probe) // batch_size
    if updates < 1 or probe < 1:
        # A buffer adds 1 + μ + μ² + … gradients up.
        rate = _UNRACED * scale * max(1 - float(optimizer.param_groups[0]["momentum"]), 0.01)
        _set(optimizer, rate)
        return Race(rate, scale, [], [], 0, looked_at)
    # Spread over all examples, which may be sorted.
    rows = torch.arange(probe, device=objective.targets.device) * many // probe
    factors = 1 - torch.arange(updates, dtype=torch.float64) / updates
    rates, losses = [scale * multiple for multiple in _MULTIPLES], []
    for rate in rates:
        kept = _Kept(objective, optimizer)
        _set(optimizer, rate)
        finite, done = True, 0
        while done < updates and finite:
            indices = block(done, updates - done)
            indices = indices.to(objective.targets.device)
            made = engine(indices, factors[done : done + len(indices)], draw + done)
            finite, done = bool(torch.isfinite(made).all()), done + len(indices)
        value = float(objective.value(rows, draw)) + _penalty(optimizer) if finite else math.inf
        losses.append(value if math.isfinite(value) else math.inf)
        kept.give_back(optimizer)
    best = min(range(len(rates)), key=lambda i: losses[i])
    longer = _QUADRUPLED if updates < _FEW else _DOUBLED
    rate = longer * rates[best] if math.isfinite(losses[best]) else 0.1 * rates[0]
    _set(optimizer, rate)
    examples = looked_at + len(rates) * (updates * batch_size + probe)
    return Race(rate, scale, rates, losses, updates, examples)


def _scale(
    objective: Objective, block: Callable[[int, int], Tensor], batches: int, draw: int
) -> tuple[float, int]:
    """The median of f_B / ‖g_B‖² at the start, and how many examples it took."""
    ratios: list[float] = []
    done = examples = 0
    kept = [b.clone() for b in objective.model.buffers()]
    before = _random_states(objective)
    while done < batches:
        indices = block(done, batches - done).to(objective.targets.device)
        for row in indices:
            value, gradient = objective.value_and_grad(row, draw + done)
            square = sum(float(g.double().square().sum()) for g in gradient if g is not None)
            if not (math.isfinite(float(value)) and math.isfinite(square)):
                raise ValueError(
                    f"The loss or its gradient is not finite at the start (loss "
                    f"{float(value):g}): look at the examples and the initial weights."
                )
            if square > 0 and value > 0:
                ratios.append(float(value) / square)
            done, examples = done + 1, examples + len(row)
    for b, old in zip(objective.model.buffers(), kept, strict=True):
        b.copy_(old)
    _set_random_states(objective, before)
    if not ratios:
        raise ValueError(
            "The gradient of the first batches is 0, so that no step size can be found: the start "
            "is a stationary point. Initialise the weights at random."
        )
    return statistics.median(ratios), examples


def _set(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["initial_lr"] = rate


@torch.no_grad()
def _penalty(optimizer: Optimizer) -> float:
    """½ λ ‖θ‖², summed over the groups."""
    return sum(
        0.5 * group["weight_decay"] * float(p.double().square().sum())
        for group in optimizer.param_groups
        if group["weight_decay"] != 0
        for p in group["params"]
    )


class _Kept:
    """What a candidate changes, as it was before."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        self.objective = objective
        tensors = [*objective.model.parameters(), *objective.model.buffers()]
        self.tensors = [(t, t.detach().clone()) for t in tensors]
        self.groups = [
            {k: copy.deepcopy(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ]
        self.random = _random_states(objective)

    def give_back(self, optimizer: Optimizer) -> None:
        with torch.no_grad():
            for tensor, old in self.tensors:
                tensor.copy_(old)
        optimizer.state.clear()
        for group, options in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(copy.deepcopy(options))
        for p in self.objective.params:
            p.grad = None
        _set_random_states(self.objective, self.random)


def _random_states(objective: Objective) -> tuple[Any, ...]:
    """Of all generators that layers may draw from."""
    device = objective.params[0].device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_random_states(objective: Objective, states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], objective.params[0].device)
    random.setstate(states[2])
    np.random.set_state(states[3])  # noqa: NPY002
