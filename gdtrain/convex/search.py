"""The search for a good α: Newton's method for smooth losses, an interior-point method for hinge.

Notation and references as in `gdtrain.convex.certificate`, whose steps 2 and 3 these are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from gdtrain.convex.problem import LinearProblem
from gdtrain.losses import Hinge

__all__ = ["Search"]

_WHOLE = 2 * 10**8  # N D², up to which the interior-point method takes all examples at once
_NEWTON, _CONJUGATE, _INTERIOR = 30, 1000, 80  # most iterations


class Search:
    """Looks for a good α: `best` is the largest D so far, a lower bound of min P.

    It is over when the gap to `primal` is as `wanted`, or when the problem counts `most` passes.
    """

    def __init__(
        self, problem: LinearProblem, primal: float, wanted: float, most: float, lower: float
    ) -> None:
        self.problem, self.primal, self.wanted = problem, primal, wanted
        self.most = most  # passes, counted by the problem, after which it is over
        self.best = lower
        self.least = primal  # the smallest P that was met: min P lies in [best, least]

    @property
    def done(self) -> bool:
        """Whether the gap is as small as wanted, or nearly all of it is owed to W and b."""
        unknown = self.least - self.best
        return (
            self.primal - self.best <= self.wanted
            or unknown <= 1e-2 * self.wanted
            or unknown <= 1e-3 * (self.primal - self.least)
            or self.is_over
        )

    @property
    def is_over(self) -> bool:
        """Whether as many passes were made as it may make."""
        return self.problem.passes >= self.most

    def run(self, theta: Tensor, z: Tensor) -> None:
        """Search from θ on, whose outputs are z."""
        if self.primal - self.best <= self.wanted:
            return
        if isinstance(self.problem.dual.loss, Hinge):
            self._interior(z)
        else:
            self._newton(theta, z)

    def _newton(self, theta: Tensor, z: Tensor) -> None:
        """α at θ, and then at better ones, by Newton's method with conjugate gradients.

        The direction solves (H + Λ) d = −∇P only as well as Newton's speed needs; the step is
        halved until P falls by 10⁻⁴ of what its slope promises.
        """
        problem, dual = self.problem, self.problem.dual
        if problem.lowest is not None and problem.lowest[0] < self.primal:
            theta = problem.lowest[1]  # of an earlier search
            z = problem.outputs(theta)
        for _ in range(_NEWTON):
            if problem.balances:
                t = dual.shift(z)
                theta, z = torch.cat([theta[:, :-1], theta[:, -1:] + t[:, None]], 1), z + t
            alpha = dual.slopes(z)
            if problem.balances:
                alpha = dual.balanced(alpha)
            gathered = problem.gathered(alpha)
            value = problem.primal(theta, z)
            if problem.lowest is None or value < problem.lowest[0]:
                problem.lowest = value, theta
            self.least = min(self.least, value)
            self.best = max(self.best, problem.lower_bound(alpha, gathered))
            if self.done:
                return
            gradient = gathered + problem.decays * theta
            step = self._direction(z, gradient)
            slope = float((gradient * step).sum())
            along = problem.outputs(step)
            scale = 1.0
            while scale > 1e-10:
                nearer, z_nearer = theta + scale * step, z + scale * along
                if problem.primal(nearer, z_nearer) <= value + 1e-4 * scale * slope:
                    break
                scale /= 2
            else:
                return  # rounding: P cannot be told apart any more
            theta, z = nearer, z_nearer

    def _direction(self, z: Tensor, gradient: Tensor) -> Tensor:
        """d with (H + Λ) d = −∇P, by conjugate gradients preconditioned with the diagonal."""
        problem, dual = self.problem, self.problem.dual
        hessian, second = dual.loss.hessian(z, dual.targets), dual.curvatures(z)

        def product(v: Tensor) -> Tensor:
            """(H + Λ) v."""
            return problem.gathered(hessian(problem.outputs(v))) + problem.decays * v

        problem.passes += 1
        squares = (second[part].T @ x.square() for part, x in problem.parts())
        diagonal = reduce(torch.add, squares) / problem.count + problem.decays
        diagonal = diagonal.clamp(min=1e-3 * problem.weight_decay)
        r = -gradient
        x = torch.zeros_like(r)
        y = r / diagonal
        p, inner = y.clone(), float((r * y).sum())
        first = inner
        # Superlinear where the gap is far from what is wanted, exact near the end.
        enough = first * min(0.1, math.sqrt(first)) ** 2
        for _ in range(min(_CONJUGATE, 2 * r.numel())):
            if inner <= enough or self.is_over:
                break
            q = product(p)
            curved = float((p * q).sum())
            if not curved > 0:
                break
            a = inner / curved
            x += a * p
            r -= a * q
            y = r / diagonal
            new = float((r * y).sum())
            p = y + new / inner * p
            inner = new
        return x if bool(x.any()) else r / diagonal

    def _interior(self, z: Tensor) -> None:
        """β of the n examples nearest to the margin; the others' is 1 inside it and 0 outside."""
        problem, dual = self.problem, self.problem.dual
        signs = 2 * dual.targets.to(z) - 1
        distance = 1 - signs * z[:, 0]
        n, width = problem.count, len(problem.decays)
        if n * width**2 > _WHOLE:
            n = min(n, max(1000, 10 * width))
        while True:
            near = distance.abs().argsort()[:n]
            found = self._near(near, (distance > 0).to(z), signs)
            if found is not None:
                beta, b = found
                alpha = -(signs * beta)[:, None]
                if problem.balances:
                    alpha = dual.balanced(alpha)
                gathered = problem.gathered(alpha)
                self.best = max(self.best, problem.lower_bound(alpha, gathered))
                theta = -gathered / problem.decays
                if problem.balances:
                    theta[:, -1] = b
                z = problem.outputs(theta)
                self.least = min(self.least, problem.primal(theta, z))
                distance = 1 - signs * z[:, 0]  # a better guess of who is near
            if self.done or n == problem.count:
                return
            n = min(problem.count, 4 * n)

    def _near(self, near: Tensor, beta: Tensor, signs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The best β of the near ones with the others fixed, and b; None: no balance possible."""
        problem = self.problem
        others = beta.clone()
        others[near] = 0
        fixed = problem.gathered((signs * others)[:, None])[0]
        excess = signs @ others  # s·β of the others
        s = signs[near]
        if problem.balances:
            up, down = float((s > 0).sum()), float((s < 0).sum())
            # Strictly inside what the near ones can make up for, or there is no interior.
            if not -0.99 * up <= float(excess) <= 0.99 * down:
                if len(near) < problem.count:
                    return None
                if not (up and down):
                    return torch.zeros_like(beta), beta.new_zeros(())
        decayed = problem.decays > 0
        x, decays = problem.rows(near)[:, decayed], problem.decays[decayed]
        linear = s * (x @ (fixed[decayed] / decays)) - 1
        factor = s[:, None] * x / (decays * problem.count).sqrt()
        # A step's matrix takes as many products as it has rows, and its solutions a few more.
        share, rows = len(near) / problem.count, min(factor.shape)

        def is_over() -> bool:
            problem.passes += share * (rows + 8)
            return problem.passes > self.most

        found, b = _box_quadratic(factor, linear, s if problem.balances else None, -excess, is_over)
        others[near] = found.clamp(0, 1)
        return others, b


def _box_quadratic(
    factor: Tensor,
    linear: Tensor,
    signs: Tensor | None,
    total: Tensor,
    is_over: Callable[[], bool],
) -> tuple[Tensor, Tensor]:
    """min ½‖Mᵀβ‖² + ⟨q, β⟩ over 0 ≤ β ≤ 1 and, with signs s, ⟨s, β⟩ = total.

    Mehrotra's primal-dual interior-point method. z and u are the multipliers of β ≥ 0 and β ≤ 1,
    b that of the sum. Each step solves (MMᵀ + Θ) Δβ + s Δb = h with Θ = z/β + u/(1 − β), through
    the (D, D) matrix I + MᵀΘ⁻¹M (Woodbury). Returns β, strictly inside, and b.
    """
    n, d = factor.shape
    beta = linear.new_full((n,), 0.5)
    b = linear.new_zeros(())
    gradient = factor @ (factor.T @ beta) + linear
    z, u = gradient.clamp(min=0) + 1, (-gradient).clamp(min=0) + 1
    eye = torch.eye(min(n, d), dtype=factor.dtype, device=factor.device)
    for _ in range(_INTERIOR):
        gradient = factor @ (factor.T @ beta) + linear
        if signs is not None:
            gradient = gradient + signs * b
        wrong = gradient - z + u
        missing = signs @ beta - total if signs is not None else b
        low, high = z * beta, u * (1 - beta)
        mu = float(low.sum() + high.sum()) / (2 * n)
        # 2 n μ bounds N (P − D).
        small = mu < 1e-13 and float(wrong.abs().max()) < 1e-9 and float(missing.abs()) < 1e-9 * n
        if small or is_over():
            break
        theta = z / beta + u / (1 - beta)
        if n <= d:
            chol = torch.linalg.cholesky_ex(factor @ factor.T + theta.diag())[0]
        else:
            thin = factor / theta[:, None]
            chol = torch.linalg.cholesky_ex(eye + factor.T @ thin)[0]

        def solve(h: Tensor, theta: Tensor = theta, chol: Tensor = chol) -> Tensor:
            if n <= d:
                return torch.cholesky_solve(h[:, None], chol)[:, 0]
            y = h / theta
            return y - (factor @ torch.cholesky_solve((factor.T @ y)[:, None], chol)[:, 0]) / theta

        along = solve(signs) if signs is not None else None

        def step(h: Tensor, along: Tensor | None = along, missing: Tensor = missing) -> Any:
            db = solve(h)
            if along is None:
                return db, db.new_zeros(())
            assert signs is not None
            dt = (signs @ db + missing) / (signs @ along)
            return db - along * dt, dt

        # Straight to the boundary; then again, towards the path and with the second order.
        d_beta, _ = step(-wrong - z + u)
        dz = -z - z * d_beta / beta
        du = -u + u * d_beta / (1 - beta)
        most = _most(beta, d_beta, z, dz, u, du)
        after = float(
            ((z + most * dz) * (beta + most * d_beta)).sum()
            + ((u + most * du) * (1 - beta - most * d_beta)).sum()
        ) / (2 * n)
        aim = mu * (after / mu) ** 3
        rest_low = (aim - dz * d_beta) / beta
        rest_high = (aim + du * d_beta) / (1 - beta)
        d_beta, dt = step(-wrong + rest_low - z - rest_high + u)
        dz = rest_low - z - z * d_beta / beta
        du = rest_high - u + u * d_beta / (1 - beta)
        most = min(1.0, 0.995 * _most(beta, d_beta, z, dz, u, du))
        if not (most > 1e-12 and math.isfinite(float(dt))):
            break  # rounding
        beta, z, u, b = beta + most * d_beta, z + most * dz, u + most * du, b + most * dt
        tiny = 1e-300
        beta = beta.clamp(1e-16, 1 - 1e-16)
        z, u = z.clamp(min=tiny), u.clamp(min=tiny)
    return beta, b


def _most(beta: Tensor, d: Tensor, z: Tensor, dz: Tensor, u: Tensor, du: Tensor) -> float:
    """The longest step, at most 1/0.995, that leaves β, 1 − β, z and u at 0 or above."""
    room = torch.cat([beta, 1 - beta, z, u])
    down = -torch.cat([d, -d, dz, du])
    ratio = torch.where(down > 0, room / down.clamp(min=1e-300), math.inf)
    return min(1 / 0.995, float(ratio.min()))
