"""Features in tables: columns matched by name, and refused all together."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import gdtrain
from gdtrain.data import ArrayDataModule
from gdtrain.data.frames import feature_names, features


def frame(n=60):
    rng = np.random.default_rng(0)
    x = pd.DataFrame(rng.normal(size=(n, 3)) * [1, 10, 100] + 5, columns=["a", "b", "c"])
    return x, x @ [1.0, -2.0, 0.5]


@pytest.fixture(scope="module")
def fitted():
    x, y = frame()
    options = {"val_fraction": 0, "test": (x[["c", "b", "a"]].iloc[:9], y[:9])}
    return gdtrain.fit("linear", x, y, variant="gd", epochs=60, progress=False, **options)


def test_columns_are_matched_by_name_wherever_they_come(fitted, caplog):
    caplog.set_level("INFO", logger="gdtrain")
    x, y = frame()
    answers = fitted.predict(x)
    np.testing.assert_allclose(answers, y, atol=1e-3)
    # Its own test set had the columns in another order.
    assert fitted.metrics["metric/r2/test"] > 0.999
    for same in (
        x[["c", "a", "b"]],
        x[["b", "c", "a"]].to_dict("series"),
        x.to_numpy(),
        x.to_numpy().tolist(),
        torch.tensor(x.to_numpy()),
        pd.DataFrame(x.to_numpy()),
    ):
        np.testing.assert_array_equal(fitted.predict(same), answers)
    assert "left out" not in caplog.text
    np.testing.assert_array_equal(fitted.predict(x.assign(y=1, t="x")[list("ycatb")]), answers)
    assert "the columns 'y', 't' were not in training and are left out" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[["a"]], "lack 2 of the 3 features.*: 'b', 'c'. Received: the columns 'a'"),
        (lambda x: x.rename(columns=str.upper), "lack 3 of the 3 features"),
        (lambda x: x.to_numpy()[:, :2], r"shape \(3,\), as in training"),
        (lambda x: x.set_axis(list("abb"), axis=1), "lack 1 of the 3 features"),
        (lambda x: pd.concat([x, x[["a"]]], axis=1), "different names. Received: 'a' more than"),
        (lambda x: x.assign(b=pd.NA), "missing values in 1 of the 3 columns: b .example 0, 60 in"),
    ],
)
def test_tables_that_do_not_fit_are_refused(fitted, change, message):
    with pytest.raises(ValueError, match=message):
        fitted.predict(change(frame()[0]))


def test_names_are_what_is_no_numbering():
    x = np.ones((2, 2))
    assert feature_names(x) is None
    assert feature_names(pd.DataFrame(x)) is None
    assert feature_names(pd.DataFrame(x, columns=[2000, 2001])) == ["2000", "2001"]
    assert feature_names(pd.Series([1, 2], name="t")) == ["t"]
    assert feature_names({"a": [1], "b": [2]}) == ["a", "b"]
    with pytest.raises(ValueError, match=r"different names. Received: 'a' more than once"):
        feature_names(pd.DataFrame(x, columns=["a", "a"]))
    # A numbering out of its order is one by name.
    assert features(pd.DataFrame([[1, 2, 3]])[[2, 0, 1]]).tolist() == [[1, 2, 3]]


def test_targets_in_another_order_of_the_index_are_refused():
    x, y = frame()
    shuffled = y.sample(frac=1, random_state=0)
    for test in (False, True):
        arguments = {"test": (x, shuffled)} if test else {}
        with pytest.raises(ValueError, match=r"same index in different orders. y.loc\[X.index\]"):
            ArrayDataModule(x, y if test else shuffled, **arguments)
    for targets in (shuffled.to_numpy(), shuffled.loc[x.index], y.set_axis(y.index + 100)):
        ArrayDataModule(x, targets)


NUMBERS = pd.DataFrame(
    {
        "Int64": pd.array([1, 2], dtype="Int64"),
        "Float64": pd.array([0.5, 1.5], dtype="Float64"),
        "boolean": pd.array([True, False], dtype="boolean"),
        "category": pd.Categorical([3, 4]),
        "sparse": pd.arrays.SparseArray([0, 1]),
        "object": np.array([1, 2.5], dtype=object),
        "decimal": [Decimal("1.5"), Decimal(2)],
        "bool": [True, False],
    }
)


@pytest.mark.parametrize("name", [*NUMBERS, None])
def test_numbers_of_any_type_of_pandas_are_features(name):
    table = NUMBERS if name is None else NUMBERS[[name]]
    wanted = [[float(v) for v in row] for row in table.astype(object).to_numpy()]
    assert features(table).tolist() == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"a": ["x", "y"], "b": pd.Categorical(["u", "v"]), "c": [1, 2]},
            "others in 2 of the 3 columns: a .such as 'x'., b .such as 'u'.*get_dummies",
        ),
        (
            {"d": pd.date_range("2020", periods=2), "o": [1, "2"], "n": [1.0, np.nan]},
            "others in 2 of the 3 columns: d .such as Timestamp.*, o .such as '2'.*"
            "missing values in 1 of the 3 columns: n .example 1",
        ),
        (
            {"a": pd.array([1, None], dtype="Int64"), "b": pd.array([None, True], dtype="boolean")},
            "missing values in 2 of the 2 columns: a .example 1., b .example 0.",
        ),
        ({"a": pd.Categorical([1, None])}, "missing values in 1 of the 1 columns: a .example 1"),
        ({"a": ["x", None]}, "others in 1 of the 1 columns: a .such as 'x'"),
        ({"a": [2**60, 2**60 + 1], "b": [0.5, 1]}, "above 2.53 lose digits.* in column a"),
        (
            {"a": pd.array([None, None], dtype="string")},
            "missing values in 1 of the 1 columns: a .example 0, 2 in all",
        ),
        (np.ma.masked_array(np.ones((2, 2)), [[0, 0], [0, 1]]), "Masked.*example 1 .*column 1"),
        ([[Decimal(1), None]], "missing values in 1 of the 2 columns: 1 .example 0"),
        ([[1, 2], [3]], "lists of different lengths"),
        ([[1, "2"]], "must be numbers"),
        (pd.DataFrame(), "N and D >= 1"),
        (sparse.csr_array((0, 3)), r"N and D >= 1. Received: shape \(0, 3\)"),
        (sparse.csr_array((3, 0)), r"Received: shape \(3, 0\)"),
        (sparse.coo_array(np.ones(3)), r"Received: shape \(3,\)"),
        (sparse.csr_array(np.eye(2) * 1j), "dtype complex128"),
    ],
)
def test_all_columns_that_are_no_numbers_are_named_together(values, message):
    with pytest.raises(ValueError, match=message):
        features(values)


def test_whole_numbers_that_float64_cannot_tell_apart_are_refused():
    x = np.array([[2**60], [2**60 + 1], [2**60 + 9]])
    numbers = np.arange(3.5, 6.5)
    for arguments, name in (((x, numbers), 0), ((pd.DataFrame({"id": x[:, 0]}), numbers), "id")):
        with pytest.raises(ValueError, match=f"lose digits in float64.* in column {name}"):
            ArrayDataModule(*arguments, batch_size=1).setup()
    with pytest.raises(ValueError, match="lose digits in float64"):
        ArrayDataModule(numbers, x, batch_size=1).setup()
    # Nanoseconds of days lose nothing that matters.
    ArrayDataModule(1_700_000_000_000_000_000 + x * 0 + np.arange(3)[:, None] * 10**9, numbers,
        batch_size=1, val_fraction=0, test_fraction=0).setup()  # fmt: skip
