"""One application of the update rule to an optimizer's groups: the fastest way that is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf, isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim.optimizer import ParamsT

from gdtrain._compat.torch_optimizer import LightOptimizer, check_fused
from gdtrain.optim.plan import Plan
from gdtrain.rules import UpdateRule, descend_, fused_descend_

__all__ = ["Updating"]


class Updating(LightOptimizer):
    """An optimizer that applies the update rule of each group to its parameters."""

    rule: ClassVar[Callable[..., None]] = staticmethod(descend_)
    """The update rule, with the arguments of `gdtrain.rules.descend_`."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        check_hyperparameters(defaults)
        self._plans: dict[int, Plan] = {}  # by the group's position
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans = {}
        for group in self.param_groups:  # reached from load_state_dict too, whose states may be old
            group.setdefault("nesterov", False)
            group.setdefault("maximize", False)
            group.setdefault("foreach", None)
            group.setdefault("differentiable", False)
            group.setdefault("fused", None)

    @property
    def _is_scaled(self) -> bool:
        """Whether this is a step that a GradScaler makes."""
        return hasattr(self, "found_inf")

    def _forget_scaler(self) -> None:
        """What a GradScaler whose step raises leaves; it would multiply the next scale by it."""
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _scaler(self) -> dict[str, Tensor | None]:
        """By what the fused kernel divides the gradients, and whether it skips the update."""
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}

    def _parameters(self) -> Iterator[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _with_states(self, exported: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The parameters, each with its part of a state."""
        places = (i for group in exported["param_groups"] for i in group["params"])
        pairs = zip(self._parameters(), places, strict=True)
        return ((p, exported["state"].get(i, {})) for p, i in pairs)

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

    def _is_blank_step(self) -> bool:
        """Whether this is no update, but `torch.distributed.checkpoint` asking for state.

        It sets each lr to 0 and each gradient to zeros, and calls step().
        """
        grads = [p.grad for p in self._parameters() if p.requires_grad]
        return (
            not self._is_scaled
            and all(float(group["lr"]) == 0 for group in self.param_groups)
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
            or self.rule is not descend_
        )

    def _descend(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor | None],
    ) -> None:
        rule = {name: group[name] for name in UpdateRule._fields}
        if group["fused"]:
            self._update_fused(params, grads, buffers, rule)
        elif group["foreach"] is False:
            for i, (p, g) in enumerate(zip(params, grads, strict=True)):
                own = buffers[i : i + 1]
                self.rule([p], [g], own, **rule)
                buffers[i : i + 1] = own
        else:
            self.rule(params, grads, buffers, **rule)
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
        if self.rule is not descend_:
            raise RuntimeError(f"`fused` has no kernel for {type(self).__name__}: use fused=None.")
        if any(g.is_sparse for g in grads):
            raise RuntimeError("`fused` does not support sparse gradients: use fused=None.")
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for i, p in enumerate(params):
            check_fused(p)
            kinds.setdefault((p.device, p.dtype), []).append(i)
        for (device, _), part in kinds.items():
            part_buffers = [buffers[i] for i in part] if buffers else []
            scaler: dict[str, Any] = {
                name: None if value is None else value.to(device, non_blocking=True)
                for name, value in self._scaler().items()
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


def check_hyperparameters(group: dict[str, Any]) -> None:
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


def _is_zero(gradient: Tensor) -> bool:
    local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return not bool(local.count_nonzero())
