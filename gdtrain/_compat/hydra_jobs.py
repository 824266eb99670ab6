"""One run as Hydra makes it, from a configuration that is composed already.

`hydra.main` composes it itself, and has no public way to be given it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import run_job
from hydra.types import HydraContext
from omegaconf import DictConfig

__all__ = ["run_composed"]


def run_composed(task: Callable[[DictConfig], Any], config: DictConfig, folder: str) -> Any:
    """Run a task in the folder that `hydra.run.dir` names, with Hydra's callbacks around it.

    Args:
        task: Gets the configuration without Hydra's own part.
        config: The whole of `train.yaml`, composed.
        folder: Of the configuration's files.

    Returns:
        What the task returns; what it raises is raised.

    Example:
        >>> import tempfile
        >>> from hydra import compose
        >>> from gdtrain.runs.configuration import conf_directory
        >>> conf = str(conf_directory())
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with initialize_config_dir(conf, version_base="1.3"):
        ...         words = ["seed=3", f"hydra.run.dir={place}"]
        ...         config = compose("train", words, return_hydra_config=True)
        ...     run_composed(lambda config: config.seed, config, conf)
        3
    """
    with initialize_config_dir(folder, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name="train")
    context = HydraContext(loader, callbacks)
    done = run_job(task, config, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=config, config_name="train", job_return=done)
    return done.return_value
