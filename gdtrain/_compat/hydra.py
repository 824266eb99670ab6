"""Private names of Hydra: its grammar of overrides, its flags, its sweep, and how it runs a job."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.core.utils import run_job
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig

__all__ = [
    "Override",
    "flag_parser",
    "function_names",
    "in_quotes",
    "is_text",
    "parse_override",
    "run_composed",
    "sweep",
]


def parse_override(word: str) -> Override | None:
    """A word such as "seed=1" as Hydra reads it; None: it cannot."""
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):  # ValueError: thousands of digits
        return None


def in_quotes(value: str) -> str:
    """A text as it must stand in an override to be taken as it is."""
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def is_text(value: Any) -> bool:
    """Whether the value of an override is a text."""
    return isinstance(value, str | QuotedString)


def function_names() -> list[str]:
    """What may be called in a value, such as range(0,3)."""
    return list(create_functions().functions)


def flag_parser() -> argparse.ArgumentParser:
    """The parser of Hydra's flags."""
    return get_args_parser()


def sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of each run of a sweep."""
    batches = BasicSweeper.split_arguments(list(overrides), max_batch_size=None)
    return [list(job) for batch in batches for job in batch]


def run_composed(task: Callable[[DictConfig], Any], config: DictConfig, folder: str) -> Any:
    """Run a task in the folder that `hydra.run.dir` names, with Hydra's callbacks around it.

    `hydra.main` composes the configuration itself, and has no public way to be given it. The task
    gets `config` without Hydra's own part; `folder` is that of the configuration's files.
    """
    with initialize_config_dir(folder, version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
    callbacks = Callbacks(config)
    callbacks.on_run_start(config=config, config_name="train")
    context = HydraContext(loader, callbacks)
    done = run_job(task, config, "hydra.run.dir", None, context)
    callbacks.on_run_end(config=config, config_name="train", job_return=done)
    return done.return_value
