"""The optimizer of a run: parameter groups, and the rule that finds η where none is given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from gdtrain._compat.torch_modules import NORMS
from gdtrain.losses import Loss
from gdtrain.optim.protocol import is_full_batch, step_size_of, takes_step_size
from gdtrain.schedules import Constant, Schedule, WarmupStableDecay
from gdtrain.step_sizes import BarzilaiBorwein, DoWG, StepSize, StochasticPolyak

__all__ = ["automatic_schedule", "check_step_size", "make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, decay_biases: bool = False) -> list[dict[str, Any]]:
    """A model's trainable parameters, biases and the parameters of norms apart, without decay.

    With `decay_biases`, all are in one group.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.requires_grad and not any(p is q for q in (*decayed, *exempt)):
                bias = name.endswith("bias") or isinstance(module, NORMS)
                (exempt if bias and not decay_biases else decayed).append(p)
    groups: list[dict[str, Any]] = [{"params": decayed}] if decayed else []
    return [*groups, {"params": exempt, "weight_decay": 0.0}] if exempt else groups


def make_optimizer(
    made: Callable[..., Optimizer] | Optimizer,
    model: nn.Module,
    loss: Loss,
    *,
    decay_biases: bool = False,
    step_size: StepSize | Literal["auto"] | None = None,
    total_updates: int | None = None,
    races: bool = True,
) -> Optimizer:
    """The optimizer of a run, whose groups have "initial_lr", as the engines need it.

    With a rule for the step size, its lr is 1: only the unit of the schedule. "auto" is, on the
    full batch with `GD`, Barzilai and Borwein's; else a race finds η, if one can be held over
    resident examples (`races`), and Polyak's step bounds it.
    """
    check_step_size(step_size, made)
    if not isinstance(made, Optimizer):
        groups = parameter_groups(model, decay_biases)
        if step_size is None:
            made = made(groups)
        else:
            plain = made(groups, lr=1.0)
            if not takes_step_size(plain):
                raise ValueError(
                    f"Rules for the step size, and lr=auto, work with GD, SGD and MiniBatchSGD of "
                    f"gdtrain. Received: {type(plain).__name__}. Set optimizer.lr to a number."
                )
            rule = _automatic_rule(plain, loss, races) if step_size == "auto" else step_size
            rule.check_loss(loss)
            options: dict[str, Any] = {"lr": 1.0, "step_size": copy.deepcopy(rule)}
            made = made(groups, **options, total_updates=total_updates)
    for group in made.param_groups:
        group.setdefault("initial_lr", group["lr"])
        if group.get("differentiable"):
            raise ValueError("A sweep's steps are not differentiable: use differentiable=False.")
    return made


def check_step_size(
    step_size: StepSize | Literal["auto"] | None, optimizer: Callable[..., Optimizer] | Optimizer
) -> None:
    """Raise where a rule is none, or does not reach the optimizer, which is made already."""
    if not (step_size is None or step_size == "auto" or isinstance(step_size, StepSize)):
        raise ValueError(
            f"step_size must be a rule of gdtrain.step_sizes, 'auto' or None. Received: "
            f"{step_size!r}."
        )
    if step_size is not None and isinstance(optimizer, Optimizer):
        raise ValueError(
            "With step_size=…, the optimizer must be a factory, such as "
            "functools.partial(SGD, momentum=0.9). Received: an optimizer; give it the rule "
            "itself: SGD(…, step_size=…)."
        )


def _automatic_rule(optimizer: Optimizer, loss: Loss, races: bool) -> StepSize:
    group = optimizer.param_groups[0]
    if group["nesterov"]:
        raise ValueError(
            "lr=auto has no rule for Nesterov momentum. Set optimizer.nesterov=false, or "
            "optimizer.lr to a number."
        )
    if is_full_batch(optimizer) and loss.smooth and group["momentum"] == 0:
        return BarzilaiBorwein(memory=30, f_star=0.0)  # no loss is below 0
    if not races:
        return DoWG(cap=2.0, decay="linear")
    # A buffer adds 1 + μ + μ² + … gradients up, and so the bound holds for their sum.
    gain = (1 - group["dampening"]) / max(1 - group["momentum"], 1e-3)
    return StochasticPolyak(c=0.5 * max(float(gain), 1.0))


def automatic_schedule(optimizer: Optimizer) -> Schedule:
    """Constant where a rule finds each step's length, or decays it; else a schedule that decays."""
    rule = step_size_of(optimizer)
    own = rule is not None and (rule.needs.full_batch or rule.needs.total_updates)
    return Constant() if own else WarmupStableDecay(warmup=0.1, decay=0.5)
