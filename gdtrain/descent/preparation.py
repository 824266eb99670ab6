"""What is settled before the first update: micro-batches, a misfit of model and data, the layout.

N examples, B examples per update, M examples in one pass.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gdtrain.data.mapped import MappedInputs
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.plan import Plan
from gdtrain.losses import Loss
from gdtrain.objective import Objective, Rows, evaluating, own_part, prediction_of, untouched

__all__ = [
    "check_examples",
    "resident_objective",
    "restore_layout",
    "single_example",
    "use_channels_last",
]

_BATCH = 8  # examples, from which on convolutions gain from another layout


def resident_objective(
    model: nn.Module,
    loss: Loss,
    inputs: Rows,
    targets: Tensor,
    batch_size: int,
    micro_batch_size: int | Literal["auto"] | None = None,
    *,
    rank: int = 0,
    ranks: int = 1,
) -> Objective:
    """J over resident or mapped examples, on the device of the model, with an M that memory holds.

    Without an M, rows from a file are taken as "auto", and sparse ones, which a pass makes dense,
    as many at once as they allow; others all together.
    """
    if micro_batch_size is None and isinstance(inputs, MappedInputs):
        micro_batch_size = "auto"
    if micro_batch_size is None and isinstance(inputs, SparseInputs):
        most = inputs.rows_at_once
        micro_batch_size = most if batch_size > most else None
    if ranks > batch_size:
        raise ValueError(
            f"The {batch_size} examples of an update cannot be divided over {ranks} processes. "
            f"One-example SGD is sequential: train it on one device, or use optimizer=minibatch "
            f"with a larger batch_size."
        )
    return Objective(model, loss, inputs, targets, micro_batch_size, rank=rank, ranks=ranks)


@torch.no_grad()
def check_examples(
    model: nn.Module, loss: Loss, inputs: Rows, targets: Tensor, single: str = ""
) -> int:
    """Run two examples, so that a misfit of model, loss and data is told before training: those of
    the lowest and the highest label. Returns C, the model's outputs.

    `single` says where a pass over one example will come from, see `single_example`.
    """
    if len(inputs) != len(targets) or not len(targets):
        raise ValueError(
            f"Expected one target for each example, and at least one. Received: {len(inputs)} "
            f"examples and targets of shape {tuple(targets.shape)}."
        )
    flat = targets.reshape(len(targets), -1)[:, 0]
    flat = flat.byte() if flat.dtype == torch.bool else flat
    extremes = torch.stack([flat.argmin(), flat.argmax()])
    examples, targets = inputs[extremes], targets[extremes]
    try:
        with evaluating(model):
            prediction = prediction_of(model(examples))
    except RuntimeError as error:
        raise ValueError(
            f"The model does not take examples of shape {tuple(examples.shape[1:])}: {error}"
        ) from error
    loss.check(prediction, targets)
    if single:
        _refuse_one(model, examples[:1], single)
    return prediction.shape[1]


def _refuse_one(model: nn.Module, example: Tensor, single: str) -> None:
    with untouched(model):
        try:
            model(example)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"The model cannot be trained on one example by itself ({error}), and {single}. "
                f"Choose another batch_size, or a norm that does not mix examples: "
                f"model.norm=group (torch.nn.GroupNorm, LayerNorm)."
            ) from error


def single_example(loader: Any, objective: Objective | None = None) -> str:
    """Where a pass over a single example will come from; "": none will, or none knows.

    The loader is a plan or a `DataLoader`; an objective's micro-batches and ranks divide batches.
    """
    try:
        size = loader.batch_size
        count = loader.num_examples if isinstance(loader, Plan) else len(loader.dataset)
    except (AttributeError, TypeError):
        return ""
    if size is None:
        return ""
    if size == 1:
        return "each update sees one"
    last = 0 if getattr(loader, "drop_last", False) else count % size
    if last == 1:
        better = next(b for b in range(size + 1, count + 2) if count % b != 1)
        return (
            f"the last batch of an epoch has one: {count} examples in batches of {size}; batches "
            f"of {better} end otherwise"
        )
    if objective is None:
        return ""
    micro = objective.micro_batch_size
    for batch in filter(None, (size, last)):
        start, end = own_part(batch, objective.rank, objective.ranks)
        own = end - start
        if 1 in ({own} if micro is None else {min(micro, own), own % micro}):
            return (
                f"a pass has one: {own} examples of a batch"
                + (f" in passes of {micro}" if micro is not None else "")
                + (f" on one of {objective.ranks} processes" if objective.ranks > 1 else "")
            )
    return ""


def use_channels_last(model: nn.Module, batch_size: int) -> None:
    """While training on CPU, keep convolutions' weights with the channels last in memory.

    PyTorch's kernels for batches are about twice as fast on them; the numbers are the same (to
    rounding). For single examples they are not.
    """
    images = any(isinstance(m, nn.Conv2d) for m in model.modules())
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if images and batch_size >= _BATCH and on_cpu:
        model.to(memory_format=torch.channels_last)


def restore_layout(model: nn.Module) -> None:
    """Go back to the default layout, as view() expects it."""
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.to(memory_format=torch.contiguous_format)
