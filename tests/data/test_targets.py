"""One rule for what a target is, and what may be one."""

import datetime
import enum
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import torch
from example_files import ready
from scipy import sparse

from gdtrain.data import ArrayDataModule
from gdtrain.data.frames import features
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.targets import class_numbers, decide, read
from gdtrain.losses import CrossEntropy, Logistic, Loss, SquaredError

RNG = np.random.default_rng(0)
WHOLE = {"batch_size": 1, "val_fraction": 0, "test_fraction": 0}


class Poisson(Loss):
    task = "regression"
    raw_targets = True

    def forward(self, prediction, target):
        return (prediction.exp() - target.reshape(prediction.shape) * prediction).sum(1)


Colour = enum.Enum("Colour", ["RED", "BLUE"])
Word = enum.Enum("Word", {"RED": "red", "BLUE": "blue"}, type=str)
Level = enum.IntEnum("Level", ["LOW", "HIGH"], start=0)


def cycled(labels, n=12):
    return [labels[i % len(labels)] for i in range(n)]


# ---------------------------------------------------------------- whole numbers: classes or counts


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float64, object, "list"])
@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (np.arange(50) % 10, 10),  # digits
        (np.arange(260) % 26 + 1, 26),  # letters, from 1
        (np.repeat([0, 1, 2], 4), 3),
        (np.repeat([0, 1, 2], [50, 30, 10]), 3),
        (np.repeat([1, 2, 3], [9000, 900, 40]), 3),  # few of many, but no tail
        ([0] * 99 + [1], 2),
        ([3, 7, 7], 2),
        (RNG.poisson(120, 700) % 200, None),  # bikes that are rented
        (np.r_[RNG.poisson(9, 4000) + 1, np.arange(1, 30)], None),  # rings of shells
        (RNG.permutation(np.repeat(np.arange(3, 10), [6, 20, 160, 200, 90, 17, 7])), None),  # wine
        (np.minimum(RNG.poisson(0.5, 500), 9), None),  # children
        (np.minimum(RNG.poisson(2, 60), 9), None),
        (np.arange(20), None),  # one of each
        (np.arange(404) % 101, None),  # too many
        (np.arange(40) % 4 + 2, None),  # from neither 0 nor 1
        (np.arange(40) % 4 * 2, None),  # with gaps
        ([5, 5, 5], None),
    ],
)
def test_whole_numbers_of_any_type_are_classes_or_counts(values, classes, dtype):
    y = list(map(int, values)) if dtype == "list" else np.asarray(values).astype(dtype)
    found = decide(y)
    assert (None if found.classes is None else len(found.classes)) == classes
    if classes is None:
        assert found.standardize
        assert found.said.startswith("target: numbers, ")
    else:
        assert found.classes == sorted(set(map(int, values)))


def test_what_was_decided_is_said_with_the_word_that_changes_it():
    assert decide(np.arange(12) % 3).said == (
        "target: 3 classes (0, 1, 2); task=regression would make them numbers"
    )
    assert decide(np.arange(12)).said == (
        "target: numbers, 12 different whole values; task=classification would make them classes"
    )
    assert decide([0.5, 1.5]).said == "target: numbers"
    assert decide([[0.5, 1], [2, 3]]).said == "target: numbers in 2 columns"
    assert decide(cycled(["a", "b"])).said == "target: 2 classes ('a', 'b')"
    assert decide([5, 5]).said == "target: numbers, all 5"
    assert (
        decide(np.arange(12) % 3, loss=SquaredError()).said == "target: numbers, for SquaredError"
    )


# --------------------------------------------------------------------------- types and containers


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        (cycled(["no", "yes"]), ["no", "yes"]),
        ([np.str_("a"), np.str_("b")], ["a", "b"]),
        (np.array(["b", "a"]), ["a", "b"]),
        (np.array(["b", "a"], dtype=object), ["a", "b"]),
        (np.array(["b", "a"], dtype=np.dtypes.StringDType()), ["a", "b"])
        if hasattr(np.dtypes, "StringDType")
        else (["b", "a"], ["a", "b"]),
        ([Word.RED, Word.BLUE], ["blue", "red"]),
        ([Level.HIGH, Level.LOW], [0, 1]),
        ([-1.0, 1.0, 1.0], [-1, 1]),
        ([True, False], [False, True]),
        (np.array([True, False], dtype=object), [False, True]),
        (torch.tensor([True, False]), [False, True]),
        ([torch.tensor(0), torch.tensor(1)], [0, 1]),
        (torch.arange(12)[:, None] % 3, [0, 1, 2]),
        (np.arange(12)[:, None] % 3, [0, 1, 2]),
        (pd.DataFrame({"kind": np.arange(12) % 3}), [0, 1, 2]),
        (pd.Series([0, 1, 2] * 4, dtype="Int64"), [0, 1, 2]),
        (pd.Series([0, 1, 2] * 4, dtype="Float64"), [0, 1, 2]),
        (pd.Series([True, False], dtype="boolean"), [False, True]),
        (pd.Series(["a", "b"], dtype="string"), ["a", "b"]),
        (pd.Series(["b", "a"], dtype="category"), ["a", "b"]),
        (pd.Categorical([5, 7, 9, 5]), [5, 7, 9]),  # told to be categories
        (pd.Index([0, 1, 0]), [0, 1]),
        (pd.Series(pd.arrays.SparseArray([0, 1, 0])), [0, 1]),
        (np.ma.masked_array([0, 1, 0]), [0, 1]),
        (np.array([0, 1, 0], dtype=">i4"), [0, 1]),
        (np.array([0, 1, 0], dtype=np.longdouble), [0, 1]),
        (np.array([2**60, 2**60 + 1]), [2**60, 2**60 + 1]),
        ([2**63 + 1, 2], [2, 2**63 + 1]),
    ],
)
def test_labels_are_kept_as_plain_values_and_come_back(values, classes):
    data = ready(ArrayDataModule(np.zeros((len(values), 1)), values, **WHOLE))
    found = data.preprocessing.classes
    assert found == classes
    assert all(type(label) in (str, bool, int, float) for label in found)
    restored = Preprocessing.from_state_dict(data.preprocessing.state_dict())
    numbers = restored.targets(values)
    assert torch.equal(numbers, data.examples("train")[1])
    assert restored.answers(numbers).tolist() == read(values).tolist()


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ([Decimal("1.5"), Decimal(2), 3], [1.5, 2, 3]),
        ([Decimal(1), Decimal(2)] * 5, [1, 2] * 5),  # prices
        ([Fraction(1, 2), Fraction(3)], [0.5, 3]),
        (np.array([1.5, 2, 3], dtype=object), [1.5, 2, 3]),
        (pd.Series([0.5, 1.5], dtype="Float64"), [0.5, 1.5]),
        (pd.Series([0.5, 1.5], name="y").to_frame(), [0.5, 1.5]),
        (torch.tensor([0.5, 1.5], dtype=torch.bfloat16), [0.5, 1.5]),
        (torch.tensor([0.5, 1.5], requires_grad=True), [0.5, 1.5]),
        ([[0.5], [1.5]], [0.5, 1.5]),
        ([(0.5, 1), (1.5, 2)], [[0.5, 1], [1.5, 2]]),
        (pd.DataFrame({"a": [0.5, 1], "b": pd.array([4, 5], dtype="Int64")}), [[0.5, 4], [1, 5]]),
    ],
)  # fmt: skip
def test_numbers_of_any_type_are_numbers(values, numbers):
    found = decide(values)
    assert found.classes is None
    assert found.values.dtype.kind == "f"
    assert found.values.tolist() == numbers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array(["2020", "2021"], dtype="M8[D]"), "Received: date"),
        (pd.Series(pd.date_range("2020", periods=2)), "the days since one of them"),
        (pd.Series(pd.date_range("2020", periods=2, tz="UTC")), "Received: Timestamp"),
        (pd.Series(pd.period_range("2020", periods=2)), "Received: Period"),
        (np.array([1, 2], dtype="m8[s]"), "Received: time span"),
        (pd.cut(pd.Series([1, 2, 3]), 2), "Received: Interval.*y.astype\\(str\\)"),
        ([datetime.date(2020, 1, 1)] * 2, "Received: date, such as datetime.date"),
        ([b"a", b"b"], "Received: bytes, such as b'a' in example 0. y.astype\\(str\\)"),
        (np.array([b"a", b"b"]), "Received: bytes"),
        ([Colour.RED, Colour.BLUE], "Received: Colour"),
        ([1j, 2], "Received: complex"),
        (np.array([(1, 2)], dtype="i4,i4"), "Received: record"),
        ([{1}, {2}], "Received: set"),
        (["1", 1], r"one type. Received: text \('1' in example 0\) and whole number \(1 in exa"),
        ([2, True], "whole number .2 in example 0. and boolean .True in example 1"),
        (["a", None, "b", None], "none in 2 of 4 examples: 1, 3 .counted from 0"),
        (["a", float("nan")], "none in 1 of 2 examples: 1 "),
        ([1, None], "none in 1 of 2 examples: 1 "),
        (pd.Series([1, None, 2], dtype="Int64"), "none in 1 of 3 examples: 1 "),
        (pd.Series([True, None], dtype="boolean"), "none in 1 of 2 examples: 1 "),
        (pd.Series(["a", None], dtype="string"), "none in 1 of 2 examples: 1 "),
        (pd.Series(["a", None], dtype="category"), "none in 1 of 2 examples: 1 "),
        ([pd.Timestamp("2020"), pd.NaT], "none in 1 of 2 examples: 1 "),
        (np.ma.masked_array([1, 2, 3], [0, 1, 0]), "Masked.*1 of them, the first in example 1 "),
        ([1.0, np.nan, np.nan], "finite numbers. Received: nan in example 1 .*and such in 1 more"),
        ([[1.0, 2], [np.inf, 3]], "finite numbers. Received: .inf.* in example 1 "),
        ([2**70, 1], "must fit into 64 bits"),
        ([[1], [1, 2]], "as many for each example"),
        (np.zeros((2, 2, 2)), "one or several for each example.*shape .2, 2, 2."),
        (np.array(3), "one or several for each example"),
        ([], "at least one example"),
        (None, "Received: NoneType"),
        ((i for i in range(3)), "Received: generator"),
        ([["a", "b"], ["a", "c"]], "Classes must be one column"),
        (pd.DataFrame({"a": ["x"], "b": [1]}), "the columns a, b, with text"),
        ([[1, 1, 0], [0, 1, 0]], "3 columns of 0 and 1.*2 ones in example 0 .*task=regression"),
        (["a", "a"], "at least two classes. Received: 2 examples of the class 'a'"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_target_is_refused_with_its_place(values, message):
    with pytest.raises(ValueError, match=message):
        decide(values)


# ------------------------------------------------------------------------------- several columns


@pytest.mark.parametrize("dtype", [int, float, bool])
def test_one_hot_targets_are_classes(dtype):
    y = np.eye(3)[[0, 2, 2, 1]].astype(dtype)
    for values in (y, torch.from_numpy(y), sparse.csr_array(y), pd.DataFrame(y)):
        found = decide(values)
        assert found.classes == [0, 1, 2]
        assert found.values.tolist() == [0, 2, 2, 1]
    names = decide(pd.get_dummies(pd.Series(["x", "z", "z", "y"])))
    assert (names.classes, names.values.tolist()) == (["x", "y", "z"], ["x", "z", "z", "y"])
    assert decide(pd.get_dummies(pd.Series([3, 5, 3]))).values.tolist() == [3, 5, 3]
    assert class_numbers(y, ["x", "y", "z"]).tolist() == [0, 2, 2, 1]


def test_columns_of_zeros_and_ones_are_regressed_as_they_are_where_that_is_asked_for():
    y = np.array([[1, 1, 0], [0, 1, 0]] * 5)
    x = np.arange(10.0)[:, None]
    data = ready(ArrayDataModule(x, y, task="regression", **WHOLE))
    assert data.preprocessing.target_mean is None
    assert data.examples("train")[1].tolist() == y.tolist()
    assert decide(y, loss=SquaredError()).said == (
        "target: numbers in 3 columns, for SquaredError (not standardised)"
    )
    assert decide(y + 0.5, "regression").standardize


# -------------------------------------------------------------------------------- task and loss


def test_a_task_decides_then_a_loss_then_the_targets():
    counts, digits = np.arange(40), np.arange(40) % 4
    for y in (counts, digits):
        assert decide(y, "classification").classes is not None
        assert decide(y, "regression").classes is None
        assert decide(y, loss=CrossEntropy()).classes is not None
        assert decide(y, loss=SquaredError()).classes is None
        assert decide(y, "regression", CrossEntropy()).classes is None  # which then refuses
        assert decide(y, "classification", SquaredError()).classes is not None
    # Fractions are no classes for a loss; for a task they are.
    assert decide([0.5, 1.5], loss=Logistic()).classes is None
    assert decide([0.5, 1.5], "classification").classes == [0.5, 1.5]
    assert decide([False, True], loss=SquaredError()).classes is None
    with pytest.raises(ValueError, match=r"needs numbers as targets, for SquaredError.*'a'"):
        decide(["a", "b"], loss=SquaredError())
    with pytest.raises(ValueError, match=r"one column, or one-hot.*for CrossEntropy"):
        decide([[1, 1], [0, 1]], loss=CrossEntropy())
    with pytest.raises(ValueError, match="Received: task='classify'"):
        decide([0, 1], "classify")


def test_a_loss_may_want_its_targets_as_they_are():
    counts = np.arange(10) * 7
    data = ArrayDataModule(counts[:, None], counts, **WHOLE)
    data.use_loss(Poisson())
    data.setup()
    assert data.examples("train")[1].tolist() == counts.tolist()
    assert data.target_said == "target: numbers, for Poisson (not standardised)"
    assert decide(np.eye(3), loss=Poisson()).values.shape == (3, 3)


def test_labels_that_training_did_not_have_are_named():
    for values, message in (
        (["a", "c"], "Received: 'c'"),
        ([0, 5], "Received: 5"),
        ([[1, 0], [1, 1]], "one column, or one-hot in 2 columns"),
    ):
        classes = ["a", "b"] if isinstance(values[0], str) else [0, 1]
        with pytest.raises(ValueError, match=message):
            class_numbers(values, classes)


def test_a_long_label_is_shortened_in_words():
    long = "x" * 300_000
    decided = decide([long, "b"] * 40)
    assert len(decided.said) < 200
    for refused in (
        lambda: class_numbers([long], ["a", "b"]),
        lambda: Preprocessing().targets([long]),
        lambda: features(pd.DataFrame({"a": [long]})),
    ):
        with pytest.raises(ValueError, match=r"Received.*'xxx") as caught:
            refused()
        assert len(str(caught.value)) < 300
