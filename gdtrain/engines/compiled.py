"""The compiled sweep: forward pass, backward pass and rule of K updates as one graph.

K updates in one sweep, B examples per update, P parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer

from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import (
    NotApplicableError,
    check_hooks,
    in_stretches,
    rates_by_schedule,
)
from gdtrain.engines.program import GraphRule, Program, descents, own_descents
from gdtrain.generators import RandomStates, same_after
from gdtrain.models.dropout import drawing
from gdtrain.objective import Objective, prediction_of
from gdtrain.optim.protocol import bounded_step_of, gathers, own_rule, step_size_of, update_rules

__all__ = ["Compiled"]


class Compiled:
    """Makes K updates, as `gdtrain.engines.engine.Engine` says, of any module that compiles.

    One compilation per batch size and mode of the model, at the first sweep that needs it; step
    sizes, the schedule and K are inputs of the graph. Momentum, dampening, weight decay, Nesterov
    and `maximize` are constants of it: another value is another compilation. Buffers that the
    forward pass changes (BatchNorm's statistics) are carried from update to update. Of random
    layers only `gdtrain.models.dropout.Dropout` is taken: it draws alike on every engine.

    Afterwards p.grad is None. A sweep that fails leaves parameters, buffers and optimizer as they
    were.

    Args:
        objective: J.
        optimizer: `SGD`, `GD`, `MiniBatchSGD`, a subclass with a rule of its own, or
            `torch.optim.SGD`, of the objective's parameters; its groups have "initial_lr".

    Raises:
        NotApplicableError: This engine cannot make these updates; the text says why. What only a
            compilation can show is raised by the first sweep.

    Example:
        >>> Compiled.name  # it is called as `Eager` is
        'compiled'
    """

    name: ClassVar[str] = "compiled"

    def __init__(self, objective: Objective, optimizer: Optimizer) -> None:
        check_hooks(objective, optimizer)
        _check_optimizer(objective, optimizer)
        kinds = {p.dtype for p in objective.params}
        if not kinds <= {torch.float32, torch.float64}:
            raise NotApplicableError(
                f"the parameters are {', '.join(sorted(map(str, kinds)))}, and only float32 and "
                f"float64 round alike on each engine"
            )
        if len({p.device for p in objective.params}) > 1:
            raise NotApplicableError("the parameters lie on several devices")
        self.objective, self.optimizer = objective, optimizer
        self.rates = torch.zeros(0, dtype=torch.float64)
        self.evaluations = 0
        rule = step_size_of(optimizer)
        self._bound = bounded_step_of(optimizer)
        if rule is not None and self._bound is None:
            raise NotApplicableError(
                f"{type(rule).__name__} looks at more than the loss and the gradient's norm"
            )
        self._own = own_rule(optimizer)
        if self._own is not None and rule is not None:
            raise NotApplicableError(
                f"{type(rule).__name__} is compiled with the rule of gradient descent alone"
            )
        self._programs: dict[Any, Program] = {}

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses, as in `Engine`.

        NotApplicableError: the model or loss does not compile, or draws random numbers, or the
        batch does not fit into one pass. ValueError: η is not finite. Nothing was changed then.
        """
        check_hooks(self.objective, self.optimizer)  # a callback may have come with some

        def make(indices: Tensor, factors: Tensor, shares: Tensor, total: Tensor) -> Tensor:
            nonlocal draw
            losses = self._stretch(indices, factors, draw, shares, total)
            draw += len(indices)
            return losses

        losses, shares = in_stretches(make, self.optimizer, indices, factors)
        self.rates = rates_by_schedule(self.optimizer, factors) * shares
        return losses

    def _stretch(
        self, indices: Tensor, factors: Tensor, draw: int, own_shares: Tensor, total: Tensor
    ) -> Tensor:
        """As `__call__`; where the step is bounded, shares of η₀ and Σ‖g‖² are written."""
        objective, params = self.objective, self.objective.params
        groups = self.optimizer.param_groups
        owner = {p: group for group in groups for p in group["params"]}
        own = [owner[p] for p in params]
        scale = factors.to("cpu", torch.float64)
        rates = torch.tensor([group["initial_lr"] for group in own], dtype=torch.float64)
        rates = scale[:, None] * rates  # (K, P)
        if type(self.optimizer) is not torch.optim.SGD and not rates.isfinite().all():
            worst = rates[~rates.isfinite()][0].item()
            raise ValueError(f"Invalid learning rate: {worst}. Expected lr finite.")

        program = self._program(indices, own, draw)
        state = self.optimizer.state
        moving = [p for p, rule in zip(params, program.rules, strict=True) if rule.momentum != 0]
        fresh = {p for p in moving if state.get(p, {}).get("momentum_buffer") is None}
        if self._own is not None and fresh:
            return self._begin(indices, factors, draw)
        shares = torch.tensor([1.0 - group["dampening"] for group in own], dtype=torch.float64)
        shares = shares.repeat(len(indices), 1)
        shares[0, [p in fresh for p in params]] = 1.0  # momentum starts undampened

        velocities = [
            torch.zeros_like(p) if p in fresh else state[p]["momentum_buffer"] for p in moving
        ]
        names = dict(objective.model.named_buffers())
        buffers = [names[name] for name in program.buffers]
        bound = None
        if self._bound is not None:
            bound = (*self._bound.bound(self.optimizer), float(groups[0]["initial_lr"]))
        with torch.no_grad():
            theta, kept, b, losses, taken, squares = program(
                # As new objects: torch guards on the model's own, and would compile a second time.
                [p.detach() for p in params],
                [b.detach() for b in buffers],
                velocities,
                indices,
                rates,
                shares,
                draw,
                bound,
            )
            for old, new in (*zip(params, theta, strict=True), *zip(buffers, kept, strict=True)):
                old.copy_(new)
            for p, new in zip(moving, b, strict=True):
                if p in fresh:
                    state[p]["momentum_buffer"] = new.clone()
                else:
                    state[p]["momentum_buffer"].copy_(new)
        for group in groups:
            group["lr"] = group["initial_lr"] * scale[-1].item()
        for p in params:
            p.grad = None
        if self._bound is not None:
            own_shares.copy_(taken)
            total.copy_(squares)
        return losses

    def _begin(self, indices: Tensor, factors: Tensor, draw: int) -> Tensor:
        """Let a user's rule make its momentum buffers, which no graph can; then go on."""
        objective, state = self.objective, self.optimizer.state
        changing = [*objective.params, *objective.model.buffers()]
        before = [t.detach().clone() for t in changing]
        known: dict[Tensor, Any] = {p: dict(state[p]) for p in objective.params if p in state}
        eager = Eager(objective, self.optimizer)
        try:
            losses, rates = eager(indices[:1], factors[:1], draw), eager.rates
            if any(state[p].get("momentum_buffer") is None for p in objective.params):
                raise NotApplicableError("its rule has momentum, and keeps no buffer of it")
            if len(indices) > 1:
                losses = torch.cat([losses, self(indices[1:], factors[1:], draw + 1)])
                rates = torch.cat([rates, self.rates])
        except BaseException:
            with torch.no_grad():
                for tensor, old in zip(changing, before, strict=True):
                    tensor.copy_(old)
            for p in objective.params:
                state.pop(p, None)
            state.update(known)
            raise
        self.rates = rates
        return losses

    def _program(self, indices: Tensor, own: Sequence[dict[str, Any]], draw: int) -> Program:
        """The compiled graph for such updates."""
        objective = self.objective
        for hyperparameters in own:
            _check_hyperparameters(hyperparameters)
        rules = tuple(GraphRule(*(group[name] for name in GraphRule._fields)) for group in own)
        size = indices.shape[1]
        modes = tuple(module.training for module in objective.model.modules())
        device = objective.params[0].device.type
        if torch.is_autocast_enabled(device):
            raise NotApplicableError("mixed precision rounds otherwise in a compiled graph")
        program = self._programs.get((size, rules, modes))
        if program is None:
            if objective.automatic and objective.micro_batch_size is None:
                objective.micro_batch_size = objective.automatic_size()
            micro = objective.micro_batch_size
            if micro is not None and micro < size:
                raise NotApplicableError(
                    f"an update of {size} examples is gathered from micro-batches of {micro}"
                )
            _rehearse(objective, indices[0], draw)
            owners = {id(group): at for at, group in enumerate(self.optimizer.param_groups)}
            parts: dict[int, list[int]] = {}
            for k, group in enumerate(own):
                parts.setdefault(owners[id(group)], []).append(k)
            rule = descents(rules) if self._own is None else own_descents(self._own, rules, parts)
            program = Program(objective, rules, size, self._bound, rule)
            self._programs[size, rules, modes] = program
        return program


def _check_optimizer(objective: Objective, optimizer: Optimizer) -> None:
    if update_rules(optimizer) is None and own_rule(optimizer) is None:
        raise NotApplicableError(
            f"the step of {type(optimizer).__name__} is not compiled, only the rule of SGD, GD, "
            f"MiniBatchSGD and torch.optim.SGD, and that of a subclass of the first three"
        )
    if gathers(optimizer):
        raise NotApplicableError("the optimizer gathers micro-batches")
    owned = {p for group in optimizer.param_groups for p in group["params"]}
    if {p for p in owned if p.requires_grad} != set(objective.params):
        raise NotApplicableError("the optimizer's parameters are not the trainable ones")
    for group in optimizer.param_groups:
        _check_hyperparameters(group)


def _check_hyperparameters(group: dict[str, Any]) -> None:
    names = ("initial_lr", "momentum", "dampening", "weight_decay")
    held = [name for name in names if isinstance(group[name], Tensor)]
    if held:
        raise NotApplicableError(f"{held[0]} is a tensor, not a number")
    if group["differentiable"]:
        raise NotApplicableError("differentiable=True lets autograd see the step")


def _rehearse(objective: Objective, indices: Tensor, draw: int) -> None:
    """One gradient that changes nothing: raises the model's own errors, and shows what it does."""
    model = objective.model
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    devices = [objective.params[0].device]
    with same_after(devices) as before, torch.enable_grad():
        with drawing(draw, 0):
            output = functional_call(model, buffers, (objective.inputs[indices],))
            losses = objective.loss(prediction_of(output), objective.targets[indices])
        gradient = torch.autograd.grad(losses.sum(), objective.params, allow_unused=True)
        draws = RandomStates.now(devices) != before
    if draws:
        raise NotApplicableError(
            "the model draws random numbers, which would not be the same in a compiled graph "
            "(gdtrain.models.dropout.Dropout's are)"
        )
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    unused = [name for name, g in zip(names, gradient, strict=True) if g is None]
    if unused:
        raise NotApplicableError(f"the loss does not depend on parameter {unused[0]}")
