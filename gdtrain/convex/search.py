"""The search for a good α: Newton's method for smooth losses, an interior-point method for hinge.

Notation as in `gdtrain.convex.certificate`, whose steps 2 and 3 these are.

References:
    Ferris and Munson, Interior-Point Methods for Massive Support Vector Machines, 2002; Mehrotra,
    On the Implementation of a Primal-Dual Interior Point Method, 1992.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdtrain.convex.problem import LinearProblem
from gdtrain.losses import Hinge

__all__ = ["Search"]

_WHOLE = 2 * 10**8  # N D², up to which the interior-point method takes all examples at once
_NEWTON, _CONJUGATE, _INTERIOR = 30, 1000, 80  # most iterations


class Search:
    """Looks for a good α: `best` is the largest D so far, a lower bound of min P.

    Args:
        problem: P and D.
        primal: P at the parameters.
        wanted: The gap that is small enough.
        most: Passes, as the problem counts them, after which it is over.
        lower: A lower bound of min P.

    Example:
        >>> from gdtrain.losses import Logistic
        >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([1, 0])
        >>> problem = LinearProblem(x, y, Logistic(), 1, weight_decay=1.0, bias=False)
        >>> w = torch.zeros(1, 1, dtype=torch.float64)
        >>> search = Search(problem, problem.primal(w), 1e-9, math.inf, 0.0)
        >>> search.run(w, None, problem.outputs(w))
        >>> round(search.best, 3), round(search.least, 3)  # min P lies between
        (0.593, 0.593)
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

    def run(self, w: Tensor, b: Tensor | None, z: Tensor) -> None:
        """Search from W and b on.

        Args:
            w: W, (C, D), float64.
            b: (C,), float64.
            z: Their outputs, (N, C).
        """
        if self.primal - self.best <= self.wanted:
            return
        if isinstance(self.problem.dual.loss, Hinge):
            self._interior(w, z)
        else:
            self._newton(w, b, z)

    def _newton(self, w: Tensor, b: Tensor | None, z: Tensor) -> None:
        """α at (W, b), and then at better ones, by Newton's method with conjugate gradients.

        The direction solves (H + Λ) d = −∇P only as well as Newton's speed needs; the step is
        halved until P falls by 10⁻⁴ of what its slope promises.
        """
        problem, dual = self.problem, self.problem.dual
        if problem.lowest is not None and problem.lowest[0] < self.primal:
            _, w, b = problem.lowest  # of an earlier search
            z = problem.outputs(w, b)
        for _ in range(_NEWTON):
            if problem.balances:
                assert b is not None
                t = dual.shift(z)
                b, z = b + t, z + t
            alpha = dual.slopes(z)
            if problem.balances:
                alpha = dual.balanced(alpha)
            gathered = problem.gathered(alpha)
            value = float(dual.values(z).mean()) + problem.penalty(w, b)
            if problem.lowest is None or value < problem.lowest[0]:
                problem.lowest = value, w, b
            self.least = min(self.least, value)
            self.best = max(self.best, problem.lower_bound(alpha, gathered))
            if self.done:
                return
            gradient = gathered + problem.weight_decay * w
            gradient_b = None
            if b is not None:
                gradient_b = alpha.mean(0) + problem.bias_decay * b
            step, step_b = self._direction(z, gradient, gradient_b)
            slope = float((gradient * step).sum())
            if gradient_b is not None and step_b is not None:
                slope += float((gradient_b * step_b).sum())
            along = problem.outputs(step, step_b)
            scale = 1.0
            while scale > 1e-10:
                w_new = w + scale * step
                b_new = None if b is None or step_b is None else b + scale * step_b
                new = float(dual.values(z + scale * along).mean()) + problem.penalty(w_new, b_new)
                if new <= value + 1e-4 * scale * slope:
                    break
                scale /= 2
            else:
                return  # rounding: P cannot be told apart any more
            w, b, z = w_new, b_new, z + scale * along

    def _direction(
        self, z: Tensor, gradient: Tensor, gradient_b: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """d with (H + Λ) d = −∇P, by conjugate gradients preconditioned with the diagonal."""
        problem = self.problem
        hessian, second = problem.dual.hessian(z), problem.dual.curvatures(z)
        bias = gradient_b is not None

        def product(v: Tensor) -> Tensor:
            """(H + Λ) v; v is (C, D + 1) with a bias, its last column."""
            vw = v[:, :-1] if bias else v
            bent = hessian(problem.outputs(vw, v[:, -1] if bias else None))
            made = problem.gathered(bent) + problem.weight_decay * vw
            if not bias:
                return made
            last = bent.mean(0) + problem.bias_decay * v[:, -1]
            return torch.cat([made, last[:, None]], 1)

        diagonal = torch.zeros_like(gradient)
        problem.passes += 1
        for part, x in problem.parts():
            diagonal += second[part].T @ x.square() / problem.count
        diagonal += problem.weight_decay
        r = -gradient
        if gradient_b is not None:
            last = second.mean(0) + problem.bias_decay
            diagonal = torch.cat([diagonal, last[:, None]], 1)
            r = torch.cat([r, -gradient_b[:, None]], 1)
        diagonal = diagonal.clamp(min=1e-3 * problem.weight_decay)
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
        if not bool(x.any()):
            x = r / diagonal
        return (x[:, :-1], x[:, -1]) if bias else (x, None)

    def _interior(self, w: Tensor, z: Tensor) -> None:
        """β of the n examples nearest to the margin; the others' is 1 inside it and 0 outside."""
        problem, dual = self.problem, self.problem.dual
        signs = 2 * dual.targets.to(z) - 1
        distance = 1 - signs * z[:, 0]
        width = w.shape[1]
        n = problem.count
        if n * width**2 > _WHOLE:
            n = min(n, max(1000, 10 * (width + 1)))
        while True:
            near = distance.abs().argsort()[:n]
            beta = (distance > 0).to(z)
            found = self._near(near, beta, signs)
            if found is not None:
                alpha = dual.balanced(-signs[:, None] * found[0][:, None])
                if not problem.balances:
                    alpha = -signs[:, None] * found[0][:, None]
                gathered = problem.gathered(alpha)
                self.best = max(self.best, problem.lower_bound(alpha, gathered))
                w_new = -gathered / problem.weight_decay
                b_new = None
                if problem.has_bias:
                    b_new = (
                        found[1].reshape(1)
                        if problem.balances
                        else -alpha.mean(0) / problem.bias_decay
                    )
                distance_new = 1 - signs * problem.outputs(w_new, b_new)[:, 0]
                value = float(F.relu(distance_new).mean()) + problem.penalty(w_new, b_new)
                self.least = min(self.least, value)
                distance = distance_new  # a better guess of who is near
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
        x = problem.rows(near)
        if problem.has_bias and problem.bias_decay:  # as a feature more, decayed like the others
            more = math.sqrt(problem.weight_decay / problem.bias_decay)
            x = torch.cat([x, x.new_full((len(x), 1), more)], 1)
            fixed = torch.cat([fixed, (excess / problem.count * more).reshape(1)])
        scale = problem.weight_decay * problem.count
        linear = s * (x @ fixed) / problem.weight_decay - 1
        factor = s[:, None] * x / math.sqrt(scale)
        # A step's matrix takes as many products as it has rows, and its solutions a few more.
        share, rows = len(near) / problem.count, min(factor.shape)

        def is_over() -> bool:
            problem.passes += share * (rows + 8)
            return problem.passes > self.most

        found, b = _box_quadratic(factor, linear, s if problem.balances else None, -excess, is_over)
        made = others
        made[near] = found.clamp(0, 1)
        return made, b


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
    the (D, D) matrix I + MᵀΘ⁻¹M (Woodbury).

    Args:
        factor: M, (n, D).
        linear: q, (n,).
        signs: s, (n,); None: no sum is asked for.
        total: Of s·β, a scalar.
        is_over: Asked before each step whether to stop.

    Returns:
        β (n,), strictly inside, and b.
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
