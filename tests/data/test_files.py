"""Examples from new files: to predict from, and to evaluate on."""

import numpy as np
import pytest
from example_files import write, write_libsvm
from scipy import sparse

from gdtrain.data.files import read_features, read_labelled
from gdtrain.data.preprocessing import Preprocessing


def numbers():
    x = np.where(np.random.default_rng(0).random((30, 6)) < 0.4, 1.5, 0.0)
    x[0] = 1.0
    return x, np.arange(30) % 2


# ---------------------------------------------------------------------- read_features


@pytest.mark.parametrize("name", ["new.csv", "new.CSV", "new.txt", "new"])
def test_columns_come_in_the_order_of_training(tmp_path, name):
    path = write(tmp_path / name, "b,extra,a,y\n2,x,1,\n4,,3,\n")
    np.testing.assert_array_equal(read_features(path, ["a", "b"]), [[1, 2], [3, 4]])


def test_all_columns_and_arrays(tmp_path):
    path = write(tmp_path / "new.csv", "b,a\n2,1\n4,3\n")
    np.testing.assert_array_equal(read_features(path), [[2, 1], [4, 3]])
    np.testing.assert_array_equal(read_features(path, [" a", "b "]), [[1, 2], [3, 4]])
    path = write(tmp_path / "new.csv", "2,1\n4,3\n")
    np.testing.assert_array_equal(read_features(path, header=False), [[2, 1], [4, 3]])
    images = np.zeros((2, 1, 4, 4))
    np.save(tmp_path / "new.npy", images)
    assert read_features(tmp_path / "new.npy").shape == (2, 1, 4, 4)
    (tmp_path / "new.npy").rename(tmp_path / "new.NPY")
    assert read_features(tmp_path / "new.NPY").shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("file", "text", "names", "message"),
    [
        ("new.csv", "a\n1\n", ["a", "b"], r"new\.csv lacks the feature 'b'\. It has: 'a'\."),
        ("new.csv", "a\n1\n", ["a", *"bcd"], r"new\.csv lacks the features 'b', 'c', 'd'\. It"),
        ("new.csv", "a\nred\n", None, "column 'a', line 2: 'red', which is text"),
        ("new.csv", "a,b\n1,2\n,3\n", None, "column 'a', line 3: empty"),
        ("new.csv", "1,2\n3,4\n", ["a", "b"], "header=false takes it as one"),
        ("new.csv", "a,b,a\n1,2,3\n", ["a", "b"], "'a' in the columns 1 and 3"),
        ("new.csv", "", None, "is empty"),
        ("new.txt", "a\n1\n", None, r"must come as \.csv, \.tsv or \.npy"),
        ("new.npy", "text", None, "could not be read as an array"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, file, text, names, message):
    with pytest.raises(ValueError, match=message):
        read_features(write(tmp_path / file, text), names)


def test_a_path_that_is_no_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*away\.csv. Set input to"):
        read_features(tmp_path / "away.csv")
    with pytest.raises(ValueError, match=r"input must name a file\. Received: .*, a folder"):
        read_features(tmp_path)


def test_sparse_files(tmp_path):
    x, y = numbers()
    sparse.save_npz(tmp_path / "x.npz", sparse.csc_array(x))
    np.testing.assert_array_equal(read_features(tmp_path / "x.npz").toarray(), x)
    for name in ("x.svm", "x.libsvm.gz", "x.svmlight", "x.SVM"):
        path = write_libsvm(tmp_path / name, x, y)
        np.testing.assert_array_equal(read_features(path).toarray(), x)
    path = write_libsvm(tmp_path / "a9a", x, y)
    np.testing.assert_array_equal(read_features(path, first_feature=1).toarray(), x)
    with pytest.raises(ValueError, match=r"must come as .*, or sparse as"):
        read_features(path)


def test_features_are_counted_as_in_training(tmp_path, caplog):
    path = write(tmp_path / "new.svm", "0 1:3\n0 2:4\n")
    from_one = read_features(path, num_features=4, first_feature=1)
    from_zero = read_features(path, num_features=4, first_feature=0)
    assert from_one.toarray().tolist() == [[3, 0, 0, 0], [0, 4, 0, 0]]
    assert from_zero.toarray().tolist() == [[0, 3, 0, 0], [0, 0, 4, 0]]
    assert not caplog.records
    with caplog.at_level("INFO", "gdtrain"):
        one = read_features(path, num_features=1, first_feature=1)
    assert one.toarray().tolist() == [[3], [0]]
    assert "new.svm: features that training did not have are left out: 2." in caplog.text
    write(path, "0 0:3\n")
    with pytest.raises(ValueError, match=r"has a feature 0.*counted from 1, as in training"):
        read_features(path, num_features=4, first_feature=1)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.npz", "text", r"x\.npz could not be read as a matrix"),
        (
            "x.svm",
            "1:3 2:4\n",
            r"label at the start of each line. Received, in line 1: 1:3 2:4 Mend",
        ),
        (
            "x.svm",
            "1 1:2 # 3\n1 a:b\n",
            "whole_number:number for each feature. Received, in line 2",
        ),
        ("x.svm", "1 qid:1 2:1 1:1\n", "features of a line in ascending order, none twice"),
        (
            "x.svm",
            "1 99999999:1\n",
            "expected features from 0 to 33,554,431 in a file of this size",
        ),
        ("x.svm", "", "could not be read as LIBSVM: it has no examples"),
    ],
)
def test_what_is_wrong_with_a_sparse_file_is_said(tmp_path, name, text, message):
    with pytest.raises(ValueError, match=message):
        read_features(write(tmp_path / name, text))


# ---------------------------------------------------------------------- read_labelled

WORDS = Preprocessing(classes=["NA", "no", "yes"], feature_names=["a", "b"], input_shape=[2])
WHOLE = Preprocessing(classes=[1, 2], feature_names=["a", "b"], input_shape=[2])
DIGITS = Preprocessing(classes=["1", "2", "3+"], feature_names=["a", "b"], input_shape=[2])
PRICES = Preprocessing(feature_names=["a", "b"], input_shape=[2])


@pytest.mark.parametrize(
    ("text", "preprocessing", "target", "labels"),
    [
        ("kind,b,a\nyes,2,1\nNA,4,3\n", WORDS, None, ["yes", "NA"]),
        (",kind;b;a\n,yes;2;1\n".replace(",", "0;"), WORDS, "kind", ["yes"]),
        ("kind,b,a,extra\nyes,2,1,\nNA,4,3,x\n", WORDS, "kind", ["yes", "NA"]),
        ("b,a,kind\n2,1,2.0\n4,3,1.0\n", WHOLE, None, [2, 1]),
        ("b,a,kind\n2,1,1\n4,3,2\n", DIGITS, None, ["1", "2"]),  # text, as in training
        ("b,a,price\n2,1,7\n4,3,1e3\n", PRICES, "price", [7, 1000]),
    ],
)
def test_a_labelled_table(tmp_path, text, preprocessing, target, labels):
    x, y = read_labelled(write(tmp_path / "new.csv", text), preprocessing, target)
    assert x.tolist() == [[1, 2], [3, 4]][: len(labels)]
    assert y.tolist() == labels


@pytest.mark.parametrize(
    ("text", "preprocessing", "target", "message"),
    [
        ("a,b,y\n1,2,no\n\n3,4,maybe\n5,6,maybe\n", WORDS, None, r"new\.csv, line 4: Labels must"),
        ("a,b,y\n1,2,no\n3,4,maybe\n5,6,maybe\n", WORDS, None, "'maybe'. There are 2 of this"),
        ("a,b,y\n1,2,1\n3,4,3\n", WHOLE, None, "line 3: Labels must be among .*1, 2.*: 3"),
        ("a,b,y\n1,2,1\n3,4,x\n", WHOLE, None, "the target 'y', line 3: 'x', which is text"),
        ("a,b,y\n1,2,\n3,4,2\n", PRICES, None, "the target 'y', line 2: empty"),
        ("a,b\n1,2\n", WORDS, None, "which column has the targets.* Beside .*: none"),
        ("a,b,y,z\n1,2,no,no\n", WORDS, None, "which column has the targets.*: 'y', 'z'"),
        ("a,b,y\n1,2,no\n", WORDS, "kind", "has no column 'kind'"),
        ("a,y\n1,no\n", WORDS, None, "lacks the feature 'b'"),
    ],
)
def test_a_table_whose_labels_are_not_those_of_training(
    tmp_path, text, preprocessing, target, message
):
    with pytest.raises(ValueError, match=message):
        read_labelled(write(tmp_path / "new.csv", text), preprocessing, target)


def test_labelled_arrays_and_sparse_files(tmp_path):
    x, y = numbers()
    learnt = Preprocessing.learn(x, y, classes=[0, 1], standardize=False, first_feature=1)
    np.save(tmp_path / "y.npy", y)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "xy.npy", np.column_stack([x, y]))
    np.save(tmp_path / "yx.npy", np.column_stack([y, x]))
    sparse.save_npz(tmp_path / "x.npz", sparse.csr_array(x))
    write_libsvm(tmp_path / "x.svm", np.column_stack([x, np.ones(30)]), y)  # with one feature more
    for name, target in (
        ("x.npy", str(tmp_path / "y.npy")),
        ("xy.npy", None),
        ("yx.npy", "0"),
        ("x.npz", str(tmp_path / "y.npy")),
        ("x.svm", None),
    ):
        inputs, labels = read_labelled(tmp_path / name, learnt, target)
        np.testing.assert_array_equal(learnt.inputs(inputs)[:], x)
        np.testing.assert_array_equal(labels, y)


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("x.npz", "y.npy", r"30 examples and 7 targets"),
        ("x.npz", None, r"must come with a \.npy file of targets"),
        ("xy.npy", "9", r"must come with a \.npy file.* in column 9"),
        ("xy.npy", "xy.npy", r"one label for each example.*shape \(\d+, \d+\)"),
        ("xy.npy", None, r"example 1 \(counted from 0\): Labels must be among"),
    ],
)
def test_labelled_arrays_that_do_not_fit(name, target, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x, y = numbers()
    learnt = Preprocessing.learn(x, y, classes=[0, 1], standardize=False)
    np.save("y.npy", y[:7])
    np.save("xy.npy", np.column_stack([x, y + 1]))
    sparse.save_npz("x.npz", sparse.csr_array(x))
    with pytest.raises(ValueError, match=message):
        read_labelled(name, learnt, target)
    with pytest.raises(FileNotFoundError, match=r"away\. Set target to one that exists"):
        read_labelled(tmp_path / "xy.npy", learnt, "away")
