"""`gdtrain`: one run, or a sweep of them."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gdtrain import __version__
from gdtrain._compat.hydra import run_composed
from gdtrain.cli.composition import check_package, compose, own_part
from gdtrain.cli.messages import (
    EXIT_CODES,
    explain_error,
    one_message,
    report_error,
    set_up_process,
    shown,
)
from gdtrain.cli.overview import overview
from gdtrain.cli.words import config_folder, jobs, read_flags
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes, is_first_process
from gdtrain.runs.configuration import checked, conf_directory
from gdtrain.runs.folder import discard_empty

if TYPE_CHECKING:
    from gdtrain.runs.result import Result

__all__ = ["train"]


def train() -> None:
    """Train what the words name; ends the process with its exit code."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        with one_message():
            print(overview(words, config_folder(words)))
        sys.exit(0)
    if "--version" in words:
        print(f"gdtrain {__version__}")
        sys.exit(0)
    prepared = _prepare(words)
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(_train(prepared, str(Path(scratch) / "codes")))


@one_message()
def _prepare(words: list[str]) -> tuple[DictConfig, dict[str, Any]] | None:
    """Tell all that can be told without torch before it is imported."""
    arguments, sys.argv[1:] = read_flags(words)
    if arguments.shell_completion or arguments.hydra_help:
        return None
    several, only_shows = arguments.multirun, arguments.cfg or arguments.info
    prepared: tuple[DictConfig, dict[str, Any]] | None = None
    runs = jobs(arguments)
    wrong: list[Exception] = []
    for overrides in runs:
        whole = compose(overrides, arguments.config_dir, whole=True)
        if arguments.cfg and arguments.package:
            check_package(arguments.package, whole)
        try:
            if only_shows:
                OmegaConf.to_container(own_part(whole), resolve=True)
                continue
            plain = checked(own_part(whole))
            check_processes({} if several else plain["trainer"])
        except (ConfigurationError, OmegaConfBaseException) as error:
            wrong.append(error)
            continue
        several = several or str(whole.hydra.mode).endswith("MULTIRUN")
        prepared = None if several else (whole, plain)
    if wrong and len(wrong) == len(runs):  # else the others run
        raise wrong[0]
    if not only_shows:
        import gdtrain.runs.train  # noqa: F401 (before a folder is made: Ctrl-C leaves none)
    return prepared


def _train(prepared: tuple[DictConfig, dict[str, Any]] | None, codes: str) -> int:
    """Make the runs; the highest of their exit codes, which each leaves in a file."""
    plain = None if prepared is None else prepared[1]

    # Launchers may run it in other processes: it carries all that it needs.
    def job(config: DictConfig) -> float:
        _add(codes, 0)
        code, value = _run(config, plain)
        _add(codes, code)
        return value

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions out: what is not said below is a fault
    set_up_process()
    conf = str(conf_directory())
    try:
        if prepared is None:
            hydra.main(version_base="1.3", config_path=conf, config_name="train")(job)()
        else:
            run_composed(job, prepared[0], conf)
    except OSError as error:
        if _read(codes):
            raise
        place = error.filename or "The run's folder"
        return report_error(
            f"{place} cannot be made, or not be written to: {error.strerror or error}. Choose "
            f"another folder: hydra.run.dir=… (of a sweep hydra.sweep.dir=…)."
        )
    except ConfigurationError:  # said by the job; a sweeper of another kind does not go on
        pass
    except BrokenExecutor:
        report_error(
            "The process of a run was killed; perhaps memory ran out. Run fewer side by side."
        )
        return max(1, *_read(codes))
    except KeyboardInterrupt:  # before or after the training itself, which ends in good order
        return EXIT_CODES["INTERRUPTED"]
    return max(_read(codes), default=0)


def _add(codes: str, code: int) -> None:
    with open(codes, "a", encoding="utf-8") as file:
        file.write(f"{code}\n")


def _read(codes: str) -> list[int]:
    path = Path(codes)
    return [int(line) for line in path.read_text("utf-8").split()] if path.is_file() else []


def _run(config: DictConfig, plain: dict[str, Any] | None) -> tuple[int, float]:
    """One run: its exit code, and what a sweeper optimizes. A wrong one does not end the others.

    Of a sweep's run, `plain` is None: it is checked here.
    """
    directory = Path(HydraConfig.get().runtime.output_dir)
    from gdtrain.runs.train import train as run

    several = plain is None
    set_up_process(signals=False)
    try:
        if several and config.trainer.get("strategy") is not None:
            raise ConfigurationError(
                "A sweep (-m) runs its jobs in one process, and trainer=ddp needs several for "
                "each. Start such runs one by one."
            )
        result = run(config, directory, plain)
    except (ConfigurationError, OmegaConfBaseException) as error:
        discard_empty(directory)
        overrides = HydraConfig.get().overrides.task
        code = report_error(explain_error(error), f" in {' '.join(overrides)}" if several else "")
        asks_for_values = not str(HydraConfig.get().sweeper._target_).endswith("BasicSweeper")
        if several and asks_for_values:
            raise ConfigurationError(str(error)) from None
        return code, math.nan
    except BaseException:
        discard_empty(directory)
        raise
    if is_first_process():
        _show(result)
    else:
        discard_empty(directory)  # each rank of a launcher is given one
    reason = result.stop.reason.value
    if several and reason == "INTERRUPTED":
        raise KeyboardInterrupt  # the whole sweep is meant
    try:
        value = _optimized(config.optimized_metric, result.metrics)
    except ConfigurationError as error:
        return report_error(str(error)), math.nan
    return EXIT_CODES.get(reason, 0), value


def _optimized(tag: str, metrics: dict[str, float]) -> float:
    """What a sweeper that searches gets of a run; infinitely bad where it is not a number."""
    if tag == "loss/val" and tag not in metrics:
        tag = "loss/train"
    if tag not in metrics:
        raise ConfigurationError(
            f"optimized_metric must be one of {', '.join(metrics)}. Received: optimized_metric="
            f"{tag}. The run is kept."
        )
    value = metrics[tag]
    if math.isfinite(value):
        return value
    return -math.inf if "accuracy" in tag or "r2" in tag else math.inf


def _show(result: Result) -> None:
    """A short table at the end of a run."""
    from rich.console import Console
    from rich.table import Table

    from gdtrain.runs.result import loss_name, rows

    summary = result.summary
    table = Table(title=summary["variant"], title_justify="left")
    (_, *parts), *values = rows(result.metrics, loss_name(result.data), digits=4)
    table.add_column("")
    for part in parts:
        table.add_column(part, justify="right")
    for row in values:
        table.add_row(*row)
    Console().print(table)
    updates, seconds = summary["updates"], max(summary["fit_seconds"], 1e-9)
    print(
        f"{updates:,} updates in {seconds:.1f} s ({updates / seconds:,.0f}/s), "
        f"{summary['examples_seen']:,} examples seen."
    )
    micro = summary["micro_batch_size"]
    if result.module.micro_batch_size_is_automatic and micro < summary["batch_size"]:
        print(f"Micro-batches of {micro} examples, by the memory that an example takes.")
    if result.directory is not None:
        folder = shown(result.directory)
        root = folder.split(os.sep)[0] or folder
        print(f"Run: {folder}\nCurves: tensorboard --logdir {root}")
    print(_verdict(result))


def _verdict(result: Result) -> str:
    """How the run ended; one that did all that was planned has not failed for want of a budget."""
    stop, module = result.stop, result.module
    if stop.reason.value != "BUDGET":
        return str(stop)
    if module.total_updates is not None and module.updates >= module.total_updates:
        return f"finished: all {module.updates:,} updates made"
    return f"finished: {stop.message[:1].lower()}{stop.message[1:]}"
