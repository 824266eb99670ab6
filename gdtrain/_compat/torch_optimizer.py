"""Private names of `torch.optim.Optimizer`: the wrapper of `step`, hooks, the fused check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ClassVar

from torch import is_grad_enabled
from torch._C import _set_grad_enabled
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import _device_dtype_check_for_fused as check_fused
from torch.optim.optimizer import (
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

__all__ = [
    "LightOptimizer",
    "check_fused",
    "has_step_hooks",
    "mark_stepped",
    "with_hooks_if_there_are_any",
]


def with_hooks_if_there_are_any(step: Callable[..., Any]) -> Any:
    """Give `step` hooks, the profiler and the grad mode, as `Optimizer` does, at less cost.

    torch's own wrappers take 11 µs, as much as the update of a small model. They run here only
    where somebody looks on: a hook, the profiler, or torch.compile, which knows them.
    """
    unhooked = _use_grad_for_differentiable(step)
    hooked = Optimizer.profile_hook_step(unhooked)

    @functools.wraps(step)
    def wrapper(self: LightOptimizer, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
            or is_compiling()
        ):
            watched = unhooked if type(self).step is type(self)._watched_step else hooked
            return watched(self, *args, **kwargs)
        before = is_grad_enabled()
        _set_grad_enabled(self.defaults["differentiable"])
        try:
            return step(self, *args, **kwargs)
        finally:
            _set_grad_enabled(before)

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells Optimizer.__init__ not to wrap it
    return wrapper


class LightOptimizer(Optimizer):
    """An optimizer whose `step` has `with_hooks_if_there_are_any`."""

    # The step of a subclass with torch's own wrapper around it, which runs the hooks.
    _watched_step: ClassVar[Any] = None

    def _patch_step_function(self) -> None:
        before = type(self).step
        super()._patch_step_function()
        if type(self).step is not before:
            type(self)._watched_step = type(self).step


def has_step_hooks(optimizer: Optimizer) -> bool:
    """Whether somebody has registered a hook on the optimizer's own steps."""
    return bool(optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks)


def mark_stepped(optimizer: Any) -> None:
    """Tell torch's schedulers that updates were made: not every engine calls `step()`."""
    optimizer._opt_called = True
