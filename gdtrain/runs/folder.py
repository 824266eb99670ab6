"""A run's folder, and other places for results: found free, filled whole or not at all.

Imports no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from gdtrain.errors import ConfigurationError
from gdtrain.lightning.launch import is_first_process

__all__ = [
    "complete_file",
    "complete_folder",
    "discard_empty",
    "free_folder",
    "holds",
    "new_folder",
    "reserve",
    "reserved",
    "write_file",
]


# ---------------------------------------------------------------------- a run's


def reserve(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml, which makes a folder this run's: no two runs ever share one.

    Args:
        folder: Of the run; made if it is not there.
        config: Plain containers.

    Raises:
        ConfigurationError: The folder holds a run already, or cannot be made.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     reserve(Path(folder) / "run", {"lr": 0.1})
        ...     reserve(Path(folder) / "run", {"lr": 0.2})
        Traceback (most recent call last):
        ...
        gdtrain.errors.ConfigurationError: .../run already holds a run. ...
    """
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

    Args:
        folder: Of the run.
        config: Plain containers; None: the folder is the run's already.
        keep: From what was raised to whether the folder is left as it is.

    Raises:
        ConfigurationError: As `reserve`.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     try:
        ...         with reserved(Path(root) / "run", {"lr": 0.1}, keep=lambda error: False):
        ...             raise ValueError
        ...     except ValueError:
        ...         os.listdir(root)
        []
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
    """Remove a folder if it is empty, and what is then empty above it, within the working folder.

    Args:
        folder: Of a run that did not start.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     (Path(root) / "keep").touch()
        ...     folder = Path(root) / "a" / "b"
        ...     folder.mkdir(parents=True)
        ...     discard_empty(folder)
        ...     os.listdir(root)
        ['keep']
    """
    here = Path.cwd()
    for path in (folder.absolute(), *folder.absolute().parents):
        if path == here or path in here.parents or (path.is_dir() and any(path.iterdir())):
            return
        if path.is_dir():
            path.rmdir()


def holds(folder: str | Path, checkpoint: str | Path) -> bool:
    """Whether a checkpoint is of the run in a folder.

    Args:
        folder: Of a run.
        checkpoint: Its path.

    Example:
        >>> holds("run", "run/checkpoints/last.ckpt")
        True
    """
    return Path(checkpoint).resolve().parent.parent == Path(folder).resolve()


# ---------------------------------------------------------------------- of other results


def new_folder(path: str | Path) -> Path:
    """A folder to leave results in.

    Args:
        path: It must not be there, or be empty.

    Returns:
        The path.

    Raises:
        ConfigurationError: It is a file, or there is something in it.

    Example:
        >>> new_folder("not there yet").name
        'not there yet'
    """
    folder = Path(path)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists already; choose another output=…")
    return folder


def free_folder(folder: Path) -> Path:
    """The folder, or the first free one with a number.

    Args:
        folder: That may be taken.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     free_folder(Path(root)).name.removeprefix(Path(root).name)
        '-2'
    """
    number = 2
    free = folder
    while free.exists():
        free = folder.with_name(f"{folder.name}-{number}")
        number += 1
    return free


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A place to make a folder in, which is moved to where it belongs once all is written.

    Args:
        folder: Where it belongs.

    Raises:
        ConfigurationError: It cannot be made there.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with complete_folder(Path(root) / "results") as new:
        ...         new.mkdir()
        ...     os.listdir(root)
        ['results']
    """
    was_there = folder.parent.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            yield Path(scratch) / "new"
            os.replace(Path(scratch) / "new", folder)
    except OSError as error:
        if not error.filename or Path(error.filename).parent != folder.parent:
            raise
        raise ConfigurationError(
            f"{folder} cannot be made: {error.strerror}. Choose another output=…"
        ) from None
    finally:
        if not was_there:
            discard_empty(folder.parent)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    r"""A place to write a new file to, which is moved to where it belongs once all is written.

    That it can be written is seen beforehand.

    Args:
        path: Where it belongs.

    Raises:
        FileExistsError: It is there already.
        ValueError: It is a folder, or cannot be written.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     with complete_file(Path(root) / "new.csv") as output:
        ...         _ = output.write_text("prediction\n")
        ...     os.listdir(root)
        ['new.csv']
    """
    taken = f"{path} exists already; choose another output=…"
    if path.is_dir():
        raise ValueError(f"output must name a new file. Received: {path}, a folder.")
    if path.exists():
        raise FileExistsError(taken)
    was_there = path.parent.exists()
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.TemporaryDirectory(dir=path.parent, prefix=".predictions-")
        except OSError as error:
            raise ValueError(f"output={path} cannot be written: {error.strerror}.") from None
        with scratch as folder:
            yield Path(folder) / path.name
            if path.exists():
                raise FileExistsError(taken)
            os.replace(Path(folder) / path.name, path)
    finally:
        if not was_there:
            discard_empty(path.parent)


def write_file(
    path: Path, write: Callable[[Any], Any], check: Callable[[Path], Any] | None = None
) -> None:
    """Write all of a file or nothing; one that is there is replaced.

    Args:
        path: Of the file.
        write: Gets it open, in binary mode.
        check: Reads what was written before it takes its place; raises if it cannot be read.

    Example:
        >>> with tempfile.TemporaryDirectory() as root:
        ...     write_file(Path(root) / "a.txt", lambda file: file.write(b"all"))
        ...     (Path(root) / "a.txt").read_text()
        'all'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        if check is not None:
            check(Path(name))
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
