"""The words of `gdtrain`: overrides as they were typed, Hydra's flags, and the runs of a sweep."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from gdtrain._compat.hydra_overrides import (
    Override,
    flag_parser,
    function_names,
    in_quotes,
    is_text,
    parse_override,
    sweep,
)
from gdtrain.cli.composition import check_folder, groups, known_keys
from gdtrain.errors import ConfigurationError
from gdtrain.runs.configuration import closest, conf_directory

__all__ = ["KEY", "TEXTS", "flags", "jobs", "typed"]

# Whatever stands behind the equals sign is meant as it is.
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
KEY = re.compile(r"(\+\+?|~)?[A-Za-z_$][\w$-]*([./@:][\w$.-]+)*")
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
    if word.startswith("~") and KEY.fullmatch(name):
        return word
    if not equals or not KEY.fullmatch(name):
        raise ConfigurationError(_not_key_value(i, words))
    key = name.lstrip("+")
    if key in TEXTS and not value and key != "data.target":
        raise ConfigurationError(
            f"{key} must name a file or folder. Received: {word}, and no more."
        )
    parsed = parse_override(word)
    if parsed is None or (key in TEXTS and not several and parsed.is_sweep_override()):
        quoted = value[:1] in ("'", '"')
        call = re.match(r"([A-Za-z_]\w*) ?\(.*\)$", value)
        if key in TEXTS and not quoted:
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
    if value is None and group != "experiment":
        raise ConfigurationError(
            f"A group takes a choice, not null: {_choices(group)}. Received: {word}"
        )
    if word.startswith("++"):
        raise ConfigurationError(f"{group} has a choice already. Write {word[2:]}")
    if value is not None and not is_text(value):
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
    if equals and stripped != name and KEY.fullmatch(stripped):
        return f"{said}: there are spaces in it. Write {stripped}={value.strip()}"
    if equals and not stripped:
        return f"{said}: there is no key before the equals sign. Expected: such as optimizer.lr=0.1"
    colon = re.fullmatch(r"([\w.]+):\s*(\S.*)", word)
    if colon:
        return f"{said}. Write {colon.group(1)}={colon.group(2).lstrip('= ')}"
    if after.startswith("=") and KEY.fullmatch(name):
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
    parser = flag_parser()
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
    check_folder(arguments.config_dir)
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
