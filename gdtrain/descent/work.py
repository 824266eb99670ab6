"""What passes over examples cost, counted and not timed, and where in a run there are looks.

What a run leaves may not depend on a clock: how often somebody looks at it is decided by counts of
floating-point operations, which are the same at any speed.

N examples, B examples per update, T planned updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from gdtrain.data.sparse import SparseInputs
from gdtrain.objective import Objective, untouched

__all__ = ["FREE", "Places", "Work"]

FREE = 2**31  # operations that looks may take in any run: about a tenth of a second
_PASS = 2**24  # that a pass of autograd counts for at least, however few examples it has


@dataclass(frozen=True)
class Work:
    """Floating-point operations, of forward and backward passes."""

    example: float  # of one, forward and backward, by autograd
    update: float  # one of the run

    @classmethod
    def of(cls, objective: Objective, batch_size: int) -> Work:
        """Of a run, by counting those of a forward pass; model and generators stay as they are."""
        few = torch.arange(min(2, len(objective.targets)), device=objective.targets.device)
        with untouched(objective.model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            objective.model(objective.inputs[few])
        # What is no product of matrices is not counted, but each parameter is used.
        parameters = sum(p.numel() for p in objective.params)
        example = 3.0 * max(counter.get_total_flops() / len(few), 2 * parameters)
        inputs, share = objective.inputs, 1.0
        if isinstance(inputs, SparseInputs):  # of which an update touches the nonzeros alone
            share = len(inputs.values) / (inputs.shape[0] * inputs.shape[1])
        return cls(example, batch_size * example * share)

    def passes(self, examples: list[int]) -> float:
        """Operations of some passes by autograd, of so many examples each."""
        return sum(max(count * self.example, float(_PASS)) for count in examples)


@dataclass(frozen=True)
class Places:
    """Update numbers, a function of the plan alone: 0, and then evenly.

    With T, they are ⌊iT/n⌋ for i = 0 … n. Without, they are multiples of `every`, and become rarer:
    n in each doubling of the run.
    """

    total: int | None  # T
    count: int | None  # n; None: without bound
    every: int = 1  # updates from one to the next at first, where T or n is None

    def next(self, update: int) -> int | None:
        """The smallest above an update number; None: there is none."""
        if update < 0:
            return 0
        if self.total is None or self.count is None:
            every = self.every
            if self.count is not None:
                every <<= max(0, (update // (every * self.count)).bit_length() - 1)
            return (update // every + 1) * every
        if update >= self.total:
            return None
        return -(-(update + 1) * self.count // self.total) * self.total // self.count

    def __contains__(self, update: int) -> bool:
        return self.next(update - 1) == update
