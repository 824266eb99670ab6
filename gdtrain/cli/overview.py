"""`gdtrain --help`: groups and keys, read from the YAML files that the configuration is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gdtrain.runs.configuration import conf_directory

__all__ = ["documented", "overview"]

_LINE = re.compile(r"( *)(\w+):(?: +([^#\s][^#]*?))?(?: +# *(.*))?")
_BASE = re.compile(r"^  - (?!_self_)(\w+)$", re.MULTILINE)
_TEXT = """\
usage: gdtrain [GROUP=CHOICE …] [KEY=VALUE …] [-m] [--cfg job] [--config-dir=FOLDER]

Trains a model by gradient descent: optimizer=gd averages all examples in each update,
optimizer=sgd one, optimizer=minibatch data.batch_size of them.

Groups (GROUP=CHOICE; the first choice shown is the default):
{groups}

Keys (KEY=VALUE; those of other choices: gdtrain GROUP=CHOICE --help):

{keys}

How words are written:
  A list has brackets and no spaces: model.hidden=[256,128].
  What has spaces, brackets or $ is quoted for the shell: 'data.target=price ($)'.
  A key that is new has a plus: +callbacks.ema._target_=mypackage.EMA
  With -m, several values make a run each: seed=0,1,2 or range(0,3), choice(a,b).

Flags:
  -m, --multirun            a run for each value that is separated by commas
  --cfg job                 show the whole configuration, and train nothing
  --config-dir=FOLDER       a folder of your own with groups and choices
  -sc install=bash          the shell's completion: eval "$(gdtrain -sc install=bash)"
  --hydra-help              more of Hydra

Examples:
{examples}
  gdtrain data=csv data.path=table.csv data.target=price optimizer=minibatch
  gdtrain ckpt_path=outputs/digits-mlp-sgd/…/checkpoints/last.ckpt

Exit codes: 0, all went well; 2, the command was wrong, and nothing was trained;
3, the run diverged; 130, interrupted. A sweep ends with the highest."""
_NOT_SHOWN = ("_target_", "_partial_", "defaults", "hydra", "variant")


def documented(path: Path, prefix: str = "") -> list[tuple[str, str, str]]:
    """Key, default and meaning, from the comment, of each key that a YAML file sets.

    A choice that adds to another has the other's too.
    """
    text = path.read_text(encoding="utf-8")
    if "# @package _global_" in text:
        prefix = ""
    found = []
    for base in _BASE.findall(text):
        other = _choices(path.parent.name, path.parent.parent).get(base)
        found += documented(other, prefix) if other else []
    above: list[str] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line)
        if not match:
            continue
        spaces, name, value, meaning = match.groups()
        above = [*above[: len(spaces) // 2], name]
        if value is not None and not set(above) & set(_NOT_SHOWN):
            found.append((prefix + ".".join(above), value, meaning or ""))
    return found


def _choices(group: str, further: Path | None) -> dict[str, Path]:
    """The files of a group's choices, by name; of two, Hydra takes gdtrain's own."""
    folders = [further, conf_directory()] if further else [conf_directory()]
    return {path.stem: path for folder in folders for path in (folder / group).glob("*.yaml")}


def _purpose(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    return next((line for line in comments if line and not line.startswith("@package")), "")


def overview(words: Sequence[str], further: Path | None = None) -> str:
    """The help of `gdtrain`: the choices of all groups, and the keys of those among the words.

    `further` is a folder of more groups and choices.
    """
    folder = conf_directory()
    text = (folder / "train.yaml").read_text(encoding="utf-8")
    groups = dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))
    given = dict(w.split("=", 1) for w in words if "=" in w)
    lines = []
    own = [path.name for path in further.iterdir() if path.is_dir()] if further else []
    for group in [*groups, *sorted(set(own) - groups.keys())]:
        lines += ["", f"  {group}=" if group in groups else f"  +{group}="]
        choices = _choices(group, further)
        names = sorted(choices, key=lambda name: (name != groups.get(group), name))
        lines += [f"    {name:<26} {_purpose(choices[name])}".rstrip() for name in names]
    keys = {key: (value, meaning) for key, value, meaning in documented(folder / "train.yaml")}
    for group, default in groups.items():
        path = _choices(group, further).get(given.get(group) or default)
        if path is not None:
            found = documented(path, f"{group}.")
            said: dict[str, str] = {}  # of keys of the same name, the first has the comment
            for key, value, meaning in found:
                name = key.rsplit(".", 1)[-1]
                meaning = meaning or said.get(name) or keys.get(key, ("", ""))[1]
                said.setdefault(name, meaning)
                keys[key] = (value, meaning)
    examples = [
        "  " + line.lstrip("# ").replace("python scripts/train.py", "gdtrain")
        for line in text.splitlines()
        if line.startswith("#   python scripts/train.py")
    ]
    return _TEXT.format(
        groups="\n".join(lines),
        keys="\n".join(f"  {f'{k}={v}':<44} {said}".rstrip() for k, (v, said) in keys.items()),
        examples="\n".join(examples),
    )
