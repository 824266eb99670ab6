"""The command line: `gdtrain`, `gdtrain-compare`, `gdtrain-evaluate`, …, and the scripts.

Exit codes: 0, all went well; 2, the command was wrong, and nothing was trained; 3, the run diverged
(or a number in it was not finite) and did not recover; 130, interrupted. A sweep of several runs
ends with the highest.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import signal
import sys
import tempfile
import warnings
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gdtrain.configuration import (
    ConfigurationError,
    check,
    closest,
    conf_directory,
    new_folder,
)

if TYPE_CHECKING:
    from gdtrain.comparison import Comparison
    from gdtrain.rate_finder import RateCurve
    from gdtrain.training import Result

__all__ = [
    "compare_main",
    "evaluate_main",
    "explain_main",
    "find_lr_main",
    "landscape_main",
    "predict_main",
    "train_main",
]

_EXIT_CODES = {"DIVERGED": 3, "NON_FINITE": 3, "INTERRUPTED": 130}


def train_main() -> None:
    """Train from the command line; ends the process with its exit code.

    Example:
        >>> sys.argv = ["gdtrain", "optimizer=sdg"]
        >>> train_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    arguments = get_args_parser().parse_args()
    runs = not (arguments.help or arguments.hydra_help or arguments.cfg or arguments.info)
    try:
        if arguments.config_name or arguments.config_path:
            raise ConfigurationError(
                "--config-name and --config-path would replace gdtrain's own configuration. Put "
                "files of yours into a folder beside it: --config-dir=FOLDER."
            )
        # Everything that can be told without torch is told before it is imported.
        for overrides in _jobs(arguments):
            config = _compose(overrides, arguments.config_dir)
            if runs and not arguments.multirun:
                check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(error, words=arguments.overrides))
    except ValueError as error:
        if "override must be a string or a list" not in str(error):
            raise
        sys.exit(_complain(ConfigurationError("A group takes a choice, not null: see --help.")))

    started: list[str] = []
    codes: list[int] = []
    several = bool(arguments.multirun)

    @hydra.main(version_base="1.3", config_path=str(conf_directory()), config_name="train")
    def job(config: DictConfig) -> None:
        started.append(config.variant)
        codes.append(_run(config, several))

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions out: what is not said below is a fault
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    warnings.showwarning = _warn  # type: ignore[assignment]
    _speak()
    try:
        job()
    except OSError as error:
        if started:
            raise
        sys.exit(_complain(ConfigurationError(f"The run's folder cannot be made: {error}")))
    except KeyboardInterrupt:  # before or after the training itself, which ends in good order
        sys.exit(_EXIT_CODES["INTERRUPTED"])
    sys.exit(max(codes, default=0))


def _run(config: DictConfig, several: bool) -> int:
    """One run; its exit code. A wrong one does not end the others of a sweep."""
    directory = Path(HydraConfig.get().runtime.output_dir)
    try:
        check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        if several and config.trainer.get("strategy") is not None:
            raise ConfigurationError(
                "A sweep (-m) runs its jobs in one process, and trainer=ddp needs several for "
                "each. Start such runs one by one."
            )
        from gdtrain.experiment import train

        result = train(config, directory)
    except ConfigurationError as error:
        from gdtrain.experiment import discard_empty, is_first_process

        if not is_first_process():
            return 2  # the first says it
        discard_empty(directory)
        overrides = HydraConfig.get().overrides.task
        return _complain(error, f" in {' '.join(overrides)}" if several else "")
    except KeyboardInterrupt:
        from gdtrain.experiment import discard_empty

        discard_empty(directory)
        raise
    if result.module.trainer.is_global_zero:
        _show(result)
    code = _EXIT_CODES.get(result.stop.reason.value, 0)
    if several and result.stop.reason.value == "INTERRUPTED":
        sys.exit(code)  # the whole sweep is meant
    return code


def _jobs(arguments: Any) -> list[list[str]]:
    """The overrides of each run."""
    if not arguments.multirun:
        return [arguments.overrides]
    parsed = OverridesParser.create().parse_overrides(arguments.overrides)
    if any(o.get_key_element() == "hydra/sweeper" for o in parsed):
        return []  # another sweeper reads the overrides in its own way
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(overrides) for batch in batches for overrides in batch]


def _compose(overrides: list[str], config_dir: str | None, whole: bool = False) -> DictConfig:
    extra = []
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise ConfigurationError(f"--config-dir: there is no folder {config_dir}")
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        return compose("train", [*overrides, *extra], return_hydra_config=whole)


# ---------------------------------------------------------------------- what the user reads


def _complain(error: BaseException, where: str = "", words: list[str] | None = None) -> int:
    print(f"error{where}: {_explain(error, words or [])}", file=sys.stderr)
    return 2


def _explain(error: BaseException, words: list[str]) -> str:
    """Hydra's message, said for a user: what was wrong, and what there is."""
    text = str(error).strip()
    if isinstance(error, ConfigurationError) or type(error) is ValueError:  # our own words
        return text
    group = re.search(r"Could not find '([^']+)'", text)
    if group:
        name, _, value = group.group(1).rpartition("/")
        listed = text.partition("Config search path")[0]
        options = re.findall(r"^\t(\S+)", listed, re.MULTILINE)
        hint = closest(value, options)
        return f"There is no {name}={value}.{hint} There are: {', '.join(sorted(options))}."
    key = re.search(r"Could not override '([^']+)'", text)
    if key:
        name = key.group(1).split("@")[0]
        return f"Unknown key {name}.{closest(name, _known_keys(words))} `--cfg job` shows all keys."
    syntax = re.search(r"Error parsing override '([^']*)'\s*(.*)", text, re.DOTALL)
    if syntax:
        return (
            f"{syntax.group(1)!r} is not of the form key=value: "
            f"{syntax.group(2).strip().splitlines()[0]}"
        )
    detail = text.splitlines()[0] if text else type(error).__name__
    context = None if error.__suppress_context__ else error.__context__
    cause = str(error.__cause__ or context or "").strip()
    if cause and cause not in detail:
        detail += f" ({cause.splitlines()[0]})"
    return detail


def _known_keys(words: list[str]) -> list[str]:
    """Of the configuration with the groups that were chosen, where they can be composed."""
    groups = [w for w in words if "." not in w.partition("=")[0] and "," not in w]
    try:
        config = _compose(groups, None)
    except (HydraException, OmegaConfBaseException):
        config = _compose([], None)
    keys: list[str] = []

    def walk(node: Any, prefix: str) -> None:
        for name, value in node.items():
            keys.append(f"{prefix}{name}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    walk(OmegaConf.to_container(config, resolve=False), "")
    return [*keys, "experiment"]


def _show(result: Result) -> None:
    """A short table at the end of a run."""
    from rich.console import Console
    from rich.table import Table

    summary, metrics = result.summary, result.metrics
    table = Table(title=f"{summary['variant']}: {summary['stop_reason']}", title_justify="left")
    parts = [part for part in ("train", "val", "test") if f"loss/{part}" in metrics]
    table.add_column("")
    for part in parts:
        table.add_column(part, justify="right")
    names = ["loss", *sorted({t.split("/")[1] for t in metrics if t.startswith("metric/")})]
    for name in names:
        tags = [f"loss/{p}" if name == "loss" else f"metric/{name}/{p}" for p in parts]
        values = [metrics.get(tag) for tag in tags]
        table.add_row(name, *("–" if v is None else f"{v:.4g}" for v in values))
    console = Console()
    console.print(table)
    updates, seconds = summary["updates"], max(summary["fit_seconds"], 1e-9)
    console.print(
        f"{updates:,} updates in {seconds:.1f} s ({updates / seconds:,.0f}/s), "
        f"{summary['examples_seen']:,} examples seen.",
        highlight=False,
        soft_wrap=True,
    )
    micro = summary["micro_batch_size"]
    if result.module.micro_batch_size_is_automatic and micro < summary["batch_size"]:
        console.print(
            f"Micro-batches of {micro} examples, by the memory that an example takes.",
            highlight=False,
        )
    if result.directory is not None:
        shown = _shown(result.directory)
        console.print(f"Run: {shown}", highlight=False, soft_wrap=True)
        root = shown.split(os.sep)[0] or shown
        console.print(f"Curves: tensorboard --logdir {root}", highlight=False, soft_wrap=True)
    console.print(str(result.stop), highlight=False, soft_wrap=True, markup=False)


# ---------------------------------------------------------------------- evaluate and predict


def _speak() -> None:
    """Show what gdtrain says on its log: which engine was chosen, and the like."""
    log = logging.getLogger("gdtrain")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False


def _warn(message: Warning | str, *_: Any) -> None:
    """A warning as a user reads it, without the line of code that gave it."""
    print(f"warning: {message}", file=sys.stderr)


def _key_values(usage: str, required: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
    """`key=value` words of the command line; prefixes like `data.` end in a dot."""
    words = sys.argv[1:]
    if any(word in ("-h", "--help") for word in words):
        print(usage)
        sys.exit(0)
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        known = key in (*required, *optional) or any(
            k.endswith(".") and key.startswith(k) for k in optional
        )
        if not equals or not known:
            names = [*required, *(k for k in optional if not k.endswith("."))]
            raise ConfigurationError(f"Unknown argument {word}.{closest(key, names)}\n{usage}")
        found[key] = value
    missing = [key for key in required if key not in found]
    if missing:
        raise ConfigurationError(f"{missing[0]}=… is missing.\n{usage}")
    return found


def _trust(found: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name in found.get("trust", "").split(",") if name)


def _header(found: dict[str, str]) -> Any:
    """Whether a table has a header, where that was said."""
    word = found.get("header")
    return {"true": True, "false": False}.get((word or "").lower(), word)


def evaluate_main() -> None:
    """Print a checkpoint's test metrics, or those on a new file; ends the process.

    Example:
        >>> sys.argv = ["gdtrain-evaluate", "ckpt_path=missing.ckpt"]
        >>> evaluate_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: evaluate.py ckpt_path=CHECKPOINT [data.KEY=VALUE …] [trust=PACKAGE], or for a new "
        "file evaluate.py ckpt_path=CHECKPOINT input=FILE [target=COLUMN|FILE.npy] "
        "[header=true|false]"
    )
    try:
        found = _key_values(usage, ("ckpt_path",), ("data.", "trust", "input", "target", "header"))
        from gdtrain.experiment import evaluate

        dots = [f"{k[5:]}={v}" for k, v in found.items() if k.startswith("data.")]
        overrides: Any = OmegaConf.to_container(OmegaConf.from_dotlist(dots))
        _speak()
        metrics = evaluate(
            found["ckpt_path"],
            overrides,
            _trust(found),
            input_path=found.get("input"),
            target=found.get("target"),
            header=_header(found),
        )
    except (
        ValueError,
        OSError,
        TypeError,
        HydraException,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        sys.exit(_complain(_innermost(error)))
    for tag, value in metrics.items():
        print(f"{tag} {value:.6g}")


def predict_main() -> None:
    """Write predictions for a file of examples; ends the process with its exit code.

    Example:
        >>> sys.argv = ["gdtrain-predict", "ckpt_path=missing.ckpt"]
        >>> predict_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: predict.py ckpt_path=CHECKPOINT input=FILE.csv|FILE.npy output=FILE.csv "
        "[header=true|false] [trust=PACKAGE]"
    )
    try:
        found = _key_values(usage, ("ckpt_path", "input", "output"), ("header", "trust"))
        from gdtrain.experiment import predict_file

        _speak()
        count = predict_file(
            found["ckpt_path"],
            found["input"],
            found["output"],
            _trust(found),
            header=_header(found),
        )
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(_innermost(error)))
    print(f"{count} predictions in {found['output']}")


# ---------------------------------------------------------------------- the rate finder

_FINDER: dict[str, type] = {
    "min_lr": float,
    "max_lr": float,
    "updates": int,
    "repetitions": int,
    "output": str,
}


def find_lr_main() -> None:
    """Look for a learning rate by a range test; ends the process with its exit code.

    Example:
        >>> sys.argv = ["find_lr.py", "min_lr=fast"]
        >>> find_lr_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: find_lr.py [KEY=VALUE as for train.py …] [min_lr=1e-6] [max_lr=100] "
        "[updates=COUNT] [repetitions=COUNT] [output=FOLDER] [--config-dir=FOLDER]"
    )
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(usage)
        sys.exit(0)
    overrides: list[str] = []
    try:
        options, words, config_dir = _own_words(usage, _FINDER, "test")
        overrides = words
        config, choices = _composed(words, config_dir)
        names = {name: str(choices[name]) for name in ("data", "model", "optimizer")}
        if "lr" in config.optimizer:
            config.optimizer.lr = 1.0  # what is looked for: not used, whatever it was
        if config.get("step_size"):
            raise ConfigurationError(
                f"There is no rate to find where a rule computes the step size. Received: "
                f"step_size={choices['step_size']}. Set step_size=none."
            )
        check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        output = options.pop("output", None)
        folder = Path(output) if output else _finder_folder(names)
        _speak()
        warnings.showwarning = _warn  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from gdtrain.experiment import find_lr

        curve = find_lr(config, folder, "-".join(names.values()), **options)
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(error, words=overrides))
    except KeyboardInterrupt:
        sys.exit(_EXIT_CODES["INTERRUPTED"])
    _show_curve(curve, folder)


def _composed(words: list[str], config_dir: str | None) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of a run, and the choice of each group."""
    whole = _compose(words, config_dir, whole=True)
    own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return own, dict(whole.hydra.runtime.choices)


def _own_words(
    usage: str, kinds: dict[str, type], what: str
) -> tuple[dict[str, Any], list[str], str | None]:
    """A command's own options, the overrides of the configuration, and a folder of more."""
    options: dict[str, Any] = {}
    words: list[str] = []
    config_dir = None
    for word in sys.argv[1:]:
        key, equals, value = word.partition("=")
        if key == "--config-dir" and equals:
            config_dir = value
        elif word.startswith("-"):
            raise ConfigurationError(f"Unknown argument {word}: one {what} at a time. {usage}")
        elif key not in kinds:
            words.append(word)
        else:
            kind = kinds[key]
            try:
                options[key] = kind(value)
            except ValueError:
                number = "a whole number" if kind is int else "a number"
                raise ConfigurationError(f"{key} must be {number}. Received: {word}") from None
            if value == "":
                raise ConfigurationError(
                    f"{key} must name {_NAMED.get(key, 'a folder')}. Received: {word}"
                )
    return options, words, config_dir


def _finder_folder(names: dict[str, str]) -> Path:
    time = datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")
    return Path("outputs") / "find_lr" / "-".join(names.values()) / time


def _show_curve(curve: RateCurve, folder: Path) -> None:
    """Loss by half decades, and what follows from it."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"loss after updates with a growing η: from {curve.start:.4g}")
    for name in ("η", "loss", "smoothed", "slope per decade", ""):
        table.add_column(name, justify="left" if name == "" else "right")
    for i, words in curve.rows().items():
        values = (curve.losses[i], curve.smoothed[i], curve.slopes[i])
        table.add_row(f"{curve.rates[i]:.2g}", *(f"{v:.4g}" for v in values), words)
    console = Console()
    console.print(table)
    said = curve.basis if curve.suggestion is None else f"Suggestion: {curve.basis}"
    console.print(said, highlight=False, soft_wrap=True, markup=False)
    if curve.suggestion is not None:
        console.print(f"Train with optimizer.lr={curve.suggestion:g}", highlight=False)
    shown = _shown(folder)
    for line in (f"Curve: {shown}/find_lr.png", f"TensorBoard: tensorboard --logdir {shown}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error


# ---------------------------------------------------------------------- one update in full

_EXPLANATION: dict[str, type] = {"update": int, "digits": int, "examples": int}


def explain_main() -> None:
    """Print one update in full; ends the process with its exit code where something was wrong.

    Example:
        >>> sys.argv = ["explain.py", "update=first"]
        >>> explain_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: explain.py [KEY=VALUE as for train.py …] [update=0] [digits=4] [examples=2] "
        "[--config-dir=FOLDER]; without data=, model= and experiment=: experiment=demo_iris_sgd"
    )
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(usage)
        sys.exit(0)
    overrides: list[str] = []
    try:
        options, words, config_dir = _own_words(usage, _EXPLANATION, "update")
        overrides = _with_readable_model(words)
        config, choices = _composed(overrides, config_dir)
        check(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        warnings.showwarning = _warn  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        update = options.pop("update", 0)
        names = f"{config.variant} on {choices['data']}, {choices['model']}"
        from gdtrain.experiment import explain

        print(explain(config, update, title=f"Update {update} of {names}", **options))
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(error, words=overrides))
    except KeyboardInterrupt:
        sys.exit(_EXIT_CODES["INTERRUPTED"])


def _with_readable_model(words: list[str]) -> list[str]:
    """Where nothing says what to train, something that is small enough to read."""
    if any(w.partition("=")[0] in ("data", "model", "experiment") for w in words):
        return words
    of_mlp = ("model.hidden", "model.activation", "model.dropout")
    wants_mlp = any(w.partition("=")[0] in of_mlp for w in words)
    return ["experiment=demo_iris_sgd", *(["model=mlp"] if wants_mlp else []), *words]


# ---------------------------------------------------------------------- comparing

_COMPARISON: dict[str, type] = {
    "contenders": str,
    "seeds": int,
    "epochs": int,
    "jobs": int,
    "output": str,
    "runs": str,
    "target": float,
}
_NAMED = {"contenders": "at least two contenders"}
_THE_THREE = "optimizer=gd;optimizer=minibatch;optimizer=sgd"
_WARM_UP = 2  # updates that a process makes before a run, and throws away


def compare_main() -> None:
    """Train contenders with several seeds, or read finished runs, and leave a report.

    Ends the process with its exit code where something was wrong.

    Example:
        >>> sys.argv = ["compare.py", "runs=missing"]
        >>> compare_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: compare.py [KEY=VALUE as for train.py …] [contenders='optimizer=gd;optimizer=sgd'] "
        "[seeds=3] [epochs=20] [jobs=COUNT] [target=LOSS] [output=FOLDER] [--config-dir=FOLDER], "
        "or compare.py runs=FOLDER [target=LOSS] [output=FOLDER]"
    )
    if any(word in ("-h", "--help") for word in sys.argv[1:]):
        print(usage)
        sys.exit(0)
    words: list[str] = []
    try:
        options, words, config_dir = _own_words(usage, _COMPARISON, "comparison")
        _check_comparison(options)
        warnings.showwarning = _warn  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if "runs" in options:
            folder, comparison = _compare_finished(options, words)
        else:
            folder, comparison = _compare_trained(options, words, config_dir)
        from gdtrain.report import save

        save(comparison, folder)
    except (ConfigurationError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(error, words=words))
    except OSError as error:
        sys.exit(_complain(ConfigurationError(f"The report cannot be written: {error}")))
    except KeyboardInterrupt:
        sys.exit(_EXIT_CODES["INTERRUPTED"])
    for sentence in comparison.sentences():
        print(sentence)
    for sentence in comparison.absent():
        print(f"Left out: {sentence}")
    print(f"Report: {_shown(folder)}/report.html")


def _check_comparison(options: dict[str, Any]) -> None:
    for key in ("seeds", "epochs", "jobs"):
        if options.get(key, 1) < 1:
            raise ConfigurationError(
                f"{key} must be a whole number of at least 1. Received: {key}={options[key]}"
            )
    if not math.isfinite(options.get("target", 0.0)):
        raise ConfigurationError(
            f"target must be a finite loss. Received: target={options['target']}"
        )


def _compare_finished(options: dict[str, Any], words: list[str]) -> tuple[Path, Comparison]:
    others = [*words, *(f"{key}=…" for key in options if key not in ("runs", "output", "target"))]
    if others:
        raise ConfigurationError(
            f"runs=… compares finished runs and trains none, so it takes target=… and output=… "
            f"only. Received: {others[0]}"
        )
    from gdtrain.comparison import compare, find_runs

    folder = _comparison_folder(options, "runs")
    try:
        runs, left_out = find_runs(options["runs"])
        comparison = compare(runs, options.get("target"))
        comparison.left_out += left_out
    except ValueError as error:
        raise ConfigurationError(str(error)) from None
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
    known = _known_keys([])
    for key in keys:
        hint = "" if key in known else closest(key, list(_COMPARISON))
        if hint and not set("./@") & set(key):
            raise ConfigurationError(f"Unknown argument {key}.{hint}")
    common = list(words)
    if "epochs" in options or "trainer.max_epochs" not in keys:
        common.append(f"trainer.max_epochs={options.get('epochs', 20)}")
    first: dict[str, str] = {}
    for name, overrides in contenders.items():
        if "seed" in (word.partition("=")[0].lstrip("+~") for word in overrides):
            raise ConfigurationError(
                f"seed=… is set for each run by the comparison: set seeds=COUNT. Received: {name}"
            )
        config, choices = _composed([*common, *overrides], config_dir)
        first = first or choices
        _check_contender(config, choices["logger"], overrides)
    folder = _comparison_folder(options, f"{first['data']}-{first['model']}")
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
            f"runs={_shown(folder / 'runs')}",
            file=sys.stderr,
        )
        raise
    from gdtrain.comparison import compare, read_run

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
        kept = f" Finished runs are in {_shown(folder / 'runs')}." if runs else ""
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
        found[name] = overrides
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


def _comparison_folder(options: dict[str, Any], name: str) -> Path:
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
    from gdtrain.experiment import discard_empty, train

    directory = Path(HydraConfig.get().runtime.output_dir)
    where = f"{directory.parent.name}, {directory.name.replace('-', ' ')}"
    log = logging.getLogger("gdtrain")
    level = log.level
    log.setLevel(logging.CRITICAL)  # one line a run, below
    warnings.showwarning = _warn  # type: ignore[assignment]
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
        f"{where}: {reason}, {summary['updates']:,} updates in {summary['fit_seconds']:.2f} s, "
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


def _shown(folder: Path) -> str:
    relative = os.path.relpath(folder)
    return str(folder) if relative.startswith("..") else relative


# ---------------------------------------------------------------------- the landscape

_LANDSCAPE: dict[str, type] = {
    "span": float,
    "points": int,
    "examples": int,
    "seed": int,
    "megabytes": float,
}


def landscape_main() -> None:
    """Draw the objective around a checkpoint; ends the process with its exit code.

    Example:
        >>> sys.argv = ["landscape.py", "run=outputs", "points=few"]
        >>> landscape_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = (
        "usage: landscape.py ckpt_path=CHECKPOINT | run=FOLDER | ckpt_dir=FOLDER [output=FOLDER] "
        "[span=1] [points=31] [examples=2048] [seed=0] [megabytes=2048] [data.KEY=VALUE …] "
        "[trust=PACKAGE]"
    )
    places = ("ckpt_path", "run", "ckpt_dir")
    try:
        found = _key_values(usage, (), (*places, "output", *_LANDSCAPE, "data.", "trust"))
        given = [key for key in places if key in found]
        if len(given) != 1:
            raise ConfigurationError(
                f"One of ckpt_path=…, run=… and ckpt_dir=… says what to draw. Received: "
                f"{' and '.join(given) or 'none'}.\n{usage}"
            )
        empty = [key for key, value in found.items() if value == ""]
        if empty:
            raise ConfigurationError(f"{empty[0]} must have a value. Received: {empty[0]}=")
        options = {
            key: _number(key, found[key], kind) for key, kind in _LANDSCAPE.items() if key in found
        }
        dots = [f"{k[5:]}={v}" for k, v in found.items() if k.startswith("data.")]
        _speak()
        warnings.showwarning = _warn  # type: ignore[assignment]
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        from gdtrain.experiment import find_checkpoint, landscape

        path = found["ckpt_path"] if given == ["ckpt_path"] else find_checkpoint(found[given[0]])
        folder, pictures = landscape(
            path,
            found.get("output"),
            overrides=OmegaConf.to_container(OmegaConf.from_dotlist(dots)),  # type: ignore[arg-type]
            trust=_trust(found),
            **options,
        )
    except (
        ValueError,
        OSError,
        TypeError,
        HydraException,
        OmegaConfBaseException,
        YAMLError,
    ) as error:
        sys.exit(_complain(_innermost(error)))
    except KeyboardInterrupt:
        sys.exit(_EXIT_CODES["INTERRUPTED"])
    shown = _shown(folder)
    for name, picture in pictures.items():
        print(f"{shown}/{name}.png: {picture.title.splitlines()[0]}")
    if "trajectory" not in pictures and "surface" not in pictures:
        print("The path is not drawn: the run has left no trajectory.npz, or has not moved.")
    print(f"Images: tensorboard --logdir {shown}")


def _number(key: str, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ConfigurationError(f"{key} must be {what}. Received: {key}={value}") from None
