"""Data parallel training in which the ranks' parts add up to the exact mean.

R ranks, B examples per update.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy

__all__ = ["ExactDDP"]


class ExactDDP(DDPStrategy):
    """Processes as in Lightning's DDP, without its wrapper around the model.

        g = Σ_r (Σ_{i ∈ part r} ∇ℓ_i) / B

    The wrapper averages the ranks' means, which is not the mean over B unless all parts are equal,
    and does so at each backward pass. Here `gdtrain.objective` divides each update's B examples
    over the ranks, nothing padded or dropped, and adds the parts' sums in one reduction per update.
    Parameters and buffers start from those of rank 0.

    Args:
        **options: As for `lightning.pytorch.strategies.DDPStrategy`.

    Example:
        >>> ExactDDP(process_group_backend="gloo").strategy_name
        'exact_ddp'

    References:
        Lightning and PyTorch document the mean of means: pytorch.org, DistributedDataParallel.
    """

    strategy_name = "exact_ddp"

    def configure_ddp(self) -> None:
        """Bring the ranks to the same start, instead of wrapping the model."""
        module: Any = self.lightning_module
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor, src=0)
