"""Minimise any differentiable function by gradient descent: no data, no model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from gdtrain.descent.stopping import Stop, StopReason
from gdtrain.optim import GD
from gdtrain.schedules import Constant, Schedule

__all__ = ["Minimum", "minimize"]


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
        """f against updates, and for one or two variables the path.

        Returns:
            A matplotlib figure; `.savefig(path)` keeps it.
        """
        from matplotlib.figure import Figure

        is_complex = np.iscomplexobj(self.path)
        points = self.path.reshape(len(self.path), -1)
        if is_complex:
            points = np.stack((points.real, points.imag), axis=-1).reshape(len(points), -1)
        figure = Figure(figsize=(9 if points.shape[1] <= 2 else 5, 4), layout="constrained")
        columns = 2 if points.shape[1] <= 2 else 1
        axes = np.atleast_1d(figure.subplots(1, columns))
        axes[0].plot(self.values)
        axes[0].set(xlabel="updates", ylabel="f(x)", title=f"{self.stop.reason.value}")
        if columns == 2:
            across = points[:, 0] if points.shape[1] == 2 else self.path_updates
            axes[1].plot(across, points[:, -1], ".-", linewidth=0.8)
            names = ("x₁", "x₂") if points.shape[1] == 2 else ("updates", "x")
            names = ("Re x", "Im x") if is_complex else names
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
        x0: Where to start, at least one number: nested lists, an array without masked entries, or
            a tensor. A tensor of a floating-point or complex type keeps it; all else becomes
            float64, or complex128 if it is complex.
        lr: η, range (0, ∞).
        updates: The most to make, range [1, ∞).
        momentum: μ, range [0, ∞).
        nesterov: Nesterov momentum.
        schedule: The factor on η; None: constant.
        tolerance: Of the gradient's norm, relative, range [0, ∞); 0: only a gradient of 0 is
            small enough, and the updates are all made.
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
    for name, number in (("lr", lr), ("tolerance", tolerance)):
        positive = number > 0 if name == "lr" else number >= 0
        if not positive or not math.isfinite(number):
            bound = "> 0" if name == "lr" else ">= 0"
            raise ValueError(f"{name} must be finite and {bound}. Received: {name}={number}.")
    for name, count, least in (("updates", updates, 1), ("keep", keep, 2)):
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(
                f"{name} must be a whole number of at least {least}. Received: {name}={count!r}."
            )
    x = _start(x0)
    x.requires_grad_()
    optimizer = GD([x], lr=lr, momentum=momentum, nesterov=nesterov)
    factors = (schedule if schedule is not None else Constant())(torch.arange(updates), updates)
    every = math.ceil(updates / (keep - 1)) if keep < updates + 1 else 1
    values: list[float] = []
    path: list[Tensor] = []
    numbers: list[int] = []
    first_norm = norm = math.nan
    turns = 0  # updates of the second half whose gradient points back along the last one
    still = 0  # updates in a row that have not changed x
    last: Tensor | None = None
    longest = factors.flip(0).cummax(0).values.flip(0)  # of the factors from each update on
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
        norm = float(torch.linalg.vector_norm(x.grad))
        values.append(value.item())
        if t % every == 0:
            path.append(x.detach().clone())
            numbers.append(t)
        if t == 0:
            first_norm = norm
        if not (math.isfinite(values[-1]) and math.isfinite(norm)):
            stop = _not_finite(values, t, lr)
            break
        if norm <= tolerance * max(1.0, first_norm):
            stop = _converged(norm, first_norm, tolerance, t)
            break
        if t == updates:
            break
        if last is not None and 2 * t > updates:
            turns += float(torch.sum(last.conj() * x.grad).real) < 0
        last = x.grad.detach().clone() if 2 * (t + 1) > updates - 1 else None
        optimizer.param_groups[0]["lr"] = lr * float(factors[t])
        before = x.detach().clone()
        optimizer.step()
        still = still + 1 if torch.equal(before, x.detach()) and factors[t] >= longest[t] else 0
        if still > (0 if momentum == 0 else 10 / max(1 - momentum, 1e-3)):
            stop = _at_rest(x, norm, first_norm, lr, t + 1)
            values.append(values[-1])
            t += 1
            break
    if stop is None:
        stop = _spent(values, x, norm, first_norm, tolerance, lr, turns)
    if numbers[-1] != t:
        path.append(x.detach().clone())
        numbers.append(t)
    return Minimum(
        x=x.detach(),
        value=values[-1],
        gradient_norm=norm,
        updates=t,
        stop=stop,
        values=np.asarray(values),
        path=torch.stack(path).to("cpu", _widest(x)).numpy(),
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


def _widest(x: Tensor) -> torch.dtype:
    return torch.complex128 if x.is_complex() else torch.float64


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _converged(norm: float, first_norm: float, tolerance: float, t: int) -> Stop:
    where = "at x0" if t == 0 else f"after {t} updates"
    advice = ""
    if t == 0 and norm == 0:
        advice = (
            "A gradient of 0 at x0 is a minimum, a saddle or a plateau: if it is no minimum, start "
            "elsewhere."
        )
    elif t == 0 or norm > 1e-3:
        advice = (
            "That is small against the bound alone: to go on, lower tolerance, or measure f or x "
            "in other units."
        )
    return Stop(
        StopReason.CONVERGED,
        f"‖∇f‖ = {norm:.3g} {where}: within tolerance={tolerance:g} of max(1, {first_norm:.3g}), "
        f"its norm at x0.",
        {"gradient_norm": norm, "first_gradient_norm": first_norm, "tolerance": tolerance},
        advice,
    )


def _not_finite(values: list[float], t: int, lr: float) -> Stop:
    if t == 0:
        said, advice = "f or its gradient is not finite at x0.", "Start elsewhere."
    else:
        said, advice = f"f or its gradient was not finite after {t} updates with lr={lr:g}", ""
        if values[-1] == -math.inf or (values[-1] == min(values) and values[-1] < -1e30):
            said += f": f fell to {values[-1]:.3g}, and has no minimum on this way."
            advice = "Minimise a function that is bounded below (to maximise f, minimise -f)."
        elif math.isnan(values[-1]):
            said += ": the step led out of where f is defined, or grew too long."
        else:
            said += ": the steps are too long."
        advice = advice or f"Try lr={lr / 10:g}."
    return Stop(StopReason.NON_FINITE, said, {"update": t, "lr": lr}, advice)


def _grown(values: list[float], since: int, lr: float) -> Stop:
    t = len(values) - 1
    said = f"f grew from {values[since]:.3g} at update {since} to {values[-1]:.3g} at update {t}"
    return Stop(
        StopReason.DIVERGED,
        f"{said} with lr={lr:g}: the steps are too long.",
        {"update": t, "lr": lr, "lowest": min(values), "value": values[-1]},
        f"Try a lower lr, such as lr={lr / 10:g}.",
    )


def _at_rest(x: Tensor, norm: float, first_norm: float, lr: float, t: int) -> Stop:
    """x does not change any more: where the gradient is small that is all its dtype can tell."""
    numbers = {"gradient_norm": norm, "first_gradient_norm": first_norm, "update": t}
    told = f"‖∇f‖ = {norm:.3g} after {t} updates"
    if norm <= math.sqrt(torch.finfo(x.dtype).eps) * max(1.0, first_norm):
        finer = "" if _dtype(x) in ("float64", "complex128") else "float64 goes further."
        return Stop(
            StopReason.CONVERGED,
            f"{told}: the rounding limit of {_dtype(x)} is reached.",
            numbers,
            finer,
        )
    return Stop(
        StopReason.STALLED,
        f"{told}, but steps with lr={lr:g} are too short to change x in {_dtype(x)}.",
        numbers,
        f"Try a larger lr, such as lr={lr * 10:g}, or a wider dtype.",
    )


def _spent(
    values: list[float],
    x: Tensor,
    norm: float,
    first_norm: float,
    tolerance: float,
    lr: float,
    turns: int,
) -> Stop:
    """All updates were made: what f did on the way, and so what to try."""
    updates, half = len(values) - 1, len(values) // 2
    eps = torch.finfo(x.dtype).eps
    numbers = {"gradient_norm": norm, "first_gradient_norm": first_norm, "tolerance": tolerance}
    made = f"All {updates} updates were made; ‖∇f‖ = {norm:.3g}."
    late, low = values[half:], values.index(min(values))
    rounding = 8 * eps * max(map(abs, late))
    highest = max(range(half, updates + 1), key=values.__getitem__)
    if low < half and highest >= updates - updates // 10 and values[-1] - values[low] > rounding:
        return _grown(values, low, lr)
    if updates >= 10 and min(late) >= min(values[:half]) - rounding:
        level = max(late) - min(late) <= rounding
        if level and norm <= math.sqrt(eps) * max(1.0, first_norm):
            return _at_rest(x, norm, first_norm, lr, updates)
        if not level or 4 * turns > len(late):
            return Stop(
                StopReason.STALLED,
                f"{made} f has not fallen below {values[low]:.6g}, of update {low}, in the second "
                f"half of them: the steps jump to and fro over lower places.",
                numbers,
                f"Try a lower lr, such as lr={lr / 10:g}, or a schedule that decays to 0.",
            )
    fell = values[half] - values[-1], values[0] - values[half]
    if values[-1] < values[0] and norm > 1e3 * first_norm > 0:
        return Stop(
            StopReason.BUDGET,
            f"{made} f fell from {values[0]:.3g} to {values[-1]:.3g}, and its gradient grew from "
            f"{first_norm:.3g}: f has no minimum on this way.",
            numbers,
            "Minimise a function that is bounded below (to maximise f, minimise -f).",
        )
    if updates >= 10 and fell[0] >= 0.5 * fell[1] > 0 and norm >= 0.5 * first_norm > 0:
        return Stop(
            StopReason.BUDGET,
            f"{made} f fell from {values[0]:.3g} to {values[-1]:.3g}, in the second half of the "
            f"updates no slower than in the first: it may have no minimum, or be far from it.",
            numbers,
            "If f is bounded below, more updates (updates=…) or a larger lr get further.",
        )
    return Stop(
        StopReason.BUDGET,
        made,
        numbers,
        "If f has a minimum, more updates (updates=…) or a larger lr may get nearer to it.",
    )
