"""`gdtrain-compare`: train contenders side by side, or read finished runs, and report."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
import tempfile
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from gdtrain.cli.composition import composed
from gdtrain.cli.messages import listen, one_message, shown
from gdtrain.cli.options import Command, given, option
from gdtrain.cli.overrides import typed
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.configuration import check, conf_directory
from gdtrain.runs.folder import discard_empty, new_folder

if TYPE_CHECKING:
    from gdtrain.reporting.comparison import Comparison

__all__ = ["compare"]

_THE_THREE = "optimizer=gd;optimizer=minibatch;optimizer=sgd"
_TOLD = 5  # runs that are left out, in a message
_WARM_UP = 2  # updates that a process makes before a run, and throws away


@dataclass
class _Options:
    contenders: str | None = option(
        "at least two contenders, separated by a semicolon, each with its overrides",
        "'optimizer=gd;optimizer=sgd'",
        _THE_THREE,
    )
    seeds: int | None = option(
        "runs of each contender, with seeds 0, 1, …", "5", "3", Whole(1, 10000)
    )
    epochs: int | None = option("passes over the data of each run", "50", "20", Whole(1, 2**31 - 1))
    jobs: int | None = option(
        "runs side by side, in processes", "4", "min(2, cores)", Whole(1, 1024)
    )
    target: float | None = option(
        "training loss that is to be reached", "0.1", "the runs' own", Interval(-math.inf, math.inf)
    )
    output: str | None = option(
        "a folder for the report and the runs, new or empty", "FOLDER", "outputs/compare/…"
    )
    runs: str | None = option(
        "a folder of finished runs, to compare instead of training", "outputs"
    )


COMMAND = Command(
    "gdtrain-compare",
    "Trains contenders with the same seeds, or reads finished runs, and leaves a report: curves by "
    "updates,\nexamples and seconds, and who was first at a target.",
    _Options,
    (
        "data=iris model=linear",
        "data=digits contenders='optimizer=sgd;optimizer=minibatch data.batch_size=8' seeds=5",
        "runs=outputs target=0.1",
    ),
    configures="comparison",
)


def compare() -> None:
    """Compare what the words name; ends the process where something was wrong.

    Example:
        >>> sys.argv = ["compare.py", "runs=missing"]
        >>> compare()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    with one_message():
        check_processes({})
        words = COMMAND.read(sys.argv[1:])
        options = given(words.options)
        listen()
        if "runs" in options:
            folder, comparison = _compare_finished(options, words.overrides)
        else:
            folder, comparison = _compare_trained(options, words.overrides, words.config_dir)
        from gdtrain.reporting.page import save

        try:
            save(comparison, folder)
        except OSError as error:
            raise ConfigurationError(f"The report cannot be written: {error}") from None
    for sentence in comparison.sentences():
        print(sentence)
    for sentence in comparison.absent():
        print(f"Left out: {sentence}")
    print(f"Report: {shown(folder)}/report.html")


def _compare_finished(options: dict[str, Any], words: list[str]) -> tuple[Path, Comparison]:
    others = [*words, *(f"{key}=…" for key in options if key not in ("runs", "output", "target"))]
    if others:
        raise ConfigurationError(
            f"runs=… compares finished runs and trains none, so it takes target=… and output=… "
            f"only. Received: {others[0]}"
        )
    from gdtrain.reporting.comparison import compare, find_runs

    folder = _folder(options, "runs")
    left_out: list[str] = []
    try:
        runs, left_out = find_runs(options["runs"])
        comparison = compare(runs, options.get("target"))
        comparison.left_out += left_out
    except ValueError as error:
        gone = f" Left out: {' '.join(left_out[:_TOLD])}" if left_out else ""
        more = f" And {len(left_out) - _TOLD} more." if len(left_out) > _TOLD else ""
        raise ConfigurationError(f"{error}{gone}{more}") from None
    comparison.made = [
        f"gdtrain-compare {shlex.join(sys.argv[1:])}",
        "Finished runs were read: their seconds are those of the machines that they ran on, and "
        "of whatever ran beside them.",
    ]
    return folder, comparison


def _compare_trained(
    options: dict[str, Any], words: list[str], config_dir: str | None
) -> tuple[Path, Comparison]:
    contenders = _contenders(options.get("contenders", _THE_THREE))
    keys = [word.partition("=")[0].lstrip("+~") for word in words]
    for key, instead in (("seed", "seeds=COUNT"), ("optimizer", "contenders='optimizer=…;…'")):
        if key in keys and (key == "seed" or "contenders" not in options):
            raise ConfigurationError(
                f"{key}=… is set for each run by the comparison: set {instead}. Received: "
                f"{words[keys.index(key)]}"
            )
    common = list(words)
    if "epochs" in options or "trainer.max_epochs" not in keys:
        common.append(f"trainer.max_epochs={options.get('epochs', 20)}")
    first: dict[str, str] = {}
    for name, overrides in contenders.items():
        if "seed" in (word.partition("=")[0].lstrip("+~") for word in overrides):
            raise ConfigurationError(
                f"seed=… is set for each run by the comparison: set seeds=COUNT. Received: {name}"
            )
        config, choices = composed([*common, *overrides], config_dir)
        first = first or choices
        _check_contender(config, choices["logger"], overrides)
    folder = _folder(options, f"{first['data']}-{first['model']}")
    count = options.get("seeds", 3)
    places = {
        folder / "runs" / _slug(name, i) / f"seed-{seed}": (name, [*overrides, f"seed={seed}"])
        for seed in range(count)  # the same seeds for all: common random numbers
        for i, (name, overrides) in enumerate(contenders.items())
    }
    processes = min(options.get("jobs", min(2, os.cpu_count() or 1)), len(places))
    jobs = [[*common, *own, _place(path)] for path, (_, own) in places.items()]
    try:
        failed = _launch(jobs, list(places), processes, config_dir)
    except KeyboardInterrupt:
        print(
            f"Interrupted, so there is no report. Compare the runs that were finished with "
            f"runs={shown(folder / 'runs')}",
            file=sys.stderr,
        )
        raise
    from gdtrain.reporting.comparison import compare, read_run

    runs, left_out = [], []
    for path, (name, own) in places.items():
        try:
            if path in failed:
                raise ValueError(failed[path])
            runs.append(read_run(path))
        except ValueError as error:
            left_out.append(f"{name}, {own[-1].replace('=', ' ')}: {error}")
    try:
        names = {path: name for path, (name, _) in places.items()}
        comparison = compare(runs, options.get("target"), names)
    except ValueError as error:
        why = f" {left_out[0]}" if left_out else ""
        kept = f" Finished runs are in {shown(folder / 'runs')}." if runs else ""
        raise ConfigurationError(f"{error}{why}{kept}") from None
    comparison.left_out += left_out
    comparison.made = _told(common, contenders, count, processes)
    return folder, comparison


def _contenders(text: str) -> dict[str, list[str]]:
    """The overrides of each contender, by its name."""
    found: dict[str, list[str]] = {}
    for part in text.split(";"):
        # A comma or a space ends an override, but not within brackets: model.hidden=[64, 32].
        overrides = re.findall(r"(?:\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[^\s,])+", part)
        if not overrides:
            continue
        name = " ".join(w.removeprefix("optimizer=").removeprefix("optimizer.") for w in overrides)
        if name in found:
            raise ConfigurationError(f"Contenders must differ. Received: {part.strip()} twice.")
        found[name] = typed(overrides)
    if len(found) < 2:
        raise ConfigurationError(
            f"contenders must name at least two, separated by a semicolon, such as "
            f"{_THE_THREE!r}. Received: contenders={text!r}"
        )
    return found


def _check_contender(config: DictConfig, logger: str, overrides: list[str]) -> None:
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    try:
        check(plain)
    except ConfigurationError as error:
        raise ConfigurationError(f"{' '.join(overrides)}: {error}") from None
    loggers = [str(entry.get("_target_")) for entry in (plain["logger"] or {}).values() if entry]
    if not any(name.endswith("CSVLogger") for name in loggers):
        raise ConfigurationError(
            "Curves are read from metrics.csv, so logger must be csv or tensorboard. Received: "
            f"logger={logger}"
        )
    if plain["trainer"].get("strategy") is not None:
        raise ConfigurationError(
            "Each run of a comparison has one process. Received: trainer=ddp. Train such runs one "
            "by one, and compare them with runs=…"
        )


def _folder(options: dict[str, Any], name: str) -> Path:
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return new_folder(options.get("output") or Path("outputs") / "compare" / name / time)


def _slug(name: str, number: int) -> str:
    plain = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")
    return plain if plain == name else f"{plain[:60]}-{number + 1}"


def _place(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"hydra.sweep.subdir='{text}'"


def _launch(
    jobs: list[list[str]], folders: list[Path], processes: int, config_dir: str | None
) -> dict[Path, str]:
    """Train in parallel processes, by Hydra's launcher; why runs failed, by their folders."""
    words = [
        "hydra/launcher=joblib",
        f"hydra.launcher.n_jobs={processes}",
        "hydra.launcher.batch_size=1",
        "hydra.sweep.dir=.",
    ]
    if config_dir is not None:
        words.append(f"hydra.searchpath=[file://{Path(config_dir).resolve()}]")
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        launcher = Plugins.instance().instantiate_launcher(
            HydraContext(loader, Callbacks()),
            _contend,
            loader.load_configuration("train", words, RunMode.MULTIRUN),
        )
        failed: dict[Path, str] = {}
        waiting = dict(zip(folders, jobs, strict=True))
        while waiting:
            try:
                done = launcher.launch(list(waiting.values()), 0)
            except BrokenExecutor:  # it takes what ran beside it along, and not what had to wait
                open_ones = [path for path in waiting if not (path / "summary.json").is_file()]
                begun = [path for path in open_ones if path.exists()] or open_ones
                failed |= dict.fromkeys(begun, "A process was killed; perhaps memory ran out.")
                waiting = {path: waiting[path] for path in open_ones if path not in begun}
                continue
            for path, job in zip(waiting, done, strict=True):
                outcome = job._return_value
                if outcome:
                    kind = f"{type(outcome).__name__}: " if isinstance(outcome, Exception) else ""
                    failed[path] = f"{kind}{outcome}"
            break
    return failed


def _contend(config: DictConfig) -> str:
    """One run of a comparison; returns nothing, or why there is none."""
    from gdtrain.runs.train import train

    directory = Path(HydraConfig.get().runtime.output_dir)
    where = f"{directory.parent.name}, {directory.name.replace('-', ' ')}"
    listen(signals=False)
    log = logging.getLogger("gdtrain")
    level = log.level
    log.setLevel(logging.CRITICAL)  # one line a run, below
    with open_dict(config):
        (config.callbacks or {}).pop("progress", None)
    try:
        # What a process loads once would else be in the seconds of its first run only.
        with tempfile.TemporaryDirectory() as scratch, suppress(ConfigurationError):
            train(_first_updates(config), Path(scratch) / "run")
        result = train(config, directory)
    except ConfigurationError as error:
        discard_empty(directory)
        print(f"{where}: {error}", file=sys.stderr, flush=True)
        return str(error)
    finally:
        log.setLevel(level)
    summary = result.summary
    reason = summary["stop_reason"]
    if reason == "INTERRUPTED":
        raise KeyboardInterrupt  # the whole comparison is meant
    loss = summary["metrics"].get("loss/train")
    print(
        f"{where}: {'finished' if reason == 'BUDGET' else reason}, {summary['updates']:,} updates "
        f"in {summary['fit_seconds']:.2f} s, "
        f"training loss {'–' if loss is None else format(loss, '.4g')}",
        file=sys.stderr,
        flush=True,
    )
    return ""


def _first_updates(config: DictConfig) -> DictConfig:
    few = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    few.logger, few.ckpt_path = {}, None
    few.trainer.max_steps = _WARM_UP
    return few  # type: ignore[return-value]


def _told(
    common: list[str], contenders: dict[str, list[str]], seeds: int, processes: int
) -> list[str]:
    """How a comparison was made, with the command of each run."""
    lines = [f"gdtrain-compare {shlex.join(sys.argv[1:])}".strip()]
    each = f"0 to {seeds - 1}" if seeds > 1 else "0"
    lines += [
        f"{name}: gdtrain {shlex.join([*common, *overrides])} seed=… ({each})"
        for name, overrides in contenders.items()
    ]
    lines.append(
        "All contenders have the same seeds, and with them the same initial weights, where the "
        "model is the same, and the same training, validation and test examples."
    )
    lines.append(
        f"{processes} processes ran side by side, so seconds are those of a machine that was "
        f"busy; jobs=1 trains one run after another."
        if processes > 1
        else "One run was trained after another."
    )
    lines.append(
        f"Before each run its process made {_WARM_UP} updates and threw them away, so what a "
        f"process loads once is not in the seconds; what callbacks do while training is."
    )
    return lines
