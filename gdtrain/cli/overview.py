"""`gdtrain --help`: groups and keys, read from the YAML files that the configuration is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from gdtrain.runs.configuration import conf_directory

__all__ = ["documented", "overview"]

_LINE = re.compile(r"( *)(\w+):(?: +([^#\s][^#]*?))?(?: +# *(.*))?")
_NOT_SHOWN = ("_target_", "_partial_", "defaults", "hydra", "variant")


def documented(path: Path, prefix: str = "") -> list[tuple[str, str, str]]:
    """The keys that a YAML file sets, with what its comments say of them.

    Args:
        path: Of the file.
        prefix: Of its keys, with a dot.

    Returns:
        Key, default and meaning of each; a choice that adds to another has the other's too.

    Example:
        >>> documented(conf_directory() / "model" / "mlp.yaml", "model.")[0]
        ('model.hidden', '[128]', 'widths of the hidden layers')
    """
    text = path.read_text(encoding="utf-8")
    if "# @package _global_" in text:
        prefix = ""
    found = []
    for base in re.findall(r"^  - (\w+)$", text, re.MULTILINE) if path.stem != "train" else ():
        found += documented(path.with_name(f"{base}.yaml"), prefix)
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


def _purpose(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ").strip() for line in lines if line.startswith("#")]
    return next(line for line in comments if line and not line.startswith("@package"))


def overview(words: Sequence[str]) -> str:
    """The help of `gdtrain`.

    Args:
        words: Of the command line: choices of groups, whose keys are shown.

    Returns:
        The text.

    Example:
        >>> "model.channels" in overview(["model=cnn"])
        True
    """
    folder = conf_directory()
    text = (folder / "train.yaml").read_text(encoding="utf-8")
    groups = dict(re.findall(r"^  - (\w+): (\w+)", text, re.MULTILINE))
    given = dict(w.split("=", 1) for w in words if "=" in w)
    lines = [
        "usage: gdtrain [GROUP=CHOICE …] [KEY=VALUE …] [-m] [--cfg job] [--config-dir=FOLDER]",
        "",
        "Trains a model by gradient descent: optimizer=gd averages all examples in each update,",
        "optimizer=sgd one, optimizer=minibatch data.batch_size of them.",
        "",
        "Groups (GROUP=CHOICE; the first choice shown is the default):",
    ]
    for group, default in groups.items():
        lines += ["", f"  {group}="]
        paths = sorted((folder / group).glob("*.yaml"), key=lambda p: (p.stem != default, p.stem))
        lines += [f"    {path.stem:<26} {_purpose(path)}" for path in paths]
    lines += [
        "",
        "Keys (KEY=VALUE; those of other choices: gdtrain GROUP=CHOICE --help):",
        "",
    ]
    keys = {key: (value, meaning) for key, value, meaning in documented(folder / "train.yaml")}
    for group, default in groups.items():
        path = folder / group / f"{given.get(group, default)}.yaml"
        if path.is_file():
            found = documented(path, f"{group}.")
            said: dict[str, str] = {}  # of keys of the same name, the first has the comment
            for key, value, meaning in found:
                name = key.rsplit(".", 1)[-1]
                meaning = meaning or said.get(name) or keys.get(key, ("", ""))[1]
                said.setdefault(name, meaning)
                keys[key] = (value, meaning)
    lines += [
        f"  {f'{key}={value}':<44} {meaning}".rstrip() for key, (value, meaning) in keys.items()
    ]
    lines += [
        "",
        "How words are written:",
        "  A list has brackets and no spaces: model.hidden=[256,128].",
        "  What has spaces, brackets or $ is quoted for the shell: 'data.target=price ($)'.",
        "  A key that is new has a plus: +callbacks.ema._target_=mypackage.EMA",
        "  With -m, several values make a run each: seed=0,1,2 or range(0,3), choice(a,b).",
        "",
        "Flags:",
        "  -m, --multirun            a run for each value that is separated by commas",
        "  --cfg job                 show the whole configuration, and train nothing",
        "  --config-dir=FOLDER       a folder of your own with groups and choices",
        '  -sc install=bash          the shell\'s completion: eval "$(gdtrain -sc install=bash)"',
        "  --hydra-help              more of Hydra",
        "",
        "Examples:",
    ]
    lines += [
        "  " + line.lstrip("# ").replace("python scripts/train.py", "gdtrain")
        for line in text.splitlines()
        if line.startswith("#   python scripts/train.py")
    ]
    lines += [
        "  gdtrain data=csv data.path=table.csv data.target=price optimizer=minibatch",
        "  gdtrain ckpt_path=outputs/digits-mlp-sgd/…/checkpoints/last.ckpt",
        "",
        "Exit codes: 0, all went well; 2, the command was wrong, and nothing was trained;",
        "3, the run diverged; 130, interrupted. A sweep ends with the highest.",
    ]
    return "\n".join(lines)
