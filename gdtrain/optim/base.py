"""What the three optimizers share with `torch.optim.SGD`: arguments, groups, states, `step`.

N examples in the training set, B examples per update, m examples in one micro-batch. The
mathematics is in `gdtrain.rules`. On which tensors it acts is `updating`'s, when it acts
`gathering`'s, and what η is `stepping`'s.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from math import isfinite
from typing import Any, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim import Optimizer

from gdtrain._compat.torch_optimizer import with_hooks_if_there_are_any
from gdtrain.optim.stepping import Stepping
from gdtrain.rules import UpdateRule, descend_

__all__ = ["Descent"]


class Descent(Stepping):
    """Base of `GD`, `SGD` and `MiniBatchSGD`; use one of these.

    With a `torch.amp.GradScaler`, step through the scaler: `scaler.step(optimizer)` after `gather`,
    or `scaler.step(optimizer, num_samples=m)`. An overflow in one micro-batch cancels the whole
    update: its other micro-batches are still counted, so that the next update begins where it
    should, but nothing is changed, neither θ nor momentum.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of `torch.optim.SGD`.

        A state saved in the middle of an update goes on to that update. Saved between `gather()`
        and `step()`, it holds the gradients, and puts them into `p.grad`.

        Raises:
            ValueError: The groups do not match, the state was saved in the middle of gathering
                another number of examples, or a part of it is missing.
        """
        loaded: dict[str, Any] = {}

        def last_hook(_: Optimizer, state: dict[str, Any]) -> None:  # sees what the others made
            self._check_loadable(state)
            missing = self._missing(state) if state["param_groups"] else []
            if missing:
                raise ValueError(
                    f"This state is not whole: expected {', '.join(missing)} for the parameters, "
                    f"received none. torch.distributed.checkpoint loads only what is in the state "
                    f"that it is given, and nothing that is gathered is in a new optimizer's: save "
                    f"between two updates, without flatten_optimizer_state_dict, or load all of "
                    f"the checkpoint (torch.distributed.checkpoint.format_utils.dcp_to_torch_save, "
                    f"torch.load)."
                )
            loaded.update(state)

        handle = self.register_load_state_dict_pre_hook(last_hook)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._adopt(loaded)

    @property
    def update_rules(self) -> tuple[UpdateRule, ...] | None:
        """The rule of each group, for engines that restate `gdtrain.rules.descend_`.

        None: `step` makes another update, as that of a subclass may.
        """
        if self._has_own_step or self.rule is not descend_:
            return None
        return tuple(UpdateRule.of(group) for group in self.param_groups)

    @property
    def own_rule(self) -> Callable[..., None] | None:
        """The rule of a subclass that `step` applies in the place of `gdtrain.rules.descend_`."""
        return None if self._has_own_step or self.rule is descend_ else self.rule

    @property
    def _has_own_step(self) -> bool:
        return inspect.unwrap(type(self).step) is not inspect.unwrap(Descent.step)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler, which then calls step() whatever it saw, and says so in attributes.

        The fused kernel unscales; when gathering, step() must count the examples of a micro-batch
        that overflowed. Where it is true Lightning clips no gradients: so `GatherMicroBatches`,
        which uses no scaler, sets `has_no_scaler`.
        """
        if self.has_no_scaler:
            return False
        return self.examples is not None or all(group["fused"] for group in self.param_groups)

    @overload
    def step(self, closure: None = None, *, num_samples: int | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, num_samples: int | None = None) -> float: ...

    @with_hooks_if_there_are_any
    def step(
        self, closure: Callable[[], float] | None = None, *, num_samples: int | None = None
    ) -> float | None:
        """Update the parameters from their gradients; when gathering, once B examples are in.

        With a step-size rule, η is computed from what the closure gives. The rule may call it again
        at other points: with the CPU's and the GPUs' random numbers of the first call, so that
        dropout is the same, and with parameters, gradients and random states put back after it.
        What else it changes, such as the running statistics of BatchNorm, it changes again. Where
        the loss or the gradient is not finite, nothing is updated and `last_rate` is NaN.

        Args:
            closure: Begins with zero_grad, computes the loss and the gradients, and returns the
                loss, as `step` then does. Required with a step-size rule.
            num_samples: The number of examples, range [1, B], whose mean the gradients are.
                Required when gathering, except after `gather()` returned True; else refused.

        Raises:
            ValueError: `num_samples` or, with a rule, the closure is missing or does not go with
                this optimizer; or lr is NaN or infinite. Nothing is changed.
        """
        if self.step_size is not None:
            return self._step_by(self.step_size, closure, num_samples)
        gathers = self.examples_argument is not None and self.examples is not None
        compiling = is_compiling()
        if gathers and closure is None and num_samples is None and self._is_blank_step():
            self._begin_momentum()
            return None
        try:
            # What a schedule, or a hand, may have made of lr: one such step loses the run. A tensor
            # is not looked at, for that would wait for its device; nor is lr while compiling, for
            # that would compile the step anew for each value.
            if not compiling:
                for group in self.param_groups:
                    lr = group["lr"]
                    if not isinstance(lr, Tensor) and not isfinite(lr):
                        raise ValueError(f"Invalid learning rate: {lr}. Expected lr finite.")
            if num_samples is not None or (gathers and not self._is_complete):
                num_samples = self.check_gatherable(num_samples)
            if closure is not None and gathers and self._is_scaled:
                raise ValueError(
                    "A closure makes gradients after the GradScaler has looked at them: call "
                    "backward() first, then scaler.step(optimizer, num_samples=m)."
                )
        except ValueError:
            self._forget_scaler()
            raise
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if gathers and not self._is_due(num_samples):
            return loss
        self._update_all(compiling)
        if gathers:
            self.discard()
        return loss
