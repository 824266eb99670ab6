"""The program `gdtrain`: from a configuration to a finished run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes, is_first_process
from gdtrain.lightning.module import SupervisedModule
from gdtrain.runs.build import USER_ERRORS, build, entries, message, too_large
from gdtrain.runs.checkpoints import unfinished
from gdtrain.runs.configuration import checked
from gdtrain.runs.folder import discard_empty, reserved
from gdtrain.runs.result import Result
from gdtrain.runs.run import run

__all__ = ["train"]


def train(
    config: DictConfig, directory: str | Path, plain: Mapping[str, Any] | None = None
) -> Result:
    """Build what the configuration names, train it, test it, and leave the run in a folder.

    Args:
        config: Composed from `conf/train.yaml`.
        directory: The run's folder; it must not hold a run yet. A run that `ckpt_path` names and
            of which only the evaluation is left is finished in its own folder.
        plain: What `checked` has made of the configuration; None: it is checked here.

    Returns:
        The finished run.

    Raises:
        ConfigurationError: The configuration, the data or the checkpoint is wrong. No update was
            made, and the folder is as it was.

    Example:
        >>> import tempfile
        >>> from hydra import compose, initialize_config_dir
        >>> from gdtrain.runs.configuration import conf_directory
        >>> with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        ...     config = compose("train", ["data=iris", "model=linear", "optimizer=gd"])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = train(config, folder)
        >>> result.stop.reason.value
        'BUDGET'
    """
    plain = checked(config) if plain is None else plain
    check_processes(plain["trainer"])
    folder = Path(directory)
    unfinished = _unfinished(plain)
    if unfinished is not None:
        discard_empty(folder)
        folder = unfinished
    elif not is_first_process() and any(
        (folder / n).exists() for n in ("summary.json", "checkpoints")
    ):
        raise ConfigurationError(f"{folder} already holds a run.")  # as the first process says
    own = plain if unfinished is None and is_first_process() else None
    module: SupervisedModule | None = None
    start = 0

    def trained() -> bool:
        return module is not None and module.total_updates is not None and module.updates > start

    def keep(error: BaseException) -> bool:
        started = module is not None and module.total_updates is not None
        told = isinstance(error, USER_ERRORS) or too_large(error) is not None
        return started and (trained() or not told)

    try:
        with reserved(folder, own, keep):
            data, module = build(config)
            start = module.updates
            return run(
                module,
                data,
                trainer=instantiate(config.trainer, _convert_="all"),
                callbacks=[*entries(config.callbacks), *entries(config.instruments)],
                loggers=entries(config.logger),
                directory=folder,
                variant=config.variant,
                seed=config.seed,
                checkpoint=config.ckpt_path,
                hyperparameters=_hyperparameters(plain),
                description={
                    "command": True,
                    **{name: plain.get(name) for name in ("model", "loss", "data")},
                },
            )
    except Exception as error:
        size = too_large(error)
        if size is not None:
            raise ConfigurationError(
                f"There is not enough memory to train{size}. Received: data.micro_batch_size="
                f"{plain['data'].get('micro_batch_size')}. Set a smaller one, such as "
                f"data.micro_batch_size=64, which changes no result, or train fewer updates."
            ) from error
        if trained() or not isinstance(error, USER_ERRORS):
            raise  # not the configuration's fault: the traceback tells more
        raise ConfigurationError(message(error, plain)) from error


def _unfinished(plain: Mapping[str, Any]) -> Path | None:
    """The folder of the run to go on with, where only its evaluation is left."""
    if plain["ckpt_path"] is None:
        return None
    limits = plain["trainer"].get("max_epochs"), plain["trainer"].get("max_steps", -1)
    try:
        return unfinished(plain["ckpt_path"], *limits)
    except (ValueError, OSError) as error:
        raise ConfigurationError(str(error)) from None


def _hyperparameters(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What distinguishes runs, flat, for TensorBoard."""
    chosen = {"variant": plain["variant"], "seed": plain["seed"]}
    for group in ("optimizer", "schedule", "step_size", "model", "loss", "data"):
        if group in ("schedule", "step_size") and not plain[group]:
            chosen[group] = "auto" if group == "schedule" else "none"
        for name, value in (plain[group] or {}).items():
            if name == "_partial_":
                continue
            key = group if name == "_target_" else f"{group}.{name}"
            chosen[key] = value.rsplit(".", 1)[-1] if name == "_target_" else value
    return chosen
