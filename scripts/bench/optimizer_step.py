"""How long one step of SGD takes, against torch.optim.SGD and against the bare kernels.

    python scripts/bench/optimizer_step.py                         # all rows, about two minutes
    python scripts/bench/optimizer_step.py --only mlp,many-momentum --threads 1
    python scripts/bench/optimizer_step.py --repetitions 9 --json optimizer_step.json

Ours is `gdtrain.SGD` with its default arguments; what it is compared with:
    torch, loop / foreach / fused: `torch.optim.SGD`, foreach=False, foreach=True, fused=True;
    best of torch: the least median of these three, which is what is asked to be beaten;
    kernel, foreach / fused: `torch._foreach_*` and `torch._fused_sgd_` alone, on lists prepared
        beforehand: what is left when nothing is collected, looked up or checked.

Models, float32, η = 0.001, each with momentum 0 and, as `<name>-momentum`, with 0.9:
    linear    784 to 10: 2 tensors, 8 thousand numbers
    mlp       784 to 128 to 10: 4 tensors, 0.1 million
    resnet18  torchvision's: 62 tensors, 11.7 million
    many      1,000 tensors of 16 numbers

Each contender has parameters and gradients of its own, which stay: the time is that of `step()`
alone, called in a row, in alternating repetitions of --seconds each.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comparison import (
    Row,
    alternate,
    environment,
    parser,
    per_call,
    report,
    selected,
    use_threads,
)
from torch import Tensor, nn

import gdtrain

LR, MOMENTUM = 1e-3, 0.9
TORCH = {
    "torch, loop": {"foreach": False},
    "torch, foreach": {"foreach": True},
    "torch, fused": {"fused": True},
}
KERNELS = ("kernel, foreach", "kernel, fused")

# What is asked of best-of-torch / ours.
ASKED = {
    "mlp": 1.7,
    "many": 1.7,
    "resnet18": 1 / 1.05,
    "resnet18-momentum": 1 / 1.05,
}


def resnet18() -> nn.Module:
    from torchvision.models import resnet18 as make  # slow to import

    return make(weights=None)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(784, 10),
    "mlp": lambda: nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)),
    "resnet18": resnet18,
    "many": lambda: nn.ParameterList([nn.Parameter(torch.randn(16)) for _ in range(1000)]),
}
ROWS = [name + ending for name in MODELS for ending in ("", "-momentum")]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, repetitions=7, seconds=0.2).parse_args(arguments)
    names = selected(ROWS, options.only)
    torch.set_num_threads(use_threads(options.threads))  # Numba's first call changes torch's
    rows: list[Row] = []
    for name in names:
        rows += compare(name, options.repetitions, options.seconds, options.device)
    title = "One step of SGD: torch.optim.SGD and bare kernels against gdtrain.SGD"
    report(title, rows, environment(options), options.json)


def compare(name: str, repetitions: int, seconds: float, device: str = "cpu") -> list[Row]:
    """All rows of one model with one momentum."""
    model, _, ending = name.partition("-")
    steps = contenders(model, MOMENTUM if ending else 0.0, device)
    costs = alternate(
        {
            key: (lambda step=step: per_call(step, seconds, device))  # type: ignore[misc]
            for key, step in steps.items()
        },
        repetitions,
        say=lambda what: print(f"{name}: {what}", file=sys.stderr, flush=True),
    )
    best = min(TORCH, key=lambda key: statistics.median(costs[key]))
    ours = costs["gdtrain"]
    rows = [
        Row(
            name,
            "best of torch",
            costs[best],
            ours,
            asked=ASKED.get(name),
            unit="µs",
            details={"best": best, "tensors": len(gradients(MODELS[model](), device)[0])},
        )
    ]
    return rows + [Row(name, key, costs[key], ours, unit="µs") for key in (*TORCH, *KERNELS)]


def contenders(model: str, momentum: float, device: str = "cpu") -> dict[str, Callable[[], Any]]:
    """What is timed, by name; warmed up, with their momentum buffers made."""
    steps: dict[str, Callable[[], Any]] = {}
    for key, flags in TORCH.items():
        params, _ = gradients(MODELS[model](), device)
        steps[key] = torch.optim.SGD(params, lr=LR, momentum=momentum, **flags).step  # type: ignore[arg-type]
    params, _ = gradients(MODELS[model](), device)
    steps["gdtrain"] = gdtrain.SGD(params, lr=LR, momentum=momentum).step
    for key, kernel in zip(KERNELS, (foreach_kernel, fused_kernel), strict=True):
        params, grads = gradients(MODELS[model](), device)
        steps[key] = kernel([p.detach() for p in params], grads, momentum)
    for step in steps.values():
        for _ in range(3):
            step()
    return steps


def gradients(model: nn.Module, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Its parameters, and gradients that are theirs."""
    params = list(model.to(device).parameters())
    for p in params:
        p.grad = 1e-3 * torch.randn_like(p)
    return [*params], [p.grad for p in params if p.grad is not None]


def foreach_kernel(
    params: list[Tensor], grads: list[Tensor], momentum: float
) -> Callable[[], None]:
    def plain() -> None:
        torch._foreach_add_(params, grads, alpha=-LR)

    buffers = [g.clone() for g in grads]

    def heavy_ball() -> None:
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1)
        torch._foreach_add_(params, buffers, alpha=-LR)

    return heavy_ball if momentum else plain


def fused_kernel(params: list[Tensor], grads: list[Tensor], momentum: float) -> Callable[[], None]:
    buffers = [g.clone() for g in grads] if momentum else []

    def fused() -> None:
        torch._fused_sgd_(
            params,
            grads,
            buffers,
            lr=LR,
            momentum=momentum,
            dampening=0.0,
            weight_decay=0.0,
            nesterov=False,
            maximize=False,
            is_first_step=False,
        )

    return fused


if __name__ == "__main__":
    main()
