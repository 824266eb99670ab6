"""What the ways to run a sweep share.

K updates in one sweep, B examples per update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from gdtrain._compat.torch_modules import has_hooks, tensor_has_hooks
from gdtrain._compat.torch_optimizer import has_step_hooks
from gdtrain.objective import Objective
from gdtrain.optim.protocol import bounded_step_of

__all__ = [
    "WORTH_SHARING",
    "Engine",
    "LookAhead",
    "NotApplicableError",
    "check_hooks",
    "in_stretches",
    "rates_by_schedule",
    "single_threaded",
]

# Multiplications an update: with fewer, threads wait more than they work.
WORTH_SHARING = 2**20


class NotApplicableError(ValueError):
    """An engine cannot make the updates of this model, loss, optimizer or data; the text says why.

    Example:
        >>> raise NotApplicableError("the model is no MLP")
        Traceback (most recent call last):
        ...
        gdtrain.engines.engine.NotApplicableError: the model is no MLP
    """


class Engine(Protocol):
    """Makes K whole updates, one after the other. All engines make the same (to rounding).

        for k in 0 … K−1:  g = ∇J(θ; indices[k]),  η = η₀ factors[k],  θ ← rule(θ, g, η)

    η₀ is each parameter group's "initial_lr", as torch's schedulers keep it. After a call the
    parameters, the optimizer's state and each group's "lr" are as the K-th update left them, and
    one call of K updates is the same, bit for bit, as several that make K together.

    Example:
        >>> from gdtrain.engines.eager import Eager
        >>> engine: type[Engine] = Eager
        >>> engine.name
        'eager'
    """

    name: ClassVar[str]
    optimizer: Optimizer
    rates: Tensor
    """(K,) float64: η of the first group at each update of the last call."""
    evaluations: int
    """How often a rule has looked at J or its gradient elsewhere, so far."""

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        """Prepare, or raise `NotApplicableError`: then nothing was changed."""

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers, int64, and (K,) factors of the schedule, float64, to (K,) losses.

        The losses are J on each update's examples before that update. `draw` names the random
        numbers of the first update; the next has the next.
        """


def rates_by_schedule(optimizer: Optimizer, factors: Tensor) -> Tensor:
    """η of the first group at each update, where a schedule alone decides."""
    return factors.to("cpu", torch.float64) * float(optimizer.param_groups[0]["initial_lr"])


class LookAhead:
    """What a line search found where it went: value and gradient of the next update, if it held.

    A rule that tests a point before it goes there (Armijo, Barzilai and Borwein) needs the value
    there; the next full-batch update needs value and gradient at the same point. So the first test
    of an update makes both, unless the update before needed more than one.
    """

    def __init__(self) -> None:
        self._kept: tuple[list[Tensor], Tensor, Any] | None = None
        self._tests, self._hopeful, self._asked, self._useless = 0, True, False, False

    def begin(self, params: Sequence[Tensor], rows: Tensor) -> Any:
        """An update begins: what was kept at this very θ and these examples (B,), or None."""
        kept, self._kept = self._kept, None
        self._useless = self._useless or (self._asked and kept is None)  # it draws, say
        self._tests, self._hopeful, self._asked = 0, self._tests <= 1, False
        if kept is None or not torch.equal(kept[1], rows):
            return None
        same = all(torch.equal(p, there) for p, there in zip(params, kept[0], strict=True))
        return kept[2] if same else None

    def wanted(self) -> bool:
        """Whether a test that comes now should make the gradient as well."""
        self._tests += 1
        self._asked = self._asked or (self._tests == 1 and self._hopeful and not self._useless)
        return self._asked and self._tests == 1

    def keep(self, params: Sequence[Tensor], rows: Tensor, answer: Any) -> None:
        """Keep the answer of the next `begin`, if that is at this θ."""
        self._kept = [p.detach().clone() for p in params], rows, answer


@contextmanager
def single_threaded(multiplications: int) -> Iterator[None]:
    """Within it, torch computes on one thread if an update has too little work for more."""
    threads = torch.get_num_threads()
    if threads == 1 or multiplications >= WORTH_SHARING:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def in_stretches(
    make: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    optimizer: Optimizer,
    indices: Tensor,
    factors: Tensor,
) -> tuple[Tensor, Tensor]:
    """Losses and shares of η₀ (K,), of updates made as far at once as the rule's bound is good for.

    `make` gets a stretch of indices and factors, and the shares and Σ‖d‖² to be written.
    """
    rule, count, done = bounded_step_of(optimizer), len(factors), 0
    shares, total = (torch.ones(n, dtype=torch.float64) for n in (count, 1))
    made: list[Tensor] = []
    while done < count or not made:
        end = done + (count - done if rule is None else rule.stretch(optimizer, count - done))
        own = shares[done:end]
        made.append(make(indices[done:end], factors[done:end], own, total))
        if rule is not None and end > done:
            rule.remember(optimizer, made[-1], own, float(total))
        done = end
    return (made[0] if len(made) == 1 else torch.cat(made)), shares


def check_hooks(objective: Objective, optimizer: Optimizer) -> None:
    """Refuse what only the eager engine runs: hooks of the user's, and several processes."""
    modules: list[Any] = [*objective.model.modules(), objective.loss]
    for module in modules:
        if has_hooks(module):
            raise NotApplicableError(
                f"{type(module).__name__} has hooks, which only the eager engine calls"
            )
    if any(map(tensor_has_hooks, objective.params)):
        raise NotApplicableError("a parameter has hooks, which only the eager engine calls")
    if has_step_hooks(optimizer):
        raise NotApplicableError("the optimizer has hooks, which only the eager engine calls")
    if objective.ranks > 1:
        raise NotApplicableError("several processes share each update")
