"""The compiled sweep: forward pass, backward pass and rule of K updates as one graph.

K updates in one sweep, B examples per update, S updates at most in one run of the graph, P
parameters.

On CPU the graph is a loop over a chunk of examples that was gathered beforehand, whose number of
turns is an input: a short chunk costs no more than its updates, and how updates are cut into calls
cannot change them. On a GPU one update is recorded as a CUDA graph and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value
from torch.optim import Optimizer

from gdtrain._compat.torch_compile import while_loop
from gdtrain.engines.compilation import compiled_for, flat
from gdtrain.engines.eager import Eager
from gdtrain.engines.engine import (
    WORTH_SHARING,
    NotApplicableError,
    check_hooks,
    last_share,
    rates_by_schedule,
)
from gdtrain.generators import RandomStates, same_after
from gdtrain.models.dropout import Dropout, drawing, example_seeds
from gdtrain.objective import Objective, prediction_of
from gdtrain.optim.protocol import gathers, own_rule, step_size_of, update_rules
from gdtrain.step_sizes import StochasticPolyak

__all__ = ["Compiled"]

_CHUNK = 8 * 2**20  # bytes of examples that are gathered at once
_LONGEST = 512  # S at most


class _Rule(NamedTuple):
    """One parameter's hyperparameters that are constants of the graph."""

    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    dampening: float = 0.0


def _descend(
    theta: Tensor, g: Tensor, b: Tensor | None, rate: Tensor, share: Tensor, rule: _Rule
) -> tuple[Tensor, Tensor | None]:
    """One parameter's update as `gdtrain.rules.descend_` makes it, out of place.

    Lists of tensors (`torch._foreach_*`) cannot stand in a compiled loop. `share` is 1 − τ, or 1
    at a buffer's first update, which starts from b = 0.
    """
    d = -g if rule.maximize else g
    if rule.weight_decay != 0:
        d = d + rule.weight_decay * theta
    if b is not None:
        b = rule.momentum * b + share * d
        d = d + rule.momentum * b if rule.nesterov else b
    return theta - rate * d, b


_Descend = Callable[..., list[tuple[Tensor, Tensor | None]]]


def _descents(rules: tuple[_Rule, ...]) -> _Descend:
    """Gradient descent, parameter by parameter."""

    def descend(theta: Any, gradient: Any, buffers: Any, rate: Tensor, share: Tensor) -> Any:
        return [
            _descend(p, g, b, rate[k].to(p.dtype), share[k].to(p.dtype), rules[k])
            for k, (p, g, b) in enumerate(zip(theta, gradient, buffers, strict=True))
        ]

    return descend


def _own(
    rule: Callable[..., None], rules: tuple[_Rule, ...], parts: dict[int, list[int]]
) -> _Descend:
    """A user's rule, group by group, on copies: it changes its tensors in place."""

    def descend(theta: Any, gradient: Any, buffers: Any, rate: Tensor, share: Tensor) -> Any:
        made = [p.clone() for p in theta]
        moved = [None if b is None else b.clone() for b in buffers]
        for part in parts.values():
            first, own = part[0], [moved[k] for k in part]
            options = rules[first]._asdict()
            lr = rate[first].to(made[first].dtype)
            rule(
                [made[k] for k in part],
                [gradient[k] for k in part],
                own if options["momentum"] != 0 else [],
                lr=lr,
                **options,
            )
            for k, b in zip(part, own, strict=True):
                moved[k] = b
        return list(zip(made, moved, strict=True))

    return descend


class Compiled:
    """Makes K updates, as `gdtrain.engines.engine.Engine` says, of any module that compiles.

    One compilation per batch size and mode of the model, at the first sweep that needs it; step
    sizes, the schedule and K are inputs of the graph. Momentum, weight decay, Nesterov and
    `maximize` are constants of it: another value is another compilation. Buffers that the forward
    pass changes (BatchNorm's statistics) are carried from update to update. Of random layers only
    `gdtrain.models.dropout.Dropout` is taken, for it draws the same numbers on every engine.

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
        >>> from torch import nn
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 2.0])
        >>> optimizer = torch.optim.Adam([{"params": model.parameters(), "initial_lr": 0.5}])
        >>> Compiled(Objective(model, SquaredError(), x, y), optimizer)
        Traceback (most recent call last):
        ...
        gdtrain.engines.engine.NotApplicableError: the step of Adam is not compiled, ...
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
        if rule is not None and not isinstance(rule, StochasticPolyak):
            raise NotApplicableError(
                f"{type(rule).__name__} looks at more than the loss and the gradient's norm"
            )
        self._bound: StochasticPolyak | None = rule
        self._own = own_rule(optimizer)
        if self._own is not None and rule is not None:
            raise NotApplicableError(
                f"{type(rule).__name__} is compiled with the rule of gradient descent alone"
            )
        self._programs: dict[Any, _Program] = {}

    def __call__(self, indices: Tensor, factors: Tensor, draw: int = 0) -> Tensor:
        """(K, B) example numbers and (K,) factors to (K,) losses.

        Args:
            indices: (K, B), int64.
            factors: (K,), the schedule's factor at each update.
            draw: Names the random numbers of the first update; the next has the next.

        Returns:
            (K,), J on each update's examples before that update.

        Raises:
            NotApplicableError: The model or loss does not compile, or draws random numbers, or
                the batch does not fit into one pass. Nothing was changed.
            ValueError: A step size is not finite.
        """
        check_hooks(self.objective, self.optimizer)  # a callback may have come with some
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
        polyak = None
        if self._bound is not None:
            bounds = self._bound.bounds(self.optimizer, indices.shape[1])
            polyak = (*bounds, float(groups[0]["initial_lr"]))
        with torch.no_grad():
            theta, kept, b, losses, taken = program(
                # As new objects: torch guards on the model's own, and would compile a second time.
                [p.detach() for p in params],
                [b.detach() for b in buffers],
                velocities,
                indices,
                rates,
                shares,
                draw,
                polyak,
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
        self.rates = rates_by_schedule(self.optimizer, factors)
        if self._bound is not None:
            self.rates *= taken.to(self.rates)
            self._bound.remember(self.optimizer, indices.shape[1], last_share(taken))
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

    def _program(self, indices: Tensor, own: Sequence[dict[str, Any]], draw: int) -> _Program:
        """The compiled graph for such updates."""
        objective = self.objective
        for hyperparameters in own:
            _check_hyperparameters(hyperparameters)
        rules = tuple(_Rule(*(group[name] for name in _Rule._fields)) for group in own)
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
            descend = _descents(rules) if self._own is None else _own(self._own, rules, parts)
            program = _Program(objective, rules, size, self._bound, descend)
            self._programs[size, rules, modes] = program
        return program


# ------------------------------------------------------------------ what is refused


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


# ------------------------------------------------------------------ the graph


class _Program:
    """The updates of one batch size, compiled: a loop on CPU, a recorded graph on a GPU."""

    def __init__(
        self,
        objective: Objective,
        rules: tuple[_Rule, ...],
        size: int,
        bound: StochasticPolyak | None,
        descend: _Descend,
    ) -> None:
        self.objective, self.rules = objective, rules
        model = objective.model
        self.buffers = [name for name, _ in model.named_buffers()]
        example = objective.inputs[torch.zeros(1, dtype=torch.int64)]
        target = objective.targets[:1]
        if example.layout is not torch.strided:
            raise NotApplicableError("the inputs are sparse")
        per_update = size * (example.nbytes + target.nbytes)
        self.length = max(1, min(_LONGEST, _CHUNK // max(per_update, 1)))
        self.inputs = example.new_zeros(self.length, size, *example.shape[1:])
        self.targets = target.new_zeros(self.length, size, *target.shape[1:])
        device = objective.params[0].device
        dtype = torch.promote_types(objective.params[0].dtype, torch.float32)
        # The losses, and which share of η₀ each update took.
        self.losses = torch.zeros(2, self.length, dtype=dtype, device=device)
        # What bounds the step: 1/c, f*, growth, the first bound; and η₀.
        self.polyak = torch.zeros(self.length, 5, dtype=torch.float64, device=device)
        shape = (self.length, len(rules))
        self.rates = torch.zeros(shape, dtype=torch.float64, device=device)
        self.shares = torch.zeros(shape, dtype=torch.float64, device=device)
        dropouts = [m for m in model.modules() if isinstance(m, Dropout)]
        # Shapes (S, layers, B): the hashes that need not be computed for each unit.
        self.layers = torch.tensor([m.layer for m in dropouts], dtype=torch.int64)
        self.positions = torch.arange(size)
        self.seeds = torch.zeros(self.length, len(dropouts), size, dtype=torch.int64, device=device)
        update = _update(objective, rules, self.buffers, bound, descend)
        weights = sum(p.numel() for p in objective.params)
        self._run = (
            _replayed(update)
            if device.type == "cuda"
            else _looped(update, single_threaded=size * weights < WORTH_SHARING)
        )
        # Several images at a time: twice as fast with the channels of a pixel side by side.
        self._channels_last = size > 1 and device.type == "cpu"

    def __call__(
        self,
        theta: list[Tensor],
        kept: list[Tensor],
        velocities: list[Tensor],
        indices: Tensor,
        rates: Tensor,
        shares: Tensor,
        draw: int,
        polyak: tuple[float, ...] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor]:
        """Parameters, buffers, momentum; losses and shares of η₀; nothing in place."""
        made = []
        if polyak is not None:
            self.polyak[:] = torch.tensor(polyak, dtype=torch.float64)
        if self._channels_last:
            theta, velocities = (
                [t.contiguous(memory_format=_layout(t)) for t in tensors]
                for tensors in (theta, velocities)
            )
        for first in range(0, len(indices), self.length):
            part = indices[first : first + self.length]
            count = len(part)
            self._gather(part)
            self.rates[:count] = rates[first : first + count]
            self.shares[:count] = shares[first : first + count]
            draws = torch.tensor(draw) + torch.arange(first, first + count)
            self.seeds[:count] = example_seeds(
                draws[:, None, None], self.layers[:, None], self.positions
            )
            theta, kept, velocities, losses = self._run(
                theta,
                kept,
                velocities,
                self.losses,
                (self.inputs, self.targets, self.rates, self.shares, self.seeds, self.polyak),
                count=count,
            )
            made.append(losses[:, :count].clone())
            if polyak is not None and polyak[2] > 0:
                self.polyak[:, 3] = polyak[2] * last_share(
                    made[-1][1], float(self.polyak[0, 3]) / polyak[2]
                )
        found = torch.cat(made, dim=1)
        return theta, kept, velocities, found[0], found[1]

    def _gather(self, part: Tensor) -> None:
        """Put the examples of a chunk side by side."""
        inputs, targets = self.objective.inputs, self.objective.targets
        count, rows = len(part), part.reshape(-1).to(targets.device)
        if isinstance(inputs, Tensor):
            torch.index_select(inputs, 0, rows, out=self.inputs[:count].flatten(0, 1))
        else:
            self.inputs[:count] = inputs[rows].view_as(self.inputs[:count])
        torch.index_select(targets, 0, rows, out=self.targets[:count].flatten(0, 1))


def _layout(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]
_Update = Callable[..., tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]]
_Run = Callable[..., _Lists]


def _update(
    objective: Objective,
    rules: tuple[_Rule, ...],
    buffer_names: list[str],
    bound: StochasticPolyak | None,
    descend: _Descend,
) -> _Update:
    """Update number i of a chunk, as a pure function of tensors."""
    model, loss = objective.model, objective.loss
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    drawn = [
        f"{name}.seeds".lstrip(".") for name, m in model.named_modules() if isinstance(m, Dropout)
    ]
    moving = [k for k, rule in enumerate(rules) if rule.momentum != 0]

    def update(
        i: Tensor,
        theta: list[Tensor],
        kept: list[Tensor],
        velocities: list[Tensor],
        losses: Tensor,
        chunk: tuple[Tensor, ...],
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor]:
        x, y, rate, share, seeds, polyak = (
            t.index_select(0, i.reshape(1)).squeeze(0) for t in chunk
        )

        def mean_loss(theta: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
            state = dict(zip(names, theta, strict=True))
            state.update({name: b.clone() for name, b in zip(buffer_names, kept, strict=True)})
            state.update(zip(drawn, seeds, strict=True))
            prediction = prediction_of(functional_call(model, state, (x,)))
            value = loss(prediction, y).sum() / len(x)
            return value, [state[name] for name in buffer_names]

        gradient, (value, changed) = grad_and_value(mean_loss, has_aux=True)(theta)
        buffers: list[Tensor | None] = [None] * len(rules)
        for k, velocity in zip(moving, velocities, strict=True):
            buffers[k] = velocity
        taken = torch.ones((), dtype=torch.float64, device=losses.device)
        if bound is not None:
            past = None if bound.smoothing is None else (losses[1], i)
            taken = _polyak_share(value, theta, gradient, rules, polyak, past)
            rate = rate * taken
        updated = descend(theta, gradient, buffers, rate, share)
        here = torch.arange(losses.shape[1], device=losses.device) == i
        found = torch.stack([value.to(losses.dtype), taken.to(losses.dtype)])
        return (
            [p for p, _ in updated],
            changed,
            [b for _, b in updated if b is not None],
            torch.where(here, found[:, None], losses),
        )

    return update


def _polyak_share(
    value: Tensor,
    theta: list[Tensor],
    gradient: Any,
    rules: tuple[_Rule, ...],
    polyak: Tensor,
    past: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """As `gdtrain.engines.native.kernels.polyak_share`, of tensors."""
    f = value.double()
    square = torch.zeros_like(f)
    for p, g, rule in zip(theta, gradient, rules, strict=True):
        d = g
        if rule.weight_decay != 0:
            d = g + rule.weight_decay * p
            f = f + 0.5 * rule.weight_decay * p.square().sum().double()
        square = square + d.square().sum().double()
    inverse, lowest, growth, first, peak = polyak.unbind()
    most = first
    if past is not None:  # the last share above 0 of the updates before this one lets it grow
        shares, i = past
        numbers = torch.arange(len(shares), device=shares.device)
        at = torch.where((numbers < i) & (shares > 0), numbers, -1).max()
        before = shares.index_select(0, at.clamp_min(0).reshape(1)).squeeze(0).double()
        most = torch.where(at < 0, first, growth * before)
    bound = inverse * (f - lowest).clamp_min(0) / (square * peak)
    return torch.where((square == 0) | (bound >= most), most, bound)


def _looped(update: _Update, single_threaded: bool) -> _Run:
    """A chunk as one compiled loop, for the CPU."""

    def loop(
        theta: list[Tensor],
        kept: list[Tensor],
        velocities: list[Tensor],
        losses: Tensor,
        chunk: tuple[Tensor, ...],
        count: Tensor,
    ) -> Any:
        def goes_on(i: Tensor, *_: Any) -> Tensor:
            return i < count

        def turn(i: Tensor, *carried: Any) -> Any:
            return i + 1, *update(i, *carried, chunk)

        start = torch.zeros((), dtype=torch.int64)
        return while_loop(goes_on, turn, (start, theta, kept, velocities, losses))[1:]

    compiled: Callable[..., Any] | None = None

    def run(*arguments: Any, count: int) -> Any:
        nonlocal compiled
        if compiled is None:
            compiled = compiled_for(loop, (*arguments, torch.tensor(0)), single_threaded)
        return compiled(*arguments, torch.tensor(count))

    return run


def _replayed(update: _Update) -> _Run:
    """A compiled update, recorded once and replayed without the host, for a GPU."""
    recorded: tuple[torch.cuda.CUDAGraph, Tensor, tuple[Any, ...]] | None = None

    def run(*arguments: Any, count: int) -> Any:
        nonlocal recorded
        *carried, chunk = arguments
        if recorded is None:
            recorded = _record(update, carried, chunk)
        graph, i, held = recorded
        for old, new in zip(flat(held), flat(carried), strict=True):
            old.copy_(new)
        i.zero_()
        for _ in range(count):
            graph.replay()
        return held

    return run


def _record(
    update: _Update, carried: Sequence[Any], chunk: tuple[Tensor, ...]
) -> tuple[torch.cuda.CUDAGraph, Tensor, tuple[Any, ...]]:
    """The graph of one update, the update's number that it reads, and what it changes in place."""
    held = tuple([t.clone() for t in c] if isinstance(c, list) else c.clone() for c in carried)
    i = torch.zeros((), dtype=torch.int64, device=chunk[0].device)
    compiled = compiled_for(update, (i, *held, chunk))

    def step() -> None:
        for old, new in zip(flat(held), flat(compiled(i, *held, chunk)), strict=True):
            old.copy_(new)
        i.add_(1)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # a first call makes what must not be made while recording
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph, i, held
