"""The graph of the compiled engine: updates as a pure function of tensors, looped or replayed.

S updates at most in one run of the graph, B examples per update, P parameters.

On CPU the graph is a loop over a chunk of examples that was gathered beforehand, whose number of
turns is an input: a short chunk costs no more than its updates, and how updates are cut into calls
cannot change them. On a GPU one update is recorded as a CUDA graph and replayed.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value

from gdtrain._compat.torch_compile import (
    compiler_errors,
    decompositions,
    inductor,
    while_loop,
    with_strides,
)
from gdtrain.engines.engine import WORTH_SHARING, NotApplicableError
from gdtrain.models.dropout import Dropout, example_seeds
from gdtrain.objective import Objective, prediction_of
from gdtrain.step_sizes.bounded import BoundedStep, last_share

__all__ = ["GraphRule", "Program", "descend", "descents", "own_descents"]

_CHUNK = 8 * 2**20  # bytes of examples that are gathered at once
_LONGEST = 512  # S at most


class GraphRule(NamedTuple):
    """A parameter's hyperparameters that are constants of the graph."""

    momentum: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    dampening: float = 0.0


def descend(
    theta: Tensor, g: Tensor, b: Tensor | None, rate: Tensor, share: Tensor, rule: GraphRule
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


def descents(rules: tuple[GraphRule, ...]) -> _Descend:
    """Gradient descent, parameter by parameter."""

    def update(theta: Any, gradient: Any, buffers: Any, rate: Tensor, share: Tensor) -> Any:
        return [
            descend(p, g, b, rate[k].to(p.dtype), share[k].to(p.dtype), rules[k])
            for k, (p, g, b) in enumerate(zip(theta, gradient, buffers, strict=True))
        ]

    return update


def own_descents(
    rule: Callable[..., None], rules: tuple[GraphRule, ...], parts: dict[int, list[int]]
) -> _Descend:
    """A user's rule, group by group, on copies: it changes its tensors in place."""

    def update(theta: Any, gradient: Any, buffers: Any, rate: Tensor, share: Tensor) -> Any:
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

    return update


class Program:
    """The updates of one batch size, compiled: a loop on CPU, a recorded graph on a GPU."""

    def __init__(
        self,
        objective: Objective,
        rules: tuple[GraphRule, ...],
        size: int,
        bound: BoundedStep | None,
        descents: _Descend,
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
        self.dtype = torch.promote_types(objective.params[0].dtype, torch.float32)
        # The losses, which share of η₀ each update took, and Σ‖g‖².
        self.losses = torch.zeros(3, self.length, dtype=torch.float64, device=device)
        # What bounds the step: the numbers of `Bound`, and η₀.
        self.bound = torch.zeros(self.length, 7, dtype=torch.float64, device=device)
        shape = (self.length, len(rules))
        self.rates = torch.zeros(shape, dtype=torch.float64, device=device)
        self.shares = torch.zeros(shape, dtype=torch.float64, device=device)
        dropouts = [m for m in model.modules() if isinstance(m, Dropout)]
        # Shapes (S, layers, B): the hashes that need not be computed for each unit.
        self.layers = torch.tensor([m.layer for m in dropouts], dtype=torch.int64)
        self.positions = torch.arange(size)
        self.seeds = torch.zeros(self.length, len(dropouts), size, dtype=torch.int64, device=device)
        update = _update(objective, rules, self.buffers, bound, descents)
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
        bound: tuple[float, ...] | None = None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], Tensor, Tensor, Tensor]:
        """Parameters, buffers, momentum; losses, shares of η₀ and Σ‖g‖²; nothing in place."""
        made = []
        if bound is not None:
            self.bound[:] = torch.tensor(bound, dtype=torch.float64)
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
                (self.inputs, self.targets, self.rates, self.shares, self.seeds, self.bound),
                count=count,
            )
            made.append(losses[:, :count].clone())
            if bound is not None:
                growth, most = bound[2], float(self.bound[0, 3])
                if growth > 0:
                    self.bound[:, 3] = growth * last_share(made[-1][1], most / growth)
                self.bound[:, 5] = made[-1][2, -1]
        found = torch.cat(made, dim=1)
        return theta, kept, velocities, found[0].to(self.dtype), found[1], found[2, -1]

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
_Update = Callable[..., _Lists]


def _update(
    objective: Objective,
    rules: tuple[GraphRule, ...],
    buffer_names: list[str],
    bound: BoundedStep | None,
    descents: _Descend,
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
    ) -> _Lists:
        x, y, rate, share, seeds, limits = (
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
        taken = total = torch.ones((), dtype=torch.float64, device=losses.device)
        if bound is not None:
            taken, total = _bounded_share(value, theta, gradient, rules, limits, losses, i)
            rate = rate * taken
        updated = descents(theta, gradient, buffers, rate, share)
        here = torch.arange(losses.shape[1], device=losses.device) == i
        found = torch.stack([value.to(losses.dtype), taken, total])
        return (
            [p for p, _ in updated],
            changed,
            [b for _, b in updated if b is not None],
            torch.where(here, found[:, None], losses),
        )

    return update


def _bounded_share(
    value: Tensor,
    theta: list[Tensor],
    gradient: Any,
    rules: tuple[GraphRule, ...],
    limits: Tensor,
    made: Tensor,
    i: Tensor,
) -> tuple[Tensor, Tensor]:
    """As `gdtrain.engines.native.kernels.bounded_share`, of tensors; and Σ‖g‖² with this one.

    `made` (3, S) has losses, shares and sums of the updates before number i.
    """
    f = value.double()
    square = torch.zeros_like(f)
    for p, g, rule in zip(theta, gradient, rules, strict=True):
        d = g
        if rule.weight_decay != 0:
            d = g + rule.weight_decay * p
            f = f + 0.5 * rule.weight_decay * p.square().sum().double()
        square = square + d.square().sum().double()
    inverse, lowest, growth, first, reach, total, peak = limits.unbind()
    numbers = torch.arange(made.shape[1], device=made.device)

    def entry(row: int, at: Tensor) -> Tensor:
        return made[row].index_select(0, at.clamp_min(0).reshape(1)).squeeze(0)

    # The last share above 0 of the updates before this one lets it grow.
    at = torch.where((numbers < i) & (made[1] > 0), numbers, -1).max()
    most = torch.where((at < 0) | (growth == 0), first, growth * entry(1, at))
    total = square + torch.where(i == 0, total, entry(2, i - 1))
    bound = inverse * (f - lowest).clamp_min(0) / (square * peak)
    share = torch.minimum(bound, torch.minimum(most, reach / (total.sqrt() * peak)))
    still = torch.where(most.isinf() | reach.isfinite(), torch.zeros_like(most), most)
    return torch.where(square == 0, still, share), total


def _looped(update: _Update, single_threaded: bool) -> _Update:
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
            compiled = _compiled_for(loop, (*arguments, torch.tensor(0)), single_threaded)
        return compiled(*arguments, torch.tensor(count))

    return run


def _replayed(update: _Update) -> _Update:
    """A compiled update, recorded once and replayed without the host, for a GPU."""
    recorded: tuple[torch.cuda.CUDAGraph, Tensor, tuple[Any, ...]] | None = None

    def run(*arguments: Any, count: int) -> Any:
        nonlocal recorded
        *carried, chunk = arguments
        if recorded is None:
            recorded = _record(update, carried, chunk)
        graph, i, held = recorded
        for old, new in zip(_flat(held), _flat(carried), strict=True):
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
    compiled = _compiled_for(update, (i, *held, chunk))

    def step() -> None:
        for old, new in zip(_flat(held), _flat(compiled(i, *held, chunk)), strict=True):
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


def _flat(carried: Sequence[Any]) -> list[Tensor]:
    """The tensors in tensors and lists of them."""
    return [t for c in carried for t in (c if isinstance(c, (list, tuple)) else [c])]


def _compiled_for(
    function: Callable[..., Any], arguments: tuple[Any, ...], single_threaded: bool = False
) -> Callable[..., Any]:
    """A function compiled for such arguments, and called once with them.

    On CPU with host code in C++, where that can be had: a small update spends as long there as in
    its kernels.
    """
    backend_failed, tracing_failed, too_many = compiler_errors()
    on_cpu = _flat(arguments)[0].device.type == "cpu"
    for in_cpp in (True, False) if on_cpu else (False,):
        # Dynamo keeps what it compiled with the code, and no more than a few for each.
        code = function.__code__
        own = types.FunctionType(
            code.replace(), function.__globals__, None, None, function.__closure__
        )
        compiled = torch.compile(
            own, fullgraph=True, dynamic=False, backend=_backend(in_cpp, single_threaded)
        )
        try:
            with _without_word_of_cuda():
                compiled(*arguments)
        except RuntimeError as error:
            traced = isinstance(error, backend_failed)
            if in_cpp and (traced or not isinstance(error, tracing_failed)):
                continue
            raise _refusal(error) from error
        break

    def run(*arguments: Any) -> Any:
        try:
            return compiled(*arguments)
        except (tracing_failed, too_many) as error:  # the model was changed
            raise _refusal(error) from error

    return run


def _refusal(error: Exception) -> NotApplicableError:
    return NotApplicableError(f"torch.compile cannot take the update: {_reason(error)}")


@contextmanager
def _without_word_of_cuda() -> Iterator[None]:
    """Silences torch's remark on a CUDA toolkit without a GPU, made where compilers are sought."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _backend(in_cpp: bool, single_threaded: bool) -> Callable[..., Any]:
    """Inductor, with products of a single row as loops that fuse with what surrounds them.

    For one example, the product W x and the gradient, an outer product, then read or write each
    weight once, together with the rule; library calls pass over memory three times as often.
    """
    aten, in_memory = torch.ops.aten, with_strides()
    table = decompositions()
    usual_mm, usual_addmm = table[aten.mm.default], table[aten.addmm.default]

    def is_single(a: Tensor) -> bool:
        return a.is_cpu and a.dtype in (torch.float32, torch.float64) and 1 in a.shape

    def mm(a: Tensor, b: Tensor) -> Any:
        if not is_single(a):
            return usual_mm(a, b)
        # In memory: else the layer before would be computed again for each entry of the product.
        a, b = in_memory(a, a.stride()), in_memory(b, b.stride())
        return a * b if a.shape[1] == 1 else (a.reshape(-1, 1) * b).sum(0, keepdim=True)

    def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
        if not is_single(a) or beta != 1 or alpha != 1:
            return usual_addmm(c, a, b, beta=beta, alpha=alpha)
        return c + mm(a, b)

    table[aten.mm.default], table[aten.addmm.default] = mm, addmm
    patches = {"cpp_wrapper": in_cpp, **({"cpp.threads": 1} if single_threaded else {})}
    return inductor(patches, table)


def _reason(error: Exception) -> str:
    """What torch says in pages, in a line."""
    inner = getattr(error, "inner_exception", None)
    lines = [line.strip() for line in str(inner or error).splitlines() if line.strip()]
    explained = [line for line in lines if line.startswith("Explanation: ")]
    line = (*explained, *lines, "")[0].removeprefix("Explanation: ").removesuffix(".")[:200]
    return f"{type(inner).__name__}: {line}" if inner is not None else line
