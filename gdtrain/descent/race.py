"""A short race of step sizes, which finds η where an update sees only some of the examples.

    m = median over the first batches of f_B / ‖g_B‖²           the scale of Polyak's step
    candidates  m · 10^(−2), m · 10^(−1.5), …, m · 10^(½)       six, a factor of √10 apart

Each makes updates with min(η, 2 f_B/‖g_B‖²) from the same start, on the same batches: in three legs
of equal cost six, then the best three, then the best two, by the mean of f_B over the last half of
their updates. η is twice the best, for the run's steps decay, and those of the race do not. With
fewer than 64 updates in all, f_B says too little: each makes the same few, with steps that decay to
0, J on a probe is compared, and η is four times the best. Of momentum μ, R updates see only a part:
η is less by the factor (1/R) Σ_{k ≤ R} (1 − μ^k).

B examples per update. The race takes at most a tenth of the examples that the run itself will see,
and leaves no trace.

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
_SHARE = 0.1  # of the examples of the run, that the race may take
_SCALES = 32  # batches from which the scale is read
_PROBE = 1024  # examples on which the candidates are compared, at most
_PROBING = 0.25  # share of the race that is spent on them, at most


@dataclass(frozen=True)
class Race:
    """What a race found."""

    rate: float  # η
    scale: float  # m
    rates: list[float]  # of the candidates; none, where there was no room for a race
    losses: list[float]  # what was compared; infinite where it was not finite
    updates: int  # that the winner made
    examples: int  # that were looked at in all
    best: float = math.nan  # the winner's rate; the least loss may be of one that was left behind

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
    draw: int = 0,
) -> Race:
    """Find η for an optimizer with `StochasticPolyak`, whose groups' "initial_lr" is set to it.

    `engine` is called as those of `gdtrain.engines`; `block` gives the indices (K, B) of at most as
    many updates as it is asked for. ValueError: there is no finite slope at the start.
    """
    many = len(objective.inputs)
    allowed = _SHARE * planned * batch_size
    batches = max(1, min(_SCALES, int(0.1 * allowed / batch_size)))
    if batch_size == many:
        batches = 1  # all are the same
    field = _Candidates(engine, objective, optimizer, block, batch_size, draw)
    field.find_scale(min(batches, planned))
    room = int((allowed - field.examples) / batch_size)
    if room >= _ENOUGH:
        return field.run_in_legs(room)
    probe = min(many, _PROBE, int(_PROBING * allowed / len(_MULTIPLES)))
    updates = int((allowed - field.examples) / len(_MULTIPLES) - probe) // batch_size
    if updates >= 1 and probe >= 1:
        # Spread over all examples, which may be sorted.
        return field.run_to_a_probe(updates, torch.arange(probe) * many // probe)
    rate = field.set_rate(_UNRACED * field.scale * field.gathered(1))
    return Race(rate, field.scale, [], [], 0, field.examples)


@dataclass
class _Candidates:
    """Where candidates run: an engine, and what it changes."""

    engine: Callable[[Tensor, Tensor, int], Tensor]
    objective: Objective
    optimizer: Optimizer
    block: Callable[[int, int], Tensor]
    batch_size: int
    draw: int
    examples: int = 0  # that were looked at so far

    def find_scale(self, batches: int) -> None:
        """The median of f_B / ‖g_B‖² at the start, and with it the candidates."""
        ratios: list[float] = []
        done = 0
        with untouched(self.objective.model):
            while done < batches:
                for row in self.some(done, batches - done):
                    ratios += _polyak(*self.objective.value_and_grad(row, self.draw + done))
                    done, self.examples = done + 1, self.examples + len(row)
        if not ratios:
            raise ValueError(
                "The gradient of the first batches is 0, so that no step size can be found: the "
                "start is a stationary point. Initialise the weights at random."
            )
        self.scale = statistics.median(ratios)
        self.rates = [self.scale * multiple for multiple in _MULTIPLES]
        self.scores = [math.inf] * len(self.rates)

    def some(self, first: int, count: int) -> Tensor:
        """The indices of some updates, where the examples are."""
        return self.block(first, count).to(self.objective.targets.device)

    def run_in_legs(self, room: int) -> Race:
        """So many updates for all of them; who is behind at the end of a leg is left there."""
        start = self.state()
        states = dict.fromkeys(range(len(self.rates)), start)
        seen: dict[int, list[float]] = {i: [] for i in states}
        for many in _LEGS:
            going = sorted(states, key=self.scores.__getitem__)[:many]
            updates = room // (len(_LEGS) * len(going))
            states = {i: states[i] for i in going}
            for i in going:
                states[i].give_back()
                factors = torch.ones(updates, dtype=torch.float64)
                seen[i] += self.run(self.rates[i], len(seen[i]), factors)
                self.score(i, statistics.fmean(seen[i][len(seen[i]) // 2 :]))
                states[i] = self.state()
                self.examples += updates * self.batch_size
        start.give_back()
        winner = min(states, key=self.scores.__getitem__)
        return self.end(winner, _DOUBLED, len(seen[winner]))

    def run_to_a_probe(self, updates: int, rows: Tensor) -> Race:
        """Each so many updates, compared on these examples."""
        start, rows = self.state(), rows.to(self.objective.targets.device)
        factors = 1 - torch.arange(updates, dtype=torch.float64) / updates
        for i, rate in enumerate(self.rates):
            if math.isfinite(sum(self.run(rate, 0, factors))):
                self.score(i, float(self.objective.value(rows, self.draw)))
            start.give_back()
            self.examples += updates * self.batch_size + len(rows)
        winner = min(range(len(self.rates)), key=self.scores.__getitem__)
        return self.end(winner, _QUADRUPLED, updates)

    def run(self, rate: float, first: int, factors: Tensor) -> list[float]:
        """Make updates, and return the loss before each, as far as they are finite."""
        self.set_rate(rate)
        losses: list[float] = []
        while len(losses) < len(factors) and math.isfinite(sum(losses)):
            done = len(losses)
            indices = self.some(first + done, len(factors) - done)
            made = self.engine(
                indices, factors[done : done + len(indices)], self.draw + first + done
            )
            losses += made.tolist()
        return losses

    def score(self, i: int, loss: float) -> None:
        """Note a candidate's loss, to which the weight decay is added."""
        params = self.objective.params
        total = loss + penalty(params, weight_decays(params, self.optimizer.param_groups))
        self.scores[i] = total if math.isfinite(total) else math.inf

    def state(self) -> Snapshot:
        """All that updates change, to go back to."""
        for p in self.objective.params:
            p.grad = None
        return Snapshot(self.objective, self.optimizer)

    def end(self, winner: int, multiple: float, updates: int) -> Race:
        """Set η, of which each of so many updates of the winner has seen a part."""
        best = self.rates[winner]
        rate = multiple * best if math.isfinite(self.scores[winner]) else 0.1 * self.rates[0]
        rate = self.set_rate(rate * self.gathered(updates))
        return Race(rate, self.scale, self.rates, self.scores, updates, self.examples, best)

    def gathered(self, updates: int) -> float:
        """How far the momentum of a constant gradient has grown, in the mean over R updates."""
        momentum = float(self.optimizer.param_groups[0]["momentum"])
        if momentum >= 1:
            return 0.01
        return statistics.fmean(1 - momentum**k for k in range(1, updates + 1))

    def set_rate(self, rate: float) -> float:
        """Let the next updates have η."""
        for group in self.optimizer.param_groups:
            group["initial_lr"] = rate
        return rate


def _polyak(value: Tensor, gradient: list[Tensor | None]) -> list[float]:
    """f_B / ‖g_B‖², where neither is 0."""
    loss = float(value)
    square = sum(float(g.double().square().sum()) for g in gradient if g is not None)
    if not (math.isfinite(loss) and math.isfinite(square)):
        raise ValueError(
            f"The loss or its gradient is not finite at the start (loss {loss:g}): look at the "
            f"examples and the initial weights."
        )
    if loss < 0:
        raise ValueError(
            f"lr=auto bounds each step by f/‖g‖², which asks for a loss that is never below 0. "
            f"Received: loss {loss:g} at the start. Set the learning rate, or add a constant to "
            f"the loss."
        )
    return [loss / square] if square > 0 and loss > 0 else []
