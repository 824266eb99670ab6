"""What is settled before the first update: the optimizer and the rule that finds η where none is
given, micro-batches, a misfit of model and data, the layout.

N examples, B examples per update, M examples in one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gdtrain._compat.torch_modules import NORMS
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.sparse import SparseInputs
from gdtrain.descent.plan import Plan
from gdtrain.losses import Loss
from gdtrain.objective import Objective, Rows, evaluating, own_part, prediction_of, untouched
from gdtrain.optim.protocol import is_full_batch, step_size_of, takes_step_size
from gdtrain.schedules import Constant, Schedule
from gdtrain.step_sizes import StepSize, automatic
from gdtrain.step_sizes.automatic import SCHEDULE

__all__ = [
    "automatic_schedule",
    "check_examples",
    "check_step_size",
    "make_optimizer",
    "parameter_groups",
    "resident_objective",
    "restore_layout",
    "single_example",
    "use_channels_last",
]

_BATCH = 8  # examples, from which on convolutions gain from another layout


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
) -> Optimizer:
    """The optimizer of a run, whose groups have "initial_lr", as the engines need it.

    With a rule for the step size, its lr is 1: only the unit of the schedule. "auto" is what
    `gdtrain.step_sizes.automatic` says.
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
            rule = _automatic_rule(plain, loss) if step_size == "auto" else step_size
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


def _automatic_rule(optimizer: Optimizer, loss: Loss) -> StepSize:
    group = optimizer.param_groups[0]
    return automatic(
        is_full_batch(optimizer), group["momentum"], group["dampening"], smooth=loss.smooth
    )


def automatic_schedule(optimizer: Optimizer) -> Schedule:
    """Constant where a rule finds each step's length, or decays it; else a schedule that decays."""
    rule = step_size_of(optimizer)
    own = rule is not None and (rule.needs.full_batch or rule.needs.total_updates)
    return Constant() if own else SCHEDULE


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
