"""What a rule is, what it needs of the optimizer and of the problem, and its options' ranges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from gdtrain.ranges import Interval, Whole
from gdtrain.step_sizes.context import NUMBERS, PREFIX, Context, Memory

__all__ = ["Needs", "StepSize", "known_fraction", "option", "optional"]


@dataclass(frozen=True)
class Needs:
    """What a rule needs of the optimizer and of the problem; a text says why it needs it.

    Args:
        values: f at other points.
        gradients: The gradient d at other points.
        total_updates: T, the number of updates planned.
        lr: The optimizer's lr, as one of the rule's options; else η is the rule's alone.
        full_batch: Why noise breaks it, so that it is refused where B < N.
        smooth: Why it does not hold where f has kinks.
        no_momentum: Why it does not go with momentum.
        no_nesterov: Why it does not go with Nesterov momentum, where momentum is allowed.

    Example:
        >>> from dataclasses import replace
        >>> replace(Needs(values=True), smooth="kinks have no tangent").elsewhere
        True
    """

    values: bool = False
    gradients: bool = False
    total_updates: bool = False
    lr: bool = False
    full_batch: str | None = None
    smooth: str | None = None
    no_momentum: str | None = None
    no_nesterov: str | None = None

    @property
    def elsewhere(self) -> bool:
        """Whether the objective is evaluated at other points than θ."""
        return self.values or self.gradients


class StepSize:
    """Base of the rules. One of your own defines `rate`; what else it needs it says in `needs`.

    A rule object holds its options only, as attributes: what it remembers is in `Memory`.

    Example:
        >>> from gdtrain import GD
        >>> class Shrinking(StepSize):
        ...     def rate(self, context, memory):
        ...         return 0.5 / (1 + context.t)
        >>> theta = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = GD([theta], step_size=Shrinking())
        >>> theta.grad = theta.detach().clone()  # of ½θ²
        >>> optimizer.step_by_rule(8.0, lambda: 0.5 * theta**2)
        >>> theta.item(), optimizer.last_rate
        (2.0, 0.5)
    """

    @property
    def needs(self) -> Needs:
        """What it needs, and why it is refused where that is missing."""
        return Needs()

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names that it gives to `Memory.keep`: a checkpoint has a place for each."""
        return ()

    @property
    def average(self) -> str | None:
        """The name under which it keeps an average of θ, for `eval`; None: it keeps none."""
        return None

    def rate(self, context: Context, memory: Memory) -> float:
        """η of this update, range [0, ∞), before a schedule's factor; f and ‖d‖² are finite."""
        raise NotImplementedError

    def follow(self, context: Context, memory: Memory, rate: float) -> None:
        """After the update: its η, with a schedule's factor; new parameters, f and d of before."""

    def check(
        self,
        *,
        full_batch: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        total_updates: int | None = None,
    ) -> None:
        """Refuse, with the reason, an optimizer for which the rule does not hold."""
        name, needs = type(self).__name__, self.needs
        if maximize:
            raise ValueError(f"{name} descends: maximize=True is refused. Negate the objective.")
        if not full_batch and needs.full_batch is not None:
            raise ValueError(
                f"{name} is a rule for full-batch descent: {needs.full_batch}. Use it with "
                f"GD; on mini-batches use StochasticPolyak, StochasticLineSearch, DoG or PolyakDoG."
            )
        if momentum != 0 and needs.no_momentum is not None:
            raise ValueError(
                f"{name} does not go with momentum: {needs.no_momentum}. Set momentum=0. "
                f"Received: momentum={momentum}."
            )
        if nesterov and needs.no_nesterov is not None:
            raise ValueError(
                f"{name} does not go with Nesterov momentum: {needs.no_nesterov}. "
                f"Set nesterov=False."
            )
        if total_updates is not None:
            Whole(1).check("total_updates", total_updates)
        elif needs.total_updates:
            raise ValueError(
                f"{name} decays over the run and needs total_updates, the number of updates that "
                f"it makes. Received: none."
            )

    def check_loss(self, loss: object) -> None:
        """Refuse a loss with kinks (`smooth = False`), if the rule needs a smooth one."""
        why = self.needs.smooth
        if why is not None and not getattr(loss, "smooth", True):
            name = type(loss).__name__
            instead = "SquaredHinge (or Logistic)" if name == "Hinge" else "a smooth loss"
            raise ValueError(
                f"{type(self).__name__} needs a smooth loss: {why}. Use {instead} "
                f"instead of {name}, or the rule StochasticPolyak, DoG or PolyakDoG."
            )

    @torch.no_grad()
    def eval(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the average into the parameters, to be evaluated or saved; `train` takes it out.

        Without an average nothing happens. What was in the parameters waits in the optimizer's
        state, so that training goes on from the same bits, after a checkpoint too. The optimizer
        refuses to step meanwhile.
        """
        group = optimizer.param_groups[0]
        numbers = group.get(NUMBERS, {})
        if self.average is None or numbers.get("mode") == "eval":
            return
        for state, p in _states(optimizer):
            if PREFIX + self.average in state:
                state[PREFIX + "training"] = p.clone()
                p.copy_(state[PREFIX + self.average])
        group[NUMBERS] = {**numbers, "mode": "eval"}

    @torch.no_grad()
    def train(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back into the optimizer's parameters what `eval` took out."""
        group = optimizer.param_groups[0]
        numbers = group.get(NUMBERS, {})
        if numbers.get("mode") != "eval":
            return
        for state, p in _states(optimizer):
            if PREFIX + "training" in state:
                p.copy_(state.pop(PREFIX + "training"))
        group[NUMBERS] = {k: v for k, v in numbers.items() if k != "mode"}

    def __repr__(self) -> str:
        """With its options, for messages and to tell a resumed run's rule."""
        options = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
        return f"{type(self).__name__}({options})"


def _states(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], Tensor]]:
    """The state of each parameter that has one."""
    every = (p for group in optimizer.param_groups for p in group["params"])
    return ((optimizer.state[p], p) for p in every if p in optimizer.state)


def option(
    name: str, value: float, low: float, high: float = inf, closed: Any = "neither"
) -> float:
    """An option that lies in its interval; NumPy's numbers become Python's, an int stays one."""
    number = Interval(low, high, closed).check(name, value)
    return value if type(value) is int else number


def optional(
    name: str, value: float | None, low: float, high: float = inf, closed: Any = "neither"
) -> float | None:
    """An option, as `option`, that may be left out."""
    return None if value is None else option(name, value, low, high, closed)


def known_fraction(own: float | None, told: float | None) -> float:
    """B/N: a rule's own option, or what the optimizer knows."""
    fraction = told if own is None else own
    if fraction is None:
        raise ValueError(
            "This rule needs to know B/N, the part of the data in one update. Construct it with "
            "batch_fraction=B/N."
        )
    return fraction
