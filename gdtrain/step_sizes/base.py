"""What a rule is, and what it needs of the optimizer and of the problem."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdtrain.ranges import Whole
from gdtrain.step_sizes.context import Context
from gdtrain.step_sizes.memory import NUMBERS, PREFIX, Memory

__all__ = ["Needs", "StepSize"]


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
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = 0.5 * (theta**2).sum()
        ...     loss.backward()
        ...     return loss
        >>> for _ in range(2):
        ...     _ = optimizer.step(closure)
        >>> theta.item(), optimizer.last_rate  # 4 − ½·4, then 2 − ¼·2
        (1.5, 0.25)
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
        """η of this update, before a schedule's factor.

        Args:
            context: What there is to see; f and ‖d‖² are finite.
            memory: What it remembers.

        Returns:
            η, range [0, ∞).
        """
        raise NotImplementedError

    def follow(self, context: Context, memory: Memory, rate: float) -> None:
        """Called after the update.

        Args:
            context: As for `rate`; the parameters are the new ones, f and d those before.
            memory: What it remembers.
            rate: η that was used, with the schedule's factor.
        """

    def check(
        self,
        *,
        full_batch: bool = True,
        momentum: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        total_updates: int | None = None,
    ) -> None:
        """Refuse, with the reason, an optimizer for which the rule does not hold.

        Args:
            full_batch: Whether each update averages all N examples.
            momentum: μ.
            nesterov: Whether it is Nesterov's.
            maximize: Whether the optimizer climbs.
            total_updates: T, range [1, ∞), or None.

        Raises:
            ValueError: It does not hold, or T is needed and absent.
        """
        name, needs = type(self).__name__, self.needs
        if maximize:
            raise ValueError(f"{name} descends: maximize=True is refused. Negate the objective.")
        if not full_batch and needs.full_batch is not None:
            raise ValueError(
                f"{name} is a rule for full-batch descent: {needs.full_batch}. Use it with "
                f"GD; on mini-batches use StochasticPolyak, StochasticLineSearch, DoG or DoWG."
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
        """Refuse a loss for which the rule does not hold.

        Args:
            loss: One with `smooth = False` has kinks.

        Raises:
            ValueError: It has kinks, and the rule needs a smooth one.

        Example:
            >>> from gdtrain.losses import Hinge
            >>> from gdtrain.step_sizes import Armijo
            >>> Armijo().check_loss(Hinge())
            Traceback (most recent call last):
            ValueError: Armijo needs a smooth loss: near a kink no step decreases f as the gradient
            promises, and the steps shrink to 0 away from the minimum. Use SquaredHinge (or
            Logistic) instead of Hinge, or the rule StochasticPolyak, DoG or DoWG.
        """
        why = self.needs.smooth
        if why is not None and not getattr(loss, "smooth", True):
            name = type(loss).__name__
            instead = "SquaredHinge (or Logistic)" if name == "Hinge" else "a smooth loss"
            raise ValueError(
                f"{type(self).__name__} needs a smooth loss: {why}. Use {instead} "
                f"instead of {name}, or the rule StochasticPolyak, DoG or DoWG."
            )

    @torch.no_grad()
    def eval(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the average into the parameters, to be evaluated or saved; `train` takes it out.

        Without an average nothing happens. What was in the parameters waits in the optimizer's
        state, so that training goes on from the same bits, and a checkpoint made in between can be
        resumed too. The optimizer refuses to step meanwhile.

        Args:
            optimizer: The one whose rule this is.

        Example:
            >>> from gdtrain import SGD
            >>> from gdtrain.step_sizes import ScheduleFree
            >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = SGD([theta], lr=0.5, step_size=ScheduleFree(beta=0.5))
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = 0.5 * (theta**2).sum()
            ...     loss.backward()
            ...     return loss
            >>> for _ in range(2):  # z = 1, .5, .25;  x = 1, .5, .375;  y = 1, .5, .3125
            ...     _ = optimizer.step(closure)
            >>> optimizer.step_size.eval(optimizer)
            >>> theta.item()
            0.375
            >>> optimizer.step_size.train(optimizer)
            >>> theta.item()
            0.3125
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
        """Put back into the parameters what `eval` took out.

        Args:
            optimizer: The one whose rule this is.
        """
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
