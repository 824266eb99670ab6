"""Training without Lightning: a model, a loss, examples and an optimizer, in one call."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.descent.loop import Loop
from gdtrain.descent.plan import Plan, Sampling, Watcher
from gdtrain.descent.preparation import automatic_schedule, make_optimizer, resident_objective
from gdtrain.descent.recovery import Guard
from gdtrain.descent.state import State
from gdtrain.engines import EngineName
from gdtrain.losses import Loss
from gdtrain.objective import Rows
from gdtrain.ranges import Whole
from gdtrain.schedules import Constant, Schedule
from gdtrain.step_sizes import StepSize

__all__ = ["Trained", "make_loop", "train"]


@dataclass(frozen=True)
class Trained:
    """A run that is over, as `train` describes it."""

    loop: Loop
    losses: Tensor
    rates: Tensor


def make_loop(
    model: nn.Module,
    loss: Loss,
    inputs: Rows,
    targets: Tensor,
    optimizer: Callable[..., Optimizer] | Optimizer,
    schedule: Schedule | Literal["auto"] | None = None,
    *,
    batch_size: int | Literal["full"] = "full",
    epochs: int | None = None,
    updates: int | None = None,
    step_size: StepSize | Literal["auto"] | None = None,
    decay_biases: bool = False,
    engine: EngineName = "auto",
    sampling: Sampling = "reshuffle",
    seed: int = 0,
    micro_batch_size: int | Literal["auto"] | None = None,
    updates_per_sweep: int | Literal["auto"] = "auto",
    watchers: Sequence[Watcher] = (),
    guard: Guard | None = None,
) -> Loop:
    """The loop of a run, before its first update.

    Args:
        model: As for `SupervisedModule`, and so are `loss`, `optimizer`, `schedule`, `step_size`,
            `decay_biases` and `engine`.
        loss: Per example.
        inputs: (N, …); floating-point numbers are taken in the model's dtype.
        targets: (N, …), as the loss expects them.
        optimizer: A factory, or an optimizer of the model's parameters.
        schedule: The factor on η.
        batch_size: B, range [1, N]; "full": N.
        epochs: Passes over the examples, range [0, ∞); None: no bound.
        updates: T, range [0, ∞); None: no bound. The first of the two bounds that is met counts.
        step_size: A rule that computes η.
        decay_biases: Whether weight decay acts on biases and norms.
        engine: How updates are made.
        sampling: The order of the examples.
        seed: Of the order, and of gdtrain's dropout.
        micro_batch_size: M.
        updates_per_sweep: The largest K.
        watchers: Who must see the run at which updates.
        guard: Sees each sweep first, such as `gdtrain.analysis.guard.DivergenceGuard()`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> x, rest = torch.ones(9, 1), {"batch_size": 4, "epochs": 2}
        >>> make_loop(nn.Linear(1, 1), SquaredError(), x, x[:, 0], SGD, **rest).total_updates
        6
    """
    like = next(model.parameters())
    inputs, targets = (_as(like, t) for t in (inputs, targets))
    size = len(targets) if batch_size == "full" else batch_size
    plan = Plan(
        len(targets),
        size,
        sampling=sampling,
        seed=seed,
        updates_per_sweep=updates_per_sweep,
        watchers=[*watchers],
    )
    bounds = [] if epochs is None else [Whole(0).check("epochs", epochs) * plan.updates_per_epoch]
    bounds += [] if updates is None else [Whole(0).check("updates", updates)]
    plan.total = min(bounds, default=None)
    made = make_optimizer(
        optimizer,
        model,
        loss,
        decay_biases=decay_biases,
        step_size=step_size,
        total_updates=plan.total,
    )
    if schedule is None or (schedule == "auto" and plan.total is None):
        schedule = Constant()
    elif schedule == "auto":
        schedule = automatic_schedule(made)
    return Loop(
        resident_objective(model, loss, inputs, targets, size, micro_batch_size),
        made,
        plan,
        engine=engine,
        state=State(copy.deepcopy(schedule)),  # a plateau schedule belongs to one run
        guard=guard,
    )


def _as(like: Tensor, values: Any) -> Any:
    return values.to(like.device, like.dtype if values.is_floating_point() else None)


def train(
    model: nn.Module,
    loss: Loss,
    inputs: Rows,
    targets: Tensor,
    optimizer: Callable[..., Optimizer] | Optimizer,
    schedule: Schedule | Literal["auto"] | None = None,
    **options: Any,
) -> Trained:
    """Train a model, without Lightning: the same run, bit for bit, as `SupervisedModule`'s.

    Args:
        model: Trained in place, in training mode.
        loss: Per example.
        inputs: (N, …).
        targets: (N, …).
        optimizer: From parameters or groups to an optimizer.
        schedule: The factor on η.
        **options: As for `make_loop`; `epochs` or `updates` bounds the run.

    Returns:
        "loop", whose `state.stop` says why a guard has ended the run, if one has; "losses" (T,), J
        on each update's examples before that update; "rates" (T,), η of the first group.

    Raises:
        ValueError: An argument is out of range, or nothing bounds the run.

    Example:
        >>> from functools import partial
        >>> from gdtrain import SGD
        >>> from gdtrain.losses import SquaredError
        >>> x = torch.linspace(-1, 1, 9)[:, None]
        >>> model = nn.Linear(1, 1)
        >>> run = train(model, SquaredError(), x, 3 * x[:, 0] + 1, partial(SGD, lr=0.5),
        ...     batch_size=1, epochs=20)
        >>> [round(p.item(), 2) for p in model.parameters()]
        [3.0, 1.0]
    """
    loop = make_loop(model, loss, inputs, targets, optimizer, schedule, **options)
    if loop.total_updates is None:
        raise ValueError(
            "A run needs an end. Received: epochs=None and updates=None. Set one of them, or "
            "call make_loop() and advance() as long as you like."
        )
    model.train()
    losses, rates = [torch.zeros(0)], [torch.zeros(0, dtype=torch.float64)]
    while not loop.done:
        made = loop.advance()
        losses.append(made.losses.cpu())
        rates.append(made.rates)
    loop.finish()
    return Trained(loop, torch.cat(losses), torch.cat(rates))
