"""Where the configs are, and what must hold in one. Imports no torch: a typo is told at once."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from gdtrain.errors import ConfigurationError
from gdtrain.ranges import Interval, Whole

__all__ = [
    "check",
    "checked",
    "closest",
    "conf_directory",
    "flatten",
    "out_of_range",
    "plain_containers",
    "read_defaults",
]


def conf_directory() -> Path:
    """The folder of YAML files: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def read_defaults(choice: str) -> dict[str, Any]:
    """One YAML file, such as "optimizer/sgd", as it stands."""
    text = (conf_directory() / f"{choice}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


_COUNT = Whole(1, 2**31 - 1)  # more than that is a mistake
_SEED = Whole(0, 2**32 - 1)
_POSITIVE = Interval(0, math.inf)
_NOT_NEGATIVE = Interval(0, math.inf, "left")
# Keys that are absent are not asked for.
_NUMBERS: dict[str, Interval | Whole] = {
    "optimizer.lr": _POSITIVE,
    "optimizer.momentum": _NOT_NEGATIVE,
    "optimizer.weight_decay": _NOT_NEGATIVE,
    "data.micro_batch_size": _COUNT,
    "data.num_examples": _COUNT,
    "data.num_features": _COUNT,
    "data.val_fraction": _NOT_NEGATIVE,
    "data.test_fraction": _NOT_NEGATIVE,
    "data.updates_per_sweep": _COUNT,
    "data.split_seed": _SEED,
    "trainer.max_epochs": _COUNT,
    "trainer.check_val_every_n_epoch": _COUNT,
    "schedule.warmup": _NOT_NEGATIVE,
    "seed": _SEED,
    "data.data_seed": _SEED,
    "data.seed": _SEED,
    "step_size.seed": _SEED,
    "callbacks.early_stopping.patience": Whole(0, 2**31 - 1),
    "callbacks.early_stopping.min_delta": _NOT_NEGATIVE,
}
_KEYS = (
    "variant",
    "seed",
    "ckpt_path",
    "decay_biases",
    "engine",
    "optimized_metric",
    "data",
    "model",
    "loss",
    "schedule",
    "step_size",
    "trainer",
    "optimizer",
    "logger",
    "callbacks",
    "instruments",
)
_SWITCHES = ("optimizer.nesterov", "optimizer.maximize", "data.standardize", "decay_biases")
_AUTOMATIC = ("optimizer.lr", "data.micro_batch_size", "data.updates_per_sweep")
# Rules of which optimizer.lr is an option: the longest step.
_BOUNDED_BY_LR = ("gdtrain.step_sizes.StochasticPolyak",)
_WORDS = {
    "engine": ("auto", "eager", "compiled", "native"),
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    "trainer.precision": (
        "32-true", "16-mixed", "bf16-mixed", "64-true", "16-true", "bf16-true", "32", "16", "bf16",
        "64", "transformer-engine", "transformer-engine-float16",
    ),
}  # fmt: skip
_OPTIONAL = ("data.micro_batch_size", "trainer.max_epochs", "trainer.precision")
_METRIC = re.compile(r"(loss|metric/\w+)/(train|val|test)")


def check(config: Mapping[str, Any]) -> None:
    """Raise where a value is of the wrong type, out of range, or against the variant.

    What needs the data (a batch size above N, labels that do not fit the loss) is found when they
    are read.
    """
    missing_keys = [key for key in _KEYS if key not in config]
    if missing_keys:
        raise ConfigurationError(f"{missing_keys[0]} is missing: it cannot be taken away.")
    unknown = [key for key in config if key not in _KEYS]
    if unknown:
        raise ConfigurationError(
            f"Unknown key {unknown[0]}.{closest(unknown[0], list(_KEYS))} `--cfg job` shows all."
        )
    for key in ("data", "model", "trainer", "optimizer", "schedule"):
        if key == "schedule" and config[key] == {}:
            continue
        if not isinstance(config[key], Mapping):
            raise ConfigurationError(
                f"{key} must be one of its choices. Received: {key}={_short(config[key])}"
            )
        if "_target_" not in config[key]:
            raise ConfigurationError(
                f"{key} must be one of its choices, and cannot be taken away: set {key}=…, without "
                f"~{key}. --help shows the choices."
            )
    flat = dict(flatten(config))
    if flat.get("trainer.max_epochs") is None and flat.get("trainer.max_steps", -1) == -1:
        raise ConfigurationError(
            "trainer.max_epochs or trainer.max_steps must bound the run. Received: neither."
        )
    for key, within in _NUMBERS.items():
        if key not in flat or (flat[key] is None and key in _OPTIONAL):
            continue
        automatic = key in _AUTOMATIC
        if not (automatic and flat[key] == "auto") and not _lies_in(within, flat[key]):
            raise out_of_range(key, within, flat[key], ", or auto" * automatic)
    for key in _SWITCHES:
        if key in flat and not isinstance(flat[key], bool):
            raise ConfigurationError(f"{key} must be true or false. Received: {flat[key]!r}.")
    for key, words in _WORDS.items():
        word = str(flat.get(key, words[0]))
        if word not in (*words, *["None"] * (key in _OPTIONAL)):
            raise ConfigurationError(
                f"{key} must be one of {', '.join(words)}. Received: {key}={word}."
                f"{closest(word, list(words))}"
            )
    _check_batch_size(flat)
    _check_step_size(config, flat)
    steps = flat.get("trainer.max_steps", -1)
    if steps != -1 and not _lies_in(Whole(1, 2**63 - 1), steps):
        raise ConfigurationError(
            f"trainer.max_steps must be a whole number of updates at least 1 and below 2^63, or -1 "
            f"for as many as the epochs have. Received: trainer.max_steps={_short(steps)}"
        )
    if not _METRIC.fullmatch(str(flat["optimized_metric"])):
        raise ConfigurationError(
            f"optimized_metric must be the tag of a final value, such as loss/val or "
            f"metric/accuracy/test. Received: optimized_metric={flat['optimized_metric']}"
        )
    devices = flat.get("trainer.devices", 1)
    if (_lies_in(Whole(-(2**63), 0), devices) and devices != -1) or (
        isinstance(devices, str) and devices != "auto" and not re.fullmatch(r"[\d, ]+", devices)
    ):
        raise ConfigurationError(
            f"trainer.devices must be a whole number of at least 1, auto, or a list of GPUs' "
            f"numbers. Received: trainer.devices={devices}"
        )
    for group in ("callbacks", "instruments", "logger"):
        _check_entries(group, config[group])
    for key, value in flat.items():
        _check_size(key, value)
    missing = [key for key, value in flat.items() if value == "???"]
    if missing:
        raise ConfigurationError(f"{missing[0]} has no default and must be set: {missing[0]}=…")
    for key in ("ckpt_path", "data.path", "data.test_path", "data.target_path"):
        path = flat.get(key)
        if path is not None and not Path(str(path)).expanduser().is_file():
            raise ConfigurationError(f"{key} must name a file that exists. Received: {path}")


def out_of_range(
    key: str, within: Interval | Whole, value: Any, other: str = ""
) -> ConfigurationError:
    """What to say of a number that is none, or not in its range."""
    what = f"{within}" if isinstance(within, Whole) else f"a number in {within}"
    return ConfigurationError(f"{key} must be {what}{other}. Received: {key}={_short(value)}")


def _lies_in(within: Interval | Whole, value: Any) -> bool:
    try:
        within.check("", value)
    except ValueError:
        return False
    return True


def _short(value: Any) -> str:
    """As it came, unless it would fill the screen."""
    try:
        text = str(value)
    except ValueError:  # Python writes no whole numbers of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:20]}… ({len(text)} characters)"


def _check_size(key: str, value: Any) -> None:
    """No number that nothing can be: infinite, or beyond what an index can be."""
    for entry in value if isinstance(value, list) else [value]:
        if isinstance(entry, list):
            _check_size(key, entry)
        infinite = isinstance(entry, float) and not math.isfinite(entry)
        if infinite or (isinstance(entry, int) and abs(entry) >= 2**63):
            raise ConfigurationError(
                f"{key} must be finite, and a whole number below 2^63. Received: {key}="
                f"{_short(value)}"
            )


def _check_entries(group: str, entries: Any) -> None:
    for name, entry in (entries or {}).items():
        if entry is None:
            continue
        key = f"{group}.{name}"
        partial = f" +{key}._partial_=true" if group == "logger" else ""
        if not isinstance(entry, Mapping) or "_target_" not in entry:
            raise ConfigurationError(
                f"{key} must name a class: +{key}._target_=…{partial}; or choose one that has it: "
                f"--help shows the choices of {group}. Received: {key}={_short(entry)}"
            )
        if group == "logger" and entry.get("_partial_") is not True:  # it is called with a folder
            raise ConfigurationError(
                f"{key} must wait for the run's folder: add +{key}._partial_=true. Received: "
                f"{key}._target_={entry['_target_']} without it."
            )


def _check_step_size(config: Mapping[str, Any], flat: Mapping[str, Any]) -> None:
    rule = config["step_size"]
    if not rule:
        return
    if not isinstance(rule, Mapping) or "_target_" not in rule:
        raise ConfigurationError(
            f"step_size must be one of its choices. Received: step_size={_short(rule)}"
        )
    if flat.get("optimizer.lr") not in (None, "auto") and rule["_target_"] not in _BOUNDED_BY_LR:
        name = str(rule["_target_"]).rsplit(".", 1)[-1]
        raise ConfigurationError(
            f"step_size={name} computes the step size, and optimizer.lr sets it: one of them only. "
            f"Received: optimizer.lr={flat['optimizer.lr']}. Leave optimizer.lr at auto, or set "
            f"step_size=none."
        )


def _check_batch_size(flat: Mapping[str, Any]) -> None:
    size, variant = flat.get("data.batch_size"), flat.get("variant")
    if "data.batch_size" not in flat:
        return
    if size != "full" and not _lies_in(Whole(1), size):
        raise ConfigurationError(
            f"data.batch_size must be a whole number of at least 1, or full (all N training "
            f"examples). Received: data.batch_size={size}"
        )
    if variant == "sgd" and size != 1:
        raise ConfigurationError(
            f"optimizer=sgd updates from one example at a time, so data.batch_size must be 1. "
            f"Received: data.batch_size={size}. Descent on batches, which many texts call SGD, is "
            f"optimizer=minibatch."
        )
    if variant == "gd" and size != "full":
        raise ConfigurationError(
            f"optimizer=gd updates from all N training examples, so data.batch_size must be full. "
            f"Received: data.batch_size={size}. Descent on batches is optimizer=minibatch; to "
            f"bound memory, set data.micro_batch_size={size}, which changes no result."
        )
    micro = flat.get("data.micro_batch_size")
    if isinstance(micro, int) and isinstance(size, int) and micro > size:
        raise ConfigurationError(
            f"data.micro_batch_size must be at most data.batch_size={size}. Received: "
            f"data.micro_batch_size={micro}"
        )


def checked(config: DictConfig) -> dict[str, Any]:
    """A configuration as plain containers, and checked."""
    plain = plain_containers(config)
    check(plain)
    return plain


def plain_containers(config: DictConfig) -> dict[str, Any]:
    """A configuration with all that it refers to filled in."""
    return OmegaConf.to_container(config, resolve=True)  # type: ignore[return-value]


def closest(word: str, words: list[str]) -> str:
    """A hint for a misspelt word: " Did you mean …?", or nothing."""
    found = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    if not found and "." not in word:  # perhaps only the last part of a key was typed
        found = [w for w in words if w.rsplit(".", 1)[-1] == word][:1]
    return f" Did you mean {found[0]}?" if found else ""


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots, and their values."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value
