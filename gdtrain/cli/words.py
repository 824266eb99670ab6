"""The words of a command line: options of the command, overrides of the configuration, flags.

An option is a field of a dataclass that says what it means and what it may be; an override is what
Hydra reads; the flags are Hydra's.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ValidationError

from gdtrain._compat.hydra import (
    Override,
    flag_parser,
    function_names,
    in_quotes,
    is_text,
    parse_override,
    sweep,
)
from gdtrain.cli.composition import ELSEWHERE, groups, known_keys
from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import check_processes
from gdtrain.ranges import Interval, Whole
from gdtrain.runs.configuration import closest, conf_directory, out_of_range

__all__ = [
    "Command",
    "Words",
    "config_folder",
    "given",
    "jobs",
    "option",
    "read_flags",
    "read_overrides",
]

# Whatever stands behind the equals sign is meant as it is.
_TEXTS = (
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


# ---------------------------------------------------------------------- a command's own options


def option(
    meaning: str,
    example: str = "…",
    default: str = "none",
    within: Interval | Whole | None = None,
    *,
    required: bool = False,
) -> Any:
    """One option, as a field of a dataclass: what reads it and `--help` know it from here alone.

    Its value is None where it is not given. `within` are the numbers that it may be; None: it is a
    text.
    """
    told = {"meaning": meaning, "example": example, "within": within}
    if required:
        return field(default=MISSING, metadata={**told, "default": None})
    return field(default=None, metadata={**told, "default": default})


def given(options: Any) -> dict[str, Any]:
    """The options that were given, by name."""
    return {name: value for name, value in vars(options).items() if value is not None}


@dataclass
class Words:
    """A command line, read: the command's own options, overrides, the folder of `--config-dir`."""

    options: Any
    overrides: list[str]
    config_dir: str | None


@dataclass(frozen=True)
class Command:
    """A command: what it does, and its options, the fields of a dataclass.

    An option that is named `data` takes data.KEY=VALUE. `configures` is what the command makes one
    of, where it takes the keys of `gdtrain` too; "": it takes none of them. `examples` are words
    behind its name; `notes` end the help.
    """

    name: str
    purpose: str
    options: type
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
        return {"data." if f.name == "data" else f.name: f for f in fields(self.options)}

    def read(self, words: Sequence[str]) -> Words:
        """Sort the words, without the program's name; show the help where it is asked for."""
        check_processes({})
        if any(word in ("-h", "--help") for word in words):
            print(self.help())
            sys.exit(0)
        options = OmegaConf.structured(self.options)
        keys, seen = self.keys, set()
        flags: list[str] = []
        rest: list[str] = []
        remaining = iter(words)
        for word in remaining:
            name, equals, value = word.partition("=")
            if self.configures and name in ("--config-dir", "-cd"):
                flags += [word] if equals else [word, *islice(remaining, 1)]
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
        self._check_misspelt(rest)
        read, _ = read_flags([*flags, *rest])
        for missing in sorted(OmegaConf.missing_keys(options), key=list(keys).index):
            told = keys[missing].metadata
            raise ConfigurationError(
                f"{missing}=… is missing: {told['meaning']}. Such as {missing}={told['example']}; "
                f"--help shows all keys."
            )
        return Words(OmegaConf.to_object(options), read.overrides, read.config_dir)

    def _check_misspelt(self, words: Sequence[str]) -> None:
        """Among the keys of the configuration, one may be meant for the command."""
        if not words:
            return
        if not self.configures:
            raise ConfigurationError(self._unknown(words[0]))
        names, known = list(self.keys), [*known_keys([]), *ELSEWHERE]
        for word in words:
            name = word.partition("=")[0]
            if set("./@+~") & set(name) or name in known or not _KEY.fullmatch(name):
                continue
            if hint := closest(name, names):
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
        if name in _TEXTS:
            OmegaConf.update(options, key, text)
        else:
            options.merge_with_dotlist([f"{key}={text}"])
    except Exception:
        raise ConfigurationError(
            f"{name} cannot be read. Received: {name}={text}. A text with colons or brackets has "
            f"quotes of its own inside: '{name}=\"…\"'"
        ) from None


# ---------------------------------------------------------------------- overrides


def read_overrides(words: Sequence[str], several: bool = False) -> list[str]:
    """Overrides as Hydra reads them: what it would not take as a plain value is quoted for it.

    `several` says that a sweep is meant (`-m`).
    """
    return [_override(i, words, several) for i, _ in enumerate(words)]


def _override(i: int, words: Sequence[str], several: bool) -> str:
    word = words[i]
    name, equals, value = word.partition("=")
    if word.startswith("~") and _KEY.fullmatch(name):
        return word
    if not equals or not _KEY.fullmatch(name):
        raise ConfigurationError(_not_key_value(i, words))
    key = name.lstrip("+")
    if key in _TEXTS and not value and key != "data.target":
        raise ConfigurationError(
            f"{key} must name a file or folder. Received: {word}, and no more."
        )
    parsed = parse_override(word)
    if parsed is None or (key in _TEXTS and not several and parsed.is_sweep_override()):
        quoted = value[:1] in ("'", '"')
        call = re.match(r"([A-Za-z_]\w*) ?\(.*\)$", value)
        if key in _TEXTS and not quoted:
            return f"{name}={in_quotes(value)}"
        if several and not quoted and value[:1] not in ("[", "{") and set(",(") & set(value):
            raise ConfigurationError(
                f"{word} cannot be read as a sweep. Expected: values separated by commas, such as "
                f"{key}=1,2,3, or one of {', '.join(_SWEEPS.values())}."
            )
        if quoted or value[:1] in ("[", "{") or call or len(value) > 1000:
            raise ConfigurationError(_broken(word, key, value, call.group(1) if call else None))
        return f"{name}={in_quotes(value)}"
    if parsed.is_sweep_override() and not several:
        lists = "" if key in groups() else f" A list has brackets: {key}=[{value}]."
        raise ConfigurationError(
            f"{word} names several values, and this is one run. For a run with each of them: "
            f"gdtrain -m {word}.{lists}"
        )
    if key in groups():
        _check_choice(key, word, parsed)
    return word


def _check_choice(group: str, word: str, parsed: Override) -> None:
    if parsed.is_sweep_override():
        return
    value = parsed.value()
    choices = ", ".join(sorted(path.stem for path in (conf_directory() / group).glob("*.yaml")))
    if value is None and group != "experiment":
        raise ConfigurationError(f"A group takes a choice, not null: {choices}. Received: {word}")
    if word.startswith("++"):
        raise ConfigurationError(f"{group} has a choice already. Write {word[2:]}")
    if value is not None and not is_text(value):
        raise ConfigurationError(
            f"{group} takes the name of one choice: {choices}. Received: {word}"
        )


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
    for group in groups():
        if (conf_directory() / group / f"{word}.yaml").is_file():
            return f"{said}. Did you mean {group}={word}?"
    if not equals and word.split(".")[0] in (*groups(), "seed", "ckpt_path", "hydra"):
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
        names = [*_SWEEPS, *function_names()]
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


# ---------------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    """Hydra's, whose messages are ours."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        if unknown:
            word = unknown.group(1)
            name, _, value = word.lstrip("-").partition("=")
            meant = closest(name, known_keys([])).removeprefix(" Did you mean ").rstrip("?")
            message = (
                f"Unknown argument {word}. Keys have no dashes: write {meant or 'key'}="
                f"{value or 'VALUE'}. --help shows all keys"
            )
        raise ConfigurationError(f"{message}.")


def _parser() -> argparse.ArgumentParser:
    parser = flag_parser()
    parser.__class__ = _Parser
    return parser


def config_folder(words: Sequence[str]) -> Path | None:
    """The folder that `--config-dir` names among any words."""
    name = _parser().parse_known_args(list(words))[0].config_dir
    _check_folder(name)
    return None if name is None else Path(name)


def _check_folder(name: str | None) -> None:
    if name is not None and not (name and Path(name).is_dir()):
        raise ConfigurationError(
            f"--config-dir must name a folder. Received: --config-dir={name}, and there is none."
        )


def read_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Hydra's flags, wherever they stand among the overrides; and the words as Hydra is to read.

    `overrides` among the flags are quoted where they must be.
    """
    arguments = _parser().parse_intermixed_args(list(words))
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
        arguments.overrides = read_overrides(arguments.overrides, arguments.multirun)
    return arguments, [*own, *arguments.overrides]


def jobs(arguments: argparse.Namespace) -> list[list[str]]:
    """The overrides of each run; none where a sweeper of another kind decides what to run."""
    if not arguments.multirun:
        return [arguments.overrides]
    parsed = [p for p in map(parse_override, arguments.overrides) if p is not None]
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
    return sweep(parsed)
