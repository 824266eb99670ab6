"""Which tensors of a group PyTorch's fused kernel may update: decided once, checked at each step.

`torch._fused_sgd_` makes the whole update of a list of tensors in one pass over memory, faster than
anything else on a CPU. But it believes what it is told: it looks neither at strides nor at sizes,
and it rounds some entries less often than the loop that is promised. So a plan takes only the
tensors for which it is safe and, unless the user has asked for the kernel, gives the very bits of
`gdtrain.rules.descend_`. The rest is left to `descend_`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, get_num_threads, is_grad_enabled

from gdtrain._compat import torch_kernels
from gdtrain.rules import VECTOR, UpdateRule, descend_, fused_is_exact, scale_

__all__ = ["Plan"]

# With several threads the kernel opens a parallel region for each tensor of more than a cache line:
# 1 µs, and a wait for the other processors if they are busy. torch's other loops do so from a size
# on, and below it need half the time.
_CACHE_LINE, _PARALLEL = 64, 32768

# As many entries as one more pass costs less for than a second call.
_CHEAP = 16384

# From so many tensors on, it pays to call something once more for them.
_SEVERAL, _MANY = 8, 64

_NO_STATE: dict[str, Any] = {}
_Tensors: TypeAlias = tuple[list[Tensor], list[Any], list[Any]]  # θ, g, b


class Plan:
    """How the tensors of a group are updated, for as long as they stay what they are.

    A plan holds no tensor and remembers no value: whatever has replaced a parameter, a gradient or
    a buffer is used, and where it is of another kind, the plan no longer holds. The group's lr and
    weight_decay are numbers; with momentum, `state` has a buffer of each parameter with a gradient.
    """

    def __init__(self, group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> None:
        params, grads = _with_gradient(group["params"], [p.grad for p in group["params"]])
        momentum = group["momentum"] != 0
        buffers = [state[p]["momentum_buffer"] for p in params] if momentum else []
        self._some_lack_gradients = len(params) < len(group["params"])
        self._made_for = _kind(params, group)
        columns = zip(params, grads, buffers or grads, strict=True)
        whole = [i for i, tensors in enumerate(columns) if _is_safe(*tensors)]
        ends: list[int] = []
        if not group["fused"]:
            whole = [i for i in whole if params[i].is_cpu and fused_is_exact(params[i].dtype)]
            if get_num_threads() > 1:
                whole = _worth_threads(params, whole)
            if momentum:
                ends = [i for i in whole if params[i].numel() % VECTOR]
                whole = [i for i in whole if params[i].numel() % VECTOR == 0]
                if _is_joined(group):
                    ends = []
                elif ends and sum(params[i].numel() for i in whole) <= _CHEAP:
                    whole, ends = [], sorted(whole + ends)  # in one call
        # The kernel takes one device and dtype, and what the user gave it whole, or not at all.
        kinds = {(params[i].device, params[i].dtype) for i in whole + ends}
        if len(kinds) != 1 or (group["fused"] and len(whole) < len(params)):
            whole, ends = [], []
        tensors = params, grads, buffers
        self._guards = _guards(_of(tensors, whole + ends))
        if self._guards is None:
            whole, ends = [], []
        # The kernel takes these; and these after μ b, rounded on its own as in `descend_`, as if μ
        # were 1: for the entries at their end that fill no vector.
        self._whole, self._ends = whole, ends
        self._left = sorted({*range(len(params))} - {*whole, *ends})
        self.takes_all = len(params) in (len(whole), len(ends))

    def descend_(self, group: Mapping[str, Any], state: Mapping[Tensor, Any]) -> bool:
        """Update in place if the plan still holds, and say whether it does; else change nothing."""
        params = group["params"]
        grads = [p.grad for p in params]
        if self._some_lack_gradients:
            params, grads = _with_gradient(params, grads)
        if self._made_for != _kind(params, group):
            return False
        momentum, buffers = group["momentum"], []
        if momentum != 0:
            buffers = [state.get(p, _NO_STATE).get("momentum_buffer") for p in params]
        if self.takes_all:
            if not self._guards.check(*params, *grads, *buffers):
                return False
            if self._ends:
                if _is_joined(group):
                    return False
                scale_(buffers, momentum)
                momentum = 1.0
            if len(params) < _MANY:
                _fused_(params, grads, buffers, momentum, group)
            else:  # without asking each tensor whether autograd has something to do
                with torch_kernels.BelowAutograd():
                    _fused_(params, grads, buffers, momentum, group)
            return True
        return self._descend_by_parts_((params, grads, buffers), group)

    def _descend_by_parts_(self, tensors: _Tensors, group: Mapping[str, Any]) -> bool:
        whole, ends, left = self._whole, self._ends, self._left
        if any(t is None for t in _of(tensors, left)) or (ends and _is_joined(group)):
            return False
        if self._guards is not None and not self._guards.check(*_of(tensors, whole + ends)):
            return False
        if left:  # first, for they may be refused: an error then changes nothing
            descend_(*_parts(tensors, left), **UpdateRule.of(group)._asdict())
        if whole:
            _fused_(*_parts(tensors, whole), group["momentum"], group)
        if ends:
            part = _parts(tensors, ends)
            scale_(part[2], group["momentum"])
            _fused_(*part, 1.0, group)
        return True


def _fused_(
    params: list[Tensor],
    grads: list[Any],
    buffers: list[Any],
    momentum: float,
    group: Mapping[str, Any],
) -> None:
    torch_kernels.fused_sgd_(
        params,
        grads,
        buffers,
        lr=group["lr"],
        momentum=momentum,
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        is_first_step=False,
    )
    # For autograd, which is to refuse what was saved of the old ones.
    torch_kernels.increment_version(params)


def _kind(params: list[Tensor], group: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on, besides the tensors."""
    return (
        len(params),
        group["momentum"] != 0,
        group["fused"],
        group["foreach"],
        group["lr"].__class__,
        group["weight_decay"].__class__,
        get_num_threads(),
        is_grad_enabled(),
    )


def _guards(tensors: list[Tensor]) -> Any:
    """A comparison with these tensors; None if there are none, or one is in two places."""
    if not tensors or torch_kernels.TensorGuards is None:
        return None  # without the comparison, nothing is planned
    guards = torch_kernels.TensorGuards(
        *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
    )
    return guards if guards.check(*tensors) else None


def _parts(tensors: _Tensors, indices: list[int]) -> _Tensors:
    """Those of some parameters: θ, g, and b where there are buffers."""
    params, grads, buffers = tensors
    return (
        [params[i] for i in indices],
        [grads[i] for i in indices],
        [buffers[i] for i in indices] if buffers else [],
    )


def _of(tensors: _Tensors, indices: list[int]) -> list[Any]:
    """The same, in one list."""
    return [t[i] for t in tensors if t for i in indices]


def _with_gradient(params: list[Tensor], grads: list[Any]) -> tuple[list[Tensor], list[Any]]:
    return (
        [p for p, g in zip(params, grads, strict=True) if g is not None],
        [g for g in grads if g is not None],
    )


def _is_joined(group: Mapping[str, Any]) -> bool:
    """Whether the rule has products besides μ b that the kernel may join to a sum."""
    return bool(group["nesterov"]) or group["dampening"] != 0


def _is_safe(p: Tensor, *others: Tensor) -> bool:
    """Whether the kernel, which walks over memory, may update p from the others."""
    return (
        _is_plain(p)
        and p.is_floating_point()
        and p.device.type in ("cpu", "cuda")
        and torch_kernels.is_dense(p)
        and all(
            _is_plain(t)
            and (t.dtype, t.device, t.shape, t.stride()) == (p.dtype, p.device, p.shape, p.stride())
            for t in others
        )
    )


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.layout == torch.strided


def _worth_threads(params: Sequence[Tensor], taken: list[int]) -> list[int]:
    """Those for which the kernel is the better way with several threads."""
    large = {i for i in taken if params[i].numel() >= _PARALLEL}
    small = {i for i in taken if params[i].nbytes <= _CACHE_LINE}
    middling = set(taken) - large - small
    if large and len(middling) < _SEVERAL:
        return taken
    if len(small) < _SEVERAL and middling:
        small = set()
    return sorted(large | small)
