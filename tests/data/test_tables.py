"""Delimited text: what is read as a table, and what is said where a file is none."""

import bz2
import gzip
import io
import logging
import lzma
import zipfile

import numpy as np
import pandas as pd
import pytest
from example_files import write

from gdtrain.data import CSVDataModule
from gdtrain.data.files import read_features
from gdtrain.data.tables import Table
from gdtrain.data.targets import decide

TABLE = "a,b,y\n1,2,u\n3,4,v\n"


def load(tmp_path, content, name="t.csv", **options):
    return CSVDataModule(write(tmp_path / name, content), **options).load()


def said(tmp_path, content, name="t.csv", **options):
    """The message, with the file's name alone."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the caller looks at the words)
        load(tmp_path, content, name, **options)
    return str(caught.value).replace(f"{tmp_path}/", "")


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, TABLE)
    return file.getvalue()


# ------------------------------------------------------------------------ what is read


def test_the_last_column_is_the_target_and_columns_are_named(tmp_path):
    path = write(tmp_path / "t.csv", "a,b,c\n" + "1,2,0.5\n3,4,1.5\n" * 5)
    raw = CSVDataModule(path).load()
    assert raw.targets.tolist() == [0.5, 1.5] * 5
    picked = CSVDataModule(path, target="a", columns=["c", "b"]).load()
    assert picked.inputs[:2].tolist() == [[0.5, 2.0], [1.5, 4.0]]
    assert picked.feature_names == ["c", "b"]
    assert picked.targets.tolist() == [1, 3] * 5
    assert CSVDataModule(path, target="a", task="regression").load().task == "regression"


SAME = {
    "mark of UTF-8": b"\xef\xbb\xbf" + TABLE.encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "line ends of Windows": TABLE.replace("\n", "\r\n"),
    "line ends of old Macs": TABLE.replace("\n", "\r"),
    "no end of the last line": TABLE.rstrip(),
    "tabs": TABLE.replace(",", "\t"),
    "semicolons": TABLE.replace(",", ";"),
    "bars": TABLE.replace(",", "|"),
    "sep= of Excel": "sep=;\r\n" + TABLE.replace(",", ";"),
    "quotes": '"a","b","y"\n"1","2","u"\n"3","4","v"\n',
    "spaces": "a , b, y\n1, 2,u \n 3 ,4, v\n",
    "spaces before quotes": 'a, "b", y\n1, "2", "u"\n3, "4", v\n',
    "blank lines": "\n\na,b,y\n\n1,2,u\n   \n3,4,v\n\n\n",
    "empty rows at the end": TABLE + ",,\n,,\n",
    "a delimiter at the end of every line": TABLE.replace("\n", ",\n"),
    "row names of R and pandas": '"","a","b","y"\n"1",1,2,"u"\n"2",3,4,"v"\n',
    "row names read and written again": "Unnamed: 0,a,b,y\n0,1,2,u\n1,3,4,v\n",
}


@pytest.mark.parametrize("content", SAME.values(), ids=SAME)
def test_the_same_table_in_other_hands(tmp_path, content):
    raw = load(tmp_path, content)
    assert raw.feature_names == ["a", "b"]
    assert raw.inputs.tolist() == [[1, 2], [3, 4]]
    assert raw.targets.tolist() == ["u", "v"]
    np.testing.assert_array_equal(read_features(tmp_path / "t.csv", ["b", "a"]), [[2, 1], [4, 3]])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.CSV", TABLE.encode()),
        ("t.tsv", TABLE.replace(",", "\t").encode()),
        ("t.csv.gz", gzip.compress(TABLE.encode())),
        ("t.CSV.GZ", gzip.compress(TABLE.encode())),
        ("t.tsv.bz2", bz2.compress(TABLE.replace(",", "\t").encode())),
        ("t.csv.xz", lzma.compress(TABLE.encode())),
        ("t.csv.zip", zipped("t.csv", "__MACOSX/._t.csv")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # packed bytes tell the time
)
def test_suffixes_mean_the_same_in_training_and_in_prediction(tmp_path, name, content):
    assert load(tmp_path, content, name).inputs.tolist() == [[1, 2], [3, 4]]
    np.testing.assert_array_equal(read_features(tmp_path / name, ["a", "b"]), [[1, 2], [3, 4]])


def test_a_name_with_a_comma_between_semicolons(tmp_path):
    raw = load(tmp_path, "price, EUR;area;y\n1;2;u\n3;4;v\n")
    assert raw.feature_names == ["price, EUR", "area"]


def test_what_was_taken_is_said(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "gdtrain"):
        load(tmp_path, ";a;y\n1;2;u\n2;3;v\n")
    assert "t.csv: fields are separated by semicolons." in caplog.text
    assert "t.csv: the first column has no name: left out, as names of the rows." in caplog.text


@pytest.mark.parametrize("word", ["True", "TRUE", "true"])
def test_booleans_are_features_and_classes_and_a_blank_is_none(tmp_path, word):
    raw = load(tmp_path, f"a,y\n{word},False\nFalse,{word}\n")
    assert raw.inputs.tolist() == [[1], [0]]
    assert raw.targets.tolist() == [False, True]
    assert decide(raw.targets, raw.task).classes is not None
    assert "column 'a', line 3: empty" in said(tmp_path, f"a,y\n{word},1\n,2\n")


# ------------------------------------------------------------------------ header


@pytest.mark.parametrize(
    "content",
    ["1,2,3\n4,5,6\n", "5.1,3.5,1.4,Iris-setosa\n4.9,3.0,1.4,Iris-setosa\n", "1,1,7\n2,3,4\n"],
    ids=["numbers", "numbers and a label", "equal numbers"],
)
def test_a_header_that_looks_like_an_example_is_asked_about(tmp_path, content):
    shown = content.splitlines()[0]
    message = said(tmp_path, content)
    assert message.startswith("t.csv, line 1: expected the columns' names.")
    for words in (repr(shown), "data.header=false", "data.header=true"):
        assert words in message
    raw = load(tmp_path, content, header=False)
    assert raw.inputs[0].tolist() == [float(value) for value in shown.split(",")[:-1]]
    assert len(raw.inputs) == 2
    assert raw.feature_names == [str(i) for i in range(raw.inputs.shape[1])]
    with pytest.raises(ValueError, match="header=false takes it as one"):  # a "1" among the values
        load(tmp_path, content, target=shown.split(",")[0])


def test_numbers_may_be_names(tmp_path):
    assert load(tmp_path, "1,2,3\n4,5,6\n", header=True).feature_names == ["1", "2"]
    of_pandas = load(tmp_path, "0,1,2,target\n4.5,5,6,u\n1,2,3,v\n")
    assert of_pandas.feature_names == ["0", "1", "2"]
    assert load(tmp_path, "1990,1991,y\n1,2,3.5\n").feature_names == ["1990", "1991"]
    np.testing.assert_array_equal(
        read_features(write(tmp_path / "n.csv", "1,0\n5,6\n"), ["0", "1"]), [[6, 5]]
    )


# ------------------------------------------------------------------------ targets


def test_na_and_none_are_labels(tmp_path):
    labels = ["NA", "None", "null", "nan", "N/A", "DE"]
    raw = load(tmp_path, "x,code\n" + "".join(f"{i},{c}\n" for i, c in enumerate(labels)))
    assert raw.targets.tolist() == labels
    assert decide(raw.targets, raw.task).classes is not None


@pytest.mark.parametrize(
    ("values", "task", "line"),
    [
        (["1.5", "", "2.5"], "auto", "line 3: empty"),
        (["1", "2", "NA", "nan"], "auto", "line 4: 'NA', a missing value (1 more)"),
        (["1", "2", ""], "classification", "line 4: empty"),
        (["up", "", "down"], "auto", "line 3: empty"),
        (["True", "", "False"], "classification", "line 3: empty"),
        (["1.5", "inf"], "auto", "line 3: 'inf', which is not finite"),
        (["1,5", "2,5"], "auto", "line 2: '1,5', with a decimal comma"),
        (["5 €", "7 €"], "auto", "line 2: '5 €', with"),
        (["1", "2", "x"], "regression", "line 4: 'x', which is text"),
        ([*map(str, range(30)), "x"], "auto", "line 32: 'x', which is text"),
    ],
)
def test_a_target_that_is_missing_or_no_number_is_named(tmp_path, values, task, line):
    content = "a,y\n" + "".join(f'1,"{value}"\n' for value in values)
    assert f"the target 'y', {line}" in said(tmp_path, content, task=task)


def test_words_and_numbers_are_labels_where_that_is_told_or_plain(tmp_path):
    content = "a,y\n" + "".join(f"1,{i}\n" for i in [*range(30), "x"])
    assert load(tmp_path, content, task="classification").targets.tolist()[-2:] == ["29", "x"]
    assert load(tmp_path, "a,y\n1,1\n2,2\n3,3+\n").targets.tolist() == ["1", "2", "3+"]


# ------------------------------------------------------------------------ what is refused


def test_all_bad_columns_are_told_at_once_with_the_lines_of_an_editor(tmp_path):
    good = "1,1,1,1,1,1,1,1,1\n"
    content = (
        'a,b,c,"d\nof two lines",e,f,g,h,y\n'  # lines 1 and 2
        + good
        + '1,"two\nlines",1,$5,1,1,1,1,1\n'  # lines 4 and 5
        + "\n"
        + ',2,"1,5",1,1e999,-inf,9007199254740993,1,\n'  # line 7
        + ',2,"1,5",1,1,1,1,1,2\n'
    )
    message = said(tmp_path, content, columns=["a", "b", "c", "d\nof two lines", *"efgh"])
    assert message.splitlines() == [
        "t.csv: expected a value in each row, and features that are finite numbers. Received:",
        "  column 'a', line 7: empty (1 more)",
        "  column 'b', line 4: 'two\\nlines', which is text",
        "  column 'c', line 7: '1,5', with a decimal comma, a separator or a unit (1 more)",
        "  column 'd\\nof two lines', line 4: '$5', with a decimal comma, a separator or a unit",
        "  column 'e', line 7: '1e999', beyond float64",
        "  column 'f', line 7: '-inf', which is not finite",
        "  column 'g', line 7: '9007199254740993', which float64 rounds: it has whole numbers up "
        "to 2^53 only",
        "  the target 'y', line 7: empty",
        "  Fill in or drop missing values first.",
        "  Encode text as numbers, or leave such columns out (data.columns=[…] names those to "
        "take).",
        "  Write numbers with a point and nothing else, as in 1234.5.",
        "  Divide such numbers by a constant first.",
        "  Subtract a constant from such numbers first, or leave them out if they name things.",
    ]


def test_of_many_bad_columns_ten_are_shown_and_the_target_is_among_them(tmp_path):
    names = [f"c{i}" for i in range(21)]
    content = ",".join([*names, "y"]) + "\n" + "x," * 21 + "1.5\n" + "x," * 21 + "\n"
    lines = said(tmp_path, content).splitlines()
    assert sum(", line 2: 'x'" in line for line in lines) == 9
    assert lines[10].strip() == "the target 'y', line 3: empty"
    assert lines[11].strip() == "and 12 more columns"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("NA", "'NA', a missing value"),
        ("#DIV/0!", "'#DIV/0!', a missing value"),
        ("?", "'?', a missing value"),
        ("1_000", "'1_000', which is text"),
        ("2020-01-01", "'2020-01-01', which is text"),
        ("−1", "'−1', with a decimal comma"),
        ("1\u00a0000", r"'1\xa0000', with a decimal comma"),
        ("1.234.567,8", "'1.234.567,8', with a decimal comma"),
        ("5%", "'5%', with a decimal comma"),
        ("yes", "'yes', which is text"),
        ("0x1A", "'0x1A', which is text"),
    ],
)
def test_a_value_that_is_no_number_is_named(tmp_path, value, words):
    assert f"column 'a', line 3: {words}" in said(tmp_path, f'a,y\n1,1.5\n"{value}",2.5\n')


@pytest.mark.parametrize("value", [2**53, 2**53 + 2, 10**20, -(2**60)])
def test_whole_numbers_that_float64_has_are_read(tmp_path, value):
    assert load(tmp_path, f"a,y\n{value},1.5\n3,2\n").inputs[0, 0] == value


LENGTHS = {
    "longer": ("a,b,y\n1,2,u\n3,4,v,9\n5,6,w,7\n", "line 3: 4 fields, and line 1 has 3, as 2 rows"),
    "all longer": ("a,b,y\nr1,1,2,u\nr2,3,4,v\n", "line 2: 4 fields, and line 1 has 3, as 2 rows"),
    "shorter": ("a,b,y\n1,2,u\n\n3,4\n", "line 4: 2 fields, and line 1 has 3. Where a value"),
    "after a quoted line": ('a,b,y\n1,"2\n",u\n3,4\n', "line 4: 2 fields"),
    "a delimiter after each row": ("a,b,y\n1,2,u,\n3,4,v,\n", "line 2: 4 fields, and line 1 has 3"),
    "numbered rows without targets": ("a,b,y\n1,5,6,\n2,7,8,\n", "line 2: 4 fields"),
    "one delimiter too many": ("a,b,y\n1,2,u\n3,4,v,\n", "line 3: 4 fields"),
    "a comma in a number": ("a,y\n1,5,u\n", "line 2: 3 fields"),
    "a comment first": ("# made by hand\na,b,y\n1,2,u\n", "line 2: 3 fields, and line 1 has 1"),
    "the end of DOS": (TABLE + "\x1a", "line 4: 1 field, and line 1 has 3"),
}


@pytest.mark.parametrize(("content", "words"), LENGTHS.values(), ids=LENGTHS)
def test_rows_longer_or_shorter_than_the_header_are_refused_with_the_line(tmp_path, content, words):
    assert said(tmp_path, content).startswith(f"t.csv, {words}")
    with pytest.raises(ValueError, match=f"t.csv, {words}"):
        read_features(tmp_path / "t.csv", ["a"])


REFUSED = {
    "empty": ("", {}, "t.csv is empty"),
    "blank": ("\n\n", {}, "t.csv is empty"),
    "header alone": ("a,b,y\n", {}, "t.csv has a header, but no rows"),
    "no target": (TABLE, {"target": "z"}, "has no column 'z'. It has: 'a', 'b', 'y'."),
    "no columns": (TABLE, {"columns": ["a", "q", "r"]}, "has no column 'q', 'r'."),
    "target alone": ("y\n1\n0\n", {}, "no feature column beside the target 'y'"),
    "spaces between": ("a b y\n1 2 u\n", {}, "separated by commas, tabs, semicolons or bars"),
    "a web page": ("<!DOCTYPE html>\n<html>\n", {}, "no feature column beside the target '<!"),
    "a name twice": ("a,b,a,y\n1,2,3,u\n", {}, "line 1: each column needs a name of its own. "),
    "target twice": ("a,y,y\n1,2,3\n", {}, "Received: 'y' in the columns 2 and 3."),
    "no name": ("a,,y\n1,2,u\n", {}, "line 1: column 2 has values, but no name"),
    "no name last": ("a,y,\n1,2,u\n", {"columns": ["a"]}, "line 1: column 3 has values"),
    "no names": (",\n1,2\n", {}, "line 1: no column has a name"),
    "no pair of quotes": ('a,y\n1,u\n2,"v\n3,u\n', {}, "begins in line 3 has quotes that do not"),
    "quotes within": ('a,y\n1,"5"x" pipe"\n', {}, "begins in line 2 has quotes that do not"),
    "Windows' encoding": ("a,y\n1,Köln\n".encode("cp1252"), {}, r"line 2: b'\xf6ln\n'. Save it"),
    "UTF-16 without its mark": (TABLE.encode("utf-16-le"), {}, "expected text in UTF-8"),
    "packed, and not named so": (gzip.compress(TABLE.encode()), {}, "expected text in UTF-8"),
    "Excel's own format": (zipped("xl/workbook.xml"), {"name": "t.xlsx"}, "expected text in UTF-8"),
    "packed, and not of UTF-8": (
        gzip.compress("a,y\n1,Köln\n".encode("cp1252")),
        {"name": "t.csv.gz"},
        "t.csv.gz could not be read as CSV: expected text in UTF-8. Received, line 2",
    ),
    "a cut archive": (gzip.compress(TABLE.encode())[:-9], {"name": "t.csv.gz"}, "be unpacked"),
    "no archive": (TABLE, {"name": "t.csv.zip"}, "t.csv.zip is no archive"),
    "two files": (zipped("a.csv", "b.csv"), {"name": "t.csv.zip"}, "must hold one file. Received"),
    "no word for a header": (TABLE, {"header": "no"}, "data.header must be true, false or auto. R"),
    "a feature twice": (TABLE, {"columns": ["a", "a"]}, "columns must name each feature once"),
}


@pytest.mark.parametrize(("content", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_a_file_that_is_no_such_table_is_refused(tmp_path, content, options, words):
    assert words in said(tmp_path, content, **options)


def test_columns_that_are_not_taken_may_hold_anything(tmp_path):
    content = f'a,,c,c,y\n1,x,"{"z" * 300_000}",2,u\n2,,3,4,v\n'
    raw = load(tmp_path, content, columns=["a"], target="y")
    assert raw.inputs.tolist() == [[1], [2]]


def test_long_fields_and_names_are_shortened_in_messages(tmp_path):
    long = "z" * 300_000
    for content, options in (
        (f"a,y\n{long},u\n", {}),
        (f"{long},y\nred,u\n", {}),
        (f"{long},y\n1,u\n", {"target": "x"}),
        (f"{long},{long},y\n1,2,u\n", {}),
    ):
        assert len(said(tmp_path, content, **options)) < 500


def test_a_line_without_end_and_more_numbers_than_memory_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gdtrain.data.tables._LONGEST_LINE", 1000)
    assert "line 2, has more than 1,000 characters" in said(tmp_path, "a,y\n" + "1" * 2000)
    monkeypatch.setattr("gdtrain.data.tables._MOST_BYTES", 40)
    assert "2 rows of 3 columns, more than 8 GB" in said(tmp_path, TABLE)


def test_a_row_is_found_again(tmp_path):
    table = Table(write(tmp_path / "t.csv", 'a,b\n1,"x\ny"\n\n3,z\n4,w\n'))
    assert table.lines([0, 2]) == {0: (2, ["1", "x\ny"]), 2: (6, ["4", "w"])}
    assert table.num_rows == 3


@pytest.mark.parametrize("seed", range(5))
def test_random_tables_are_read_as_pandas_wrote_them(tmp_path, seed):
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(2, 40)), int(rng.integers(1, 8))
    x = rng.normal(size=(n, d)) * 10.0 ** rng.integers(-300, 300, d)
    frame = pd.DataFrame(x, columns=[f"c{i}" for i in range(d)])
    label = rng.choice(["NA", 'a "b"', "c,d", "e\nf", "g;h", "ß"], n)
    frame.insert(int(rng.integers(0, d + 1)), "y", label)
    suffix = rng.choice([".csv", ".csv.gz", ".csv.xz"])
    path = tmp_path / f"t{suffix}"
    frame.to_csv(path, index=bool(rng.integers(2)), lineterminator=str(rng.choice(["\n", "\r\n"])))
    names = [str(name) for name in rng.permutation(frame.columns.drop("y"))]
    raw = CSVDataModule(path, target="y", columns=names).load()
    np.testing.assert_array_equal(raw.inputs, frame[names].to_numpy())
    assert raw.targets.tolist() == label.tolist()
