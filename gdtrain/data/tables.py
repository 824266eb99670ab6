"""Tables: delimited text, read alike for training, prediction and evaluation."""

from __future__ import annotations

import codecs
import csv
import io
import logging
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TextIO
from zipfile import BadZipFile, ZipFile

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.prepared import Raw
from gdtrain.data.reading import PACKED, check_unpacked, unpacked
from gdtrain.data.targets import Task

__all__ = ["Table", "is_table", "read_csv"]

_log = logging.getLogger("gdtrain")

Header = bool | Literal["auto"]
Kind = Literal["auto", "labels", "numbers", "text"]

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_LONGEST_LINE = 2**24  # characters
_MOST_BYTES = 8e9  # of the numbers, as a dense array
_MOST_FAULTS = 10  # columns in a message
_TARGET = "the target"
_EXACT = 2**53  # float64 has every whole number up to here
_MISSING = frozenset(
    ["", "na", "n/a", "<na>", "nan", "-nan", "nat", "null", "none", "?"]
    + [f"#{word}" for word in ("n/a", "div/0!", "num!", "value!", "ref!", "name?")]  # Excel's
)
_TEXT = "Encode text as numbers."
_FILL = "Fill in or drop missing values first."
_PLAIN = "Write numbers with a point and nothing else, as in 1234.5."


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table: `.csv` or `.tsv`, plain or compressed."""
    return _suffix(path) in (".csv", ".tsv")


def _suffix(path: Path) -> str:
    """The suffix in lower case, before that of a compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class Table:
    """A file of delimited text, with its header read and the fields of every row counted.

    Fields are separated by commas (by tabs in `.tsv`), or by semicolons, tabs or bars where the
    header has more of these. Text is UTF-8 (or UTF-16 with its mark). Blank lines are skipped, and
    so are rows without any value at the end. Names and labels lose the spaces around them. Lines
    are counted from 1, as an editor does. `expected`: a first line with all of these names is a
    header. `key`: of `header`, for messages.
    """

    def __init__(
        self,
        path: str | Path,
        header: Header = "auto",
        *,
        expected: list[str] | None = None,
        key: str = "data.header",
    ) -> None:
        if not isinstance(header, bool) and header != "auto":
            raise ValueError(f"{key} must be true, false or auto. Received: {header!r}.")
        self.path = Path(path)
        check_unpacked(self.path)
        self._skipped_lines = 0
        self.delimiter = self._find_delimiter()
        with self._open() as file:
            records = self._records(file)
            first = next(records, None)
            if first is None:
                raise ValueError(f"{self.path} is empty: expected a header and rows.")
            self._first_line, fields = first
            # "Unnamed: 0" is what pandas calls a column without a name, and then writes.
            names = [re.sub(r"^Unnamed: \d+$", "", field.strip()) for field in fields]
            known = bool(expected) and set(expected or ()) <= set(names)
            if header == "auto" and not known and _look_like_values(names):
                shown = quoted(self.delimiter.join(fields))
                raise ValueError(
                    f"{self.path}, line {self._first_line}: expected the columns' names. Received "
                    f"what looks like an example: {shown}. {key}=false takes it as one, and calls "
                    f"the columns 0, 1, …; {key}=true takes it as names."
                )
            self._has_header = header is not False
            if self._has_header and not any(names):
                raise ValueError(f"{self.path}, line {self._first_line}: no column has a name.")
            self._columns = names if self._has_header else [str(i) for i in range(len(names))]
            self.num_rows = self._count(records if self._has_header else chain([first], records))
        if not self.num_rows:
            raise ValueError(f"{self.path} has a header, but no rows.")

    @contextmanager
    def _open(self) -> Iterator[TextIO]:
        """The text, unpacked."""
        longest = csv.field_size_limit(_LONGEST_LINE)
        try:
            with self._binary() as raw:
                marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                encoding = "utf-16" if raw.peek(2)[:2] in marks else "utf-8-sig"
                with io.TextIOWrapper(raw, encoding, newline="") as file:
                    for _ in range(self._skipped_lines):
                        file.readline()
                    yield file
        except UnicodeDecodeError:
            raise ValueError(self._not_text()) from None
        except (OSError, EOFError, RuntimeError, zlib.error, lzma.LZMAError, BadZipFile) as error:
            raise ValueError(f"{self.path} could not be read: {error}.") from None
        finally:
            csv.field_size_limit(longest)

    @contextmanager
    def _binary(self) -> Iterator[Any]:
        if self.path.suffix.lower() != ".zip":
            with unpacked(self.path) as file:
                yield file
            return
        with ZipFile(self.path) as archive:
            names = [n for n in archive.namelist() if not n.startswith("__MACOSX/")]
            if len(names) != 1:
                raise ValueError(
                    f"{self.path} must hold one file. Received: {len(names)}"
                    f"{listed(names) and f', {listed(names)}'}."
                )
            with archive.open(names[0]) as file:
                yield file

    def _not_text(self) -> str:
        """Where the first bytes stand that are not of the encoding."""
        where = ""
        with self._binary() as raw:
            for number, line in enumerate(iter(lambda: raw.readline(_LONGEST_LINE), b""), 1):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    where = f", line {number}: {quoted(bytes(line[error.start :][:20]))}"
                    break
        return (
            f"{self.path} could not be read as CSV: expected text in UTF-8. Received{where}. Save "
            f"it as UTF-8 (Excel: CSV UTF-8; elsewhere: iconv -f cp1252 -t utf-8); names of "
            f"compressed tables end in .gz, .bz2, .xz or .zip."
        )

    def _find_delimiter(self) -> str:
        """That of most fields in the first line; the suffix's own where equally many."""
        with self._open() as file:
            line = next((line for line in self._lines(file) if line.strip()), "")
            said = re.fullmatch(r'"?sep=(.)"?\s*', line)  # for Excel, by Excel and LibreOffice
            if said:
                self._skipped_lines = 1
                return said[1]
            if "\0" in line:
                raise ValueError(f"{self.path} could not be read as CSV: expected text in UTF-8.")
            own = "\t" if _suffix(self.path) == ".tsv" else ","
            ranked = sorted(_DELIMITERS, key=lambda d: d != own)
            counts = {d: len(next(csv.reader([line], delimiter=d), [])) for d in ranked}
            found = max(ranked, key=counts.__getitem__)
        if found != own:
            _log.info(f"{self.path}: fields are separated by {_DELIMITERS[found]}.")
        return found

    def _lines(self, file: TextIO) -> Iterator[str]:
        lines = iter(lambda: file.readline(_LONGEST_LINE), "")
        for number, line in enumerate(lines, self._skipped_lines + 1):
            if len(line) == _LONGEST_LINE:
                raise ValueError(
                    f"{self.path}, line {number}, has more than {_LONGEST_LINE:,} characters: no "
                    f"table has such lines."
                )
            yield line

    def _records(self, file: TextIO) -> Iterator[tuple[int, list[str]]]:
        """The line that each row begins in, and its fields; blank lines are skipped."""
        reader = csv.reader(
            self._lines(file), delimiter=self.delimiter, skipinitialspace=True, strict=True
        )
        while True:
            line = self._skipped_lines + reader.line_num + 1
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"{self.path} could not be read as CSV: the row that begins in line {line} has "
                    f'quotes that do not match ({error}). Quotes stand around a field ("a, b"), '
                    f'and twice within it ("5"" pipe").'
                ) from None
            if len(fields) > 1 or (fields and fields[0].strip()):
                yield line, fields

    def _count(self, records: Iterable[tuple[int, list[str]]]) -> int:
        """The number of rows, to the last with a value; raises where one is longer or shorter."""
        names = len(self._columns)
        unnamed = [i for i, name in enumerate(self._columns) if not name]
        self._unnamed: set[int] = set()  # those of them that hold values
        wrong: tuple[int, int, bool] | None = None  # line, fields, whether it ends in a delimiter
        last = many = 0
        for number, (line, fields) in enumerate(records, 1):
            if len(fields) != names:
                wrong = wrong or (line, len(fields), not fields[-1])
                many += 1
            elif unnamed:
                self._unnamed.update(i for i in unnamed if fields[i])
            if any(fields):
                last = number
        if wrong is not None:
            line, found, is_closed = wrong
            if names == 1:
                advice = f"Line {self._first_line} must hold the names, separated as the rows are."
            elif found == names + 1 and is_closed:
                advice = "Let no line end in a delimiter, or all of them, the header too."
            elif found > names:
                advice = (
                    "Give the column of row names a name, if that is what is first; put quotes "
                    'around fields with a delimiter in them ("1,5").'
                )
            else:
                advice = "Where a value is missing, the delimiter stands all the same."
            raise ValueError(
                f"{self.path}, line {line}: {found} field{'s' * (found != 1)}, and line "
                f"{self._first_line} has {names}"
                f"{f', as {many} rows have more or fewer' * (many > 1)}. {advice}"
            )
        return last

    def lines(self, rows: Iterable[int]) -> dict[int, tuple[int, list[str]]]:
        """By row, from 0 on, the line that it begins in, and its fields as they are written."""
        wanted = set(rows)
        with self._open() as file:
            records = self._records(file)
            if self._has_header:
                next(records)
            numbered = zip(range(max(wanted, default=-1) + 1), records, strict=False)
            return {row: record for row, record in numbered if row in wanted}

    @property
    def names(self) -> list[str]:
        """Of the columns that have one, in their order."""
        return [name for name in self._columns if name]

    def all_names(self) -> list[str]:
        """Of all columns but a first one without a name, which numbers the rows."""
        if 0 in self._unnamed:
            _log.info(f"{self.path}: the first column has no name: left out, as names of the rows.")
        unnamed = sorted(self._unnamed - {0})
        if unnamed:
            raise ValueError(
                f"{self.path}, line {self._first_line}: column {unnamed[0] + 1} has values, but no "
                f"name. Give it one, or choose the columns: data.columns=[…] and data.target=…."
            )
        return self.names

    def read(
        self,
        names: list[str],
        target: str | None = None,
        kind: Kind = "auto",
        advice: str = "leave such columns out (data.columns=[…] names those to take)",
    ) -> tuple[NDArray[np.float64], NDArray[Any] | None]:
        """Columns as numbers, in the order of `names`, and one as targets.

        A target is numbers if all of its values are but those that are missing; else it is text, of
        which every word is a label, "NA" and "None" too. `kind`: "numbers" or "text" it must be;
        "labels", either; "auto", either, but numbers that are written in another way (1,5 or 5 €),
        or that stand among a few words, are refused. All columns with bad values are told in one
        message.
        """
        import pandas as pd

        chosen = [*names, *([] if target is None else [target])]
        places = self._places(chosen)
        if self.num_rows * len(chosen) * 8 > _MOST_BYTES:
            raise ValueError(
                f"{self.path} has {self.num_rows:,} rows of {len(chosen):,} columns, more than "
                f"8 GB as an array. Take fewer, or write them with numpy.save and train on that "
                f"(data=npy data.memory_map=true)."
            )
        with self._open() as file:
            if self._has_header:
                next(self._records(file))
            try:
                frame: Any = pd.read_csv(
                    file,
                    sep=self.delimiter,
                    header=None,
                    names=list(range(len(self._columns))),
                    usecols=sorted(places.values()),
                    nrows=self.num_rows,
                    index_col=False,
                    skipinitialspace=True,
                    na_filter=False,
                    low_memory=False,
                    dtype={places[target]: str} if target is not None and kind == "text" else None,
                )
            except ValueError as error:
                raise ValueError(f"{self.path} could not be read as CSV: {error}") from None
        if len(frame) != self.num_rows:
            raise ValueError(
                f"{self.path} could not be read as CSV: its quotes can be read as {self.num_rows} "
                f"or as {len(frame)} rows."
            )
        features = np.empty((self.num_rows, len(names)))
        faults = []
        for i, name in enumerate(names):
            features[:, i], bad = _numbers(frame[places[name]])
            if bad.any():
                faults.append(("column", name, int(bad.argmax()), int(bad.sum())))
        targets = None
        if target is not None:
            targets, bad = _targets(frame[places[target]], kind)
            if bad.any():
                faults.append((_TARGET, target, int(bad.argmax()), int(bad.sum())))
        if faults:
            raise ValueError(_explained(self, faults, kind, advice))
        return features, targets

    def _places(self, chosen: list[str]) -> dict[str, int]:
        """Which columns have these names."""
        places: dict[str, list[int]] = {}
        for i, name in enumerate(self._columns):
            places.setdefault(name, []).append(i)
        unknown = [name for name in chosen if name not in places or not name]
        if unknown:
            raise ValueError(
                f"{self.path} has no column {listed(unknown)}. It has: {listed(self.names)}."
            )
        twice = next((name for name in chosen if len(places[name]) > 1), None)
        if twice is not None:
            first, second = places[twice][:2]
            raise ValueError(
                f"{self.path}, line {self._first_line}: each column needs a name of its own. "
                f"Received: {quoted(twice)} in the columns {first + 1} and {second + 1}."
            )
        return {name: places[name][0] for name in chosen}


def _explained(
    table: Table, faults: list[tuple[str, str, int, int]], kind: Kind, advice: str
) -> str:
    """All bad columns (the target last): which, name, first bad row, how many; and advice."""
    shown = faults[:_MOST_FAULTS]
    if faults[-1][0] == _TARGET:
        shown[-1] = faults[-1]
    records = table.lines(row for _, _, row, _ in shown)
    said, remedies = [], []
    for which, name, row, many in shown:
        line, fields = records[row]
        what, remedy = _reason(fields[table._columns.index(name)].strip())
        if remedy == _TEXT and which != _TARGET:
            remedy = f"{remedy[:-1]}, or {advice}."
        elif remedy == _TEXT:
            labels = "all targets as numbers, or set task=classification to take them as labels"
            remedy = f"Write {labels if kind == 'auto' else 'targets as numbers'}."
        remedies.append(remedy)
        more = f" ({many - 1} more)" if many > 1 else ""
        said.append(f"{which} {quoted(name)}, line {line}: {what}{more}")
    if len(faults) > len(shown):
        said.append(f"and {len(faults) - len(shown)} more columns")
    return "\n  ".join(
        [
            f"{table.path}: expected a value in each row, and features that are finite numbers. "
            f"Received:",
            *said,
            *dict.fromkeys(remedies),
        ]
    )


def read_csv(
    path: Path, target: str | None, columns: list[str] | None, header: Header, task: Task
) -> Raw:
    """The examples of a table: see `CSVDataModule`."""
    target = None if target is None else str(target).strip()
    said = [*(columns or []), *([] if target is None else [target])]
    words = [name for name in said if not _is_number(name)]  # a number may be of an example
    table = Table(path, header, expected=words)
    everything = table.all_names() if target is None or columns is None else []
    if target is None:
        target = everything[-1]
    names = columns or [name for name in everything if name != target]
    if not names:
        raise ValueError(
            f"{path} has no feature column beside the target {quoted(target)}. Fields "
            f"are separated by commas, tabs, semicolons or bars."
        )
    if target in names or (columns and len(set(names)) < len(names)):
        raise ValueError(
            f"columns must name each feature once, and not the target {quoted(target)}. "
            f"Received: {listed(names)}."
        )
    kinds: dict[str, Kind] = {"regression": "numbers", "classification": "labels"}
    features, targets = table.read(names, target, kinds.get(task, "auto"))
    assert targets is not None
    return Raw(features, targets, task, names)


# ---------------------------------------------------------------------- columns


def _numbers(column: Any) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """A column of pandas as float64, and which of its values are no finite number."""
    import pandas as pd

    if column.dtype.kind in "biuf":
        values = column.to_numpy(dtype=np.float64)
    else:
        text = column.astype(str).str.strip().str.lower()
        switches = text.map({"true": 1.0, "false": 0.0})
        if switches.notna().any() and (switches.notna() | text.isin(_MISSING)).all():
            values = switches.to_numpy(dtype=np.float64)
        else:
            values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if column.dtype.kind != "f" and (np.abs(values[~bad]) >= _EXACT).any():
        for row in np.flatnonzero(~bad & (np.abs(values) >= _EXACT)):
            written = str(column.iloc[row]).strip()
            whole = re.fullmatch(r"[+-]?\d+", written)
            bad[row] = whole is not None and int(written) != int(values[row])
    return values, bad


def _targets(column: Any, kind: Kind) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """A column of pandas as numbers or labels, and which of its values are none."""
    if column.dtype.kind in "biuf":
        values = column.to_numpy()
        return values, ~np.isfinite(values)
    text = column.astype(str).str.strip()
    labels = text.to_numpy(dtype=object)
    empty = labels == ""
    if kind == "text":
        return labels, empty
    numbers, bad = _numbers(column)
    bad = ~np.isfinite(numbers)
    if kind == "numbers":
        return numbers, bad
    missing = text.str.lower().isin(_MISSING).to_numpy()
    if not missing.all() and not (bad & ~missing).any():
        return numbers, bad
    if kind == "auto" and not missing.all():
        words = text[~missing & bad]
        alike = all(_is_decorated(word) for word in words.unique())
        if alike or (2 * len(words) < len(text) and text.nunique() > 20):
            return labels, bad
    return labels, empty


def _reason(value: str) -> tuple[str, str]:
    """Why a value of a table is no finite number, and what to do about it."""
    if not value:
        return "empty", _FILL
    shown = quoted(value)
    if value.lower() in _MISSING:
        return f"{shown}, a missing value", _FILL
    if _is_number(value):
        if "inf" in value.lower():
            return f"{shown}, which is not finite", _FILL
        if not np.isfinite(float(value)):
            return f"{shown}, beyond float64", "Divide such numbers by a constant first."
        return (
            f"{shown}, which float64 rounds: it has whole numbers up to 2^53 only",
            "Subtract a constant from such numbers first, or leave them out if they name things.",
        )
    if _is_decorated(value):
        return f"{shown}, with a decimal comma, a separator or a unit", _PLAIN
    return f"{shown}, which is text", _TEXT


def _is_number(text: str) -> bool:
    """Whether a text is a number as tables write them."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text  # Python's own


def _is_decorated(text: str) -> bool:
    """Whether it is a number with a decimal comma, separators of thousands, or a unit's sign."""
    bare = re.sub("[\\s\u00a0\u202f'’$€£¥%]", "", text).replace(",", ".").replace("−", "-")
    return re.fullmatch(r"[+-]?\d+(\.\d+)*(e[+-]?\d+)?", bare, re.IGNORECASE) is not None


def _look_like_values(names: list[str]) -> bool:
    """Whether columns' names look like the values of an example.

    They do if half of them are numbers; but not if text stands beside 0, 1, 2, … or 1990, 1991, ….
    """
    numbers = [float(name) for name in names if _is_number(name)]
    if len(numbers) < len(names) and len(numbers) > 1 and set(np.diff(numbers)) == {1.0}:
        return False
    return 2 * len(numbers) >= len(names)


def quoted(value: str | bytes, most: int = 60) -> str:
    """As Python writes it, and not longer than a line."""
    return repr(value if len(value) <= most else value[:most]) + "…" * (len(value) > most)


def listed(names: list[str], most: int = 20) -> str:
    """Names for a message: the first ones, and how many more there are."""
    shown = ", ".join(quoted(name) for name in names[:most])
    return shown + f" and {len(names) - most} more" * (len(names) > most)
