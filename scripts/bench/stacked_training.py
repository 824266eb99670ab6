"""Trains one model with many learning rates at once, as members of a stack.

θ is (S, R, P): S seeds, each with its initial weights and its order of the examples, R members, and
P parameters in a row. Members are independent: the gradient of the sum of their losses is the
gradient of each, and one that is not finite does not disturb the others.

    SGD     d = g + λθ,  b ← μb + d,  θ ← θ − η (d + μb with Nesterov, else b)
    Adam    m ← β₁m + (1 − β₁)d,  v ← β₂v + (1 − β₂)d²,  θ ← θ − η m̂/(√v̂ + ε)

Biases and the parameters of norms are not decayed, as in gdtrain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.optimize import minimize
from step_size_tasks import Problem, Task
from torch import Tensor, nn
from torch.func import functional_call, vmap

from gdtrain.descent.plan import Plan
from gdtrain.descent.preparation import parameter_groups

_EXAMPLES = 4096  # on which the objective is measured
_CACHE = 2**20  # numbers that a forward pass keeps, of all members that are trained together
_BETAS, _EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class Member:
    """How one member is trained: by whose rule, η at the start, and how η goes on."""

    rule: Literal["sgd", "adam"]
    rate: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"

    def rates(self, updates: int) -> Tensor:
        """η of each update, (T,)."""
        t = torch.arange(updates, dtype=torch.float64) / updates
        factor = {"linear": 1 - t, "cosine": 0.5 * (1 + torch.cos(math.pi * t))}
        return self.rate * factor.get(self.schedule, torch.ones_like(t))


class Measure:
    """f = mean loss + ½λ‖θ‖² of the decayed parameters, of a task's model with any parameters.

    Args:
        problem: Its model is called in training mode.
        weight_decay: λ.
    """

    def __init__(self, problem: Problem, weight_decay: float) -> None:
        self.problem, self.decay = problem, weight_decay
        self.model, self.loss = problem.model.train(), problem.loss
        named = dict(self.model.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        self.sizes = [p.numel() for p in named.values()]
        exempt = [
            p for g in parameter_groups(self.model) if "weight_decay" in g for p in g["params"]
        ]
        self.decayed = torch.cat(
            [
                torch.full((p.numel(),), float(all(p is not q for q in exempt)))
                for p in named.values()
            ]
        )
        many = len(problem.targets)
        rows = torch.arange(few := min(many, _EXAMPLES)) * many // few  # spread over all
        self.inputs, self.targets = problem.inputs[rows], problem.targets[rows]

    def of_model(self) -> Tensor:
        """θ in a row, (P,)."""
        return torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])

    def predict(self, theta: Tensor, x: Tensor) -> Tensor:
        """With parameters (P,)."""
        parts = zip(self.names, theta.split(self.sizes), self.shapes, strict=True)
        return functional_call(self.model, {n: part.view(s) for n, part, s in parts}, (x,))

    def objective(self, theta: Tensor) -> Tensor:
        """f of parameters (P,)."""
        penalty = 0.5 * self.decay * (self.decayed * theta.square()).sum()
        return self.loss(self.predict(theta, self.inputs), self.targets).mean() + penalty

    @torch.no_grad()
    def __call__(self, theta: Tensor) -> float:
        """f, infinite where it is not finite."""
        value = float(self.objective(theta))
        return value if math.isfinite(value) else math.inf

    def kept(self) -> int:
        """Numbers that a forward pass keeps for the gradient, of one example."""
        count = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel() if tensor.shape[:1] == (2,) else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            self.loss(self.model(self.inputs[:2]), self.targets[:2])
        return max(count // 2, 1)


def train_together(
    task: Task, members: Sequence[Member], seeds: Sequence[int]
) -> list[list[float]]:
    """f at the end of each member, for each seed.

    Args:
        task: What is learnt.
        members: How.
        seeds: Of initial weights and order.
    """
    measures = [Measure(task.build(seed), task.weight_decay) for seed in seeds]
    one_pass = measures[0].kept() * task.per_update * len(seeds)
    chunk = max(1, min(len(members), _CACHE // one_pass))
    ends: list[list[float]] = []
    order = sorted(range(len(members)), key=lambda i: members[i].rule)
    for first in range(0, len(members), chunk):
        some = [members[i] for i in order[first : first + chunk]]
        theta = _descend(task, measures, some, seeds)
        ends += [[m(theta[s, r]) for s, m in enumerate(measures)] for r in range(len(some))]
    return [end for _, end in sorted(zip(order, ends, strict=True))]


def _descend(
    task: Task, measures: Sequence[Measure], members: Sequence[Member], seeds: Sequence[int]
) -> Tensor:
    """θ (S, R, P) after T updates; members of Adam come first."""
    measure, problem, full = measures[0], measures[0].problem, task.batch_size == "full"
    plans = [Plan(task.examples, task.per_update, seed=seed) for seed in seeds]
    data = None if full else 0
    predict = vmap(vmap(measure.predict, (0, None)), (0, data))
    theta = torch.stack([m.of_model() for m in measures])[:, None].repeat(1, len(members), 1)
    rates = torch.stack([m.rates(task.updates) for m in members], 1).float()[:, :, None]
    adaptive = sum(m.rule == "adam" for m in members)
    rules = [
        rule
        for rule in (
            _Adam(theta[:, :adaptive]) if adaptive else None,
            _SGD(theta[:, adaptive:], task) if adaptive < len(members) else None,
        )
        if rule is not None
    ]
    parts = [r for r in (slice(0, adaptive), slice(adaptive, None)) if theta[:, r].shape[1]]
    decay = task.weight_decay * measure.decayed
    x, y, update = problem.inputs, problem.targets, 0
    while update < task.updates:
        count = min(task.updates - update, 256)
        indices = torch.stack([plan.block(update, 1 if full else count) for plan in plans], 1)
        for rows in indices:  # (S, B)
            if not full:
                x, y = problem.inputs[rows], problem.targets[rows]
            made = predict(theta.requires_grad_(), x)  # (S, R, B, C)
            own = y.expand(len(plans), *y.shape) if full else y
            own = own[:, None].expand(*made.shape[:3], *own.shape[2:]).flatten(0, 2)
            total = problem.loss(made.flatten(0, 2), own).sum() / made.shape[2]
            (gradient,) = torch.autograd.grad(total, theta)
            theta = theta.detach()
            if task.weight_decay:
                gradient = gradient.addcmul_(theta, decay)
            for part, rule in zip(parts, rules, strict=True):
                theta[:, part] -= rates[update, part] * rule(gradient[:, part])
            update += 1
    return theta


class _SGD:
    def __init__(self, like: Tensor, task: Task) -> None:
        self.momentum, self.nesterov = task.momentum, task.nesterov
        self.buffer = torch.zeros_like(like)

    def __call__(self, d: Tensor) -> Tensor:
        if not self.momentum:
            return d
        self.buffer.mul_(self.momentum).add_(d)
        return d + self.momentum * self.buffer if self.nesterov else self.buffer


class _Adam:
    def __init__(self, like: Tensor) -> None:
        self.mean, self.square, self.t = torch.zeros_like(like), torch.zeros_like(like), 0

    def __call__(self, d: Tensor) -> Tensor:
        self.t += 1
        first, second = _BETAS
        self.mean.lerp_(d, 1 - first)
        self.square.mul_(second).addcmul_(d, d, value=1 - second)
        root = (self.square / (1 - second**self.t)).sqrt_().add_(_EPSILON)
        return self.mean / (1 - first**self.t) / root


def optimum(task: Task) -> float | None:
    """f* of smooth linear models by L-BFGS in float64; 0 of networks; None of others.

    Args:
        task: What is learnt.
    """
    if not task.is_linear:
        return 0.0
    problem = task.build(0)
    if not problem.loss.smooth:
        return None
    measure = Measure(_double(problem), task.weight_decay)
    measure.decayed = measure.decayed.double()

    def value(point: Any) -> tuple[float, Any]:
        theta = torch.from_numpy(point).requires_grad_()
        made = measure.objective(theta)
        (gradient,) = torch.autograd.grad(made, theta)
        return made.item(), gradient.numpy()

    start = np.zeros(sum(measure.sizes))
    options = {"maxiter": 5000, "maxfun": 10_000, "ftol": 1e-14, "gtol": 1e-9}
    return float(minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun)


def _double(problem: Problem) -> Problem:
    y = problem.targets
    y = y.double() if y.is_floating_point() else y
    model: nn.Module = problem.model.double()
    return Problem(problem.inputs.double(), y, model, problem.loss)
