"""What a rule sees at one update, f and d at other points too, and what it remembers.

Norms and products are of lists of tensors, the parameters taken as one vector.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach
from gdtrain.penalised import penalty, weight_decays, with_decay

__all__ = [
    "NUMBERS",
    "PREFIX",
    "Context",
    "Evaluations",
    "Memory",
    "at_least_single",
    "in_dtypes_of",
    "inner",
    "squared_norm",
]

NUMBERS = "step_size"  # the name of a rule's numbers in the first group
PREFIX = "step_size_"  # of its tensors in state[p]


@dataclass(frozen=True, eq=False)
class Evaluations:
    """The objective wherever the parameters are: the update's examples, the same random numbers.

    `value` gives J, without the penalty of weight decay, and leaves no trace; `gradient` puts its
    gradient into each `p.grad` (None: cannot be had).

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
        direction: d, one for each of `params`; so are `decays`, λ.
        loss: J on the examples of the update, without the penalty; `value` is f, with it.
        t: Updates made before this one.
        lr: The optimizer's, before a schedule's factor.
        total_updates: T, or None; `batch_fraction` B/N, or None where it is not known.
        evaluations: The objective elsewhere, for a rule that needs it.
        owned: All parameters of the optimizer, those without a gradient too.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> optimizer = torch.optim.SGD([theta], lr=1.0, weight_decay=1.0)
        >>> theta.grad = theta.detach().clone()  # of J = ½θ²
        >>> context = Context.of(optimizer.param_groups, 2.0)
        >>> context.value, context.direction, context.squared_norm  # ½θ² + ½θ², θ + θ
        (4.0, [tensor([4.])], 16.0)
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
        """Of an optimizer's groups, whose parameters hold their gradients; loss without penalty."""
        owned = [p for group in groups for p in group["params"]]
        params = [p for p in owned if p.grad is not None]
        if any(p.grad.is_sparse for p in params):
            raise ValueError(
                "A step-size rule needs dense gradients. Received: sparse ones. "
                "Construct the embedding with sparse=False."
            )
        decays = weight_decays(params, groups)
        return cls(
            params=params,
            direction=with_decay([p.grad for p in params], params, decays),
            loss=loss,
            value=_number(loss) + penalty(params, decays),
            t=groups[0].get(NUMBERS, {}).get("updates", 0),
            lr=float(groups[0].get("initial_lr", groups[0]["lr"])),
            decays=decays,
            total_updates=total_updates,
            batch_fraction=batch_fraction,
            evaluations=evaluations,
            owned=owned,
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
        """f at θ − rate·d, of the update's examples; may be infinite or NaN. θ is restored."""
        if self.evaluations is None:
            raise ValueError("This rule evaluates f elsewhere: let it have Needs(values=True).")
        value = self.evaluations.value
        return self._elsewhere(
            lambda: foreach.add_(self.params, self.direction, alpha=-rate),
            lambda: _number(value()) + penalty(self.params, self.decays),
        )

    @torch.no_grad()
    def direction_at(self, displacement: list[Tensor]) -> list[Tensor]:
        """The gradient d at θ + displacement, one for each of `params`; θ is restored."""
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


class Memory:
    """What a rule remembers from update to update: the optimizer's state, saved with it.

    `numbers`, texts and lists of them are the rule's to change, by name; tensors are kept beside
    the parameters.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([2.0]))
        >>> memory = Memory({}, [theta], {theta: {}})
        >>> memory.keep("start", [theta])
        >>> memory.numbers["last"] = 0.5
        >>> memory.tensors("start"), memory.tensors("average")
        ([tensor([2.])], None)
    """

    def __init__(
        self, numbers: Mapping[str, Any], params: Sequence[Tensor], state: Mapping[Tensor, Any]
    ) -> None:
        self.numbers: dict[str, Any] = dict(numbers)
        self._params, self._state = params, state

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, params: Sequence[Tensor]) -> Memory:
        """Of an optimizer, whose numbers change only when `numbers` is put back into its group."""
        return cls(optimizer.param_groups[0].get(NUMBERS, {}), params, optimizer.state)

    def inner(self) -> Memory:
        """That of a rule within the rule: numbers of its own, the same tensors."""
        inner = Memory(self.numbers.get("inner", {}), self._params, self._state)
        self.numbers["inner"] = inner.numbers
        return inner

    def tensors(self, name: str) -> list[Tensor] | None:
        """What `keep` has kept, to be changed in place; None: it is missing for some parameter."""
        key = PREFIX + name
        found = [self._state[p].get(key) if p in self._state else None for p in self._params]
        return None if any(t is None for t in found) else found  # type: ignore[return-value]

    def keep(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep copies in the optimizer's state, in single precision at least."""
        old = self.tensors(name)
        if old is not None:
            foreach.copy_(old, list(tensors))
            return
        for p, t in zip(self._params, tensors, strict=True):
            self._state[p][PREFIX + name] = _copy(t)

    def keep_missing(self, name: str, tensors: Sequence[Tensor]) -> None:
        """As `keep`, only where nothing is kept yet."""
        key = PREFIX + name
        for p, t in zip(self._params, tensors, strict=True):
            if key not in self._state[p]:
                self._state[p][key] = _copy(t)


def _number(value: Tensor | float) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else float(value)


def _copy(t: Tensor) -> Tensor:
    return t.detach().to(at_least_single(t.dtype), copy=True)


def at_least_single(dtype: torch.dtype) -> torch.dtype:
    """The dtype, or float32 where it has fewer bits."""
    return torch.promote_types(dtype, torch.float32)


def in_dtypes_of(others: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors, each in the dtype of another."""
    return [t.to(other.dtype) for t, other in zip(tensors, others, strict=True)]


def squared_norm(tensors: Sequence[Tensor]) -> float:
    """Σ ‖t‖², added up in double precision, over all devices and all parts of DTensors."""
    if not tensors:
        return 0.0
    own = foreach.norm([t if t.dtype.itemsize >= 4 else t.float() for t in tensors])
    norms = [_over_ranks(n) for n in own]
    if all(n.is_cpu for n in norms):
        return sum(n.item() ** 2 for n in norms)
    return float(torch.stack([n.to(norms[0].device).double() for n in norms]).square().sum())


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Σ ⟨a, b⟩, the real part where they are complex."""
    products = [
        _over_ranks((x.conj() * y).sum()).real
        if hasattr(x, "full_tensor")
        else torch.vdot(_flat(x), _flat(y)).real
        for x, y in zip(a, b, strict=True)
    ]
    if all(p.is_cpu for p in products):
        return sum(p.item() for p in products)
    return float(torch.stack([p.to(products[0].device).double() for p in products]).sum())


def _over_ranks(number: Tensor) -> Tensor:
    """All of it, where the parameters are divided between ranks (DTensor)."""
    return number.full_tensor() if hasattr(number, "full_tensor") else number


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1).to(at_least_single(t.dtype))
