"""The shell that the three optimizers share: arguments, state, closures, gathering.

N examples in the training set, B examples per update, m examples in one micro-batch.
The mathematics is in `gdtrain.rules`; this file decides on which tensors it acts, and when.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from math import inf, isfinite, nan
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _set_grad_enabled
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_compiling
from torch.optim import Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _device_dtype_check_for_fused,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
    _use_grad_for_differentiable,
)

from gdtrain.optim.plan import Plan
from gdtrain.rules import descend_, fused_descend_
from gdtrain.step_sizes import Context, Evaluations, Memory, StepSize, automatic

__all__ = ["Descent"]

# What is gathered, in state[p]: Σ m·g so far; then, until step(), p.grad = Σ m·g / Σ m, and whether
# it was finite before anybody clipped it.
_SUM, _MEAN, _FINITE = "gathered_sum", "gathered_mean", "gathered_finite"
# In each group: Σ m, and whether a GradScaler saw an overflow in one of the micro-batches.
_COUNT, _OVERFLOW = "gathered", "overflow"
_EXAMPLES_ARGUMENTS = ("num_samples", "batch_size")  # of the subclasses
# With a step-size rule, in the first group: what it remembers in numbers. Its tensors are in
# state[p], under names that begin so.
_RULE, _RULE_TENSOR = "step_size", "step_size_"
# In what state_dict() gives of a rule's numbers: all of them once more, as one list; and the names
# of the tensors.
_WHOLE, _TENSORS = "whole", "tensors"
_DEFAULT_LR = 1e-3


def _with_hooks_if_there_are_any(step: Callable[..., Any]) -> Any:
    """Give `step` hooks, the profiler and the grad mode, as `Optimizer` does, at less cost.

    torch's own wrappers take 11 µs, as much as the update of a small model. They run here only
    where somebody looks on: a hook, the profiler, or torch.compile, which knows them.
    """
    unhooked = _use_grad_for_differentiable(step)
    hooked = Optimizer.profile_hook_step(unhooked)

    @functools.wraps(step)
    def wrapper(self: Descent, *args: Any, **kwargs: Any) -> Any:
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
            or is_compiling()
        ):
            watched = unhooked if self._hooks_run_outside else hooked
            return watched(self, *args, **kwargs)
        before = is_grad_enabled()
        _set_grad_enabled(self.defaults["differentiable"])
        try:
            return step(self, *args, **kwargs)
        finally:
            _set_grad_enabled(before)

    wrapper.hooked = True  # type: ignore[attr-defined]  # tells Optimizer.__init__ not to wrap it
    return wrapper


class _Closure:
    """A user's closure as a rule needs it: again at other points, on the same random numbers."""

    def __init__(self, closure: Callable[[], Any], params: list[Tensor], again: bool) -> None:
        self._closure = closure
        self._devices = {p.device for p in params if p.is_cuda}
        self._before = self._random_states() if again else []

    def __call__(self) -> Any:
        """The loss; the gradients are left in p.grad."""
        with torch.enable_grad():
            return self._closure()

    def again(self) -> Any:
        """As the first time, wherever the parameters are now."""
        after = self._random_states()
        self._set_random_states(self._before)
        try:
            return self()
        finally:
            self._set_random_states(after)

    def _random_states(self) -> list[Tensor]:
        on_devices = [torch.cuda.get_rng_state(device) for device in self._devices]
        return [torch.get_rng_state(), *on_devices]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)


class _Given:
    """Value and gradients that are there already, in the place of a closure."""

    def __init__(
        self,
        value: Tensor | float,
        evaluate: Callable[[], Tensor | float],
        gradient: Callable[[], object] | None,
    ) -> None:
        self.value, self.evaluate, self.gradient = value, evaluate, gradient


class Descent(Optimizer):
    """Gradient descent, whatever the number of examples in an update.

    Base of `GD`, `SGD` and `MiniBatchSGD`; use one of these. With a number of examples per update,
    it gathers micro-batches until that many are in, and updates from their exact mean

        g = (Σ m_i g_i) / B,    B = Σ m_i,    g_i the mean gradient of the i-th m_i examples.

    The order of a loop that gathers; without what is in brackets, `step(num_samples=m)` stands for
    `gather` and `step`:

        zero_grad → backward → [scaler.unscale_] → gather → if it returned True: clip, step
        → [scaler.update]

    With a `torch.amp.GradScaler`, step through the scaler: `scaler.step(optimizer)` after `gather`,
    or `scaler.step(optimizer, num_samples=m)`. An overflow in one micro-batch cancels the whole
    update: its other micro-batches are still counted, so that the next update begins where it
    should, but nothing is changed, neither θ nor momentum.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: η, the length of a step, range [0, ∞); a float or a tensor with one element. "auto":
            a step-size rule chooses it, see `gdtrain.step_sizes.automatic`.
        momentum: μ, range [0, ∞).
        dampening: τ.
        weight_decay: λ, range [0, ∞).
        nesterov: Nesterov momentum; needs momentum > 0 and dampening = 0.
        examples: Examples per update, or None: then every `step()` is an update.
        maximize: Climb instead of descend.
        foreach: False applies the rule tensor by tensor, else to a whole group at once.
        differentiable: Let autograd see the step.
        fused: True takes PyTorch's fused kernel, which may round less often. None, with `foreach`
            None: the fastest way that has the bits of torch's loop, tensor by tensor.
        step_size: A rule that computes η at each `step(closure)`; lr is then left at its default
            (or 1.0). A schedule that scales lr scales what the rule gives.
        total_updates: T, for rules that decay over the run, range [1, ∞).

    Raises:
        ValueError: A hyperparameter is out of range, or the rule does not hold here.
        RuntimeError: `fused` with `differentiable`, with `foreach`, or with parameters that the
            kernel does not take.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = Descent([theta], lr=0.25)
        >>> (theta**2).sum().backward()
        >>> optimizer.step()
        >>> theta.data
        tensor([2.])

        The order in full: ragged micro-batches, a loss scale, clipping of the whole mean.

        >>> from gdtrain import GD
        >>> x, y = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[2.0], [4.0], [6.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = GD(model.parameters(), lr=0.2, num_samples=len(x))
        >>> scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        >>> for epoch in range(50):
        ...     for x_m, y_m in zip(x.split(2), y.split(2)):
        ...         optimizer.zero_grad()
        ...         scaler.scale((0.5 * (model(x_m) - y_m) ** 2).mean()).backward()
        ...         scaler.unscale_(optimizer)
        ...         if optimizer.gather(num_samples=len(x_m)):
        ...             _ = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=5.0)
        ...             scaler.step(optimizer)
        ...         scaler.update()
        >>> round(model.weight.item(), 4)
        2.0
    """

    # The constructor argument that holds the number of examples per update.
    _examples_argument: ClassVar[str | None] = None
    # Whether torch has put its own wrapper, which runs the hooks, around the step of a subclass.
    _hooks_run_outside: ClassVar[bool] = False
    # Whether it is stepped without a gradient scaler, whatever it offers one.
    _has_no_scaler: bool = False
    # Whether each update averages all N examples, so that no gradient is noisy.
    _full_batch: ClassVar[bool] = False

    # Without values here: a class attribute would hide the instance's from a wrapper's __getattr__.
    step_size: StepSize | None
    """The rule that computes η, or None."""
    total_updates: int | None
    """T, the number of updates that a rule which decays is told."""
    batch_fraction: float | None
    """B/N, for rules that grow η by so much in a pass over the data; set it if you know it."""

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor | Literal["auto"] = _DEFAULT_LR,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        examples: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        step_size: StepSize | None = None,
        total_updates: int | None = None,
    ) -> None:
        if isinstance(lr, str) or step_size is not None:
            lr, step_size = self._peak(lr, step_size)
        self.step_size = step_size
        self.total_updates = None if step_size is None else total_updates
        self.batch_fraction = 1.0 if self._full_batch else None
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        if self._examples_argument is not None:
            name = self._examples_argument
            defaults[name] = None if examples is None else _count(name, examples)
            defaults[_COUNT], defaults[_OVERFLOW] = 0, False
        _check_hyperparameters(defaults)
        self._plans: dict[int, Plan] = {}  # by the group's position
        super().__init__(params, defaults)
        if self.step_size is not None:
            self.param_groups[0][_RULE] = {}

    # ------------------------------------------------------------------ groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as `torch.optim.Optimizer.add_param_group`.

        Args:
            param_group: Its parameters under "params", and what differs from the defaults.

        Raises:
            ValueError: A hyperparameter is out of range, or micro-batches are being gathered.

        Example:
            >>> w, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(1))
            >>> optimizer = Descent([w], lr=0.1, weight_decay=0.01)
            >>> optimizer.add_param_group({"params": [b], "weight_decay": 0})
        """
        if isinstance(param_group, dict):
            _check_hyperparameters({**self.defaults, **param_group})
            if self.step_size is not None:
                self._check_rule({**self.defaults, **param_group})
        if self.param_groups and self._gathered:
            raise ValueError(
                f"Parameters cannot be added while micro-batches are being gathered "
                f"({self._gathered} of {self._examples} examples are in): "
                f"finish the update, or call flush(), first."
            )
        if isinstance(param_group, dict) and self._examples_argument is not None:
            # A copy, for the group may be another optimizer's, in the middle of its update.
            fresh = {self._examples_argument: self._examples, _COUNT: 0, _OVERFLOW: False}
            param_group = {**param_group, **fresh}
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        told = not self._full_batch and self.batch_fraction is not None
        if self.step_size is not None or told:  # else as in torch
            names = ("step_size", "total_updates", "batch_fraction")
            state |= {name: getattr(self, name) for name in names}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("step_size", None)
        self.__dict__.setdefault("total_updates", None)
        self.__dict__.setdefault("batch_fraction", 1.0 if self._full_batch else None)
        self._plans = {}
        for group in self.param_groups:  # reached from load_state_dict too, whose states may be old
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
            if self._examples_argument is not None:
                group.setdefault(_COUNT, 0)
                group.setdefault(_OVERFLOW, False)
        for p, state in self.state.items():  # between gather() and step(); copies have no p.grad
            if isinstance(state, dict) and _MEAN in state:
                p.grad = state[_MEAN]

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with what is gathered and what a rule remembers.

        `torch.distributed.checkpoint` loads only what is in the state of the new optimizer. So that
        a new one asks for all that an old one saved, a rule's numbers are also given as one list,
        and tensors that the rule does not keep yet are filled with NaN.

        Returns:
            The state, to be saved and loaded.

        Example:
            >>> theta = torch.nn.Parameter(torch.ones(2))
            >>> Descent([theta], momentum=0.9).state_dict()["state"]
            {}
        """
        exported = super().state_dict()
        if self.step_size is None:
            return exported
        keys = [_RULE_TENSOR + name for name in self.step_size.keeps]
        places = (i for group in exported["param_groups"] for i in group["params"])
        names: set[str] = set()
        for p, i in zip(self._parameters(), places, strict=True):
            state = exported["state"].get(i, {})
            if p.requires_grad:
                state = {**{key: _blank(p) for key in keys}, **state}
            if state:
                exported["state"][i] = state
            names |= {name for name in state if str(name).startswith(_RULE_TENSOR)}
        group = exported["param_groups"][0]
        whole = _as_list(group[_RULE])
        group[_RULE] = {**group[_RULE], _WHOLE: whole, _TENSORS: sorted(names)}
        return exported

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of `torch.optim.SGD`.

        A state saved in the middle of an update goes on to that update. Saved between `gather()`
        and `step()`, it holds the gradients, and puts them into `p.grad`.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The groups do not match, the state was saved in the middle of gathering
                another number of examples, or a part of it is missing.

        Example:
            >>> theta = torch.nn.Parameter(torch.ones(2))
            >>> other = torch.optim.SGD([theta], lr=0.2, momentum=0.9)
            >>> optimizer = Descent([theta])
            >>> optimizer.load_state_dict(other.state_dict())
            >>> optimizer.param_groups[0]["lr"]
            0.2
        """
        loaded: dict[str, Any] = {}

        def last_hook(_: Optimizer, state: dict[str, Any]) -> None:  # sees what the others made
            self._check_resumable(state["param_groups"])
            self._check_same_rule(state["param_groups"])
            self._check_whole(state)
            loaded.update(state)

        handle = self.register_load_state_dict_pre_hook(last_hook)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self._examples_argument is not None:
            for group in self.param_groups:
                group[self._examples_argument] = self._examples
        # The base class casts all state to the parameter's dtype, where a half-precision sum is no
        # sum; and what it need not cast, it shares with the optimizer that was saved.
        theirs = [i for group in loaded["param_groups"] for i in group["params"]]
        for p, i in zip(self._parameters(), theirs, strict=True):
            saved = loaded["state"].get(i, {})
            if _SUM in saved:
                self.state[p][_SUM] = saved[_SUM].to(p.device, copy=True)
            if _MEAN in saved:
                self.state[p][_MEAN] = p.grad = saved[_MEAN].to(p, copy=True)
            elif self._examples is not None and self._is_complete:
                p.grad = None  # left over, and not of that update
            for name in [name for name in saved if str(name).startswith(_RULE_TENSOR)]:
                if self.step_size is None or _is_blank(saved[name]):
                    self._pop(p, name)
                else:
                    self.state[p][name] = saved[name].to(p.device, copy=True)
        self._adopt_groups(loaded["param_groups"])

    def _check_resumable(self, groups: list[dict[str, Any]]) -> None:
        count = groups[0].get(_COUNT, 0) if groups else 0
        saved = next((groups[0][n] for n in _EXAMPLES_ARGUMENTS if groups and n in groups[0]), None)
        if count and saved != self._examples:
            name = self._examples_argument
            raise ValueError(
                f"This state holds {count} of {saved} examples of an unfinished update, but this "
                + (
                    f"optimizer has {name}={self._examples}: construct it with {name}={saved}"
                    if name
                    else f"optimizer gathers nothing: load it into GD(num_samples={saved}) or "
                    f"MiniBatchSGD(batch_size={saved})"
                )
                + " to go on with that update."
            )

    def _check_whole(self, state: dict[str, Any]) -> None:
        """Refuse what `torch.distributed.checkpoint` has loaded in part.

        Sums are in no new optimizer's state: it cannot ask for them.
        """
        if not state["param_groups"]:
            return
        group, states = state["param_groups"][0], list(state["state"].values())
        count, key = group.get(_COUNT, 0), _SUM
        if self._examples is not None and count == self._examples:
            key = _MEAN
        missing = []
        if count and not group.get(_OVERFLOW) and not any(key in own for own in states):
            missing.append(key)
        if self.step_size is not None:
            names = group.get(_RULE, {}).get(_TENSORS, [])
            missing += [name for name in names if not any(name in own for own in states)]
        if missing:
            raise ValueError(
                f"This state is not whole: expected {', '.join(missing)} for the parameters, "
                f"received none. torch.distributed.checkpoint loads only what is in the state that "
                f"it is given, and nothing that is gathered is in a new optimizer's: save between "
                f"two updates, without flatten_optimizer_state_dict, or load all of the checkpoint "
                f"(torch.distributed.checkpoint.format_utils.dcp_to_torch_save, torch.load)."
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler, which then calls step() whatever it saw, and says so in attributes.

        The fused kernel unscales; when gathering, step() must count the examples of a micro-batch
        that overflowed. (Computed: survives deepcopy and pickle.) Lightning asks it too, and where
        it is true clips no gradients: `GatherMicroBatches`, which uses no scaler, says so here.
        """
        if self._has_no_scaler:
            return False
        return self._examples is not None or all(group["fused"] for group in self.param_groups)

    # ------------------------------------------------------------------ the step

    def _patch_step_function(self) -> None:
        before = type(self).step
        super()._patch_step_function()
        if type(self).step is not before:
            type(self)._hooks_run_outside = True

    @overload
    def step(self, closure: None = None, *, num_samples: int | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, num_samples: int | None = None) -> float: ...

    @_with_hooks_if_there_are_any
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
            closure: Computes the loss and the gradients, and returns the loss; it begins with
                zero_grad. Required with a step-size rule.
            num_samples: The number of examples, range [1, B], whose mean the gradients are.
                Required when gathering, except after `gather()` returned True; else refused.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: `num_samples` is missing, not a count, more than is missing to B, or given
                to an optimizer that gathers nothing; lr is NaN or infinite; or with a rule, the
                closure is missing. Nothing is changed.
        """
        if self.step_size is not None:
            return self._step_by(self.step_size, closure, num_samples)
        gathers = self._examples_argument is not None and self._examples is not None
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
                num_samples = self._check_gatherable(num_samples)
            if closure is not None and gathers and self._is_scaled:
                raise ValueError(
                    "A closure makes gradients after the GradScaler has looked at them: call "
                    "backward() first, then scaler.step(optimizer, num_samples=m)."
                )
        except ValueError:
            # A GradScaler whose step raises leaves these, and multiplies the next scale by them.
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
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

    def _is_blank_step(self) -> bool:
        """Whether this is no update, but `torch.distributed.checkpoint` asking for state.

        It sets each lr to 0 and each gradient to zeros, and calls step(). After gather() has
        returned True, step() is the user's, unless an overflow has left no gradient.
        """
        if self._is_scaled or (
            self._examples is not None and self._is_complete and not self.param_groups[0][_OVERFLOW]
        ):
            return False
        grads = [p.grad for p in self._parameters() if p.requires_grad]
        return (
            all(float(group["lr"]) == 0 for group in self.param_groups)
            and any(g is not None for g in grads)
            and all(g is not None and _is_zero(g) for g in grads)
        )

    def _begin_momentum(self) -> None:
        """Momentum buffers of zero gradients, where there are none; nothing else."""
        for group in self.param_groups:
            for p in group["params"] if group["momentum"] != 0 else ():
                if p.grad is not None and self.state[p].get("momentum_buffer") is None:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)

    def _update_all(self, compiling: bool) -> None:
        for index, group in enumerate(self.param_groups):
            scaled = group["fused"] and self._is_scaled
            plan = None if compiling or scaled else self._plans.get(index)
            if plan is None or not plan.descend_(group, self.state):
                self._update(index, group)

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        # torch.compile knows this method by name and keeps the lists static.
        for p in group["params"]:
            if p.grad is None:
                continue
            params.append(p)
            grads.append(p.grad)
            if group["momentum"] != 0:
                buffers.append(self.state[p].get("momentum_buffer"))

    def _update(self, index: int, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        self._init_group(group, params, grads, buffers)
        if not params:
            return
        if self._is_plannable(group, buffers):
            plan = Plan(group, self.state)
            if plan.takes_all or not group["fused"]:
                self._plans[index] = plan
                plan.descend_(group, self.state)
                return
        self._descend(group, params, grads, buffers)

    def _is_plannable(self, group: dict[str, Any], buffers: list[Tensor | None]) -> bool:
        """Whether the fused kernel may be used, as far as that can be told without the tensors."""
        return not (
            is_compiling()
            or torch.is_grad_enabled()
            or self._is_scaled
            or (not group["fused"] and (group["fused"], group["foreach"]) != (None, None))
            or isinstance(group["lr"], Tensor)
            or isinstance(group["weight_decay"], Tensor)
            or any(b is None for b in buffers)
        )

    def _descend(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        rule = {
            name: group[name]
            for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        }
        if group["fused"]:
            self._update_fused(params, grads, buffers, rule)
        elif group["foreach"] is False:
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                own = buffers[i : i + 1]
                descend_([p], [g], own, **rule)
                buffers[i : i + 1] = own
        else:
            descend_(params, grads, buffers, **rule)
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers, strict=True):
                if buffer is not None:
                    self.state[p]["momentum_buffer"] = buffer

    def _update_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
        rule: dict[str, Any],
    ) -> None:
        if any(g.is_sparse for g in grads):
            raise RuntimeError("`fused` does not support sparse gradients: use fused=None.")
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, p in enumerate(params):
            _device_dtype_check_for_fused(p)
            kinds.setdefault((p.device, p.dtype), []).append(i)
        for (device, _), part in kinds.items():
            part_buffers = [buffers[i] for i in part] if buffers else []
            scaler: dict[str, Any] = {
                name: None if value is None else value.to(device, non_blocking=True)
                for name in ("grad_scale", "found_inf")
                # when gathering, `_is_due` has seen to both
                for value in [getattr(self, name, None) if self._examples is None else None]
            }
            fused_descend_(
                [params[i] for i in part],
                [grads[i] for i in part],
                part_buffers,
                **rule,
                **scaler,
            )
            for i, buffer in zip(part, part_buffers, strict=False):
                buffers[i] = buffer

    # ------------------------------------------------------------------ rules of the step size

    @property
    def last_rate(self) -> float:
        """η of the last update, of group 0; NaN where a rule made none. Without a rule, lr."""
        group = self.param_groups[0]
        return float(group["lr"]) if self.step_size is None else group[_RULE].get("rate", nan)

    def step_by_rule(
        self,
        value: Tensor | float,
        evaluate: Callable[[], Tensor | float],
        gradient: Callable[[], object] | None = None,
    ) -> None:
        """`step(closure)` for whoever has the loss and the gradients already.

        When gathering, call it when `gather` returned True.

        Args:
            value: The loss whose gradients are in p.grad: the mean over the update's examples,
                without the penalty of weight decay.
            evaluate: Gives that loss at what the parameters are when it is called, on the same
                examples with the same random numbers, and leaves no trace.
            gradient: The same with gradients, which it puts into p.grad; needed by rules that
                need gradients elsewhere.

        Raises:
            ValueError: The optimizer has no rule, or examples of the update are missing.

        Example:
            >>> from gdtrain import GD
            >>> from gdtrain.step_sizes import Armijo
            >>> theta = torch.nn.Parameter(torch.tensor([1.0]))
            >>> optimizer = GD([theta], step_size=Armijo())
            >>> theta.grad = 4 * theta.detach()
            >>> optimizer.step_by_rule(2.0, lambda: 2 * theta.item() ** 2)
            >>> theta.item(), optimizer.last_rate
            (0.0, 0.25)
        """
        if self.step_size is None:
            raise ValueError("step_by_rule() needs a rule: construct the optimizer with step_size=")
        self.step(_Given(value, evaluate, gradient))  # type: ignore[call-overload]

    def _step_by(self, rule: StepSize, closure: Any, num_samples: int | None) -> Any:
        gathers = self._examples is not None
        if closure is None and num_samples is None and self._is_blank_step():
            self._begin_momentum()
            return None
        try:
            self._check_step_by(rule, closure, num_samples)
            factor = self._factor(rule)
        except ValueError:
            for name in ("grad_scale", "found_inf"):  # as in step()
                self.__dict__.pop(name, None)
            raise
        if isinstance(closure, _Given):
            loss = closure.value
            evaluations = Evaluations(closure.evaluate, closure.gradient)
        else:
            closure = _Closure(closure, list(self._parameters()), rule.needs.elsewhere)
            loss = closure()
            evaluations = Evaluations(closure.again, closure.again)
        if gathers and not self._is_due(None):
            return loss
        first = self.param_groups[0]
        context = Context.of(
            self.param_groups,
            loss,
            evaluations if rule.needs.elsewhere else None,
            total_updates=self.total_updates,
            batch_fraction=self.batch_fraction,
        )
        memory = Memory.of(self, context.params)
        rate = nan
        if context.params and isfinite(context.value) and isfinite(context.squared_norm):
            rate = factor * rule.rate(context, memory)
        if isfinite(rate):
            before = [group["lr"] for group in self.param_groups]
            try:
                for group in self.param_groups:
                    group["lr"] = rate
                self._update_all(compiling=False)
            finally:
                for group, lr in zip(self.param_groups, before, strict=True):
                    group["lr"] = lr
            rule.follow(context, memory, rate)
        numbers = {"rule": type(rule).__name__, "updates": context.t + 1, "rate": rate}
        first[_RULE] = {**memory.numbers, **numbers}
        if gathers:
            self.discard()
        return loss

    def _check_step_by(self, rule: StepSize, closure: Any, num_samples: int | None) -> None:
        name = type(rule).__name__
        if self._is_scaled:
            raise ValueError(
                f"{name} does not go with a GradScaler, which gives no closure. Use bfloat16, "
                f"which needs no loss scale."
            )
        if num_samples is not None or (self._examples is not None and type(closure) is not _Given):
            raise ValueError(
                f"{name} needs the loss of the whole batch, and step() of micro-batches does not "
                f"give it. Let the closure go over all of the batch's examples, without "
                f"{self._examples_argument or 'num_samples'}=; or call gather(num_samples=m), and "
                f"when it returns True step_by_rule(mean_loss, evaluate)."
            )
        if closure is None:
            raise ValueError(
                f"step() needs a closure with {name}: a function that calls zero_grad(), computes "
                f"the loss, calls backward() and returns the loss. Received: none. (A GradScaler "
                f"gives none: use bfloat16, which needs no loss scale.)"
            )
        if self._examples is not None and not self._is_complete:
            raise ValueError(
                f"{self._gathered} of the {self._examples} examples of this update are in: call "
                f"gather(num_samples=m) until it returns True."
            )
        if self.param_groups[0][_RULE].get("mode") == "eval":
            raise ValueError(
                "The parameters hold the average: call optimizer.step_size.train(optimizer) "
                "before training goes on."
            )

    def _factor(self, rule: StepSize) -> float:
        """A schedule's factor on what the rule gives."""
        pairs = {(g["lr"], g.get("initial_lr", g["lr"])) for g in self.param_groups}
        if len(pairs) > 1:
            raise ValueError(
                f"All groups share the η of {type(rule).__name__}, and so one lr. "
                f"Received: {', '.join(str(lr) for lr, _ in sorted(pairs))}."
            )
        ((lr, initial),) = pairs
        if not isfinite(lr):
            raise ValueError(f"Invalid learning rate: {lr}. Expected lr finite.")
        if not rule.needs.lr and initial != 1:
            raise ValueError(_two_owners(rule, initial))
        return float(lr / initial) if initial != 0 else 1.0

    def _peak(self, lr: Any, rule: StepSize | None) -> tuple[float | Tensor, StepSize]:
        """lr of the groups, and the rule; "auto" stands for one."""
        if isinstance(lr, str):
            if lr != "auto":
                raise ValueError(f"lr must be a number or 'auto'. Received: lr={lr!r}.")
            if rule is not None:
                raise ValueError(
                    f"lr='auto' chooses a rule, and step_size={rule!r} is one: η would have two "
                    f"owners. Leave one out."
                )
            return 1.0, automatic(self._full_batch)
        if not isinstance(rule, StepSize):
            raise ValueError(
                f"step_size must be a gdtrain.step_sizes.StepSize. Received: {rule!r}."
            )
        if isinstance(lr, Tensor):
            raise ValueError("With a step-size rule lr must be a number. Received: a tensor.")
        if rule.needs.lr:
            return lr, rule
        if lr not in (_DEFAULT_LR, 1.0):
            raise ValueError(_two_owners(rule, lr))
        return 1.0, rule

    def _check_rule(self, group: dict[str, Any]) -> None:
        """Whether the rule holds for a group."""
        rule = self.step_size
        assert rule is not None
        if group["differentiable"]:
            raise ValueError(f"{type(rule).__name__} does not go with differentiable=True.")
        lr = group["lr"]
        if isinstance(lr, Tensor) or lr != self.defaults["lr"]:
            raise ValueError(
                f"All groups share the η of {type(rule).__name__}, and so one lr. Received: a "
                f"group with lr={lr}."
            )
        rule.check(
            full_batch=self._full_batch,
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            total_updates=self.total_updates,
        )

    def _check_same_rule(self, groups: list[dict[str, Any]]) -> None:
        saved = _rule_numbers(groups[0]).get("rule") if groups else None
        own = None if self.step_size is None else type(self.step_size).__name__
        if saved is not None and own is not None and saved != own:
            raise ValueError(
                f"This state was saved with the rule {saved}, and this optimizer has {own}: "
                f"construct it with step_size={saved}(…)."
            )

    def _adopt_groups(self, saved: list[dict[str, Any]]) -> None:
        """After loading: a rule's numbers in the first group if there is a rule, else none."""
        if self.step_size is None:
            for group in self.param_groups:
                group.pop(_RULE, None)
        elif _RULE in saved[0]:
            self.param_groups[0][_RULE] = _rule_numbers(saved[0])
        else:
            self.param_groups[0][_RULE] = {}
            if not self.step_size.needs.lr:  # lr was η; what a schedule had made of it remains
                for group in self.param_groups:
                    lr, initial = float(group["lr"]), float(group.get("initial_lr", group["lr"]))
                    group["lr"] = lr / initial if initial != 0 else 1.0
                    if "initial_lr" in group:
                        group["initial_lr"] = 1.0

    # ------------------------------------------------------------------ gathering

    def gather(self, num_samples: int) -> bool:
        """Take in the gradients of one micro-batch; say whether the update's examples are all in.

        If they are, each `p.grad` is the exact mean gradient over the B examples, so that it can
        be looked at or clipped before `step()`. `step(num_samples=m)` does both at once.

        Args:
            num_samples: The number of examples whose mean the gradients are, range [1, B].

        Returns:
            True if B examples are in: call `step()` next.

        Raises:
            ValueError: As for `step`.

        Example:
            >>> from gdtrain import GD
            >>> theta = torch.nn.Parameter(torch.tensor(0.0))
            >>> optimizer = GD([theta], lr=1.0, num_samples=3)
            >>> for x in torch.tensor([1.0, 2.0]), torch.tensor([6.0]):
            ...     optimizer.zero_grad()
            ...     (0.5 * (theta - x) ** 2).mean().backward()
            ...     if optimizer.gather(num_samples=len(x)):
            ...         _ = torch.nn.utils.clip_grad_norm_([theta], max_norm=10.0)
            ...         optimizer.step()
            >>> theta.item()  # the mean of 1, 2 and 6
            3.0
        """
        self._gather(self._check_gatherable(num_samples))
        return self._is_complete and self._hand_over()

    def close(self) -> bool:
        """Let the update be made from the examples that are in, though fewer than B.

        As if `gather()` had returned True: each `p.grad` is the exact mean over what is in, to be
        clipped before `step()`. `flush()` closes and steps at once.

        Returns:
            True if examples are in: call `step()` next.

        Example:
            >>> from gdtrain import MiniBatchSGD
            >>> theta = torch.nn.Parameter(torch.tensor(0.0))
            >>> optimizer = MiniBatchSGD([theta], lr=1.0, batch_size=64)
            >>> (0.5 * (theta - torch.tensor([1.0, 3.0])) ** 2).mean().backward()
            >>> if optimizer.gather(num_samples=2) or optimizer.close():  # the epoch is over
            ...     _ = torch.nn.utils.clip_grad_norm_([theta], max_norm=0.5)
            ...     optimizer.step()
            >>> round(theta.item(), 4)  # the mean was -2
            0.5
        """
        if self._examples is None or self._gathered == 0:
            return False
        if not self._is_complete:
            self._close()
            return self._hand_over()
        return True

    def discard(self) -> int:
        """Throw away what is gathered: the next micro-batch begins a new update.

        Returns:
            How many examples were in.

        Example:
            >>> from gdtrain import MiniBatchSGD
            >>> theta = torch.nn.Parameter(torch.tensor(0.0))
            >>> optimizer = MiniBatchSGD([theta], lr=1.0, batch_size=64)
            >>> (0.5 * (theta - torch.tensor([1.0, 3.0])) ** 2).mean().backward()
            >>> optimizer.step(num_samples=2)
            >>> optimizer.discard(), optimizer.flush(), theta.item()
            (2, False, 0.0)
        """
        if self._examples is None:
            return 0
        count = self._gathered
        for p in [p for p in self.state if isinstance(p, Tensor)]:  # hooks may add other keys
            self._pop(p, _SUM, _MEAN, _FINITE)
        for group in self.param_groups:
            group[_COUNT], group[_OVERFLOW] = 0, False
        return count

    def flush(self) -> bool:
        """Update from the examples that are in, though fewer than B: the end of an epoch.

        Returns:
            Whether there were any, and so an update (unless an overflow cancelled it).

        Example:
            >>> from gdtrain import MiniBatchSGD
            >>> theta = torch.nn.Parameter(torch.tensor(0.0))
            >>> optimizer = MiniBatchSGD([theta], lr=1.0, batch_size=64)
            >>> (0.5 * (theta - torch.tensor([1.0, 3.0])) ** 2).mean().backward()
            >>> optimizer.step(num_samples=2)
            >>> optimizer.flush(), theta.item()
            (True, 2.0)
        """
        if self._examples is None or self._gathered == 0:
            return False
        if not self._is_complete:
            self._close()
        cancelled = self.param_groups[0][_OVERFLOW]
        self.step()
        return not cancelled

    @property
    def _examples(self) -> int | None:
        name = self._examples_argument
        return None if name is None else self.defaults[name]

    @property
    def _gathered(self) -> int:
        return self.param_groups[0].get(_COUNT, 0)

    @_gathered.setter
    def _gathered(self, count: int) -> None:
        for group in self.param_groups:
            group[_COUNT] = count

    @property
    def _is_complete(self) -> bool:
        return self._examples is None or self._gathered == self._examples

    def _check_gatherable(self, num_samples: int | None) -> int:
        """num_samples, as an int; or what is wrong with it."""
        if self._examples is None:
            name = self._examples_argument
            raise ValueError(
                f"step() received num_samples={num_samples}, but this optimizer gathers nothing: "
                + (
                    f"construct it with {name}= the number of examples per update."
                    if name
                    else "each step of SGD is an update. GD(num_samples=N) and "
                    "MiniBatchSGD(batch_size=B) gather."
                )
            )
        if self._is_complete:
            raise ValueError(
                f"All {self._examples} examples of this update are in: call step() without "
                f"num_samples before gathering more. Received: num_samples={num_samples}."
            )
        if num_samples is None:
            raise ValueError(
                f"step() needs num_samples, the number of examples whose mean p.grad is: this "
                f"optimizer updates every {self._examples} examples "
                f"({self._examples_argument}={self._examples}) and {self._gathered} are in."
            )
        num_samples = _count("num_samples", num_samples)
        missing = self._examples - self._gathered
        if num_samples > missing:
            raise ValueError(
                f"num_samples must be at most {missing}: {self._gathered} of the "
                f"{self._examples} examples of this update are in. Received: {num_samples}. "
                f"A micro-batch cannot be divided between two updates; cut it to size, or call "
                f"flush() at the end of an epoch. (An update that went wrong half-way is thrown "
                f"away by discard().)"
            )
        return num_samples

    @property
    def _is_scaled(self) -> bool:
        """Whether this is a step that a GradScaler makes."""
        return hasattr(self, "found_inf")

    @torch.no_grad()
    def _is_due(self, num_samples: int | None) -> bool:
        """Take a micro-batch in, if one is given; say whether an update is to be made now."""
        overflow = bool(getattr(self, "found_inf", False))
        scale = getattr(self, "grad_scale", None)
        scale = 1.0 if scale is None else float(scale)  # by which p.grad is still too large
        if num_samples is not None:
            self._gather(num_samples, scale, overflow)
            if not self._is_complete:
                return False
        else:  # gather() has closed the update
            if self._is_scaled and not overflow:
                known = [self.state[p] for p in self._parameters() if p in self.state]
                overflow = not all(state.get(_FINITE, True) for state in known)
            if scale != 1 and not overflow:
                for p in self._parameters():
                    p.grad = None if p.grad is None else p.grad / scale
        if overflow or self.param_groups[0][_OVERFLOW]:
            self.discard()
            return False
        return True

    @torch.no_grad()
    def _gather(self, num_samples: int, scale: float = 1.0, overflow: bool = False) -> None:
        """Add m·g to what is in; g = p.grad / scale."""
        self._gathered += num_samples
        if overflow:
            for group in self.param_groups:
                group[_OVERFLOW] = True
        if self.param_groups[0][_OVERFLOW]:
            for p in self._parameters():
                self._pop(p, _SUM)
        elif num_samples == self._examples and scale == 1:
            return  # the whole batch at once: p.grad is the mean already
        else:
            for p in self._parameters():
                if p.grad is None:
                    continue
                state, weight = self.state[p], num_samples / scale
                if _SUM in state:
                    state[_SUM].add_(p.grad, alpha=weight)
                else:
                    dtype = torch.promote_types(p.grad.dtype, torch.float32)
                    state[_SUM] = p.grad.detach().to(dtype, copy=True).mul_(weight)
        if self._is_complete:
            self._close()

    @torch.no_grad()
    def _close(self) -> None:
        """Put the mean of what is in into p.grad (a new tensor), and let an update follow."""
        for p in self._parameters():
            total = self._pop(p, _SUM)
            # Without a sum, a gradient of a micro-batch that is not in must not take part.
            p.grad = None if total is None else total.div_(self._gathered).to(p.dtype)
        self._gathered = self._examples or 0

    @torch.no_grad()
    def _hand_over(self) -> bool:
        """Keep the means in the state while they are the user's to clip, until step()."""
        for p in self._parameters():
            if p.grad is not None:
                entries = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                self.state[p].update({_MEAN: p.grad, _FINITE: torch.isfinite(entries).all()})
        return True

    def _pop(self, p: Tensor, *names: str) -> Tensor | None:
        """Take entries out of the state of p, and leave none that is empty; return the last."""
        if p not in self.state:
            return None
        value = None
        for name in names:
            value = self.state[p].pop(name, None)
        if not self.state[p]:
            del self.state[p]
        return value

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


def _count(name: str, value: Any) -> int:
    """The number of examples that is meant: an int, or an integer of numpy's or of torch's."""
    is_bool = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        count = 0 if is_bool else operator.index(value)
    except TypeError:
        count = 0
    if count < 1:
        raise ValueError(
            f"{name} must be a whole number of examples, at least 1. Received: {value!r}."
        )
    return count


def _is_zero(gradient: Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not bool(local.count_nonzero())


def _blank(p: Tensor) -> Tensor:
    """In the place of a tensor that a rule does not keep yet."""
    return torch.full_like(p, nan, dtype=torch.promote_types(p.dtype, torch.float32)).detach()


def _is_blank(tensor: Tensor) -> bool:
    found = tensor.isnan().all()
    if hasattr(found, "full_tensor"):
        found = found.full_tensor()  # all ranks decide alike
    return tensor.numel() > 0 and bool(found)


def _as_list(numbers: dict[str, Any]) -> list[Any]:
    """[names from the outermost in, value] of each number: no dict, which would be taken apart."""
    pairs: list[Any] = []
    for name, value in numbers.items():
        if isinstance(value, dict):
            pairs += [[[name, *names], number] for names, number in _as_list(value)]
        else:
            pairs.append([[name], value])
    return pairs


def _rule_numbers(group: dict[str, Any]) -> dict[str, Any]:
    """A rule's numbers in a saved group."""
    saved = group.get(_RULE, {})
    if _WHOLE not in saved:
        return dict(saved)
    numbers: dict[str, Any] = {}
    for names, value in saved[_WHOLE]:
        place = numbers
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = value
    return numbers


def _two_owners(rule: StepSize, lr: float) -> str:
    return (
        f"η would have two owners: {type(rule).__name__} computes it, and lr={lr:g} sets it. Leave "
        f"lr out (or 1.0), or step_size; a schedule may scale the rule's η, from lr=1.0."
    )


def _check_hyperparameters(group: dict[str, Any]) -> None:
    """One message per range, opening with the words of torch.optim."""
    lr, momentum, weight_decay = (
        value.detach() if isinstance(value, Tensor) else value
        for value in (group["lr"], group["momentum"], group["weight_decay"])
    )
    if isinstance(lr, str):
        raise ValueError(f"lr='auto' is for all groups at once. Received: a group with lr={lr!r}.")
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not (0 <= float(lr) < inf):
        raise ValueError(f"Invalid learning rate: {lr}. Expected lr finite and >= 0.")
    if not (0 <= momentum < inf):
        raise ValueError(f"Invalid momentum value: {momentum}. Expected it finite and >= 0.")
    if not isfinite(group["dampening"]):
        raise ValueError(f"Invalid dampening value: {group['dampening']}. Expected it finite.")
    if not (0 <= float(weight_decay) < inf):
        raise ValueError(
            f"Invalid weight_decay value: {weight_decay}. Expected it finite and >= 0."
        )
    if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
        raise ValueError("Nesterov momentum requires a momentum and zero dampening")
    if group["fused"]:
        if group["differentiable"]:
            raise RuntimeError("`fused` does not support `differentiable`")
        if group["foreach"]:
            raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
