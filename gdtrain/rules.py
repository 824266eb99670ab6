"""The update rules of gradient descent, written by hand.

    d = g + λθ                        the gradient, plus that of ½λ‖θ‖² (weight decay)
    θ ← θ − η d                       gradient descent

    b ← μ b + (1 − τ) d               momentum: a decaying sum of gradients (b = d at first)
    θ ← θ − η b

    θ ← θ − η (d + μ b)               Nesterov momentum, with b already updated

θ parameters, g gradient, b momentum buffer, η step size (`lr`), μ `momentum`, τ `dampening`,
λ `weight_decay`. With `maximize`, −g stands for g. A rule knows nothing else: not where η comes
from, nor how many examples g averages.

The functions act on lists of tensors of any shape, dtype, layout and device; the k-th entries of
the lists belong together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdtrain._compat import torch_foreach as foreach
from gdtrain._compat import torch_kernels

__all__ = ["VECTOR", "UpdateRule", "descend_", "fused_descend_", "fused_is_exact", "scale_"]

# Entries of the longest vector register: 64 bytes of float32.
VECTOR = 16


class UpdateRule(NamedTuple):
    """The rule of a parameter group as data: the arguments of `descend_`.

    Example:
        >>> group = torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9).param_groups[0]
        >>> UpdateRule.of(group).momentum
        0.9
    """

    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float | Tensor
    nesterov: bool
    maximize: bool

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> UpdateRule:
        """Of a group of an optimizer's."""
        return cls(*(group[name] for name in cls._fields))


def descend_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """Make one update of every parameter, in place.

    The mathematics and the other symbols stand at the head of this module.

    Args:
        params: θ, changed in place.
        grads: g, as many as `params`; only read.
        buffers: b, as many as `params` if `momentum` is not 0, else ignored. Changed in place; a
            `None` is replaced by a copy of d: momentum starts undampened.
        lr: η, the length of the step, range [0, ∞).
        momentum: μ, range [0, ∞), stable below 1.
        dampening: τ, range (−∞, ∞), customary [0, 1).
        weight_decay: λ, range [0, ∞).
        nesterov: Look ahead along the new buffer.
        maximize: Climb instead of descend.

    Example:
        >>> theta = [torch.tensor([1.0, 2.0, 3.0, 4.0])]
        >>> descend_(theta, [torch.tensor([1.0, 6.0, 7.0, 2.0])], [], lr=0.5)
        >>> theta
        [tensor([ 0.5000, -1.0000, -0.5000,  3.0000])]

    References:
        Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées, 1847.
        Polyak, Some methods of speeding up the convergence of iteration methods, 1964.
        Sutskever et al., On the importance of initialization and momentum in deep learning, ICML
        2013 (momentum and Nesterov in this form, which PyTorch shares: η multiplies the buffer).
    """
    if not params:
        return
    d: tuple[Tensor, ...] | list[Tensor] = foreach.neg(grads) if maximize else grads
    ours = maximize  # whether d is a temporary, which may change in place, or `grads`
    # Autograd, where it looks on, keeps operands that are about to change: it gets copies.
    theta = [p.clone() for p in params] if torch.is_grad_enabled() else params
    weight_decay = _read(weight_decay)
    if isinstance(weight_decay, Tensor):
        penalty = foreach.mul(theta, weight_decay.reshape(()))
        d, ours = _plus(d, penalty, 1, ours), True
    elif weight_decay != 0:
        d, ours = _plus(d, theta, weight_decay, ours), True
    if momentum != 0:
        b = _accumulate_(buffers, d, momentum, dampening)
        if torch.is_grad_enabled():
            b = [buffer.clone() for buffer in b]
        d = _plus(d, b, momentum, ours) if nesterov else b
    if isinstance(lr, Tensor):
        lr = lr.reshape(())
    if isinstance(lr, Tensor) and _is_factor(lr):
        foreach.sub_(params, foreach.mul(d, lr))
    else:
        foreach.add_(params, d, alpha=-lr)  # type: ignore[arg-type]


def _is_factor(number: Tensor) -> bool:
    """Whether it must stay a tensor: autograd or the compiler looks at it."""
    return number.requires_grad or torch.compiler.is_compiling()


def _read(number: float | Tensor) -> float | Tensor:
    """As a number where it may be one: its products and sums then round as in torch.optim."""
    if not isinstance(number, Tensor) or _is_factor(number):
        return number
    return float(number.item())


def _plus(
    d: tuple[Tensor, ...] | list[Tensor],
    other: tuple[Tensor, ...] | list[Tensor],
    factor: float,
    in_place: bool,
) -> tuple[Tensor, ...] | list[Tensor]:
    """d + factor · other, in place if d is a temporary: one temporary at a time."""
    if not in_place:
        return foreach.add(d, other, alpha=factor)
    foreach.add_(d, other, alpha=factor)
    return d


def _accumulate_(
    buffers: list[Tensor | None], d: Sequence[Tensor], momentum: float, dampening: float
) -> list[Tensor]:
    """b ← μ b + (1 − τ) d where b exists, b = d where it does not yet."""
    old = [i for i, b in enumerate(buffers) if b is not None]
    b = [buffers[i] for i in old]
    if old:
        scale_(b, momentum)  # type: ignore[arg-type]
        foreach.add_(b, [d[i] for i in old], alpha=1 - dampening)  # type: ignore[arg-type]
    for i, buffer in enumerate(buffers):
        if buffer is None:
            buffers[i] = d[i].clone()
    return buffers  # type: ignore[return-value]


def scale_(tensors: list[Tensor], factor: float) -> None:
    """t ← factor · t for each tensor, in place, each entry rounded once.

    Example:
        >>> t = [torch.tensor([1.0, 2.0]), torch.tensor(3.0)]
        >>> scale_(t, 0.5)
        >>> t
        [tensor([0.5000, 1.0000]), tensor(1.5000)]
    """
    kinds = {(t.dtype, t.is_cpu) for t in tensors}
    dtype, is_cpu = next(iter(kinds), (torch.float32, True))
    if len(kinds) == 1 and is_cpu and dtype in _CPU_FAST and not torch.compiler.is_compiling():
        foreach.mul_(tensors, _scalar(factor, dtype))
    elif any(dtype.itemsize < 4 and is_cpu for dtype, is_cpu in kinds):
        for t in tensors:  # torch._foreach_mul_ rounds the factor to half precision there
            t.mul_(factor)
    else:
        foreach.mul_(tensors, factor)


_CPU_FAST = (torch.float32, torch.float64)


@functools.lru_cache(maxsize=64)
def _scalar(value: float, dtype: torch.dtype) -> Tensor:
    """A number as torch makes it of a plain one for each tensor of a list, at 1 µs each."""
    return torch.scalar_tensor(value, dtype=dtype, device="cpu")


def fused_descend_(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor | None],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float | Tensor = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """`descend_` in one kernel of PyTorch's, for tensors of one device and floating-point dtype.

    The kernel walks over memory, blind to strides, and takes all buffers as new or none: so
    gradients are first laid out as their parameters, parameters with gaps or overlaps go to
    `descend_`, and new buffers go in a call of their own.

    Of a GradScaler: `grad_scale`, by which the kernel divides the gradients, in place where they
    are laid out as their parameters; and `found_inf`, 1 where nothing is to be changed.

    Example:
        >>> theta = [torch.tensor([1.0, 2.0])]
        >>> fused_descend_(theta, [torch.tensor([1.0, 6.0])], [], lr=0.5)
        >>> theta
        [tensor([ 0.5000, -1.0000])]
    """
    weight_decay = _read(weight_decay)
    rule = UpdateRule(lr, momentum, dampening, weight_decay, nesterov, maximize)._asdict()
    new, old, plain = [], [], []
    for i, p in enumerate(params):
        if not torch_kernels.is_dense(p):
            plain.append(i)
        elif momentum != 0 and buffers[i] is None:
            new.append(i)
        else:
            old.append(i)
    if (new or plain) and found_inf is not None and found_inf.item():
        return  # the kernel knows, but it finds buffers made, and the rest is `descend_`'s
    for part, first in [(part, part is new) for part in (new, old) if part]:
        ps = [params[i] for i in part]
        gs = [_laid_out_as(params[i], grads[i]) for i in part]
        if first:
            bs = [torch.zeros_like(p) for p in ps]
        else:
            bs = [_laid_out_as(params[i], buffers[i]) for i in part] if momentum != 0 else []
        torch_kernels.fused_sgd_(
            ps, gs, bs, is_first_step=first, grad_scale=grad_scale, found_inf=found_inf, **rule
        )
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(ps)  # the kernel forgets to
        if momentum != 0:
            for i, b in zip(part, bs, strict=True):
                buffers[i] = b
    if plain:
        gs = [grads[i] if grad_scale is None else grads[i] / grad_scale for i in plain]
        bs_plain = [buffers[i] for i in plain] if momentum != 0 else []
        descend_([params[i] for i in plain], gs, bs_plain, **rule)
        for i, buffer in zip(plain, bs_plain, strict=False):
            buffers[i] = buffer


@functools.cache
def fused_is_exact(dtype: torch.dtype) -> bool:
    """Whether the fused kernel gives `descend_`'s numbers on this CPU, to the last bit.

    Without momentum for every entry; with momentum for all but the entries at the end of a tensor
    that do not fill a vector of 16, where a product and a sum may be joined. It depends on the
    processor and on how torch was built, so it is tried, once in a process. In half precision the
    two never agree.

    Example:
        >>> fused_is_exact(torch.bfloat16)
        False
    """
    if dtype not in (torch.float32, torch.float64):
        return False
    cases = itertools.product(
        (0.0, 0.9), ((0.0, False), (0.3, False), (0.0, True)), (0.0, 0.1), (False, True)
    )
    for momentum, (dampening, nesterov), weight_decay, maximize in cases:
        rule = UpdateRule(0.0317, momentum, dampening, weight_decay, nesterov, maximize)._asdict()
        size = 67 * VECTOR + (5 if momentum == 0 else 0)
        golden = torch.arange(1.0, 3 * size + 1, dtype=torch.float64, device="cpu") * 0.6180339887
        start = (golden % 1 - 0.5).to(dtype).split(size)
        results = []
        for update_ in (descend_, fused_descend_):
            theta, g, b = (t.clone() for t in start)
            with torch.no_grad():
                update_([theta], [g], [b], **rule)
            results.append(torch.stack((theta, b)))
        if not torch.equal(*results):
            return False
    return True


def _laid_out_as(param: Tensor, other: Tensor | None) -> Tensor:
    """`other`, in memory as `param` is: itself where it already is."""
    assert other is not None
    if other.stride() == param.stride() and other.dtype == param.dtype:
        return other
    return torch.empty_like(param).copy_(other)
