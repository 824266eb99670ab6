"""The shell that the three optimizers share: arguments, state, closures, gathering.

N examples in the training set, B examples per update, m examples in one micro-batch.
The mathematics is in `gdtrain.rules`; this file decides on which tensors it acts, and when.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    ParamsT,
    _device_dtype_check_for_fused,
    _use_grad_for_differentiable,
)

from gdtrain.rules import descend_, fused_descend_

__all__ = ["Descent"]

_SUM = "gathered_sum"  # Σ m·g over the micro-batches so far, in state[p]
_EXAMPLES_ARGUMENTS = ("num_samples", "batch_size")  # of the subclasses
_COUNT = "gathered"  # Σ m, in each group


class Descent(Optimizer):
    """Gradient descent, whatever the number of examples in an update.

    Base of `GD`, `SGD` and `MiniBatchSGD`; use one of these. With a number of examples per update,
    it gathers micro-batches until that many are in, and updates from their exact mean

        g = (Σ m_i g_i) / B,    B = Σ m_i,    g_i the mean gradient of the i-th m_i examples.

    Args:
        params: Parameters, named parameters, or parameter groups.
        lr: η, the length of a step, range [0, ∞); a float or a tensor with one element.
        momentum: μ, range [0, ∞).
        dampening: τ.
        weight_decay: λ, range [0, ∞).
        nesterov: Nesterov momentum; needs momentum > 0 and dampening = 0.
        examples: Examples per update, or None: then every `step()` is an update.
        maximize: Climb instead of descend.
        foreach: False applies the rule tensor by tensor, else to a whole group at once.
        differentiable: Let autograd see the step.
        fused: Use PyTorch's fused kernel.

    Raises:
        ValueError: A hyperparameter is out of range.
        RuntimeError: `fused` with `differentiable`, with `foreach`, or with parameters that the
            kernel does not take.

    Example:
        >>> theta = torch.nn.Parameter(torch.tensor([4.0]))
        >>> optimizer = Descent([theta], lr=0.25)
        >>> (theta**2).sum().backward()
        >>> optimizer.step()
        >>> theta.data
        tensor([2.])
    """

    # The constructor argument that holds the number of examples per update.
    _examples_argument: ClassVar[str | None] = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
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
    ) -> None:
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
            if examples is not None:
                _check_count(self._examples_argument, examples)
            defaults[self._examples_argument] = examples
            defaults[_COUNT] = 0
        _check_hyperparameters(defaults)
        super().__init__(params, defaults)

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
        if self.param_groups and self._gathered:
            raise ValueError(
                f"Parameters cannot be added while micro-batches are being gathered "
                f"({self._gathered} of {self._examples} examples are in): "
                f"finish the update, or call flush(), first."
            )
        if isinstance(param_group, dict) and self._examples_argument is not None:
            # A copy, for the group may be another optimizer's, in the middle of its update.
            param_group = {**param_group, self._examples_argument: self._examples, _COUNT: 0}
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # reached from load_state_dict too, whose states may be old
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)
            if self._examples_argument is not None:
                group.setdefault(_COUNT, 0)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, of this class or of `torch.optim.SGD`.

        Args:
            state_dict: What `state_dict()` returned.

        Raises:
            ValueError: The groups do not match, or the state was saved in the middle of gathering
                another number of examples.

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
            loaded.update(state)

        handle = self.register_load_state_dict_pre_hook(last_hook)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        if self._examples_argument is not None:
            for group in self.param_groups:
                group[self._examples_argument] = self._examples
        # The base class casts all state to the parameter's dtype; a half-precision sum is no sum.
        theirs = [i for group in loaded["param_groups"] for i in group["params"]]
        for p, i in zip(self._parameters(), theirs, strict=True):
            total = loaded["state"].get(i, {}).get(_SUM)
            if total is not None:
                self.state[p][_SUM] = total.to(p.device, copy=True)

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

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Asked by GradScaler: the fused kernel unscales. (Computed: survives deepcopy, pickle.)"""
        return all(group["fused"] for group in self.param_groups) and self._examples is None

    # ------------------------------------------------------------------ the step

    @overload
    def step(self, closure: None = None, *, num_samples: int | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, num_samples: int | None = None) -> float: ...

    @_use_grad_for_differentiable
    def step(
        self, closure: Callable[[], float] | None = None, *, num_samples: int | None = None
    ) -> float | None:
        """Update the parameters from their gradients; when gathering, once B examples are in.

        Args:
            closure: Computes the loss and the gradients, and returns the loss.
            num_samples: The number of examples, range [1, B], whose mean the gradients are.
                Required when gathering, except after `gather()` returned True; else refused.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: `num_samples` is missing, not a count, more than is missing to B, or given
                to an optimizer that gathers nothing. Nothing is changed then.
        """
        if num_samples is not None or not self._is_complete:
            self._check_gatherable(num_samples)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if num_samples is not None and not self._gather(num_samples):
            return loss
        for group in self.param_groups:
            self._update(group)
        if self._examples is not None:
            self._gathered = 0
        return loss

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

    def _update(self, group: dict[str, Any]) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        buffers: list[Tensor | None] = []
        self._init_group(group, params, grads, buffers)
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
                for value in [getattr(self, name, None)]
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
        self._check_gatherable(num_samples)
        return self._gather(num_samples)

    def flush(self) -> bool:
        """Update from the examples that are in, though fewer than B: the end of an epoch.

        Returns:
            Whether there were any, and so an update.

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
        self.step()
        return True

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

    def _check_gatherable(self, num_samples: int | None) -> None:
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
        _check_count("num_samples", num_samples)
        missing = self._examples - self._gathered
        if num_samples > missing:
            raise ValueError(
                f"num_samples must be at most {missing}: {self._gathered} of the "
                f"{self._examples} examples of this update are in. Received: {num_samples}. "
                f"A micro-batch cannot be divided between two updates; cut it to size, or call "
                f"flush() at the end of an epoch."
            )

    @torch.no_grad()
    def _gather(self, num_samples: int) -> bool:
        if num_samples == self._examples:  # the whole batch at once: p.grad is the mean already
            self._gathered = num_samples
            return True
        for p in self._parameters():
            if p.grad is None:
                continue
            state = self.state[p]
            if _SUM in state:
                state[_SUM].add_(p.grad, alpha=num_samples)
            else:
                dtype = torch.promote_types(p.grad.dtype, torch.float32)
                state[_SUM] = p.grad.detach().to(dtype, copy=True).mul_(num_samples)
        self._gathered += num_samples
        if self._is_complete:
            self._close()
        return self._is_complete

    @torch.no_grad()
    def _close(self) -> None:
        """Put the mean of what is in into p.grad (a new tensor), and let an update follow."""
        for p in self._parameters():
            total = self.state[p].pop(_SUM, None) if p in self.state else None
            # Without a sum, a gradient of a micro-batch that is not in must not take part.
            p.grad = None if total is None else total.div_(self._gathered).to(p.dtype)
            if p in self.state and not self.state[p]:
                del self.state[p]
        self._gathered = self._examples or 0

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} must be a whole number of examples, at least 1. Received: {value!r}."
        )


def _check_hyperparameters(group: dict[str, Any]) -> None:
    """One message per range, opening with the words of torch.optim."""
    lr, momentum, weight_decay = (
        value.detach() if isinstance(value, Tensor) else value
        for value in (group["lr"], group["momentum"], group["weight_decay"])
    )
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    if not (0 <= float(lr) < math.inf):
        raise ValueError(f"Invalid learning rate: {lr}. Expected lr finite and >= 0.")
    if not (0 <= momentum < math.inf):
        raise ValueError(f"Invalid momentum value: {momentum}. Expected it finite and >= 0.")
    if not math.isfinite(group["dampening"]):
        raise ValueError(f"Invalid dampening value: {group['dampening']}. Expected it finite.")
    if not (0 <= float(weight_decay) < math.inf):
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
