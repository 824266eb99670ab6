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

from gdtrain.analysis.curvature import limit_of, sharpness
from gdtrain.analysis.gradients import dot
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
    """A cause, in words (a clause) and in plain numbers, strings and lists of them.

    "examples" of the numbers, and `{example:0}` in the words, are positions in the batch.
    """

    cause: Cause
    message: str
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def told(self, name: Callable[[str, int], str]) -> str:
        """The message, with examples, features and targets by the names that the user knows."""
        return re.sub(
            r"\{(example|feature|target):(\d+)\}",
            lambda match: name(match[1], int(match[2])),
            self.message,
        )


@dataclass(frozen=True)
class Names:
    """How the user knows the examples of an update, its features and targets; None: not known."""

    rows: Sequence[int] | None = None  # of the update's examples, in the training part
    source: Sequence[int] | None = None  # row of the data by number in the training part
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
        """Its examples in the training part, and their rows in the data."""
        positions = finding.numbers.get("examples", [])
        if self.rows is None or not positions:
            return {}
        examples = [self.rows[i] for i in positions]
        if self.source is None:
            return {"examples": examples}
        return {"examples": examples, "rows": [int(self.source[i]) for i in examples]}


@torch.no_grad()
def examine(
    objective: Objective,
    indices: Tensor,
    draw: int = 0,
    watched: Mapping[str, Tensor] | None = None,
) -> Finding | None:
    """What is infinite or not a number in an update, before it is made; None: nothing.

    Looks in the order in which one thing makes the next: parameters and buffers (`watched`; None:
    all), inputs, targets, the loss of each example, the gradient.
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
        named = _list([f"{{example:{i}}}" for i in bad])
        what = f"the loss of {named} is {float(losses[bad[0]])}"
        if len(bad) > _NAMED:
            what = f"the loss of {len(bad)} of its {len(indices)} examples is not finite"
        return Finding(Cause.LOSS, what, {"examples": bad[: 4 * _NAMED]})
    parameters = _spoilt(objective, indices, draw)
    if not parameters:
        return None
    guilty = [0] if len(indices) == 1 else []
    if objective.ranks == 1 and 1 < len(indices) <= _ONE_BY_ONE:
        each = enumerate(indices.split(1))
        guilty = [i for i, index in each if _spoilt(objective, index, draw)]
    of = _list([f"{{example:{i}}}" for i in guilty]) if guilty else "the batch"
    return Finding(
        Cause.GRADIENT,
        f"the loss is finite, but the gradient of {of} with respect to {_list(parameters)} is not",
        {"examples": guilty[: 4 * _NAMED], "parameters": parameters},
    )


def _spoilt(objective: Objective, indices: Tensor, draw: int) -> list[str]:
    """Parameters in which the gradient is not finite."""
    names = {id(p): name for name, p in objective.model.named_parameters()}
    with torch.enable_grad(), untouched(objective.model):
        _, gradient = objective.value_and_grad(indices, draw)
    pairs = zip(objective.params, gradient, strict=True)
    return [names[id(p)] for p, g in pairs if g is not None and _bad(g)]


def _bad(tensor: Tensor) -> int:
    return int((~torch.isfinite(tensor)).sum())


def _list(words: Sequence[str]) -> str:
    """The first few words, and how many more there are."""
    if len(words) > _NAMED:
        return f"{', '.join(words[:_NAMED])} and {len(words) - _NAMED} more"
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


@torch.no_grad()
def health(objective: Objective, indices: Tensor, draw: int = 0) -> Health:
    """Look at the hidden units on a probe of examples, in one pass that leaves no trace.

    Seen are layers that are modules (`nn.ReLU`, `nn.Tanh`, …), in the mode that the model is in.
    Whether predictions are constant shows on two examples or more.
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


def step_limit(objective: Objective, optimizer: Optimizer) -> tuple[float, float] | None:
    """λ, and the step size beyond which full-batch descent is unstable (`stability_limit`).

    None where they cannot be had: the steps are not along −g, λ ≤ 0, or the model cannot be
    differentiated twice, is very large, or is shared by processes.
    """
    size = sum(p.numel() for p in objective.params)
    if objective.ranks > 1 or size > _LIMIT_PARAMETERS or update_rules(optimizer) is None:
        return None
    examples = min(len(objective.targets), _LIMIT_EXAMPLES)
    options: dict[str, Any] = {"optimizer": optimizer, "tolerance": 0.05, "max_iterations": 60}
    try:
        found = sharpness(objective, examples, **options)
        limit = limit_of(found, optimizer)
    except (ValueError, RuntimeError):
        return None
    return None if limit is None else (found.value, limit)


def overshoot(objective: Objective, indices: Tensor, rate: float) -> float | None:
    """η times the curvature along the gradient: from 1 on a step goes beyond the valley's floor.

        g = ∇J(θ),  g' = ∇J(θ − η g):  η λ_g = 1 − ⟨g, g'⟩/‖g‖²

    Below 1 the next gradient points the same way; between 1 and 2 it points back, and the
    parameters bounce from wall to wall; above 2 it is longer than before. None where the gradient
    is 0 or not finite.
    """
    with untouched(objective.model):
        _, before = objective.value_and_grad(indices)
        with staying(objective.params):
            with torch.no_grad():
                for p, g in zip(objective.params, before, strict=True):
                    if g is not None:
                        p.sub_(g, alpha=rate)
            _, after = objective.value_and_grad(indices)
    square, product = dot(before, before), dot(before, after)
    if not 0 < square < math.inf or not math.isfinite(product):
        return None
    return 1 - product / square


def explain(failure: Failure, start: float, growth: float) -> Finding:
    """What losses, and the units of a probe, have shown of a failure whose cause is known.

    `start` is the probe's loss at the start, `growth` the bound on the loss, in units of that.
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
    """What happened, for the user: at an update with step size `rate` and loss `loss`.

    `told` is by `Finding.told`, `limit` by `step_limit`.
    """
    if finding.cause in FINITE:
        what = "The run diverged"
    elif loss is not None and not math.isfinite(loss):
        what = f"The loss was {loss}"
    else:
        what = "The parameters became infinite or not a number"
    said = f"{what} at update {update} (counted from 0) with lr={rate:.4g}: {told}."
    if limit is not None:
        said += (
            f" Full-batch descent is stable below lr={limit[1]:.3g} at the last good state "
            f"(sharpness {limit[0]:.3g})."
        )
    return said


def what_helps(cause: Cause) -> str:
    """The next thing to try where the last good parameters fail too; "": nothing is known."""
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
    """Message, advice and numbers where `overshoot`, with step size `rate`, is above 1.

    `losses` are the last ones.
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
