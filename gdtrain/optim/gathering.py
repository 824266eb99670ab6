"""Gathering micro-batches until the examples of an update are in, and their exact mean.

N examples in the training set, B examples per update, m examples in one micro-batch.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from gdtrain.optim.updating import Updating
from gdtrain.ranges import Whole

__all__ = ["Gathering"]

# What is gathered, in state[p]: Σ m·g so far; then, until step(), p.grad = Σ m·g / Σ m, and whether
# it was finite before anybody clipped it.
_SUM, _MEAN, _FINITE = "gathered_sum", "gathered_mean", "gathered_finite"
# In each group: Σ m, and whether a GradScaler saw an overflow in one of the micro-batches.
_COUNT, _OVERFLOW = "gathered", "overflow"
_EXAMPLES_ARGUMENTS = ("num_samples", "batch_size")  # of the subclasses


class Gathering(Updating):
    """An optimizer that gathers micro-batches, if it is told how many examples make an update.

        g = (Σ m_i g_i) / B,    B = Σ m_i

    g_i is the mean gradient of the i-th m_i examples.
    """

    examples_argument: ClassVar[str | None] = None
    """The constructor argument that holds the number of examples per update; None: it has none."""
    has_no_scaler: bool = False
    """Whether it is stepped without a gradient scaler, whatever it offers one."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any], examples: int | None) -> None:
        if self.examples_argument is not None:
            name = self.examples_argument
            defaults[name] = None if examples is None else _count(name, examples)
            defaults[_COUNT], defaults[_OVERFLOW] = 0, False
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters between two updates."""
        if self.param_groups and self.gathered:
            raise ValueError(
                f"Parameters cannot be added while micro-batches are being gathered "
                f"({self.gathered} of {self.examples} examples are in): "
                f"finish the update, or call flush(), first."
            )
        if isinstance(param_group, dict) and self.examples_argument is not None:
            # A copy, for the group may be another optimizer's, in the middle of its update.
            fresh = {self.examples_argument: self.examples, _COUNT: 0, _OVERFLOW: False}
            param_group = {**param_group, **fresh}
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self.examples_argument is not None:
            for group in self.param_groups:
                group.setdefault(_COUNT, 0)
                group.setdefault(_OVERFLOW, False)
        for p, state in self.state.items():  # between gather() and step(); copies have no p.grad
            if isinstance(state, dict) and _MEAN in state:
                p.grad = state[_MEAN]

    def _check_loadable(self, state: dict[str, Any]) -> None:
        """Refuse a state from which this optimizer cannot go on."""
        groups = state["param_groups"]
        count = groups[0].get(_COUNT, 0) if groups else 0
        saved = next((groups[0][n] for n in _EXAMPLES_ARGUMENTS if groups and n in groups[0]), None)
        if count and saved != self.examples:
            name = self.examples_argument
            raise ValueError(
                f"This state holds {count} of {saved} examples of an unfinished update, but this "
                + (
                    f"optimizer has {name}={self.examples}: construct it with {name}={saved}"
                    if name
                    else f"optimizer gathers nothing: load it into GD(num_samples={saved}) or "
                    f"MiniBatchSGD(batch_size={saved})"
                )
                + " to go on with that update."
            )

    def _missing(self, state: dict[str, Any]) -> list[str]:
        """What `torch.distributed.checkpoint`, which loads what it is asked for, has left out.

        Sums are in no new optimizer's state: it cannot ask for them.
        """
        group, states = state["param_groups"][0], state["state"].values()
        count, key = group.get(_COUNT, 0), _SUM
        if self.examples is not None and count == self.examples:
            key = _MEAN
        lost = count and not group.get(_OVERFLOW) and not any(key in own for own in states)
        return [key] if lost else []

    def _adopt(self, loaded: dict[str, Any]) -> None:
        """After loading: what the base class has cast, shared or does not know.

        It casts all state to the parameter's dtype, where a half-precision sum is no sum; and what
        it need not cast, it shares with the optimizer that was saved.
        """
        if self.examples_argument is not None:
            for group in self.param_groups:
                group[self.examples_argument] = self.examples
        for p, saved in self._with_states(loaded):
            if _SUM in saved:
                self.state[p][_SUM] = saved[_SUM].to(p.device, copy=True)
            if _MEAN in saved:
                self.state[p][_MEAN] = p.grad = saved[_MEAN].to(p, copy=True)
            elif self.examples is not None and self._is_complete:
                p.grad = None  # left over, and not of that update

    def _scaler(self) -> dict[str, Tensor | None]:
        """When gathering, `_is_due` has seen to it."""
        gathers = self.examples is not None
        return {"grad_scale": None, "found_inf": None} if gathers else super()._scaler()

    def gather(self, num_samples: int) -> bool:
        """Take in the gradients of one micro-batch; say whether the update's examples are all in.

        If they are, each `p.grad` is the exact mean gradient over the B examples, to be looked at
        or clipped before `step()`, which comes next. `step(num_samples=m)`, whose argument and
        errors these are, does both at once.
        """
        self._gather(self.check_gatherable(num_samples))
        if self._is_complete:
            self._hand_over()
        return self._is_complete

    def close(self) -> bool:
        """Finish the update with the examples that are in, though fewer than B.

        As if `gather()` had returned True: each `p.grad` is the exact mean over what is in, to be
        clipped before `step()`, which comes next if this says True: examples are in. `flush()`
        closes and steps at once.
        """
        if self.examples is None or self.gathered == 0:
            return False
        if not self._is_complete:
            self._close()
            self._hand_over()
        return True

    def discard(self) -> int:
        """Throw away what is gathered, so many examples: the next begin a new update."""
        if self.examples is None:
            return 0
        count = self.gathered
        for p in [p for p in self.state if isinstance(p, Tensor)]:  # hooks may add other keys
            self._pop(p, _SUM, _MEAN, _FINITE)
        for group in self.param_groups:
            group[_COUNT], group[_OVERFLOW] = 0, False
        return count

    def flush(self) -> bool:
        """Update from the examples that are in, though fewer than B: the end of an epoch.

        Says whether there was an update: not from no examples, nor where an overflow cancels it.
        """
        if not self.close():
            return False
        cancelled = self.param_groups[0][_OVERFLOW]
        self.step()
        return not cancelled

    @property
    def examples(self) -> int | None:
        """B, the examples whose mean gradient makes an update; None: every `step` is an update."""
        name = self.examples_argument
        return None if name is None else self.defaults[name]

    @property
    def gathered(self) -> int:
        """Examples of the next update that are in."""
        return self.param_groups[0].get(_COUNT, 0)

    @gathered.setter
    def gathered(self, count: int) -> None:
        for group in self.param_groups:
            group[_COUNT] = count

    @property
    def _is_complete(self) -> bool:
        return self.examples is None or self.gathered == self.examples

    def check_gatherable(self, num_samples: int | None) -> int:
        """The size of a micro-batch that can be taken in, as an int; else a `ValueError`."""
        if self.examples is None:
            name = self.examples_argument
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
                f"All {self.examples} examples of this update are in: call step() without "
                f"num_samples before gathering more. Received: num_samples={num_samples}."
            )
        if num_samples is None:
            raise ValueError(
                f"step() needs num_samples, the number of examples whose mean p.grad is: this "
                f"optimizer updates every {self.examples} examples "
                f"({self.examples_argument}={self.examples}) and {self.gathered} are in."
            )
        num_samples = _count("num_samples", num_samples)
        missing = self.examples - self.gathered
        if num_samples > missing:
            raise ValueError(
                f"num_samples must be at most {missing}: {self.gathered} of the "
                f"{self.examples} examples of this update are in. Received: {num_samples}. "
                f"A micro-batch cannot be divided between two updates; cut it to size, or call "
                f"flush() at the end of an epoch. (An update that went wrong half-way is thrown "
                f"away by discard().)"
            )
        return num_samples

    def _is_blank_step(self) -> bool:
        # After gather() has returned True, step() is the user's, unless an overflow has left no
        # gradient.
        if self.examples is not None and self._is_complete and not self.param_groups[0][_OVERFLOW]:
            return False
        return super()._is_blank_step()

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
        self.gathered += num_samples
        if overflow:
            for group in self.param_groups:
                group[_OVERFLOW] = True
        if self.param_groups[0][_OVERFLOW]:
            for p in self._parameters():
                self._pop(p, _SUM)
        elif num_samples == self.examples and scale == 1:
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
            p.grad = None if total is None else total.div_(self.gathered).to(p.dtype)
        self.gathered = self.examples or 0

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Keep the means in the state while they are the user's to clip, until step()."""
        for p in self._parameters():
            if p.grad is not None:
                entries = p.grad.coalesce().values() if p.grad.is_sparse else p.grad
                self.state[p].update({_MEAN: p.grad, _FINITE: torch.isfinite(entries).all()})


def _count(name: str, value: Any) -> int:
    """The number of examples that is meant: an int, or an integer of numpy's or of torch's."""
    try:
        return Whole(1).check(name, value)
    except ValueError:
        raise ValueError(
            f"{name} must be a whole number of examples, at least 1. Received: {value!r}."
        ) from None
