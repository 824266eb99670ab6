"""Minimise any differentiable function by gradient descent: no data, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.optim import GD
from gdtrain.ranges import Whole
from gdtrain.schedules import Constant, Schedule

__all__ = ["Minimum", "minimize"]

_BOUNDED = "Minimise a function that is bounded below (to maximise f, minimise -f)."


@dataclass
class Minimum:
    """Where descent ended, and its way there.

    Args:
        x: The last point, of the shape of x0; its dtype as `minimize` says.
        value: f(x).
        gradient_norm: ‖∇f(x)‖.
        updates: Made.
        stop: Why it ended.
        values: (updates + 1,), f along the way.
        path: (kept, …), points along the way; the first is x0, the last is x. float64, or
            complex128 where x is complex.
        path_updates: (kept,), the update number of each.

    Example:
        >>> minimize(lambda x: (x**2).sum(), [3.0], lr=0.25, updates=2).path.tolist()
        [[3.0], [1.5], [0.75]]
    """

    x: Tensor
    value: float
    gradient_norm: float
    updates: int
    stop: Stop
    values: NDArray[np.float64]
    path: NDArray[np.float64] | NDArray[np.complex128]
    path_updates: NDArray[np.int64]

    def plot(self) -> Any:
        """A matplotlib figure of f against updates, and for one or two variables of the path."""
        from matplotlib.figure import Figure

        points = self.path.reshape(len(self.path), -1).view(np.float64)  # Re x, Im x where complex
        few = points.shape[1] <= 2
        figure = Figure(figsize=(9 if few else 5, 4), layout="constrained")
        axes = figure.subplots(1, 2 if few else 1, squeeze=False)[0]
        axes[0].plot(self.values)
        axes[0].set(xlabel="updates", ylabel="f(x)", title=f"{self.stop.reason.value}")
        if few:
            one = points.shape[1] == 1
            across = self.path_updates if one else points[:, 0]
            axes[1].plot(across, points[:, -1], ".-", linewidth=0.8)
            names = ("Re x", "Im x") if np.iscomplexobj(self.path) else ("x₁", "x₂")
            names = ("updates", "x") if one else names
            axes[1].set(xlabel=names[0], ylabel=names[1], title="path")
        return figure


def minimize(
    f: Callable[[Tensor], Tensor],
    x0: ArrayLike | Tensor,
    *,
    lr: float,
    updates: int = 1000,
    momentum: float = 0.0,
    nesterov: bool = False,
    schedule: Schedule | None = None,
    tolerance: float = 1e-8,
    keep: int = 1000,
) -> Minimum:
    """Gradient descent x ← x − η ∇f(x), or with momentum, from x0.

    Where x is complex, ∇f = ∂f/∂(Re x) + i ∂f/∂(Im x), which is torch's: both parts descend.

    It ends before all updates are made where ‖∇f(x)‖ ≤ tolerance·max(1, ‖∇f(x0)‖); where x no
    longer changes, since its dtype cannot tell it from the next point; and where f or its gradient
    is not finite. Else the values along the way tell whether f grew (DIVERGED) or the steps jump to
    and fro over lower places (STALLED).

    Args:
        f: From a tensor of the shape of x0 to a scalar real tensor, differentiable by autograd.
        x0: Where to start. A tensor of a floating-point or complex type keeps it; all else becomes
            float64 or complex128.
        lr: η, range (0, ∞).
        updates: The most to make, range [1, ∞).
        momentum: μ, range [0, ∞).
        nesterov: Nesterov momentum.
        schedule: The factor on η; None: constant.
        tolerance: Of the gradient's norm, relative, range [0, ∞); 0: only a gradient of 0 will do.
        keep: About how many points of the path are kept, range [2, ∞).

    Returns:
        The last point, the values, the path and the reason for the end.

    Raises:
        ValueError: An argument is out of range, or f does not give one real number that depends on
            x.

    Example:
        >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
        >>> found = minimize(rosenbrock, [-1.0, 1.0], lr=5e-4, momentum=0.95, updates=20_000)
        >>> found.stop.reason.value, [round(v, 4) for v in found.x.tolist()]
        ('CONVERGED', [1.0, 1.0])
    """
    ranges = (("lr", lr, "> 0", lr > 0), ("tolerance", tolerance, ">= 0", tolerance >= 0))
    for name, number, bound, fits in ranges:
        if not (fits and math.isfinite(number)):
            raise ValueError(f"{name} must be finite and {bound}. Received: {name}={number}.")
    Whole(1).check("updates", updates)
    Whole(2).check("keep", keep)
    x = _start(x0).requires_grad_()
    optimizer = GD([x], lr=lr, momentum=momentum, nesterov=nesterov)
    factors = (schedule if schedule is not None else Constant())(torch.arange(updates), updates)
    longest = factors.flip(0).cummax(0).values.flip(0)  # of the factors from each update on
    every = math.ceil(updates / (keep - 1)) if keep < updates + 1 else 1
    path: list[Tensor] = []
    numbers: list[int] = []
    course = _Course(x, lr, tolerance)
    still = 0  # updates in a row that have not changed x
    last: Tensor | None = None
    stop: Stop | None = None
    for t in range(updates + 1):
        optimizer.zero_grad()
        value = f(x)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                f"f must give one number that depends on x, as a tensor. Received: "
                f"{type(value).__name__}"
                + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
                + "."
            )
        if value.is_complex():
            raise ValueError(
                f"f must give one real number, such as z.abs()**2. Received: {value.dtype}."
            )
        value.sum().backward()
        if x.grad is None:
            raise ValueError(
                "f must give one number that depends on x. Received: one that does not."
            )
        course.norm = float(torch.linalg.vector_norm(x.grad))
        course.values.append(value.item())
        if t % every == 0:
            path.append(x.detach().clone())
            numbers.append(t)
        if t == 0:
            course.first_norm = course.norm
        stop = course.not_finite() or course.converged()
        if stop is not None or t == updates:
            break
        if last is not None and 2 * t > updates:
            course.turns += float(torch.sum(last.conj() * x.grad).real) < 0
        last = x.grad.detach().clone() if 2 * (t + 1) > updates - 1 else None
        optimizer.param_groups[0]["lr"] = lr * float(factors[t])
        before = x.detach().clone()
        optimizer.step()
        still = still + 1 if torch.equal(before, x.detach()) and factors[t] >= longest[t] else 0
        if still > (0 if momentum == 0 else 10 / max(1 - momentum, 1e-3)):
            course.values.append(course.values[-1])
            stop = course.at_rest()
            break
    stop = stop or course.spent()
    if numbers[-1] != course.t:
        path.append(x.detach().clone())
        numbers.append(course.t)
    widest = torch.complex128 if x.is_complex() else torch.float64
    return Minimum(
        x=x.detach(),
        value=course.values[-1],
        gradient_norm=course.norm,
        updates=course.t,
        stop=stop,
        values=np.asarray(course.values),
        path=torch.stack(path).to("cpu", widest).numpy(),
        path_updates=np.asarray(numbers),
    )


def _start(x0: Any) -> Tensor:
    """x0 as a tensor of its own."""
    if isinstance(x0, Tensor):
        x = x0.detach()
    else:
        if np.ma.is_masked(x0):
            raise ValueError(
                "x0 must have a number in each place. Received: an array with masked entries. Fill "
                "them (x0.filled(…)), or leave them out (x0.compressed())."
            )
        try:
            array = np.asarray(x0)
            if any(entry is None for entry in (array.flat if array.dtype == object else ())):
                raise TypeError("numpy makes NaN of None")
            x = torch.tensor(array.astype(np.complex128 if array.dtype.kind == "c" else np.float64))
        except (TypeError, ValueError):
            raise ValueError(
                f"x0 must be numbers: one, nested lists of equal lengths, an array or a tensor. "
                f"Received: {type(x0).__name__} {x0!r:.80}."
            ) from None
    if x.numel() == 0:
        raise ValueError(f"x0 must have at least one number. Received: shape {tuple(x.shape)}.")
    is_inexact = x.is_floating_point() or x.is_complex()
    return (x if is_inexact else x.double()).clone()


@dataclass
class _Course:
    """What f did on the way, and so why descent ends and what to try."""

    x: Tensor
    lr: float
    tolerance: float
    values: list[float] = field(default_factory=list)  # f(x) before each update, and at the end
    norm: float = math.nan  # ‖∇f(x)‖ at hand
    first_norm: float = math.nan
    turns: int = 0  # updates of the second half whose gradient points back along the last one

    @property
    def t(self) -> int:
        """Updates made."""
        return len(self.values) - 1

    @property
    def numbers(self) -> dict[str, float]:
        return {"gradient_norm": self.norm, "first_gradient_norm": self.first_norm}

    def converged(self) -> Stop | None:
        """Whether the gradient is as small as was asked."""
        if not self.norm <= self.tolerance * max(1.0, self.first_norm):
            return None
        where = "at x0" if self.t == 0 else f"after {self.t} updates"
        advice = ""
        if self.t == 0 and self.norm == 0:
            advice = (
                "A gradient of 0 at x0 is a minimum, a saddle or a plateau: if it is no minimum, "
                "start elsewhere."
            )
        elif self.t == 0 or self.norm > 1e-3:
            advice = (
                "That is small against the bound alone: to go on, lower tolerance, or measure f or "
                "x in other units."
            )
        return Stop(
            StopReason.CONVERGED,
            f"‖∇f‖ = {self.norm:.3g} {where}: within tolerance={self.tolerance:g} of max(1, "
            f"{self.first_norm:.3g}), its norm at x0.",
            {**self.numbers, "tolerance": self.tolerance},
            advice,
        )

    def not_finite(self) -> Stop | None:
        """Whether f or its gradient is infinite or not a number."""
        value = self.values[-1]
        if math.isfinite(value) and math.isfinite(self.norm):
            return None
        said, advice = "f or its gradient is not finite at x0.", "Start elsewhere."
        if self.t:
            said = f"f or its gradient was not finite after {self.t} updates with lr={self.lr:g}"
            advice = f"Try lr={self.lr / 10:g}."
            if value == -math.inf or (value == min(self.values) and value < -1e30):
                said += f": f fell to {value:.3g}, and has no minimum on this way."
                advice = _BOUNDED
            elif math.isnan(value):
                said += ": the step led out of where f is defined, or grew too long."
            else:
                said += ": the steps are too long."
        return Stop(StopReason.NON_FINITE, said, {"update": self.t, "lr": self.lr}, advice)

    def grown(self, since: int) -> Stop:
        """f is higher than it was, and does not fall."""
        t, value, before = self.t, self.values[-1], self.values[since]
        return Stop(
            StopReason.DIVERGED,
            f"f grew from {before:.3g} at update {since} to {value:.3g} at update {t} with "
            f"lr={self.lr:g}: the steps are too long.",
            {"update": t, "lr": self.lr, "lowest": min(self.values), "value": value},
            f"Try a lower lr, such as lr={self.lr / 10:g}.",
        )

    @property
    def is_within_rounding(self) -> bool:
        """Whether the gradient is so small that its dtype cannot tell it from 0."""
        return self.norm <= math.sqrt(torch.finfo(self.x.dtype).eps) * max(1.0, self.first_norm)

    def at_rest(self) -> Stop:
        """x no longer changes: where the gradient is small, that is all its dtype can tell."""
        numbers = {**self.numbers, "update": self.t}
        dtype = str(self.x.dtype).removeprefix("torch.")
        told = f"‖∇f‖ = {self.norm:.3g} after {self.t} updates"
        if self.is_within_rounding:
            finer = "" if dtype in ("float64", "complex128") else "float64 goes further."
            said = f"{told}: the rounding limit of {dtype} is reached."
            return Stop(StopReason.CONVERGED, said, numbers, finer)
        return Stop(
            StopReason.STALLED,
            f"{told}, but steps with lr={self.lr:g} are too short to change x in {dtype}.",
            numbers,
            f"Try a larger lr, such as lr={self.lr * 10:g}, or a wider dtype.",
        )

    def spent(self) -> Stop:
        """All updates were made: what f did on the way, and so what to try."""
        values, updates, half = self.values, self.t, len(self.values) // 2
        numbers = {**self.numbers, "tolerance": self.tolerance}
        made = f"All {updates} updates were made; ‖∇f‖ = {self.norm:.3g}."
        late, low = values[half:], values.index(min(values))
        rounding = 8 * torch.finfo(self.x.dtype).eps * max(map(abs, late))
        highest = max(range(half, updates + 1), key=values.__getitem__)
        is_late = low < half and highest >= updates - updates // 10
        if is_late and values[-1] - values[low] > rounding:
            return self.grown(low)
        if updates >= 10 and min(late) >= min(values[:half]) - rounding:
            level = max(late) - min(late) <= rounding
            if level and self.is_within_rounding:
                return self.at_rest()
            if not level or 4 * self.turns > len(late):
                return Stop(
                    StopReason.STALLED,
                    f"{made} f has not fallen below {values[low]:.6g}, of update {low}, in the "
                    f"second half of them: the steps jump to and fro over lower places.",
                    numbers,
                    f"Try a lower lr, such as lr={self.lr / 10:g}, or a schedule that decays to 0.",
                )
        fell = values[half] - values[-1], values[0] - values[half]
        said = f"{made} f fell from {values[0]:.3g} to {values[-1]:.3g}"
        advice = "If f has a minimum, more updates (updates=…) or a larger lr may get nearer to it."
        if values[-1] < values[0] and self.norm > 1e3 * self.first_norm > 0:
            made = (
                f"{said}, and its gradient grew from {self.first_norm:.3g}: f has no minimum on "
                f"this way."
            )
            advice = _BOUNDED
        elif updates >= 10 and fell[0] >= 0.5 * fell[1] > 0 and self.norm >= 0.5 * self.first_norm:
            made = (
                f"{said}, in the second half of the updates no slower than in the first: it may "
                f"have no minimum, or be far from it."
            )
            advice = "If f is bounded below, more updates (updates=…) or a larger lr get further."
        return Stop(StopReason.BUDGET, made, numbers, advice)
