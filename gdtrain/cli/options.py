"""The options of a tool: a dataclass whose fields say what they mean, and what they may be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any, Generic, TypeVar

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ValidationError

from gdtrain.cli.composition import ELSEWHERE, known_keys
from gdtrain.cli.overrides import KEY, TEXTS, typed
from gdtrain.errors import ConfigurationError
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.configuration import closest, out_of_range

__all__ = ["Command", "Words", "given", "option"]

Options = TypeVar("Options")


def option(
    meaning: str,
    example: str = "…",
    default: str = "none",
    within: Interval | Whole | None = None,
    *,
    required: bool = False,
) -> Any:
    """One option, as a field of a dataclass: what reads it and `--help` know it from here alone.

    Its value is None where it is not given.

    Args:
        meaning: With its unit.
        example: A value.
        default: As shown.
        within: The numbers that it may be; None: it is a text.
        required: Whether the command needs it.

    Example:
        >>> @dataclass
        ... class Runs:
        ...     seeds: int | None = option("runs of each", within=Whole(1, 1000))
        >>> Runs().seeds is None
        True
    """
    told = {"meaning": meaning, "example": example, "within": within}
    if required:
        return field(default=MISSING, metadata={**told, "default": None})
    return field(default=None, metadata={**told, "default": default})


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name.

    Args:
        options: A command's.

    Example:
        >>> @dataclass
        ... class Runs:
        ...     seeds: int | None = option("runs of each")
        ...     epochs: int | None = option("passes over the data")
        >>> given(Runs(seeds=3))
        {'seeds': 3}
    """
    return {name: value for name, value in vars(options).items() if value is not None}


@dataclass
class Words(Generic[Options]):
    """A command line, read.

    Args:
        options: The command's own.
        overrides: Of the configuration.
        config_dir: A folder of further configurations.

    Example:
        >>> Words(options=None).overrides
        []
    """

    options: Options
    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None


@dataclass(frozen=True)
class Command(Generic[Options]):
    """A command: what it does, and the options that it has.

    Args:
        name: Of the program.
        purpose: One sentence.
        options: A dataclass of `option`s. One that is named `data` takes data.KEY=VALUE.
        examples: Words behind its name.
        configures: What it makes one of, where it takes the keys of `gdtrain` too; "": it takes
            none of them.
        notes: Shown at the end of the help.

    Example:
        >>> @dataclass
        ... class Runs:
        ...     seeds: int | None = option("runs of each", within=Whole(1, 1000))
        >>> command = Command("gdtrain-repeat", "Repeats a run.", Runs, ("seeds=3",))
        >>> command.read(["seeds=3"]).options.seeds
        3
        >>> command.read(["seeds=0"])
        Traceback (most recent call last):
        ...
        gdtrain.errors.ConfigurationError: seeds must be a whole number from 1 to 1000. ...
    """

    name: str
    purpose: str
    options: type[Options]
    examples: tuple[str, ...]
    configures: str = ""
    notes: str = ""

    @property
    def script(self) -> str:
        """The same command in `scripts/` of a checkout."""
        return self.name.removeprefix("gdtrain-").replace("-", "_")

    @property
    def keys(self) -> dict[str, Field[Any]]:
        """Its options, by the name that is typed; "data." is followed by a key."""
        return {"data." if f.name == "data" else f.name: f for f in fields(self.options)}  # type: ignore[arg-type]

    def read(self, words: Sequence[str]) -> Words[Options]:
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
        options = OmegaConf.structured(self.options)
        keys, seen, config_dir = self.keys, set(), None
        rest: list[str] = []
        for word in words:
            name, equals, value = word.partition("=")
            if self.configures and name == "--config-dir" and equals:
                config_dir = value
            elif word.startswith("-"):
                raise ConfigurationError(self._no_flag(word))
            elif equals and "data." in keys and name.startswith("data.") and name != "data.":
                options.data = options.data or {}
                _set_below(options.data, name, value)
            elif not equals or name not in keys:
                rest.append(word)
            elif name in seen:
                raise ConfigurationError(f"{name} was given twice. Give it once.")
            else:
                seen.add(name)
                _set(options, keys[name], value)
        if rest and not self.configures:
            raise ConfigurationError(self._unknown(rest[0]))
        self._check_misspelt(rest)
        overrides = typed(rest)
        for missing in sorted(OmegaConf.missing_keys(options), key=list(keys).index):
            told = keys[missing].metadata
            raise ConfigurationError(
                f"{missing}=… is missing: {told['meaning']}. Such as {missing}={told['example']}; "
                f"--help shows all keys."
            )
        return Words(OmegaConf.to_object(options), overrides, config_dir)  # type: ignore[arg-type]

    def _check_misspelt(self, words: Sequence[str]) -> None:
        """Among the keys of the configuration, one may be meant for the command."""
        if not words:
            return
        names, known = list(self.keys), [*known_keys([]), *ELSEWHERE]
        for word in words:
            name = word.partition("=")[0]
            if set("./@+~") & set(name) or name in known or not KEY.fullmatch(name):
                continue
            if closest(name, names):
                hint = closest(name, names)
                raise ConfigurationError(f"Unknown argument {name}.{hint} --help shows all keys.")
            if not closest(name, known):
                raise ConfigurationError(self._unknown(word))

    def _unknown(self, word: str) -> str:
        name, equals, _ = word.partition("=")
        names = [key for key in self.keys if not key.endswith(".")]
        if not equals and name in names:
            return (
                f"{name} has no value. Write {name}=VALUE, without spaces. --help shows all keys."
            )
        shown = ", ".join(map(_shown, self.keys))
        others = ", and every key of gdtrain" if self.configures else ""
        return f"Unknown argument {word}.{closest(name, names)} {self.name} knows: {shown}{others}."

    def _no_flag(self, word: str) -> str:
        name, _, value = word.lstrip("-").partition("=")
        key = next((k for k in self.keys if k.replace("_", "-") == name.replace("_", "-")), None)
        if key is not None:
            return f"{word}: keys have no dashes. Write {key}={value or 'VALUE'}."
        one = f" {self.name} makes one {self.configures} at a time." if self.configures else ""
        return f"Unknown argument {word}.{one} --help shows all keys."

    def help(self) -> str:
        """Every key, with its meaning, range and default; and examples."""
        told = {_shown(key): option.metadata for key, option in self.keys.items()}
        needed = [f"{key}={t['example']}" for key, t in told.items() if t["default"] is None]
        folder = ["[--config-dir=FOLDER]"] if self.configures else []
        lines = [" ".join([f"usage: {self.name}", *needed, "[KEY=VALUE …]", *folder])]
        lines += ["", self.purpose, "", "Keys:"]
        for key, t in told.items():
            default = t["default"] or "must be given"
            bounds = f"{t['within']}; " if t["within"] is not None else ""
            lines += [
                f"  {key}={t['example']}",
                f"      {t['meaning']} ({bounds}default: {default})",
            ]
        if self.configures:
            lines.append(
                "  and every key of gdtrain, such as data=iris model=linear optimizer=gd "
                "optimizer.lr=0.1: see gdtrain --help"
            )
        lines += ["", "Examples:", *(f"  {self.name} {words}".rstrip() for words in self.examples)]
        lines += ["", f"In a checkout, {self.name} is also python scripts/{self.script}.py"]
        return "\n".join([*lines, *(["", self.notes] if self.notes else [])])


def _shown(key: str) -> str:
    return f"{key}KEY" if key.endswith(".") else key


def _set(options: Any, key: Field[Any], text: str) -> None:
    """Give an option its value from what was typed."""
    within = key.metadata["within"]
    if within is None and not text:
        raise ConfigurationError(
            f"{key.name} must be {key.metadata['meaning']}. Received: {key.name}=, with nothing "
            f"behind it."
        )
    try:
        options[key.name] = text.replace("${", r"\${")  # nothing is looked up
        if within is not None:
            within.check(key.name, options[key.name])
    except (ValidationError, ValueError):
        raise out_of_range(key.name, within, text) from None


def _set_below(options: Any, name: str, text: str) -> None:
    """A change to the data's configuration: paths and names as they stand, the rest as YAML."""
    key = name.partition(".")[2]
    try:
        if name in TEXTS:
            OmegaConf.update(options, key, text)
        else:
            options.merge_with_dotlist([f"{key}={text}"])
    except Exception:
        raise ConfigurationError(
            f"{name} cannot be read. Received: {name}={text}. A text with colons or brackets has "
            f"quotes of its own inside: '{name}=\"…\"'"
        ) from None
