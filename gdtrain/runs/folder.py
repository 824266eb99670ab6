"""A run's folder, and other places for results: found free, filled whole or not at all.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import yaml

from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import is_first_process

__all__ = [
    "complete",
    "complete_file",
    "complete_folder",
    "discard_empty",
    "free_folder",
    "holds",
    "new_folder",
    "reserve",
    "reserved",
]


def reserve(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml, which makes a folder this run's: no two runs ever share one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "config.yaml", "x", encoding="utf-8") as file:
            yaml.safe_dump(dict(config), file, sort_keys=False, allow_unicode=True)
    except FileExistsError:
        if not folder.is_dir():
            raise ConfigurationError(f"{folder} is a file, and a run needs a folder.") from None
        hint = "; what goes on from a checkpoint is left in a folder of its own."
        if config.get("ckpt_path") is None:
            hint = f"; to go on with that run, set ckpt_path={folder}/checkpoints/last.ckpt."
        raise ConfigurationError(
            f"{folder} already holds a run. Choose another folder (hydra.run.dir=…){hint}"
        ) from None
    except OSError as error:
        raise ConfigurationError(
            f"The run's folder {folder} cannot be made: {error.strerror or error}. Choose another."
        ) from None


@contextmanager
def reserved(
    folder: Path, config: Mapping[str, Any] | None, keep: Callable[[BaseException], bool]
) -> Iterator[None]:
    """Reserve a folder for the run of the block; take away what it has left where it fails.

    Without a `config` the folder is the run's already; `keep` says of an error whether all stays.
    """
    before = set(os.listdir(folder)) if folder.is_dir() else None
    if config is not None:
        reserve(folder, config)
    try:
        yield
    except BaseException as error:
        if is_first_process() and folder.is_dir() and not keep(error):
            for name in set(os.listdir(folder)) - (before or set()):
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if before is None:
                folder.rmdir()
        raise


def discard_empty(folder: Path) -> None:
    """Remove a folder if it is empty, and what is then empty above it in the working folder."""
    here = Path.cwd()
    for path in (folder.absolute(), *folder.absolute().parents):
        if path == here or path in here.parents or (path.is_dir() and any(path.iterdir())):
            return
        if path.is_dir():
            path.rmdir()


def holds(folder: str | Path, checkpoint: str | Path) -> bool:
    """Whether a checkpoint is of the run in a folder."""
    return Path(checkpoint).resolve().parent.parent == Path(folder).resolve()


def new_folder(path: str | Path) -> Path:
    """A folder to leave results in, which is not there yet, or is empty."""
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists already; choose another output=…")
    return folder


def free_folder(folder: Path) -> Path:
    """The folder, or the first free one with a number behind its name: -2, -3, …"""
    number, free = 2, folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


@contextmanager
def complete(path: Path, refusal: str = "", hint: str = "") -> Iterator[Path]:
    """A place to write to, which is moved to where it belongs once all is written.

    That something can be written there is seen beforehand; `refusal` is said if it cannot.
    """
    was_there = path.parent.exists()
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=".gdtrain-")
        except OSError as error:
            if not refusal:
                raise
            raise ConfigurationError(f"{refusal}: {error.strerror}.{hint}") from None
        with scratch as folder:
            yield Path(folder) / path.name
            os.replace(Path(folder) / path.name, path)
    finally:
        if not was_there:
            discard_empty(path.parent)


def complete_folder(folder: Path) -> AbstractContextManager[Path]:
    """A place to make a folder in: it is there whole, or not at all."""
    return complete(folder, f"{folder} cannot be made", " Choose another output=…")


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """A place to write a new file to: it is there whole, or not at all."""
    taken = f"{path} exists already; choose another output=…"
    if path.is_dir():
        raise ValueError(f"output must name a new file. Received: {path}, a folder.")
    if path.exists():
        raise FileExistsError(taken)
    with complete(path, f"output={path} cannot be written") as new:
        yield new
        if path.exists():
            raise FileExistsError(taken)
