"""What a rule sees at one update: θ, f, d, and f and d at other points where it needs them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach
from gdtrain.penalised import with_decay
from gdtrain.step_sizes.memory import NUMBERS
from gdtrain.step_sizes.vectors import squared_norm

__all__ = ["Context", "Evaluations"]


@dataclass(frozen=True, eq=False)
class Evaluations:
    """The objective wherever the parameters are: the update's examples, the same random numbers.

    Args:
        value: J, without the penalty of weight decay; leaves no trace.
        gradient: Puts the gradient of that into each `p.grad`; None: cannot be had.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([3.0]))
        >>> Evaluations(lambda: (theta**2).sum()).value().item()
        9.0
    """

    value: Callable[[], Tensor | float]
    gradient: Callable[[], object] | None = None


@dataclass(frozen=True, eq=False)
class Context:
    """What a rule sees at one update. Made by the optimizer, with `Context.of`.

    Args:
        params: θ, the parameters that have a gradient.
        direction: d, one for each of `params`.
        loss: J on the examples of the update, without the penalty.
        value: f, with the penalty.
        t: Updates made before this one.
        lr: The optimizer's, before a schedule's factor.
        decays: λ, one for each of `params`.
        total_updates: T, or None.
        batch_fraction: B/N, or None where it is not known.
        evaluations: The objective elsewhere, for a rule that needs it.
        owned: All parameters of the optimizer, those without a gradient too.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = torch.optim.SGD([theta], lr=1.0, weight_decay=1.0)
        >>> theta.grad = theta.detach().clone()  # of J = ½θ²
        >>> evaluations = Evaluations(lambda: 0.5 * theta**2)
        >>> context = Context.of(optimizer.param_groups, 2.0, evaluations)
        >>> context.value, context.direction, context.squared_norm  # ½θ² + ½θ², θ + θ
        (4.0, [tensor([4.])], 16.0)
        >>> context.evaluate(0.25), theta.item()  # at 2 − ¼·4 = 1; then back
        (1.0, 2.0)
    """

    params: list[Tensor]
    direction: list[Tensor]
    loss: Tensor | float
    value: float
    t: int
    lr: float
    decays: list[float]
    total_updates: int | None
    batch_fraction: float | None
    evaluations: Evaluations | None
    owned: list[Tensor]

    @classmethod
    @torch.no_grad()
    def of(
        cls,
        groups: Sequence[dict[str, Any]],
        loss: Tensor | float,
        evaluations: Evaluations | None = None,
        *,
        total_updates: int | None = None,
        batch_fraction: float | None = None,
    ) -> Context:
        """Of an optimizer's groups, whose parameters hold their gradients.

        Args:
            groups: The parameter groups.
            loss: J on the examples of the update, without the penalty.
            evaluations: J elsewhere; None: for a rule that does not ask.
            total_updates: T, or None.
            batch_fraction: B/N, or None.

        Raises:
            ValueError: Gradients are sparse.
        """
        params: list[Tensor] = []
        direction: list[Tensor] = []
        decays: list[float] = []
        for group in groups:
            theta = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in theta]
            if any(g.is_sparse for g in grads):
                raise ValueError(
                    "A step-size rule needs dense gradients. Received: sparse ones. "
                    "Construct the embedding with sparse=False."
                )
            decay = float(group["weight_decay"])
            if decay != 0 and theta:
                grads = list(foreach.add(grads, theta, alpha=decay))
            params += theta
            direction += grads
            decays += [decay] * len(theta)
        return cls(
            params=params,
            direction=direction,
            loss=loss,
            value=_number(loss) + _penalty(params, decays),
            t=groups[0].get(NUMBERS, {}).get("updates", 0),
            lr=float(groups[0].get("initial_lr", groups[0]["lr"])),
            decays=decays,
            total_updates=total_updates,
            batch_fraction=batch_fraction,
            evaluations=evaluations,
            owned=[p for group in groups for p in group["params"]],
        )

    @cached_property
    def squared_norm(self) -> float:
        """‖d‖²."""
        return squared_norm(self.direction)

    @cached_property
    def precision(self) -> float:
        """The machine's ε, of the coarsest dtype at hand."""
        dtypes = {p.dtype for p in self.params}
        if isinstance(self.loss, Tensor) and self.loss.is_floating_point():
            dtypes.add(self.loss.dtype)
        return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)

    @property
    def resolution(self) -> float:
        """Differences of f below this are rounding: four units in its last place."""
        return 4 * self.precision * abs(self.value)

    @property
    def updates_left(self) -> int:
        """T − t, at least 1: the updates from this one on; without end where T is not known."""
        return sys.maxsize if self.total_updates is None else max(self.total_updates - self.t, 1)

    @property
    def progress(self) -> float:
        """t/T, of the updates planned."""
        planned = self.total_updates
        assert planned is not None, "StepSize.check comes first"
        if self.t >= planned:
            raise ValueError(
                f"All {planned} planned updates are made (total_updates={planned}), and the step "
                f"size has decayed to 0. Construct the optimizer with the number of updates that "
                f"the whole run makes."
            )
        return self.t / planned

    @torch.no_grad()
    def evaluate(self, rate: float) -> float:
        """f at θ − η d, on the same examples with the same random numbers; θ is restored.

        Args:
            rate: η.

        Returns:
            f, with the penalty there; it may be infinite or NaN.

        Raises:
            ValueError: The rule has not said that it needs values.
        """
        if self.evaluations is None:
            raise ValueError("This rule evaluates f elsewhere: let it have Needs(values=True).")
        value = self.evaluations.value
        return self._elsewhere(
            lambda: foreach.add_(self.params, self.direction, alpha=-rate),
            lambda: _number(value()) + _penalty(self.params, self.decays),
        )

    @torch.no_grad()
    def direction_at(self, displacement: list[Tensor]) -> list[Tensor]:
        """The gradient d at θ + v; θ is restored.

        Args:
            displacement: v, one for each of `params`.

        Returns:
            d there.

        Raises:
            ValueError: Whoever made the update gave its gradient only.
        """
        gradient = None if self.evaluations is None else self.evaluations.gradient
        if gradient is None:
            raise ValueError(
                "This rule needs gradients at other points than θ: call step(closure), or give "
                "step_by_rule() a gradient."
            )

        def there() -> list[Tensor]:
            gradient()
            return with_decay([p.grad for p in self.params], self.params, self.decays)

        return self._elsewhere(lambda: foreach.add_(self.params, displacement), there)

    @cached_property
    def _theta(self) -> list[Tensor]:
        return [p.clone() for p in self.params]

    def _elsewhere(self, move: Callable[[], Any], see: Callable[[], Any]) -> Any:
        """see() where move() leads; parameters and gradients are then as they were."""
        grads, theta = [p.grad for p in self.owned], self._theta
        try:
            for p in self.owned:
                p.grad = None  # a closure may set gradients to zero in place
            move()
            return see()
        finally:
            foreach.copy_(self.params, theta)
            for p, g in zip(self.owned, grads, strict=True):
                p.grad = g


def _penalty(params: Sequence[Tensor], decays: Sequence[float]) -> float:
    """½λ‖θ‖², summed over the groups."""
    total = 0.0
    for decay in {decay for decay in decays if decay != 0}:
        own = [p for p, d in zip(params, decays, strict=True) if d == decay]
        total += 0.5 * decay * squared_norm(own)
    return total


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)
