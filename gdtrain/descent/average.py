"""The average of the parameters that some step-size rules keep, for evaluation and the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.optim import Optimizer

from gdtrain.descent.state import State
from gdtrain.optim.protocol import step_size_of
from gdtrain.step_sizes import StepSize

__all__ = ["Average"]


class Average:
    """Puts the average in the parameters' place, for a while or at the end.

    Args:
        optimizer: Whose rule may keep one.
        state: Of the run.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
        >>> Average(optimizer, State(updates=3)).is_hidden
        False
    """

    def __init__(self, optimizer: Optimizer, state: State) -> None:
        self._optimizer, self._state = optimizer, state
        self._shown = self._ended = False

    @property
    def _rule(self) -> StepSize | None:
        rule = step_size_of(self._optimizer)
        if rule is None or rule.average is None or not self._state.updates or self._ended:
            return None
        return rule

    @property
    def is_hidden(self) -> bool:
        """Whether there is one that the parameters are not."""
        return self._rule is not None

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Within it, the parameters are the average, if there is one."""
        rule = self._rule
        if rule is None or self._shown:
            yield
            return
        rule.eval(self._optimizer)
        self._shown = True
        try:
            yield
        finally:
            self._shown = False
            rule.train(self._optimizer)

    def end(self) -> None:
        """Leave the average in the parameters' place, if there is one."""
        rule = self._rule
        if rule is not None:
            rule.eval(self._optimizer)
            self._ended = True
