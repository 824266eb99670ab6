"""LIBSVM (svmlight) files: features by number, most of them zero.

N examples, D features.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gdtrain.data.prepared import Raw
from gdtrain.data.reading import check_unpacked, existing, most_features, printable
from gdtrain.data.targets import Task, check_task

__all__ = ["read_libsvm"]

_log = logging.getLogger("gdtrain")

# Below this share of entries that are not zero, CSR takes less than half of the dense memory, and
# its indexed sums beat the dense ones.
_SPARSE_BELOW = 0.25
_LINE = 2**20  # bytes of a line that are looked at, where one is wrong
_DENSE_BYTES = 8e9  # the most that a file may take as a dense array


def read_libsvm(
    path: str | Path,
    *,
    test_path: str | Path | None = None,
    sparse: bool | Literal["auto"] = "auto",
    standardize: bool = True,
    dtype: torch.dtype = torch.float32,
    task: Task = "auto",
) -> Raw:
    r"""The examples of a LIBSVM (svmlight) file, with scikit-learn.

    Args:
        path: As for `LIBSVMDataModule`, and so the following.
        test_path: A test file of its own.
        sparse: Whether the features stay sparse.
        standardize: Whether they are to be standardised; they are then read in float64.
        dtype: Of the tensors that are made of them.
        task: "classification", "regression" or "auto".

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "table.svm"
        ...     _ = path.write_text("+1 1:0.5 3:2\n-1 2:1\n")
        ...     read_libsvm(path).inputs
        array([[0.5, 0. , 2. ],
               [0. , 1. , 0. ]])
    """
    paths = [existing(p) for p in (path, test_path) if p is not None]
    single = dtype == torch.float32 and not standardize
    tables, targets, first = load_libsvm(paths, np.float32 if single else np.float64)
    size = _dense_bytes(tables[0])
    if sparse == "auto":
        density = tables[0].nnz / (tables[0].shape[0] * tables[0].shape[1])
        sparse = not standardize and (density < _SPARSE_BELOW or size > _DENSE_BYTES)
    if not sparse:
        for i, (file, x) in enumerate(zip(paths, tables, strict=True)):
            if _dense_bytes(x) > _DENSE_BYTES:
                raise ValueError(
                    f"{file} has {x.shape[0]} examples of {x.shape[1]} features, more than "
                    f"8 GB as a dense array. Select features first, or keep them sparse: "
                    f"standardize=false."
                )
            tables[i] = x.toarray()
    test = (tables[1], targets[1]) if len(tables) > 1 else None
    return Raw(tables[0], targets[0], check_task(task), test=test, first_feature=first)


def load_libsvm(
    paths: list[Path], number: type[np.floating], first: int | None = None, width: int | None = None
) -> tuple[list[Any], list[NDArray[Any]], int]:
    """CSR arrays and targets of files with features counted alike, and from which number.

    `first`: from which; None: from 0 if one of the files has a feature 0, else from 1.
    `width`: how many features there are; None: as many as in the first file. Further ones are left
    out.
    """
    from scipy.sparse import csr_array
    from sklearn.datasets import load_svmlight_file

    tables, targets = [], []
    for path in paths:
        check_unpacked(path)
        try:
            x, y = load_svmlight_file(str(path), zero_based=True, dtype=number)
        except (ValueError, OSError, OverflowError, EOFError) as error:
            raise _bad_libsvm(path, error) from None
        if x.shape[1] > most_features(path.stat().st_size):
            raise _bad_libsvm(path)
        tables.append(csr_array(x))
        targets.append(y)
    has_zero = any((x.indices == 0).any() for x in tables)
    if first is None:
        first = 0 if has_zero else 1
    elif first == 1 and has_zero:
        raise ValueError(
            f"{paths[0]} has a feature 0. Expected features counted from 1, as in training."
        )
    width = tables[0].shape[1] - first if width is None else width
    if width < 1 or not tables[0].shape[0]:
        raise ValueError(f"{paths[0]} could not be read as LIBSVM: it has no examples or features.")
    for i, (path, x) in enumerate(zip(paths, tables, strict=True)):
        unseen = np.unique(x.indices[x.indices >= first + width])
        if len(unseen):  # no weight was learnt for them
            _log.info(
                f"{path}: features that training did not have are left out: "
                + (
                    f"{unseen[0]}."
                    if len(unseen) == 1
                    else f"{len(unseen)}, from {unseen[0]} to {unseen[-1]}."
                )
            )
            x = x[:, : first + width]
        columns = x.indices - np.asarray(first, dtype=x.indices.dtype)
        tables[i] = csr_array((x.data, columns, x.indptr), shape=(x.shape[0], width))
    return tables, targets, first


def _bad_libsvm(path: Path, error: Exception | None = None) -> ValueError:
    """What is wrong with a file, by its first line that no LIBSVM file has."""
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open}
    opened = openers.get(path.suffix.lower(), open)
    widest = most_features(path.stat().st_size)
    with contextlib.suppress(OSError, EOFError), opened(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_LINE), b""), 1):
            if why := _wrong_in(line.partition(b"#")[0].split(), widest):
                shown = printable(line[:60].decode(errors="replace").rstrip())
                return ValueError(
                    f"{path} could not be read as LIBSVM: {why}. Received, in line {number}: "
                    f"{shown}{'…' if len(line) > 60 else ''} Mend that line."
                )
    return ValueError(
        f"{path} could not be read as LIBSVM, lines of a label and feature:value "
        f"({type(error).__name__}). Is it damaged, or of another kind?"
    )


def _wrong_in(words: list[bytes], widest: int) -> str:
    """Why no line of a LIBSVM file has these words; nothing, where one may."""
    before = -1
    try:
        if words:
            float(words[0])
    except ValueError:
        return "expected a number as label at the start of each line"
    for word in words[1:]:
        feature, _, value = word.partition(b":")
        if feature == b"qid":
            continue
        try:
            number = int(feature)
            float(value)
        except ValueError:
            return "expected whole_number:number for each feature"
        if not 0 <= number < widest:
            return f"expected features from 0 to {widest - 1:,} in a file of this size"
        if number <= before:
            return "expected the features of a line in ascending order, none twice"
        before = number
    return ""


def _dense_bytes(x: Any) -> float:
    return float(x.shape[0]) * x.shape[1] * x.dtype.itemsize
