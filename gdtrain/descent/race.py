"""A short race of step sizes, which finds η where an update sees only some of the examples.

    m = median over the first batches of f_B / ‖g_B‖²           the scale of Polyak's step
    candidates  m · 10^(−2), m · 10^(−1.5), …, m · 10^(½)       six, a factor of √10 apart

Each makes updates with min(η, 2 f_B/‖g_B‖²) from the same start, on the same batches. In three legs
of equal cost six, then the best three, then the best two go on; what is compared is the mean of f_B
over the last half of a candidate's updates, and η is twice the best: the run's steps decay, and
those of the race do not. With fewer than 64 updates for all of them, f_B says too little. Then each
makes the same few updates, with steps that decay to 0, J on a probe of training examples is
compared, and η is four times the best. Of momentum μ, R updates see only a part: η is less by the
factor (1/R) Σ_{k ≤ R} (1 − μ^k).

N training examples, B examples per update, T planned updates. The race takes at most a tenth of the
examples that the run itself will see, and leaves parameters, buffers, momentum and random numbers
as they were.

References:
    Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization,
    2016, arXiv 1502.07943 (legs that halve the field).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain.descent.trial import Snapshot
from gdtrain.objective import Objective, untouched
from gdtrain.penalised import penalty, weight_decays

__all__ = ["Race", "race"]

_MULTIPLES = [10**power for power in (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5)]
_LEGS = (6, 3, 2)  # candidates in each
_ENOUGH = 64  # updates, of all candidates together, for a race in legs
_DOUBLED, _QUADRUPLED = 2.0, 4.0  # the winner of a race in legs, and of one on a probe
_UNRACED = 4.0  # multiple of m where there is no room for a race
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
        losses: What was compared; infinite where it was not finite.
        updates: That the winner made.
        examples: That were looked at in all.
        best: The winner; NaN where there was no race. (It need not have the least of `losses`: that
            may be of a candidate that was left behind.)

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
    best: float = math.nan

    @property
    def basis(self) -> str:
        """What η rests on, in words."""
        polyak = f"median f/‖g‖² of the first batches {self.scale:.3g}"
        if not self.rates:
            return f"({polyak}; too few updates are planned for a race)"
        return (
            f"({self.rate / self.best:.2g} times the best of {len(self.rates)} rates from "
            f"{self.rates[0]:.3g} to {self.rates[-1]:.3g} after {self.updates} updates; {polyak})"
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
        engine: Makes updates, called as an engine of `gdtrain.engines` is.
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
        ValueError: The loss or its gradient is not finite at the start, the loss is below 0, or
            the gradient is 0.

    Example:
        >>> from torch import nn
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> from gdtrain.step_sizes import StochasticPolyak
        >>> from gdtrain.engines import Eager
        >>> x = torch.linspace(-1, 1, 100)[:, None]
        >>> model = nn.Linear(1, 1)
        >>> objective = Objective(model, SquaredError(), x, 3 * x[:, 0] + 1)
        >>> optimizer = SGD(model.parameters(), lr=1.0, step_size=StochasticPolyak())
        >>> optimizer.param_groups[0]["initial_lr"] = 1.0
        >>> order = torch.arange(100)[:, None]
        >>> found = race(Eager(objective, optimizer), objective, optimizer,
        ...     lambda update, count: order[update % 100 :][:count], planned=1000, batch_size=1)
        >>> 0.1 < found.rate < 10, found.updates
        (True, 30)
    """
    many = len(objective.inputs)
    allowed = share * planned * batch_size
    batches = max(1, min(_SCALES, int(0.1 * allowed / batch_size)))
    if batch_size == many:
        batches = 1  # all are the same
    scale, looked_at = _scale(objective, block, min(batches, planned), draw)
    room = int((allowed - looked_at) / batch_size)
    candidates = _Candidates(engine, objective, optimizer, block, draw)
    if room >= _ENOUGH:
        return _in_legs(candidates, scale, room, batch_size, looked_at)
    probe = min(many, _PROBE, int(_PROBING * allowed / len(_MULTIPLES)))
    updates = int((allowed - looked_at) / len(_MULTIPLES) - probe) // batch_size
    if updates >= 1 and probe >= 1:
        # Spread over all examples, which may be sorted.
        rows = torch.arange(probe, device=objective.targets.device) * many // probe
        return _on_a_probe(candidates, scale, updates, rows, looked_at, batch_size)
    rate = _UNRACED * scale * _gathered(optimizer, 1)
    _set(optimizer, rate)
    return Race(rate, scale, [], [], 0, looked_at)


def _in_legs(
    candidates: _Candidates, scale: float, room: int, batch_size: int, looked_at: int
) -> Race:
    rates, scores = [scale * multiple for multiple in _MULTIPLES], [math.inf] * len(_MULTIPLES)
    start = candidates.state()
    states = dict.fromkeys(range(len(rates)), start)
    seen: dict[int, list[float]] = {i: [] for i in states}
    examples, winner = looked_at, 0
    for many in _LEGS:
        going = sorted(states, key=lambda i: scores[i])[:many]
        updates = room // (len(_LEGS) * len(going))
        states = {i: states[i] for i in going}
        for i in going:
            factors = torch.ones(updates, dtype=torch.float64)
            states[i].give_back()
            seen[i] += candidates.run(rates[i], len(seen[i]), factors)
            score = statistics.fmean(seen[i][len(seen[i]) // 2 :]) + candidates.penalty()
            scores[i] = score if math.isfinite(score) else math.inf
            states[i] = candidates.state()
            examples += updates * batch_size
        winner = min(going, key=lambda i: scores[i])
    start.give_back()
    return candidates.end(scale, rates, scores, winner, _DOUBLED, len(seen[winner]), examples)


def _on_a_probe(
    candidates: _Candidates,
    scale: float,
    updates: int,
    rows: Tensor,
    looked_at: int,
    batch_size: int,
) -> Race:
    rates, scores = [scale * multiple for multiple in _MULTIPLES], []
    start = candidates.state()
    for rate in rates:
        losses = candidates.run(rate, 0, 1 - torch.arange(updates, dtype=torch.float64) / updates)
        value = math.inf
        if math.isfinite(sum(losses)):
            probed = float(candidates.objective.value(rows, candidates.draw))
            value = probed + candidates.penalty()
        scores.append(value if math.isfinite(value) else math.inf)
        start.give_back()
    winner = min(range(len(rates)), key=lambda i: scores[i])
    examples = looked_at + len(rates) * (updates * batch_size + len(rows))
    return candidates.end(scale, rates, scores, winner, _QUADRUPLED, updates, examples)


def _scale(
    objective: Objective, block: Callable[[int, int], Tensor], batches: int, draw: int
) -> tuple[float, int]:
    """The median of f_B / ‖g_B‖² at the start, and how many examples it took."""
    ratios: list[float] = []
    done = examples = 0
    with untouched(objective.model):
        while done < batches:
            for row in block(done, batches - done).to(objective.targets.device):
                value, gradient = objective.value_and_grad(row, draw + done)
                square = sum(float(g.double().square().sum()) for g in gradient if g is not None)
                if not (math.isfinite(float(value)) and math.isfinite(square)):
                    raise ValueError(
                        f"The loss or its gradient is not finite at the start (loss "
                        f"{float(value):g}): look at the examples and the initial weights."
                    )
                if value < 0:
                    raise ValueError(
                        f"lr=auto bounds each step by f/‖g‖², which asks for a loss that is never "
                        f"below 0. Received: loss {float(value):g} at the start. Set the learning "
                        f"rate, or add a constant to the loss."
                    )
                if square > 0 and value > 0:
                    ratios.append(float(value) / square)
                done, examples = done + 1, examples + len(row)
    if not ratios:
        raise ValueError(
            "The gradient of the first batches is 0, so that no step size can be found: the start "
            "is a stationary point. Initialise the weights at random."
        )
    return statistics.median(ratios), examples


def _gathered(optimizer: Optimizer, updates: int) -> float:
    """How far the momentum of a constant gradient has grown, in the mean over R updates."""
    momentum = float(optimizer.param_groups[0]["momentum"])
    return (
        statistics.fmean(1 - momentum**k for k in range(1, updates + 1)) if momentum < 1 else 0.01
    )


def _set(optimizer: Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["initial_lr"] = rate


class _Candidates:
    """Where candidates run: an engine, and what it changes."""

    def __init__(
        self,
        engine: Callable[[Tensor, Tensor, int], Tensor],
        objective: Objective,
        optimizer: Optimizer,
        block: Callable[[int, int], Tensor],
        draw: int,
    ) -> None:
        self.engine, self.objective, self.optimizer = engine, objective, optimizer
        self.block, self.draw = block, draw

    def run(self, rate: float, first: int, factors: Tensor) -> list[float]:
        """Make updates, and return the loss before each, as far as they are finite."""
        _set(self.optimizer, rate)
        losses: list[float] = []
        while len(losses) < len(factors) and math.isfinite(sum(losses)):
            done = len(losses)
            indices = self.block(first + done, len(factors) - done)
            indices = indices.to(self.objective.targets.device)
            made = self.engine(
                indices, factors[done : done + len(indices)], self.draw + first + done
            )
            losses += made.tolist()
        return losses

    def end(
        self,
        scale: float,
        rates: list[float],
        scores: list[float],
        winner: int,
        multiple: float,
        updates: int,
        examples: int,
    ) -> Race:
        """Set η."""
        rate = multiple * rates[winner] if math.isfinite(scores[winner]) else 0.1 * rates[0]
        rate *= _gathered(self.optimizer, updates)
        _set(self.optimizer, rate)
        return Race(rate, scale, rates, scores, updates, examples, rates[winner])

    def penalty(self) -> float:
        params = self.objective.params
        return penalty(params, weight_decays(params, self.optimizer.param_groups))

    def state(self) -> Snapshot:
        """All that updates change, to go back to."""
        for p in self.objective.params:
            p.grad = None
        return Snapshot(self.objective, self.optimizer)
