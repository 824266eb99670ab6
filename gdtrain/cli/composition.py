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
    """The configuration of a run; `whole`: with Hydra's own part."""
    extra = []
    if config_dir is not None:
        extra = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"]
    try:
        with initialize_config_dir(str(conf_directory()), version_base="1.3"):
            return hydra_compose("train", [*overrides, *extra], return_hydra_config=whole)
    except (HydraException, OmegaConfBaseException) as error:
        text = str(error)
        if gone := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
            said = (
                f"~{gone[1]}: there is no key {gone[1]} to take away."
                f"{closest(gone[1], known_keys(overrides))} `--cfg job` shows all keys."
            )
        elif there := re.search(r"to config. An item is already at '([^']+)'", text):
            said = f"{there[1]} is there already: leave out the plus, {there[1]}=…"
        elif unknown := re.search(r"Could not override '([^']+)'", text):
            said = _unknown(unknown[1], overrides)
        else:
            raise
        raise ConfigurationError(said) from None


def own_part(whole: DictConfig) -> DictConfig:
    """The configuration without Hydra's part."""
    return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])


def composed(words: list[str], config_dir: str | None) -> tuple[DictConfig, dict[str, str]]:
    """The configuration of a run, and the choice of each group."""
    whole = compose(words, config_dir, whole=True)
    return own_part(whole), dict(whole.hydra.runtime.choices)


def check_package(package: str, config: DictConfig) -> None:
    """Raise where the part of the configuration that is to be shown is not there."""
    if package != "_global_" and OmegaConf.select(config, package) is None:
        raise ConfigurationError(
            f"--package (-p) must name a key that is set.{closest(package, known_keys([]))} "
            f"Received: {package}. --cfg job without it shows all."
        )


def known_keys(words: list[str]) -> list[str]:
    """Of the configuration with the groups that were chosen, where they can be composed."""
    groups = [w for w in words if "." not in w.partition("=")[0] and "," not in w]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        try:
            config = hydra_compose("train", groups)
        except (HydraException, OmegaConfBaseException):
            config = hydra_compose("train", [])
    plain: Any = OmegaConf.to_container(config, resolve=False)
    return [*_names(plain), "experiment"]


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
    """The names of the groups."""
    return sorted(path.name for path in conf_directory().iterdir() if path.is_dir())
