"""The words of a command line: keys of the command's own, and overrides of the configuration."""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser, create_functions
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gdtrain.errors import ConfigurationError
from gdtrain.runs.configuration import closest, conf_directory

__all__ = [
    "TEXTS",
    "Command",
    "Key",
    "Words",
    "check_package",
    "compose",
    "composed",
    "flags",
    "jobs",
    "known_keys",
    "typed",
]


# ---------------------------------------------------------------------- a command's own keys


@dataclass(frozen=True)
class Key:
    """One key of a command: the parser and `--help` read the same line.

    Args:
        name: As it is typed; one that ends in a dot stands for all keys below it.
        meaning: With its unit.
        default: As shown; "": there is none.
        example: A value.
        kind: Of its values: str, int or float.
        low: The least value of a number.
        high: The largest.
        open: Whether `low` itself is out of range.
        required: Whether the command needs it.

    Example:
        >>> Key("seeds", "runs of each", "3", "5", int, 1, 1000).read("seeds", "0")
        Traceback (most recent call last):
        ...
        gdtrain.errors.ConfigurationError: seeds must be a whole number of at least 1. ...
    """

    name: str
    meaning: str
    default: str = ""
    example: str = "…"
    kind: type = str
    low: float = -math.inf
    high: float = math.inf
    open: bool = False
    required: bool = False

    def read(self, key: str, text: str) -> Any:
        """A value from what was typed.

        Args:
            key: The whole key.
            text: What stands behind the equals sign.

        Raises:
            ConfigurationError: It is of another kind, or out of range.
        """
        if self.kind is str:
            if not text:
                raise ConfigurationError(
                    f"{key} must be {self.meaning}. Received: {key}=, with nothing behind it."
                )
            return text
        what = "a whole number" if self.kind is int else "a number"
        try:
            value = self.kind(text)
        except ValueError:
            raise ConfigurationError(f"{key} must be {what}. Received: {key}={text}") from None
        if self.kind is float and not math.isfinite(value):
            raise ConfigurationError(f"{key} must be a finite number. Received: {key}={text}")
        below = value < self.low or (self.open and value == self.low)
        if below or value > self.high:
            least = f"{'above' if self.open else 'of at least'} {_number(self.low)}"
            most = f"at most {_number(self.high)}"
            bound = most if not below else least
            raise ConfigurationError(f"{key} must be {what} {bound}. Received: {key}={text}")
        return value

    @property
    def range(self) -> str:
        """As an interval, or what it names."""
        if self.kind is str:
            return "text"
        left = "(" if self.open or self.low == -math.inf else "["
        right = ")" if self.high == math.inf else "]"
        kind = "whole, " if self.kind is int else ""
        return f"{kind}{left}{_number(self.low)}, {_number(self.high)}{right}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.0f}" if value == int(value) else f"{value:g}"


@dataclass
class Words:
    """A command line, read.

    Args:
        options: The command's own keys.
        below: For each key that ends in a dot: what stands behind it.
        overrides: Of the configuration.
        config_dir: A folder of further configurations.

    Example:
        >>> Words().overrides
        []
    """

    options: dict[str, Any] = field(default_factory=dict)
    below: dict[str, dict[str, str]] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None


@dataclass(frozen=True)
class Command:
    """A command: what it does, and the keys that it knows.

    Args:
        name: Of the program.
        script: In `scripts/`.
        purpose: One sentence.
        keys: Its own.
        examples: Words behind its name.
        configures: What it makes one of, where it takes the keys of `gdtrain` too; "": it takes
            none of them.
        notes: Shown at the end of the help.

    Example:
        >>> Command("gdtrain-x", "x", "Does x.", (Key("y", "a number"),), ("y=1",)).read(["y=1"])
        Words(options={'y': '1'}, below={}, overrides=[], config_dir=None)
    """

    name: str
    script: str
    purpose: str
    keys: tuple[Key, ...]
    examples: tuple[str, ...]
    configures: str = ""
    notes: str = ""

    def read(self, words: Sequence[str]) -> Words:
        """Sort the words; show the help where it is asked for, and end.

        Args:
            words: Without the program's name.

        Raises:
            ConfigurationError: One is unknown, given twice, or of the wrong kind; or one is
                missing.
        """
        if any(word in ("-h", "--help") for word in words):
            print(self.help())
            sys.exit(0)
        found = Words()
        rest: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            key = next((k for k in self.keys if _names(k.name, name)), None)
            if self.configures and name == "--config-dir" and equals:
                found.config_dir = value
            elif word.startswith("-"):
                raise ConfigurationError(self._no_flag(word))
            elif key is None or not equals:
                rest.append(word)
            elif key.name.endswith("."):
                found.below.setdefault(key.name, {})[name[len(key.name) :]] = value
            elif name in found.options:
                raise ConfigurationError(f"{name} was given twice. Give it once.")
            else:
                found.options[name] = key.read(name, value)
        if rest and not self.configures:
            raise ConfigurationError(self._unknown(rest[0]))
        self._check_misspelt(rest)
        found.overrides = typed(rest) if rest else []
        for key in self.keys:
            if key.required and key.name not in found.options:
                raise ConfigurationError(
                    f"{key.name}=… is missing: {key.meaning}. Such as {key.name}={key.example}; "
                    f"--help shows all keys."
                )
        return found

    def _check_misspelt(self, words: Sequence[str]) -> None:
        """Among the keys of the configuration, one may be meant for the command."""
        if not self.configures:
            return
        names, known = [k.name for k in self.keys], [*known_keys([]), *_ELSEWHERE]
        for word in words:
            name = word.partition("=")[0]
            if set("./@+~") & set(name) or name in known or not _KEY.fullmatch(name):
                continue
            if closest(name, names):
                hint = closest(name, names)
                raise ConfigurationError(f"Unknown argument {name}.{hint} --help shows all keys.")
            if not closest(name, known):
                raise ConfigurationError(self._unknown(word))

    def _unknown(self, word: str) -> str:
        name, equals, _ = word.partition("=")
        names = [k.name for k in self.keys if not k.name.endswith(".")]
        if not equals and name in names:
            return (
                f"{name} has no value. Write {name}=VALUE, without spaces. --help shows all keys."
            )
        shown = ", ".join(f"{k.name}{'KEY' * k.name.endswith('.')}" for k in self.keys)
        others = ", and every key of gdtrain" if self.configures else ""
        return f"Unknown argument {word}.{closest(name, names)} {self.name} knows: {shown}{others}."

    def _no_flag(self, word: str) -> str:
        name, _, value = word.lstrip("-").partition("=")
        names = [k.name for k in self.keys]
        key = next((n for n in names if n.replace("_", "-") == name.replace("_", "-")), None)
        if key is not None:
            return f"{word}: keys have no dashes. Write {key}={value or 'VALUE'}."
        one = f" {self.name} makes one {self.configures} at a time." if self.configures else ""
        return f"Unknown argument {word}.{one} --help shows all keys."

    def help(self) -> str:
        """Every key, with its meaning, range and default; and examples."""
        head = f"usage: {self.name} " + " ".join(
            [
                *(f"{k.name}={k.example}" for k in self.keys if k.required),
                "[KEY=VALUE …]",
                *(["[--config-dir=FOLDER]"] if self.configures else []),
            ]
        )
        lines = [head, "", self.purpose, "", "Keys:"]
        for key in self.keys:
            name = f"{key.name}KEY" if key.name.endswith(".") else key.name
            default = key.default or ("must be given" if key.required else "none")
            bounds = "" if key.kind is str else f"{key.range}; "
            lines += [
                f"  {name}={key.example}",
                f"      {key.meaning} ({bounds}default: {default})",
            ]
        if self.configures:
            lines.append(
                "  and every key of gdtrain, such as data=iris model=linear optimizer=gd "
                "optimizer.lr=0.1: see gdtrain --help"
            )
        lines += ["", "Examples:", *(f"  {self.name} {words}".rstrip() for words in self.examples)]
        lines += ["", f"In a checkout, {self.name} is also python scripts/{self.script}.py"]
        if self.notes:
            lines += ["", self.notes]
        return "\n".join(lines)


def _names(key: str, word: str) -> bool:
    return word == key or (key.endswith(".") and word.startswith(key) and word != key)


# ---------------------------------------------------------------------- overrides, as typed

# Whatever stands behind the equals sign is meant as it is.
TEXTS = (
    "ckpt_path",
    "data.path",
    "data.root",
    "data.target",
    "data.target_path",
    "data.test_path",
    "hydra.run.dir",
    "hydra.sweep.dir",
)
_KEY = re.compile(r"(\+\+?|~)?[A-Za-z_$][\w$-]*([./@:][\w$.-]+)*")
_SWEEPS = {
    "choice": "choice(a,b,c)",
    "range": "range(0,3) or range(0,10,2), of numbers",
    "glob": "glob(*), over the choices of a group",
    "interval": "interval(0,1), for sweepers that search",
}


def typed(words: Sequence[str], several: bool = False) -> list[str]:
    """Overrides as Hydra reads them: what it would not take as a plain value is quoted for it.

    Args:
        words: As they came from the shell.
        several: Whether a sweep is meant (`-m`).

    Returns:
        The overrides.

    Raises:
        ConfigurationError: A word is not of the form key=value, or its value is broken.

    Example:
        >>> typed(["data.target=price ($)", "ckpt_path=epoch=3.ckpt", "seed=1"])
        ["data.target='price ($)'", "ckpt_path='epoch=3.ckpt'", 'seed=1']
        >>> typed(["model.hidden=[64,32"])
        Traceback (most recent call last):
        ...
        gdtrain.errors.ConfigurationError: The bracket of model.hidden=[64,32 is not ...
    """
    return [_typed(i, words, several) for i, _ in enumerate(words)]


def _typed(i: int, words: Sequence[str], several: bool) -> str:
    word = words[i]
    name, equals, value = word.partition("=")
    if word.startswith("~") and _KEY.fullmatch(name):
        return word
    if not equals or not _KEY.fullmatch(name):
        raise ConfigurationError(_not_key_value(i, words))
    key = name.lstrip("+")
    if key in TEXTS and not value and key != "data.target":
        raise ConfigurationError(
            f"{key} must name a file or folder. Received: {word}, and no more."
        )
    parsed = _parsed(word)
    if parsed is None or (key in TEXTS and not several and parsed.is_sweep_override()):
        quoted = value[:1] in ("'", '"')
        call = re.match(r"([A-Za-z_]\w*) ?\(.*\)$", value)
        if key in TEXTS and not quoted:
            return f"{name}={_in_quotes(value)}"
        if several and not quoted and value[:1] not in ("[", "{") and set(",(") & set(value):
            raise ConfigurationError(
                f"{word} cannot be read as a sweep. Expected: values separated by commas, such as "
                f"{key}=1,2,3, or one of {', '.join(_SWEEPS.values())}."
            )
        if quoted or value[:1] in ("[", "{") or call or len(value) > 1000:
            raise ConfigurationError(_broken(word, key, value, call.group(1) if call else None))
        return f"{name}={_in_quotes(value)}"
    if parsed.is_sweep_override() and not several:
        lists = "" if key in _groups() else f" A list has brackets: {key}=[{value}]."
        raise ConfigurationError(
            f"{word} names several values, and this is one run. For a run with each of them: "
            f"gdtrain -m {word}.{lists}"
        )
    if key in _groups():
        _check_choice(key, word, parsed)
    return word


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except (HydraException, ValueError):  # ValueError: thousands of digits
        return None


def _in_quotes(value: str) -> str:
    return QuotedString(text=value, quote=Quote.single).with_quotes()


def _groups() -> list[str]:
    return sorted(path.name for path in conf_directory().iterdir() if path.is_dir())


def _check_choice(group: str, word: str, parsed: Override) -> None:
    if parsed.is_sweep_override():
        return
    value = parsed.value()
    if value is None and group != "experiment":
        raise ConfigurationError(
            f"A group takes a choice, not null: {_choices(group)}. Received: {word}"
        )
    if word.startswith("++"):
        raise ConfigurationError(f"{group} has a choice already. Write {word[2:]}")
    if value is not None and not isinstance(value, str | QuotedString):
        raise ConfigurationError(
            f"{group} takes the name of one choice: {_choices(group)}. Received: {word}"
        )


def _choices(group: str) -> str:
    return ", ".join(sorted(path.stem for path in (conf_directory() / group).glob("*.yaml")))


def _not_key_value(i: int, words: Sequence[str]) -> str:
    word = words[i]
    name, equals, value = word.partition("=")
    after = words[i + 1] if i + 1 < len(words) else ""
    before = words[i - 1] if i else ""
    stripped = name.strip()
    said = f"{word!r} is not of the form key=value"
    if equals and stripped != name and _KEY.fullmatch(stripped):
        return f"{said}: there are spaces in it. Write {stripped}={value.strip()}"
    if equals and not stripped:
        return f"{said}: there is no key before the equals sign. Expected: such as optimizer.lr=0.1"
    colon = re.fullmatch(r"([\w.]+):\s*(\S.*)", word)
    if colon:
        return f"{said}. Write {colon.group(1)}={colon.group(2).lstrip('= ')}"
    if after.startswith("=") and _KEY.fullmatch(name):
        behind = after[1:] or (words[i + 2] if i + 2 < len(words) else "…")
        return f"{said}: there is a space behind it. Write {name}={behind}"
    for group in _groups():
        if (conf_directory() / group / f"{word}.yaml").is_file():
            return f"{said}. Did you mean {group}={word}?"
    if not equals and word.split(".")[0] in (*_groups(), "seed", "ckpt_path", "hydra"):
        return f"{said}: there is no value. Write {word}=VALUE; --help shows the values."
    if before.endswith("="):
        return f"{said}: there is a space before it. Write {before}{word}"
    if before and not equals and word:
        return (
            f"{said}. If it belongs to the word before it, put both in quotes, for the shell: "
            f"'{before} {word}'"
        )
    return f"{said}. Expected: such as optimizer=sgd or optimizer.lr=0.1; --help shows all keys."


def _broken(word: str, key: str, value: str, function: str | None) -> str:
    if function is not None:
        if function in _SWEEPS:
            return f"{word} is no sweep. Expected: {key}={_SWEEPS[function]}, with -m."
        names = [*_SWEEPS, *create_functions().functions]
        return (
            f"{word}: there is no function {function}.{closest(function, names)} Expected: a "
            f"value, or a sweep, such as {key}=range(0,3) with -m. A text is put in quotes: "
            f'{key}="…"'
        )
    if value[:1] in ("'", '"'):
        text = value.strip(value[0])
        return (
            f"The quote of {word} is not closed, or there is something behind it. Write {key}="
            f'"{text}", and the whole in quotes of the other kind for the shell: '
            f"'{key}=\"{text}\"'"
        )
    if len(value) > 1000:
        return f"The value of {key} is too long: {len(value)} characters."
    open_, close = ("[", "]") if value[0] == "[" else ("{", "}")
    inside = value.strip("[]{}").strip().rstrip(",").replace(" ", "")
    example = f"{key}={open_}{inside or '…'}{close}"
    state = "is not closed" if value.count(open_) > value.count(close) else "cannot be read"
    return (
        f"The bracket of {word} {state}. Write {example} without spaces, or in quotes for the "
        f"shell: '{example}'. Texts with other signs than letters and digits have quotes of their "
        f"own inside."
    )


# ---------------------------------------------------------------------- flags of `gdtrain`


class _Parser(argparse.ArgumentParser):
    """Hydra's, whose messages are ours."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word = unknown.group(1)
            name, _, value = word.lstrip("-").partition("=")
            hint = closest(name, known_keys([]))
            meant = re.search(r"Did you mean (\S+)\?", hint)
            instead = meant.group(1) if meant else "key"
            message = (
                f"Unknown argument {word}. Keys have no dashes: write {instead}="
                f"{value or 'VALUE'}. --help shows all keys"
            )
        raise ConfigurationError(f"{message}.")


def flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags, wherever they stand among the overrides.

    Args:
        words: Without the program's name.

    Returns:
        The flags, with `overrides` quoted where they must be; and the words as Hydra is to read
        them.

    Raises:
        ConfigurationError: A word cannot be read, or two flags contradict each other.

    Example:
        >>> flags(["optimizer=gd", "-m", "seed=0,1"])[1]
        ['-m', 'optimizer=gd', 'seed=0,1']
    """
    parser = get_args_parser()
    parser.__class__ = _Parser
    arguments = parser.parse_intermixed_args(list(words))
    if arguments.config_name or arguments.config_path:
        raise ConfigurationError(
            "--config-name and --config-path would replace gdtrain's own configuration. Put "
            "files of yours into a folder beside it: --config-dir=FOLDER."
        )
    if arguments.experimental_rerun is not None:
        raise ConfigurationError(
            "--experimental-rerun would run whatever code the file holds. To repeat a run, give "
            "its keys again: its config.yaml has them."
        )
    shows = [arguments.run, arguments.multirun, arguments.cfg, arguments.info]
    if sum(bool(flag) for flag in [*shows, arguments.shell_completion]) > 1:
        raise ConfigurationError(
            "Only one of --run, --multirun, --cfg, --info and --shell-completion goes at a time."
        )
    if arguments.resolve and not arguments.cfg:
        raise ConfigurationError("--resolve goes with --cfg job only. Write: --cfg job --resolve")
    if arguments.shell_completion and not (
        len(arguments.overrides) == 1
        and re.fullmatch(r"(install|uninstall|query)=(bash|fish|zsh)", arguments.overrides[0])
    ):
        raise ConfigurationError(
            'The completion of a shell is installed with eval "$(gdtrain -sc install=bash)"; '
            "uninstall=bash takes it away. There is one for bash, fish and zsh. Received: -sc "
            + " ".join(arguments.overrides)
        )
    _check_folder(arguments.config_dir)
    own = list(words)
    for word in arguments.overrides:
        own.remove(word)
    if not arguments.shell_completion:
        arguments.overrides = typed(arguments.overrides, arguments.multirun)
    return arguments, [*own, *arguments.overrides]


def jobs(arguments: argparse.Namespace) -> list[list[str]]:
    """The overrides of each run.

    Args:
        arguments: From `flags`.

    Returns:
        One list for each; none where a sweeper of another kind decides what to run.

    Raises:
        ConfigurationError: The sweep is empty, or of a kind that only other sweepers know.

    Example:
        >>> jobs(flags(["-m", "seed=0,1"])[0])
        [['seed=0'], ['seed=1']]
    """
    if not arguments.multirun:
        return [arguments.overrides]
    parsed = OverridesParser.create().parse_overrides(arguments.overrides)
    if any(o.get_key_element() == "hydra/sweeper" for o in parsed):
        return []
    for one in parsed:
        if one.is_sweep_override() and not one.is_discrete_sweep():
            raise ConfigurationError(
                f"{one.input_line} is a range to search in, and this sweep takes one value after "
                f"another: {one.get_key_element()}=1,2,3. A sweeper that searches is chosen by "
                f"hydra/sweeper=…"
            )
        if one.is_sweep_override() and not list(one.sweep_iterator()):
            raise ConfigurationError(
                f"{one.input_line} names no value, so there would be no run. Expected: at least "
                f"one, such as {one.get_key_element()}=range(0,3), which is 0,1,2."
            )
    batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(overrides) for batch in batches for overrides in batch]


# ---------------------------------------------------------------------- the configuration


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
    _check_folder(config_dir)
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


def _check_folder(config_dir: str | None) -> None:
    if config_dir is not None and (not config_dir or not Path(config_dir).is_dir()):
        raise ConfigurationError(
            f"--config-dir must name a folder. Received: --config-dir={config_dir}, and there is "
            f"none."
        )


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
    own = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
    return own, dict(whole.hydra.runtime.choices)


_ELSEWHERE = {
    "batch_size": "data.batch_size",
    "epochs": "trainer.max_epochs",
    "gpus": "trainer.devices",
    "layers": "model.hidden",
    "learning_rate": "optimizer.lr",
    "steps": "trainer.max_steps",
}


def _unknown(key: str, words: list[str]) -> str:
    """What to say of a key that the configuration does not have."""
    name, at, _ = key.partition("@")
    word = next((w for w in words if w.partition("=")[0] == key), f"{key}=…")
    if at:
        return f"Unknown key {key}. A choice stands under its own name: {name}=…"
    group, _, rest = name.partition(".")
    if rest and group in _groups():
        having = [
            path.stem
            for path in sorted((conf_directory() / group).glob("*.yaml"))
            if rest in _keys_of(path, group)
        ]
        if having:
            return f"Unknown key {name}. It is one of {group}={'|'.join(having)}: set that too."
    known = known_keys(words)
    elsewhere = _ELSEWHERE.get(name)
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
    return [name for name, _ in _walk(content) if not name.endswith("_")]


def _walk(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{name}.")


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
    return [*(name for name, _ in _walk(plain)), "experiment"]
