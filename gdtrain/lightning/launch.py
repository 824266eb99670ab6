"""Which of a launcher's processes this is. Imports no torch: a mistake is told at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from gdtrain.errors import ConfigurationError

__all__ = ["Launch", "check_processes", "is_first_process", "launch"]


@dataclass(frozen=True)
class Launch:
    """What started this process."""

    by: str = ""  # the launcher's command; "": none, or gdtrain itself
    rank: int = 0  # of this process among all of the launcher's
    size: int = 1  # how many there are


# Command, what tells that it was used, this process's rank, the number of processes. SLURM's are
# also there where srun was not used, and MPI's under srun: the order decides.
_LAUNCHERS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    ("torchrun", "TORCHELASTIC_RUN_ID", "RANK", ("WORLD_SIZE",)),
    ("jsrun", "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_RANK", ("JSM_NAMESPACE_SIZE",)),
    ("srun", "SLURM_PROCID", "SLURM_PROCID", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_RANK", ("OMPI_COMM_WORLD_SIZE",)),
    ("mpiexec", "PMI_RANK", "PMI_RANK", ("PMI_SIZE",)),
    ("the launcher", "RANK", "RANK", ("WORLD_SIZE",)),  # Kubeflow's, and torch's own words
)


def launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Read what the launchers of clusters leave in the environment.

    Where gdtrain has started the processes itself, a rank is all that is known.
    """
    interactive = environ.get("SLURM_JOB_NAME") in ("bash", "interactive")  # a shell, not srun
    for by, sign, rank, sizes in _LAUNCHERS:
        if sign not in environ or (by == "srun" and interactive):
            continue
        size = next((_whole(environ[name]) for name in sizes if name in environ), 1)
        if size > 1 or by == "torchrun":
            return Launch(by, _whole(environ.get(rank, "0")), size)
    ranks = [_whole(environ.get(name, "0")) for name in ("LOCAL_RANK", "NODE_RANK")]
    return Launch(rank=max(ranks))


def _whole(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def is_first_process() -> bool:
    """Whether this process speaks and writes for the run: all but the further ranks do."""
    return launch().rank == 0


def check_processes(trainer: Mapping[str, Any]) -> None:
    """Raise where a launcher started another number of processes than the run is to have.

    Of the configuration's `trainer`; empty for what has one process.
    """
    numbers = {name for _, _, rank, sizes in _LAUNCHERS for name in (rank, *sizes)}
    for name in sorted(numbers | {"LOCAL_RANK", "NODE_RANK", "SLURM_NNODES"}):
        if not os.environ.get(name, "0").isdecimal():
            raise ConfigurationError(
                f"The environment's {name} must be a whole number, as a launcher sets it. "
                f"Received: {name}={os.environ[name]}. Unset it, if no launcher started this "
                f"process."
            )
    started = launch()
    if not started.by:
        return
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    several = trainer.get("strategy") is not None
    if started.size > 1 and not several:
        instead = f"add trainer=ddp trainer.devices={started.size}" if trainer else "start it once"
        raise ConfigurationError(
            f"{started.by} has started {started.size} processes, and this is work for one. "
            f"Expected: one process, or trainer=ddp. Received: process {started.rank} of "
            f"{started.size}. To share the work, {instead}; else start one process."
        )
    whole = all(isinstance(n, int) and not isinstance(n, bool) for n in (devices, nodes))
    if several and whole and devices * nodes != started.size:
        raise ConfigurationError(
            f"trainer.devices must be the number of processes that {started.by} has started on "
            f"each node. Received: trainer.devices={devices} on {nodes} node{'s' * (nodes > 1)}, "
            f"and {started.size} process{'es' * (started.size > 1)}. Set trainer.devices="
            f"{max(started.size // max(nodes, 1), 1)}."
        )
    if several and started.by.startswith("mpi") and find_spec("mpi4py") is None:
        raise ConfigurationError(
            f"{started.by}'s processes find each other by mpi4py, which is not installed. Install "
            f"it, or start the run with torchrun."
        )
