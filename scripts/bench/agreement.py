"""How far engines are from the eager reference after 1,000 updates: every model, loss and rule.

    python scripts/bench/agreement.py                        # native, all of it
    python scripts/bench/agreement.py --engines compiled     # some models: each is compiled anew

Both make the same updates in float32, from the same start, over the same examples, with a step
size that falls from η to η/10. What is compared: the loss of each update, and the parameters and
momentum buffers at the end. A gap is |a − b| / (1 + |b|), the largest entry of all. Where one is
above the bound, the command ends with exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from comparison import write_json
from rich.console import Console
from rich.table import Table
from scipy import sparse
from torch import Tensor, nn

from gdtrain import SGD
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.preparation import parameter_groups
from gdtrain.engines import ENGINES, Eager, NotApplicableError
from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Huber,
    Logistic,
    Loss,
    SquaredError,
    SquaredHinge,
)
from gdtrain.models import CNN, MLP, Linear
from gdtrain.models.activations import ACTIVATIONS
from gdtrain.objective import Objective

# float32: 1,000 updates of about 1e-7 each, and a unit that comes to lie beyond a kink.
BOUND = 1e-4
LR = 0.002
N, SIDE = 60, 4

RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.02},
    "momentum": {"momentum": 0.8},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
    "Nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
}
# Loss, outputs, kind of targets.
LOSSES: dict[str, tuple[Loss, int, str]] = {
    "squared error": (SquaredError(), 2, "numbers"),
    "Huber": (Huber(0.5), 1, "numbers"),
    "cross-entropy": (CrossEntropy(), 3, "classes"),
    "logistic": (Logistic(), 1, "binary"),
    "hinge": (Hinge(), 1, "binary"),
    "squared hinge": (SquaredHinge(), 1, "binary"),
}
_MLPS = [f"mlp {name}" for name in ACTIVATIONS if name != "identity"]
MODELS = {
    "native": [
        "linear",
        "linear without bias",
        "linear, sparse inputs",
        "mlp of two hidden layers",
        *_MLPS,
    ],
    "compiled": ["linear", "mlp relu", "mlp tanh", "custom layer", "cnn"],
}


class Gated(nn.Module):
    """A layer that no engine knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width) to (B, width)."""
        return torch.tanh(x * self.scale) * torch.sigmoid(x + self.shift)


def build(name: str, outputs: int) -> nn.Module:
    """A small model by its name in `MODELS`, always with the same initial weights."""
    torch.manual_seed(0)
    shape = (1, SIDE, SIDE)
    if name in ("linear", "linear, sparse inputs"):
        return Linear((SIDE**2,) if "sparse" in name else shape, outputs)
    if name == "linear without bias":
        return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, outputs, bias=False))
    if name == "mlp of two hidden layers":
        return MLP(shape, outputs, hidden=[8, 6])
    if name == "custom layer":
        first, last = nn.Linear(SIDE**2, 10), nn.Linear(10, outputs)
        return nn.Sequential(nn.Flatten(), first, Gated(10), last)
    if name == "cnn":
        return CNN(shape, outputs, channels=[4], norm="none")
    return MLP(shape, outputs, hidden=[12], activation=name.split()[1])


def examples(kind: str, outputs: int, is_sparse: bool) -> tuple[Any, Tensor]:
    """Inputs (N, 1, 4, 4), or (N, 16) with half of them zero, and targets; always the same."""
    generator = torch.Generator().manual_seed(3)
    x: Any = torch.randn(N, 1, SIDE, SIDE, generator=generator)
    if is_sparse:
        matrix = sparse.csr_matrix(x.clamp_min(0).flatten(1).numpy())
        x = SparseInputs.from_scipy(matrix, None, torch.float32)
    if kind == "numbers":
        y = torch.randn(N, outputs, generator=generator)
        return x, y if outputs > 1 else y[:, 0]
    return x, torch.randint(0, 2 if kind == "binary" else outputs, (N,), generator=generator)


def trained(
    engine: str, model: nn.Module, loss: Loss, data: tuple[Any, Tensor], updates: int,
    batch_size: int, rule: dict[str, Any],
) -> list[Tensor]:  # fmt: skip
    """Losses, parameters and momentum buffers after the updates."""
    model = copy.deepcopy(model)
    optimizer = SGD(parameter_groups(model), lr=LR, **rule)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    sweep = ENGINES[engine](Objective(model, loss, *data), optimizer)
    generator = torch.Generator().manual_seed(5)
    indices = torch.randint(0, N, (updates, batch_size), generator=generator)
    losses = sweep(indices, torch.linspace(1, 0.1, updates, dtype=torch.float64))
    parameters = [p.detach() for p in model.parameters()]
    buffers = [optimizer.state[p]["momentum_buffer"] for p in parameters if p in optimizer.state]
    return [losses, *parameters, *buffers]


def gap(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest |a − b| / (1 + |b|); infinite where something is not finite."""
    gaps = [
        float(((a - b).abs() / (1 + b.abs())).max()) for a, b in zip(found, expected, strict=True)
    ]
    return max(g if g == g else float("inf") for g in gaps)


@dataclass
class Cell:
    """One model and loss.

    Args:
        engine: That was compared with eager.
        model: Its name.
        loss: Its name.
        gaps: By rule and batch size.
    """

    engine: str
    model: str
    loss: str
    gaps: dict[str, float]


def cells(
    engines: Sequence[str], updates: int, batch_sizes: Sequence[int],
    models: Sequence[str] = (), losses: Sequence[str] = tuple(LOSSES),
) -> Iterator[Cell]:  # fmt: skip
    """Compare them, one after the other.

    Args:
        engines: Names.
        updates: Of each.
        batch_sizes: B.
        models: Names; none: all that the engine is compared on.
        losses: Names.
    """
    for engine in engines:
        for name, loss_name in itertools.product(models or MODELS[engine], losses):
            loss, outputs, kind = LOSSES[loss_name]
            model, data = build(name, outputs), examples(kind, outputs, "sparse" in name)
            gaps = {}
            for (rule_name, rule), size in itertools.product(RULES.items(), batch_sizes):
                arguments: Any = (model, loss, data, updates, size, rule)
                expected = trained(Eager.name, *arguments)
                gaps[f"{rule_name}, B = {size}"] = gap(trained(engine, *arguments), expected)
            yield Cell(engine, name, loss_name, gaps)


def main(arguments: Sequence[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--engines", nargs="+", choices=tuple(MODELS), default=["native"])
    options.add_argument("--updates", type=int, default=1000)
    options.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
    options.add_argument("--models", nargs="+", default=[], help="some of them")
    options.add_argument("--losses", nargs="+", choices=tuple(LOSSES), default=list(LOSSES))
    options.add_argument("--json", type=Path, help="write the gaps there")
    given = options.parse_args(arguments)
    if given.updates < 1 or min(given.batch_sizes) < 1:
        options.error("--updates and --batch-sizes must be at least 1")
    known = sorted({name for engine in given.engines for name in MODELS[engine]})
    for name in given.models:
        if name not in known:
            options.error(f"--models must be of {', '.join(known)}. Received: {name}")
    made = []
    try:
        for cell in cells(
            given.engines, given.updates, given.batch_sizes, given.models, given.losses
        ):
            print(f"  {cell.engine}: {cell.model}, {cell.loss}", file=sys.stderr, flush=True)
            made.append(cell)
    except NotApplicableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    title = f"Largest gap to the eager engine after {given.updates:,} updates, float32"
    shown = Table(title=title, caption=f"rules: {', '.join(RULES)}; B = {given.batch_sizes}")
    for name in ("engine", "model", "loss", "gap", "at"):
        shown.add_column(name)
    for cell in made:
        worst = max(cell.gaps, key=lambda key: cell.gaps[key])
        shown.add_row(cell.engine, cell.model, cell.loss, f"{cell.gaps[worst]:.1e}", worst)
    (Console() if sys.stdout.isatty() else Console(width=120)).print(shown)
    largest = max(max(cell.gaps.values()) for cell in made)
    compared = sum(len(cell.gaps) for cell in made)
    verdict = "ok" if largest <= BOUND else "above"
    print(f"{compared} runs compared; largest gap {largest:.1e} (at most {BOUND:g}): {verdict}")
    if given.json is not None:
        rows = [asdict(cell) for cell in made]
        write_json(given.json, title, rows, {"torch": torch.__version__, "bound": BOUND})
    return 0 if largest <= BOUND else 1


if __name__ == "__main__":
    raise SystemExit(main())
