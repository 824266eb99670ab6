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

from gdtrain.optim import GD
from gdtrain.schedules import Constant, Schedule
from gdtrain.stopping import Stop, StopReason

__all__ = ["Minimum", "minimize"]


@dataclass
class Minimum:
    """Where descent ended, and its way there.

    Args:
        x: The last point, of the shape of x0.
        value: f(x).
        gradient_norm: ‖∇f(x)‖.
        updates: Made.
        stop: Why it ended.
        values: (updates + 1,), f along the way.
        path: (kept, …), points along the way; the first is x0, the last is x.
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
    path: NDArray[np.float64]
    path_updates: NDArray[np.int64]

    def plot(self) -> Any:
        """f against updates, and for one or two variables the path.

        Returns:
            A matplotlib figure; `.savefig(path)` keeps it.
        """
        from matplotlib.figure import Figure

        points = self.path.reshape(len(self.path), -1)
        figure = Figure(figsize=(9 if points.shape[1] <= 2 else 5, 4), layout="constrained")
        columns = 2 if points.shape[1] <= 2 else 1
        axes = np.atleast_1d(figure.subplots(1, columns))
        axes[0].plot(self.values)
        axes[0].set(xlabel="updates", ylabel="f(x)", title=f"{self.stop.reason.value}")
        if columns == 2:
            across = points[:, 0] if points.shape[1] == 2 else self.path_updates
            axes[1].plot(across, points[:, -1], ".-", linewidth=0.8)
            names = ("x₁", "x₂") if points.shape[1] == 2 else ("updates", "x")
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

    Args:
        f: From a tensor of the shape of x0 to a scalar tensor, differentiable by autograd.
        x0: Where to start; float64 unless it is a tensor of another floating-point type.
        lr: η, range (0, ∞).
        updates: The most to make, range [1, ∞).
        momentum: μ, range [0, ∞).
        nesterov: Nesterov momentum.
        schedule: The factor on η; None: constant.
        tolerance: Ends when ‖∇f(x)‖ ≤ tolerance·max(1, ‖∇f(x0)‖), range [0, ∞).
        keep: About how many points of the path are kept, range [2, ∞).

    Returns:
        The last point, the values, the path and the reason for the end.

    Raises:
        ValueError: An argument is out of range, or f does not give one number that depends on x.

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
    if isinstance(x0, Tensor) and x0.is_floating_point():
        x = x0.detach().clone()
    else:
        x = torch.as_tensor(np.asarray(x0, dtype=np.float64)).clone()
    x.requires_grad_()
    optimizer = GD([x], lr=lr, momentum=momentum, nesterov=nesterov)
    factors = (schedule if schedule is not None else Constant())(torch.arange(updates), updates)
    every = math.ceil(updates / (keep - 1)) if keep < updates + 1 else 1
    values: list[float] = []
    path: list[Tensor] = []
    numbers: list[int] = []
    first_norm = norm = math.nan
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
            said = f"f or its gradient was not finite after {t} updates with lr={lr:g}"
            stop = Stop(
                StopReason.NON_FINITE,
                f"{said}: the steps are too long."
                if t > 0
                else "f or its gradient is not finite at x0.",
                {"update": t, "lr": lr},
                f"Try lr={lr / 10:g}." if t > 0 else "Start elsewhere.",
            )
            break
        if norm <= tolerance * max(1.0, first_norm):
            stop = Stop(
                StopReason.CONVERGED,
                f"‖∇f‖ = {norm:.3g} after {t} updates.",
                {"gradient_norm": norm, "first_gradient_norm": first_norm, "tolerance": tolerance},
            )
            break
        if t == updates:
            break
        optimizer.param_groups[0]["lr"] = lr * float(factors[t])
        optimizer.step()
    if stop is None:
        stop = Stop(
            StopReason.BUDGET,
            f"All {updates} updates were made; ‖∇f‖ = {norm:.3g}.",
            {"gradient_norm": norm, "first_gradient_norm": first_norm, "tolerance": tolerance},
            "More updates (updates=…) or a larger lr may get further.",
        )
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
        path=torch.stack(path).double().numpy(),
        path_updates=np.asarray(numbers),
    )
