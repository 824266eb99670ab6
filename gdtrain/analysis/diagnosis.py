"""What went wrong at an update: which example, which parameter, which layer.

B examples of the update, θ parameters before it, ℓ_i loss of example i, h a hidden unit's output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.models.activations import activation_of
from gdtrain.objective import Objective, untouched

__all__ = [
    "RECTIFIERS",
    "Cause",
    "Finding",
    "Health",
    "examine",
    "health",
    "overshoot",
    "step_limit",
]

_NAMED = 5  # examples, features or parameters that a message lists
_ONE_BY_ONE = 256  # examples whose gradients are looked at one by one
_SATURATED = 0.99  # |h| from which a tanh unit counts as saturated
_NEARLY_ALL = 0.95  # share of them from which a layer does
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh)
"""Layers whose units can die: give 0, with slope 0, for every example."""
_LIMIT_EXAMPLES, _LIMIT_PARAMETERS = 2048, 10**7  # of the search for λ


class Cause(str, Enum):
    """What made a run fail.

    Example:
        >>> Cause.INPUT.value
        'INPUT'
    """

    INPUT = "INPUT"
    """A feature of an example is infinite or not a number."""
    TARGET = "TARGET"
    """A label or number to predict is."""
    WEIGHT = "WEIGHT"
    """A parameter or buffer is, before the update."""
    LOSS = "LOSS"
    """The loss is, of finite examples and parameters."""
    GRADIENT = "GRADIENT"
    """The gradient is, of a finite loss."""
    STEP = "STEP"
    """The parameters are after the update, of a finite gradient."""
    GROWTH = "GROWTH"
    """The loss grew beyond the bound."""
    DEAD = "DEAD"
    """All units of a layer give 0 for every example, and all predictions are the same."""
    SATURATED = "SATURATED"
    """Nearly all units of a layer are at the flat ends, and the loss is above the start's."""
    ABOVE_START = "ABOVE_START"
    """The loss stays above the start's, and does not fall."""


@dataclass(frozen=True)
class Finding:
    """A cause, in words and in numbers.

    Args:
        cause: Which.
        message: What was found, as a clause.
        numbers: Plain numbers, strings and lists of them: "examples" (positions in the batch),
            "features", "parameters", …

    Example:
        >>> Finding(Cause.STEP, "layers.1.weight overflowed in the step").cause.value
        'STEP'
    """

    cause: Cause
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def told(self, name: Callable[[str, int], str]) -> str:
        """The message, with examples, features and targets by the names that the user knows.

        Args:
            name: From "example", "feature" or "target" and a position to its name.

        Example:
            >>> finding = Finding(Cause.INPUT, "{feature:2} of {example:0} is nan")
            >>> finding.told(lambda kind, position: f"{kind} {position}")
            'feature 2 of example 0 is nan'
        """
        return re.sub(
            r"\{(example|feature|target):(\d+)\}",
            lambda match: name(match[1], int(match[2])),
            self.message,
        )


@dataclass(frozen=True)
class Health:
    """How the hidden units answer to a probe of examples.

    Args:
        value: J on the probe.
        dead: Share of each rectifier layer's units that give 0 for all examples, by layer.
        saturated: Share of each tanh or sigmoid layer's outputs within 0.5% of the range of one of
            its two ends (|h| > 0.99 for tanh), by layer.
        constant: Whether all predictions are equal.
        value_of_zero: The loss of predicting 0 for each, a scale for losses.

    Example:
        >>> Health(2.3, {"layers.2": 1.0}, {}, constant=True).died
        True
    """

    value: float
    dead: Mapping[str, float]
    saturated: Mapping[str, float]
    constant: bool
    value_of_zero: float = math.nan

    @property
    def died(self) -> bool:
        """A whole layer gives 0, and the predictions no longer depend on the example."""
        return self.constant and any(share == 1.0 for share in self.dead.values())

    @property
    def dead_share(self) -> float:
        """Of the units of the layer that has lost most."""
        return max(self.dead.values(), default=0.0)

    @property
    def is_saturated(self) -> bool:
        """At least 95% of a layer's outputs are saturated."""
        return any(share >= _NEARLY_ALL for share in self.saturated.values())


# ------------------------------------------------------------------ one update


@torch.no_grad()
def examine(
    objective: Objective,
    indices: Tensor,
    draw: int = 0,
    watched: Mapping[str, Tensor] | None = None,
) -> Finding | None:
    """Find what is infinite or not a number in an update, before it is made.

    Looks in the order in which one thing makes the next: parameters, inputs, targets, the loss of
    each example, the gradient.

    Args:
        objective: J, at the parameters before the update.
        indices: (B,), the update's examples.
        draw: Names the update's random numbers.
        watched: The parameters and buffers that should be finite, by name; None: all.

    Returns:
        The first cause; None: all is finite, up to the gradient. "examples" in its numbers are
        positions in `indices`.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(2, 1)
        >>> x, y = torch.ones(3, 2), torch.zeros(3)
        >>> x[1, 0] = torch.nan
        >>> examine(Objective(model, SquaredError(), x, y), torch.tensor([0, 1])).numbers
        {'examples': [1], 'features': [0], 'values': ['nan']}
    """
    model = objective.model
    if watched is None:
        watched = dict((*model.named_parameters(), *model.named_buffers()))
    broken = {name: count for name, t in watched.items() if (count := _bad(t))}
    if broken:
        listed = [f"{count} of {watched[name].numel()} in {name}" for name, count in broken.items()]
        return Finding(
            Cause.WEIGHT,
            f"{_list(listed)} {'are' if sum(broken.values()) > 1 else 'is'} not finite",
            {"parameters": list(broken)},
        )
    size = objective.micro_batch_size or max(len(indices), 1)
    for what, cause in (("feature", Cause.INPUT), ("target", Cause.TARGET)):
        found: list[tuple[int, int, float]] = []
        for first in range(0, len(indices), size):
            part = indices[first : first + size]
            rows = objective.inputs[part] if cause is Cause.INPUT else objective.targets[part]
            if rows.is_floating_point():
                flat = rows.reshape(len(part), -1)
                for i, column in (~torch.isfinite(flat)).nonzero()[: _NAMED + 1].tolist():
                    found.append((first + i, column, float(flat[i, column])))
        if found:
            numbers = {
                "examples": list(dict.fromkeys(i for i, _, _ in found)),
                f"{what}s": list(dict.fromkeys(c for _, c, _ in found)),
                "values": [str(v) for _, _, v in found[:_NAMED]],
            }
            i, column, value = found[0]
            more = f", and {len(found) - 1} more" if len(found) > 1 else ""
            return Finding(
                cause, f"{{{what}:{column}}} of {{example:{i}}} is {value}{more}", numbers
            )
    with untouched(objective.model):
        losses = objective.losses(indices, draw)
    bad = (~torch.isfinite(losses)).nonzero().flatten().tolist()
    if bad:
        named = _list([f"{{example:{i}}}" for i in bad[:_NAMED]])
        what = f"the loss of {named} is {float(losses[bad[0]])}"
        if len(bad) > _NAMED:
            what = f"the loss of {len(bad)} of its {len(indices)} examples is not finite"
        return Finding(Cause.LOSS, what, {"examples": bad[: 4 * _NAMED]})
    gradient = _gradient(objective, indices, draw)
    parameters = {
        name: count for name, g in gradient.items() if g is not None and (count := _bad(g))
    }
    if not parameters:
        return None
    guilty: list[int] = []
    if objective.ranks == 1 and 1 < len(indices) <= _ONE_BY_ONE:
        for i in range(len(indices)):
            own = _gradient(objective, indices[i : i + 1], draw).values()
            if any(g is not None and _bad(g) for g in own):
                guilty.append(i)
    elif len(indices) == 1:
        guilty = [0]
    of = (
        _list([f"{{example:{i}}}" for i in guilty[:_NAMED]], len(guilty)) if guilty else "the batch"
    )
    return Finding(
        Cause.GRADIENT,
        f"the loss is finite, but the gradient of {of} with respect to {_list(list(parameters))} "
        f"is not",
        {"examples": guilty[: 4 * _NAMED], "parameters": list(parameters)},
    )


def _gradient(objective: Objective, indices: Tensor, draw: int) -> dict[str, Tensor | None]:
    names = {id(p): name for name, p in objective.model.named_parameters()}
    with torch.enable_grad(), untouched(objective.model):
        _, made = objective.value_and_grad(indices, draw)
    return {names[id(p)]: g for p, g in zip(objective.params, made, strict=True)}


def _bad(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def _list(words: Sequence[str], count: int | None = None) -> str:
    """The first few words, and how many more there are."""
    count = len(words) if count is None else count
    shown = list(words[:_NAMED])
    if count > len(shown):
        return f"{', '.join(shown)} and {count - len(shown)} more"
    return " and ".join(filter(None, (", ".join(shown[:-1]), shown[-1])))


# ------------------------------------------------------------------ the units


@torch.no_grad()
def health(objective: Objective, indices: Tensor, draw: int = 0) -> Health:
    """Look at the hidden units on a probe of examples, in one pass that leaves no trace.

    Seen are layers that are modules (`nn.ReLU`, `nn.Tanh`, …), in the mode that the model is in.

    Args:
        objective: J, at the parameters to look at.
        indices: (P,), the probe, at least two examples to tell whether predictions are constant.
        draw: Names the random numbers.

    Returns:
        J on the probe, and the shares of dead and saturated units.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
        >>> _ = nn.init.constant_(model[0].bias, -100.0)
        >>> x = torch.linspace(-1, 1, 8)[:, None]
        >>> health(Objective(model, SquaredError(), x, x[:, 0]), torch.arange(8)).died
        True
    """
    alive: dict[str, Tensor] = {}
    ends: dict[str, list[float]] = {}
    outputs: list[Tensor] = []

    def watch(name: str, layer: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: Any, h: Any) -> None:
            if not isinstance(h, Tensor) or h.ndim < 2:
                return
            if isinstance(layer, RECTIFIERS):
                units = (
                    h.transpose(0, 1).flatten(1) if h.ndim == 4 else h.reshape(-1, h.shape[-1]).T
                )
                some = (units != 0).any(1)
                alive[name] = some | alive[name] if name in alive else some
            else:
                low, high = saturates[name]
                centred = (2 * h - (low + high)) / (high - low)
                total = ends.setdefault(name, [0.0, 0.0])
                total[0] += float((centred.abs() > _SATURATED).sum())
                total[1] += h.numel()

        return hook

    def keep(_: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append(output)

    saturates = {
        name: activation.ends
        for name, layer in objective.model.named_modules()
        if (activation := activation_of(layer)) is not None and activation.ends is not None
    }
    handles = [
        layer.register_forward_hook(watch(name, layer))
        for name, layer in objective.model.named_modules()
        if isinstance(layer, RECTIFIERS) or name in saturates
    ]
    handles.append(objective.model.register_forward_hook(keep))
    try:
        with untouched(objective.model):
            value = float(objective.value(indices, draw))
    finally:
        for handle in handles:
            handle.remove()
    constant, zero = False, math.nan
    if outputs and sum(map(len, outputs)) == len(indices) > 1:
        made = torch.cat(outputs)
        flat = made.reshape(len(made), -1)
        spread = flat.amax(0) - flat.amin(0)
        constant = bool((spread <= 1e-6 * flat.abs().amax(0)).all())
        zero = float(objective.loss(torch.zeros_like(made), objective.targets[indices]).mean())
    return Health(
        value,
        {name: 1 - float(some.double().mean()) for name, some in alive.items()},
        {name: over / max(count, 1) for name, (over, count) in ends.items()},
        constant,
        zero,
    )


# ------------------------------------------------------------------ the step size


def step_limit(objective: Objective, optimizer: Optimizer) -> tuple[float, float] | None:
    """λ and the step size beyond which full-batch descent is unstable, at the parameters as given.

    Args:
        objective: J.
        optimizer: GD, or anything with "momentum" in its groups.

    Returns:
        λ and 2/λ (with momentum, `gdtrain.analysis.curvature.stability_limit`); None where they
        cannot be had: the model cannot be differentiated twice, is very large, or is shared by
        processes.

    Example:
        >>> from gdtrain import GD
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> x = torch.tensor([[2.0], [0.0]])
        >>> objective = Objective(model, SquaredError(), x, x[:, 0])  # λ = 4/2
        >>> step_limit(objective, GD(model.parameters(), lr=0.1))
        (2.0, 1.0)
    """
    from gdtrain.analysis.curvature import sharpness, stability_limit

    if objective.ranks > 1 or sum(p.numel() for p in objective.params) > _LIMIT_PARAMETERS:
        return None
    count = len(objective.targets)
    group = optimizer.param_groups[0]
    try:
        with untouched(objective.model):
            found = sharpness(
                objective,
                None if count <= _LIMIT_EXAMPLES else _LIMIT_EXAMPLES,
                optimizer=optimizer,
                tolerance=0.05,
                max_iterations=60,
            )
        limit = stability_limit(
            found,
            float(group.get("momentum", 0.0)),
            bool(group.get("nesterov", False)),
            float(group.get("dampening", 0.0)),
        )
    except (ValueError, RuntimeError):
        return None
    return (found.value, limit) if math.isfinite(limit) else None


def overshoot(objective: Objective, indices: Tensor, rate: float) -> float | None:
    """η times the curvature along the gradient: from 1 on a step goes beyond the valley's floor.

        g = ∇J(θ),  g' = ∇J(θ − η g):  η λ_g = 1 − ⟨g, g'⟩/‖g‖²

    Below 1 the next gradient points the same way; between 1 and 2 it points back, and the
    parameters bounce from wall to wall; above 2 it is longer than before.

    Args:
        objective: J; θ is put back.
        indices: (B,), the examples of the gradient.
        rate: η.

    Returns:
        η λ_g; None where the gradient is 0 or not finite.

    Example:
        >>> from gdtrain.losses import SquaredError
        >>> model = nn.Linear(1, 1, bias=False)
        >>> objective = Objective(model, SquaredError(), torch.ones(1, 1), torch.zeros(1))
        >>> round(overshoot(objective, torch.tensor([0]), rate=1.5), 4)  # λ = 1
        1.5
    """
    with untouched(objective.model):
        _, before = objective.value_and_grad(indices)
        kept = [p.detach().clone() for p in objective.params]
        with torch.no_grad():
            for p, g in zip(objective.params, before, strict=True):
                if g is not None:
                    p.sub_(g, alpha=rate)
        try:
            _, after = objective.value_and_grad(indices)
        finally:
            with torch.no_grad():
                for p, k in zip(objective.params, kept, strict=True):
                    p.copy_(k)
    square = sum(float((g.double() ** 2).sum()) for g in before if g is not None)
    product = sum(
        float((g.double() * h.double()).sum())
        for g, h in zip(before, after, strict=True)
        if g is not None and h is not None
    )
    if not 0 < square < math.inf or not math.isfinite(product):
        return None
    return 1 - product / square
