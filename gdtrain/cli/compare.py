"""`gdtrain-compare`: train contenders side by side, or read finished runs, and report."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf, open_dict

from gdtrain.cli.composition import compose, composed
from gdtrain.cli.messages import one_message, set_up_process, shown
from gdtrain.cli.words import Command, given, option, read_overrides
from gdtrain.errors import ConfigurationError
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.configuration import checked
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
    """Compare what the words name; ends the process where something was wrong."""
    with one_message():
        words = COMMAND.read(sys.argv[1:])
        options = given(words.options)
        set_up_process()
        if "runs" in options:
            folder, comparison = _compare_finished(options, words.overrides)
        else:
            folder, comparison = _compare_trained(options, words.overrides, words.config_dir)
        from gdtrain.reporting.page import save
        from gdtrain.reporting.text import Report

        try:
            save(comparison, folder)
        except OSError as error:
            raise ConfigurationError(f"The report cannot be written: {error}") from None
    report = Report(comparison)
    for sentence in report.sentences():
        print(sentence)
    for sentence in report.absent():
        print(f"Left out: {sentence}")
    print(f"Report: {shown(folder)}/report.html")


def _compare_finished(options: dict[str, Any], words: list[str]) -> tuple[Path, Comparison]:
    others = [*words, *(f"{key}=…" for key in options if key not in ("runs", "output", "target"))]
    if others:
        raise ConfigurationError(
            f"runs=… compares finished runs and trains none, so it takes target=… and output=… "
            f"only. Received: {others[0]}"
        )
    from gdtrain.reporting.comparison import compare
    from gdtrain.reporting.finished import find_runs

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


@dataclass(frozen=True)
class _Job:
    """A run of a comparison that is to be trained."""

    contender: str
    seed: int
    overrides: list[str]
    folder: Path

    def __str__(self) -> str:
        return f"{self.contender}, seed {self.seed}"


def _compare_trained(
    options: dict[str, Any], words: list[str], config_dir: str | None
) -> tuple[Path, Comparison]:
    contenders = _contenders(options.get("contenders", _THE_THREE))
    common = _common(options, words)
    first: dict[str, str] = {}
    for name, overrides in contenders.items():
        if "seed" in map(_key, overrides):
            raise ConfigurationError(
                f"seed=… is set for each run by the comparison: set seeds=COUNT. Received: {name}"
            )
        config, choices = composed([*common, *overrides], config_dir)
        first = first or choices
        _check_contender(config, choices["logger"], overrides)
    folder = _folder(options, f"{first['data']}-{first['model']}")
    seeds = options.get("seeds", 3)
    jobs = [
        _Job(
            name,
            seed,
            [*common, *overrides, f"seed={seed}"],
            folder / "runs" / _slug(name, i) / f"seed-{seed}",
        )
        for seed in range(seeds)  # the same seeds for all: common random numbers
        for i, (name, overrides) in enumerate(contenders.items())
    ]
    processes = min(options.get("jobs", min(2, os.cpu_count() or 1)), len(jobs))
    try:
        failed = _train_all(jobs, processes, config_dir)
    except KeyboardInterrupt:
        print(
            f"Interrupted, so there is no report. Compare the runs that were finished with "
            f"runs={shown(folder / 'runs')}",
            file=sys.stderr,
        )
        raise
    from gdtrain.reporting.comparison import compare
    from gdtrain.reporting.finished import read_run

    runs, left_out = [], []
    for job in jobs:
        try:
            if job.folder in failed:
                raise ValueError(failed[job.folder])
            runs.append(read_run(job.folder))
        except ValueError as error:
            left_out.append(f"{job}: {error}")
    try:
        names = {job.folder: job.contender for job in jobs}
        comparison = compare(runs, options.get("target"), names)
    except ValueError as error:
        why = f" {left_out[0]}" if left_out else ""
        kept = f" Finished runs are in {shown(folder / 'runs')}." if runs else ""
        raise ConfigurationError(f"{error}{why}{kept}") from None
    comparison.left_out += left_out
    comparison.made = _told(common, contenders, seeds, processes)
    return folder, comparison


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _common(options: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """The overrides of all contenders."""
    keys = [_key(word) for word in words]
    for key, instead in (("seed", "seeds=COUNT"), ("optimizer", "contenders='optimizer=…;…'")):
        if key in keys and (key == "seed" or "contenders" not in options):
            raise ConfigurationError(
                f"{key}=… is set for each run by the comparison: set {instead}. Received: "
                f"{words[keys.index(key)]}"
            )
    if "epochs" not in options and "trainer.max_epochs" in keys:
        return [*words]
    return [*words, f"trainer.max_epochs={options.get('epochs', 20)}"]


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
        found[name] = read_overrides(overrides)
    if len(found) < 2:
        raise ConfigurationError(
            f"contenders must name at least two, separated by a semicolon, such as "
            f"{_THE_THREE!r}. Received: contenders={text!r}"
        )
    return found


def _check_contender(config: DictConfig, logger: str, overrides: list[str]) -> None:
    try:
        plain = checked(config)
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


def _train_all(jobs: Sequence[_Job], processes: int, config_dir: str | None) -> dict[Path, str]:
    """Train in parallel processes; why runs failed, by their folders."""
    from joblib import Parallel, delayed

    failed: dict[Path, str] = {}
    while jobs:
        try:
            parallel = Parallel(n_jobs=processes, backend="loky", batch_size=1)
            outcomes = parallel(delayed(_train)(job, config_dir) for job in jobs)
        except BrokenExecutor:  # it takes what ran beside it along, and not what had to wait
            unfinished = [job for job in jobs if not (job.folder / "summary.json").is_file()]
            begun = [job for job in unfinished if job.folder.exists()] or unfinished
            why = "A process was killed; perhaps memory ran out."
            failed |= {job.folder: why for job in begun}
            jobs = [job for job in unfinished if job not in begun]
        else:
            failed |= {job.folder: why for job, why in zip(jobs, outcomes, strict=True) if why}
            break
    return failed


def _train(job: _Job, config_dir: str | None) -> str:
    """One run of a comparison; returns nothing, or why there is none."""
    set_up_process(signals=False)
    log = logging.getLogger("gdtrain")
    level = log.level
    log.setLevel(logging.CRITICAL)  # one line a run, below
    job.folder.mkdir(parents=True)  # from here on it has begun
    try:
        config = compose(job.overrides, config_dir)
        from gdtrain.runs.train import train

        with open_dict(config):
            (config.callbacks or {}).pop("progress", None)
        # What a process loads once would else be in the seconds of its first run only.
        few: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
        few.logger, few.ckpt_path, few.trainer.max_steps = {}, None, _WARM_UP
        with tempfile.TemporaryDirectory() as scratch, suppress(ConfigurationError):
            train(few, Path(scratch) / "run")
        summary = train(config, job.folder).summary
    except Exception as error:  # of any kind: the other runs go on
        discard_empty(job.folder)
        known = isinstance(error, ConfigurationError)
        why = str(error) if known else f"{type(error).__name__}: {error}"
        print(f"{job}: {why}", file=sys.stderr, flush=True)
        return why
    finally:
        log.setLevel(level)
    reason, loss = summary["stop_reason"], summary["metrics"].get("loss/train")
    if reason == "INTERRUPTED":
        raise KeyboardInterrupt  # the whole comparison is meant
    print(
        f"{job}: {'finished' if reason == 'BUDGET' else reason}, {summary['updates']:,} updates in "
        f"{summary['fit_seconds']:.2f} s, training loss {'–' if loss is None else f'{loss:.4g}'}",
        file=sys.stderr,
        flush=True,
    )
    return ""


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
