"""The configuration of a run, composed from overrides; a key that it does not have is named."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gdtrain.errors import ConfigurationError
from gdtrain.runs.configuration import closest, conf_directory

__all__ = [
    "ELSEWHERE",
    "check_folder",
    "check_package",
    "compose",
    "composed",
    "groups",
    "known_keys",
    "own_part",
]

# What people call a key, and where it stands.
ELSEWHERE = {
    "batch_size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "layers": "model.hidden",
    "learning_rate": "optimizer.lr",
    "steps": "trainer.max_steps",
}


def compose(overrides: list[str], config_dir: str | None, whole: bool = False) -> DictConfig:
    """The configuration of a run.

    Args:
        overrides: From `typed`.
        config_dir: A folder of further configurations.
        whole: With Hydra's own part.

    Returns:
        What `gdtrain.runs.run.train` takes.

    Raises:
        ConfigurationError: A key is unknown.

    Example:
        >>> compose(["optimizer=gd"], None).variant
        'gd'
    """
    extra = []
    check_folder(config_dir)
    if config_dir is not None:
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            return hydra_compose("train", [*overrides, *extra], return_hydra_config=whole)
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error)
        gone = re.search(r"Could not delete from config. '([^']+)' does not exist", text)
        if gone:
            raise ConfigurationError(
                f"~{gone.group(1)}: there is no key {gone.group(1)} to take away."
                f"{closest(gone.group(1), known_keys(overrides))} `--cfg job` shows all keys."
            ) from None
        there = re.search(r"Could not append to config. An item is already at '([^']+)'", text)
        if there:
            name = there.group(1)
            raise ConfigurationError(
                f"{name} is there already: leave out the plus, {name}=…"
            ) from None
        unknown = re.search(r"Could not override '([^']+)'", text)
        if unknown is None:
            raise
        raise ConfigurationError(_unknown(unknown.group(1), overrides)) from None


def own_part(whole: DictConfig) -> DictConfig:
    """The configuration without Hydra's part.

    Args:
        whole: As `compose` gives it.

    Example:
        >>> "hydra" in own_part(compose([], None, whole=True))
        False
    """
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])


def composed(words: list[str], config_dir: str | None) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of a run, and the choice of each group.

    Args:
        words: Overrides.
        config_dir: A folder of further configurations.

    Returns:
        Both.

    Example:
        >>> composed(["data=iris"], None)[1]["data"]
        'iris'
    """
    whole = compose(words, config_dir, whole=True)
    return own_part(whole), dict(whole.hydra.runtime.choices)


def check_package(package: str, config: DictConfig) -> None:
    """Raise where the part of the configuration that is to be shown is not there.

    Args:
        package: The part's key.
        config: The whole configuration.

    Raises:
        ConfigurationError: It has no such key, or nothing is set there.

    Example:
        >>> check_package("optimizer", compose([], None))
    """
    if package != "_global_" and OmegaConf.select(config, package) is None:
        raise ConfigurationError(
            f"--package (-p) must name a key that is set.{closest(package, known_keys([]))} "
            f"Received: {package}. --cfg job without it shows all."
        )


def known_keys(words: list[str]) -> list[str]:
    """Of the configuration with the groups that were chosen, where they can be composed.

    Args:
        words: Overrides.

    Returns:
        Their names, and those of the groups.

    Example:
        >>> "optimizer.lr" in known_keys([])
        True
    """
    groups = [w for w in words if "." not in w.partition("=")[0] and "," not in w]
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = hydra_compose("train", groups)
    except (HydraException, OmegaConfBaseException):
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            config = hydra_compose("train", [])
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return [*_names(plain), "experiment"]


def check_folder(config_dir: str | None) -> None:
    """Raise where `--config-dir` names no folder.

    Args:
        config_dir: What it names; None: it was not given.

    Example:
        >>> check_folder(None)
    """
    if config_dir is not None and (not config_dir or not Path(config_dir).is_dir()):
        raise ConfigurationError(
            f"--config-dir must name a folder. Received: --config-dir={config_dir}, and there is "
            f"none."
        )


def _unknown(key: str, words: list[str]) -> str:
    """What to say of a key that the configuration does not have."""
    name, at, _ = key.partition("@")
    word = next((w for w in words if w.partition("=")[0] == key), f"{key}=…")
    if at:
        return f"Unknown key {key}. A choice stands under its own name: {name}=…"
    group, _, rest = name.partition(".")
    if rest and group in groups():
        having = [
            path.stem
            for path in sorted((conf_directory() / group).glob("*.yaml"))
            if rest in _keys_of(path, group)
        ]
        if having:
            return f"Unknown key {name}. It is one of {group}={'|'.join(having)}: set that too."
    known = known_keys(words)
    elsewhere = ELSEWHERE.get(name)
    hint = f" Did you mean {elsewhere}?" if elsewhere else closest(name, known)
    if (hint == f" Did you mean {group}?" and rest) or name.endswith("_target_"):
        hint = ""
    if not hint:
        hint = f" A key that is new is added with a plus: +{word}."
    return f"Unknown key {name}.{hint} `--cfg job` shows all keys."


def _keys_of(path: Path, group: str) -> list[str]:
    """The keys that a choice brings, below its group."""
    text = path.read_text(encoding="utf-8")
    content = yaml.safe_load(text) or {}
    if "@package _global_" in text:
        content = content.get(group) or {}
    return [name for name in _names(content) if not name.endswith("_")]


def _names(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{name}.")


def groups() -> list[str]:
    """The names of the groups.

    Example:
        >>> "optimizer" in groups()
        True
    """
    return sorted(path.name for path in conf_directory().iterdir() if path.is_dir())
