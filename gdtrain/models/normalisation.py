"""Exact statistics for BatchNorm's evaluation mode.

N examples, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gdtrain._compat.torch_modules import BATCH_NORMS

__all__ = ["exact_batch_norm_"]


class _Reached(Exception):  # noqa: N818 (no error)
    """The layer that is measured was reached: what lies behind it need not run."""


@torch.no_grad()
def exact_batch_norm_(model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> int:
    """Set each BatchNorm's running mean and variance to those of its inputs over all examples.

        μ_c = mean of channel c over all examples and places,  σ²_c = mean of (x − μ_c)²

    In training, they are moving averages over noisy batches of ever-changing parameters. Layers
    are measured in the order in which they run, each with those before it in evaluation mode, in
    one pass per layer. Then evaluation mode gives what training mode gives on all examples at once,
    however they are cut.

    Args:
        model: Changed in place; its mode stays.
        batches: Called for each pass; yields all inputs, cut in any way.

    Returns:
        How many layers were set.

    Raises:
        ValueError: There are no examples.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> exact_batch_norm_(layer, lambda: [torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0]])])
        1
        >>> layer.running_mean.item(), round(layer.running_var.item(), 4)
        (3.0, 4.6667)

    References:
        Ioffe and Szegedy, Batch Normalization, 2015, arXiv 1502.03167, algorithm 2.
        Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, arXiv 2105.07576.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        layers = _in_order(model, batches)
        for layer in layers:
            _measure_(layer, model, batches)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return len(layers)


def _in_order(model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> list[Any]:
    """The BatchNorms with running statistics, as a forward pass meets them."""
    met: list[Any] = []

    def note(layer: nn.Module, inputs: Any) -> None:
        if layer not in met:
            met.append(layer)

    handles = [
        layer.register_forward_pre_hook(note)
        for layer in model.modules()
        if isinstance(layer, BATCH_NORMS) and layer.track_running_stats
    ]
    if not handles:
        return []
    first = next(iter(batches()), None)
    if first is None:
        raise ValueError("BatchNorm's statistics need examples. Received: none.")
    try:
        model(first[:1])
    finally:
        for handle in handles:
            handle.remove()
    return met


def _measure_(layer: Any, model: nn.Module, batches: Callable[[], Iterable[Tensor]]) -> None:
    count = 0
    mean = torch.zeros_like(layer.running_mean, dtype=torch.float64)
    spread = torch.zeros_like(mean)  # Σ (x − mean)²

    def take(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal count
        x = inputs[0].double().transpose(0, 1).flatten(1)  # (C, all places)
        n = x.shape[1]
        gap = x.mean(1) - mean
        spread.add_((x - x.mean(1, keepdim=True)).square().sum(1))
        spread.add_(gap.square(), alpha=count * n / (count + n))
        mean.add_(gap, alpha=n / (count + n))
        count += n
        raise _Reached

    handle = layer.register_forward_pre_hook(take)
    try:
        for inputs in batches():
            try:
                model(inputs)
            except _Reached:
                pass
    finally:
        handle.remove()
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(spread / count)
