"""What went wrong at an update: which example, which parameter, which layer.

B examples of the update, θ parameters before it, ℓ_i loss of example i, h a hidden unit's output.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain.descent.monitors import FINITE, WINDOW, Cause, Failure, Health
from gdtrain.descent.trial import staying
from gdtrain.models.activations import activation_of
from gdtrain.objective import Objective, untouched
from gdtrain.optim.protocol import update_rules

__all__ = [
    "RECTIFIERS",
    "Finding",
    "Names",
    "examine",
    "explain",
    "health",
    "oscillation",
    "overshoot",
    "sentence",
    "step_limit",
    "what_helps",
]

_NAMED = 5  # examples, features or parameters that a message lists
_ONE_BY_ONE = 256  # examples whose gradients are looked at one by one
_SATURATED = 0.99  # |h| from which a tanh unit counts as saturated
RECTIFIERS = (nn.ReLU, nn.ReLU6, nn.Threshold, nn.Hardtanh)
"""Layers whose units can die: give 0, with slope 0, for every example."""
_LIMIT_EXAMPLES, _LIMIT_PARAMETERS = 2048, 10**7  # of the search for λ


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
class Names:
    """How the user knows the examples of an update, its features and targets.

    Args:
        rows: Number in the training part of each of the update's examples; None: not known.
        source: Row of the data by number in the training part; None: not known.
        features: Names of the features; None: they have none.

    Example:
        >>> names = Names([7, 4], range(100, 110), ["age", "height"])
        >>> names("feature", 1), names("example", 0)
        ('feature 1 (height)', 'training example 7 (row 107 of the data)')
        >>> Names()("example", 0), Names()("target", 0)
        ('example 0 of the batch', 'the target')
    """

    rows: Sequence[int] | None = None
    source: Sequence[int] | None = None
    features: Sequence[str] | None = None

    def __call__(self, kind: str, i: int) -> str:
        """Of "example", "feature" or "target" number i."""
        if kind == "feature":
            named = self.features and i < len(self.features)
            return f"feature {i}" + (f" ({self.features[i]})" if named else "")  # type: ignore[index]
        if kind == "target":
            return "the target" if i == 0 else f"target {i}"
        if self.rows is None:
            return f"example {i} of the batch"
        row = "" if self.source is None else f" (row {int(self.source[self.rows[i]])} of the data)"
        return f"training example {self.rows[i]}{row}"

    def numbers(self, finding: Finding) -> dict[str, list[int]]:
        """Its examples in the training part, and their rows in the data.

        Args:
            finding: Its "examples" are positions in the update.
        """
        positions = finding.numbers.get("examples", [])
        if self.rows is None or not positions:
            return {}
        examples = [self.rows[i] for i in positions]
        if self.source is None:
            return {"examples": examples}
        return {"examples": examples, "rows": [int(self.source[i]) for i in examples]}


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
        optimizer: Of its parameters.

    Returns:
        λ and 2/λ (with momentum, `gdtrain.analysis.curvature.stability_limit`); None where they
        cannot be had: the steps are not along −g, or the model cannot be differentiated twice, is
        very large, or is shared by processes.

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
    if update_rules(optimizer) is None:
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
        with staying(objective.params):
            with torch.no_grad():
                for p, g in zip(objective.params, before, strict=True):
                    if g is not None:
                        p.sub_(g, alpha=rate)
            _, after = objective.value_and_grad(indices)
    square = sum(float((g.double() ** 2).sum()) for g in before if g is not None)
    product = sum(
        float((g.double() * h.double()).sum())
        for g, h in zip(before, after, strict=True)
        if g is not None and h is not None
    )
    if not 0 < square < math.inf or not math.isfinite(product):
        return None
    return 1 - product / square


# ------------------------------------------------------------------ in words


def explain(failure: Failure, start: float, growth: float) -> Finding:
    """What losses, and the units of a probe, have shown of a failure.

    Args:
        failure: Its cause is known.
        start: The probe's loss at the start.
        growth: Bound on the loss, in units of that.

    Example:
        >>> explain(Failure(15, Cause.GROWTH), start=0.5, growth=1e4).message
        "the mean loss of 16 updates is above 1e+04 times the start's, 0.5"
    """
    cause, units = failure.cause, failure.units
    assert cause is not None
    if units is None:
        return Finding(
            cause,
            f"the mean loss of {WINDOW} updates is above {growth:.4g} times the start's, "
            f"{start:.4g}",
            {"start_loss": start, "growth": growth},
        )
    numbers: dict[str, Any] = {"probe_loss": units.value, "start_loss": start}
    text = (
        f"the loss is {units.value:.4g} on a probe of training examples, and was {start:.4g} at "
        f"the start there"
    )
    if cause is Cause.ABOVE_START:
        text += ", and has not fallen"
    elif cause in (Cause.DEAD, Cause.SATURATED):
        shares = units.dead if cause is Cause.DEAD else units.saturated
        share = max(shares.values())
        layers = [name for name, own in shares.items() if own == share]
        numbers |= {"layers": layers, cause.value.lower(): share}
        what = "give 0 for every example" if cause is Cause.DEAD else "are saturated"
        text = f"{share:.1%} of the units of {', '.join(layers)} {what}; {text}"
    return Finding(cause, text, numbers)


def sentence(
    finding: Finding,
    told: str,
    update: int,
    rate: float,
    loss: float | None,
    limit: tuple[float, float] | None,
) -> str:
    """What happened, for the user.

    Args:
        finding: What failed.
        told: Its message, by `Finding.told`.
        update: Which update.
        rate: η there.
        loss: J there; None: not known.
        limit: λ and the largest stable η, by `step_limit`; None: not known.

    Example:
        >>> sentence(Finding(Cause.GROWTH, ""), "the loss grew", 15, 30.0, 1e9, (1.0, 2.0))
        'The run diverged at update 15 (counted from 0) with lr=30: the loss grew. Full-batch \
descent is stable below lr=2 at the last good state (sharpness 1).'
    """
    if finding.cause in FINITE:
        what = "The run diverged"
    elif loss is not None and not math.isfinite(loss):
        what = f"The loss was {loss}"
    else:
        what = "The parameters became infinite or not a number"
    stable = (
        ""
        if limit is None
        else (
            f" Full-batch descent is stable below lr={limit[1]:.3g} at the last good state "
            f"(sharpness {limit[0]:.3g})."
        )
    )
    return f"{what} at update {update} (counted from 0) with lr={rate:.4g}: {told}.{stable}"


def what_helps(cause: Cause) -> str:
    """The next thing to try where no step size helps; "": nothing is known.

    Args:
        cause: Of a failure that the last good parameters have, too.

    Example:
        >>> what_helps(Cause.INPUT)
        'Correct or leave out that example: no step size helps.'
    """
    return {
        Cause.INPUT: "Correct or leave out that example: no step size helps.",
        Cause.TARGET: "Correct or leave out that example: no step size helps.",
        Cause.WEIGHT: "Give the model finite initial parameters: no step size helps.",
        Cause.LOSS: "The last good parameters give no finite loss for it either: look at the scale "
        "of these examples and of the initial parameters, or set data.dtype=float64.",
        Cause.GRADIENT: "The last good parameters give no finite gradient for it either: look for "
        "a square root, a division or a logarithm at 0 in the model.",
    }.get(cause, "")


def oscillation(bounce: float, rate: float, losses: Any) -> tuple[str, str, dict[str, Any]]:
    """Message, advice and numbers where the steps go beyond the floor of the valley.

    Args:
        bounce: η times the curvature along the gradient, by `overshoot`, range (1, ∞).
        rate: η.
        losses: (n,), the last ones.

    Example:
        >>> message, advice, numbers = oscillation(1.5, 0.3, [1.0, 0.9, 1.0, 0.9])
        >>> advice
        'lr=0.2 would step onto the floor; a schedule that decays settles there too.'
        >>> numbers["turns"]
        2
    """
    changes = torch.as_tensor(losses, dtype=torch.float64).diff().sign()
    turns = int((changes[1:] * changes[:-1] < 0).sum())
    turned = f"; the loss turned {turns} times in the last {len(changes)} updates"
    return (
        f"The steps oscillate: they go beyond the floor of the valley that they cross (η times "
        f"the curvature along the gradient is {bounce:.2f}: from 1 on a step does, from 2 on it "
        f"climbs){turned if turns > len(changes) // 2 else ''}.",
        f"lr={rate / bounce:.3g} would step onto the floor; a schedule that decays settles there "
        f"too.",
        {"oscillation": bounce, "turns": turns, "lr": rate},
    )
