"""Data parallel training in which the ranks' parts add up to the exact mean.

R ranks, B examples per update.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.kubeflow import KubeflowEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy

from gdtrain.lightning.launch import launch

__all__ = ["ExactDDP", "alone_in", "cluster_environment"]


class ExactDDP(DDPStrategy):
    """Processes as in Lightning's DDP, without its wrapper around the model.

        g = Σ_r (Σ_{i ∈ part r} ∇ℓ_i) / B

    The wrapper averages the ranks' means, which is not the mean over B unless all parts are equal,
    and does so at each backward pass. Here `gdtrain.objective` divides each update's B examples
    over the ranks, nothing padded or dropped, and adds the parts' sums in one reduction per update.
    Parameters and buffers start from those of rank 0.
    """

    strategy_name = "exact_ddp"

    def configure_ddp(self) -> None:
        """Bring the ranks to the same start, instead of wrapping the model."""
        module: Any = self.lightning_module
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                torch.distributed.broadcast(tensor, src=0)


def cluster_environment() -> ClusterEnvironment | None:
    """What tells Lightning the ranks of the processes that a launcher has started.

    SLURM's signals are left alone: no checkpoint is written, and no job put back into the queue,
    that nobody has asked for.
    """
    started = launch()
    if started.size == 1:  # whatever the cluster says, there is nobody else to find
        return LightningEnvironment() if started.by == "" else None
    if started.by == "srun":
        each = started.size // int(os.environ.get("SLURM_NNODES", "1"))
        os.environ.setdefault("SLURM_NTASKS_PER_NODE", str(each))  # Lightning asks for it
        return SLURMEnvironment(auto_requeue=False)
    return KubeflowEnvironment() if started.by == "the launcher" else None


@contextmanager
def alone_in(folder: Path | None, trainer: Callable[..., Trainer]) -> Iterator[Callable[..., Any]]:
    """A trainer that takes up nothing, and leaves nothing, outside its run's folder.

    Lightning looks for SLURM's checkpoints in the working folder, and would go on from one.
    """
    given = getattr(trainer, "keywords", {})
    plugins = given.get("plugins") or []
    plugins = [*plugins] if isinstance(plugins, list | tuple) else [plugins]
    ranks = cluster_environment()
    if ranks is not None and not any(isinstance(p, ClusterEnvironment) for p in plugins):
        plugins.append(ranks)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(given.get("default_root_dir") or folder or scratch)
        left = sorted(root.glob("hpc_ckpt_*.ckpt")) if SLURMEnvironment.detect() else []
        if left:
            raise ValueError(
                f"Lightning would go on from {left[0]}, which SLURM has left. Move it away, or "
                f"choose another folder for the run."
            )
        yield partial(trainer, default_root_dir=root, plugins=plugins)
