"""The command line: `gdtrain`, `gdtrain-evaluate`, `gdtrain-find-lr`, `gdtrain-predict`, scripts.

Exit codes: 0, all went well; 2, the command was wrong, and nothing was trained; 3, the run diverged
(or a number in it was not finite) and did not recover; 130, interrupted. A sweep of several runs
ends with the highest.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import warnings
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gdtrain.configuration import ConfigurationError, check, closest, conf_directory

if TYPE_CHECKING:
    from gdtrain.rate_finder import RateCurve
    from gdtrain.training import Result

__all__ = ["evaluate_main", "find_lr_main", "predict_main", "train_main"]

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
    if isinstance(error, ConfigurationError):
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
    if result.module.micro_batch_size_is_automatic:
        console.print(
            f"Micro-batches of {summary['micro_batch_size']} examples were found to be fastest.",
            highlight=False,
        )
    if result.directory is not None:
        shown = os.path.relpath(result.directory)
        shown = str(result.directory) if shown.startswith("..") else shown
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


def evaluate_main() -> None:
    """Print the test metrics of a checkpoint; ends the process with its exit code.

    Example:
        >>> sys.argv = ["gdtrain-evaluate", "ckpt_path=missing.ckpt"]
        >>> evaluate_main()
        Traceback (most recent call last):
        ...
        SystemExit: 2
    """
    usage = "usage: evaluate.py ckpt_path=CHECKPOINT [data.KEY=VALUE …] [trust=PACKAGE]"
    try:
        found = _key_values(usage, ("ckpt_path",), ("data.", "trust"))
        from gdtrain.experiment import evaluate

        dots = [f"{k[5:]}={v}" for k, v in found.items() if k.startswith("data.")]
        overrides = OmegaConf.to_container(OmegaConf.from_dotlist(dots))
        metrics = evaluate(found["ckpt_path"], overrides, _trust(found))  # type: ignore[arg-type]
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
        "[trust=PACKAGE]"
    )
    try:
        found = _key_values(usage, ("ckpt_path", "input", "output"), ("trust",))
        from gdtrain.experiment import predict_file

        count = predict_file(found["ckpt_path"], found["input"], found["output"], _trust(found))
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        sys.exit(_complain(_innermost(error)))
    print(f"{count} predictions in {found['output']}")


# ---------------------------------------------------------------------- the rate finder

_FINDER = {"min_lr": float, "max_lr": float, "updates": int, "repetitions": int, "output": str}


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
        options, words, config_dir = _finder_words(usage)
        overrides = words
        composed = _compose(words, config_dir, whole=True)
        choices = composed.hydra.runtime.choices
        names = {name: str(choices[name]) for name in ("data", "model", "optimizer")}
        config = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
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


def _finder_words(usage: str) -> tuple[dict[str, Any], list[str], str | None]:
    """The finder's own options, the overrides of the configuration, and a folder of more."""
    options: dict[str, Any] = {}
    words: list[str] = []
    config_dir = None
    for word in sys.argv[1:]:
        key, equals, value = word.partition("=")
        if key == "--config-dir" and equals:
            config_dir = value
        elif word.startswith("-"):
            raise ConfigurationError(f"Unknown argument {word}: one test at a time. {usage}")
        elif key not in _FINDER:
            words.append(word)
        else:
            kind = _FINDER[key]
            try:
                options[key] = kind(value)
            except ValueError:
                what = "a whole number" if kind is int else "a number"
                raise ConfigurationError(f"{key} must be {what}. Received: {word}") from None
            if value == "":
                raise ConfigurationError(f"{key} must name a folder. Received: {word}")
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
    shown = os.path.relpath(folder)
    shown = str(folder) if shown.startswith("..") else shown
    for line in (f"Curve: {shown}/find_lr.png", f"TensorBoard: tensorboard --logdir {shown}"):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__
    return error
