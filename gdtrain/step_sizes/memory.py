"""What a rule remembers from update to update: the optimizer's state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach
from gdtrain.step_sizes.vectors import at_least_single

__all__ = ["NUMBERS", "PREFIX", "Memory"]

NUMBERS = "step_size"  # the name of a rule's numbers in the first group
PREFIX = "step_size_"  # of its tensors in state[p]


class Memory:
    """What a rule remembers from update to update: the optimizer's state, saved with it.

    Args:
        numbers: By name; numbers, texts and lists of them. They are the rule's to change.
        params: The parameters beside which tensors are kept.
        state: The optimizer's state.

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
        """Of an optimizer, whose numbers change only when `numbers` is put back into its group.

        Args:
            optimizer: Whose rule remembers.
            params: Those that take part in the update.
        """
        return cls(optimizer.param_groups[0].get(NUMBERS, {}), params, optimizer.state)

    def inner(self) -> Memory:
        """That of a rule within the rule: numbers of its own, the same tensors."""
        inner = Memory(self.numbers.get("inner", {}), self._params, self._state)
        self.numbers["inner"] = inner.numbers
        return inner

    def tensors(self, name: str) -> list[Tensor] | None:
        """What `keep` has kept under a name, or None if that is missing for some parameter.

        Args:
            name: As for `keep`.

        Returns:
            One tensor for each parameter, to be changed in place.
        """
        key = PREFIX + name
        found = [self._state[p].get(key) if p in self._state else None for p in self._params]
        return None if any(t is None for t in found) else found  # type: ignore[return-value]

    def keep(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Keep copies in the optimizer's state, in single precision at least.

        Args:
            name: Distinguishes what a rule keeps.
            tensors: One for each parameter.
        """
        old = self.tensors(name)
        if old is not None:
            foreach.copy_(old, list(tensors))
            return
        for p, t in zip(self._params, tensors, strict=True):
            self._state[p][PREFIX + name] = _copy(t)

    def keep_missing(self, name: str, tensors: Sequence[Tensor]) -> None:
        """As `keep`, only where nothing is kept yet.

        Args:
            name: As for `keep`.
            tensors: One for each parameter.
        """
        key = PREFIX + name
        for p, t in zip(self._params, tensors, strict=True):
            if key not in self._state[p]:
                self._state[p][key] = _copy(t)


def _copy(t: Tensor) -> Tensor:
    return t.detach().to(at_least_single(t.dtype), copy=True)
