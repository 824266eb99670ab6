"""Data modules: where examples come from, the split, the preprocessing."""

import functools
import gzip
import pickle

import numpy as np
import pytest
import torch
from example_files import ready, write
from optimizers import through_a_file
from sklearn.datasets import load_breast_cancer, load_iris
from torchvision import datasets

from gdtrain.data import (
    ArrayDataModule,
    CSVDataModule,
    EmbeddedDataModule,
    LIBSVMDataModule,
    NPYDataModule,
    SyntheticDataModule,
    TorchvisionDataModule,
)
from gdtrain.data.preprocessing import Preprocessing

PARTS = ("train", "val", "test")
RAW = {"standardize": False, "standardize_targets": False, "dtype": "float64", "batch_size": 1}
WHOLE = {**RAW, "val_fraction": 0, "test_fraction": 0}


def table(n=40, d=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), np.arange(n) % 2


@functools.cache
def known(name):
    """An embedded set, prepared once for all tests that only look at it."""
    return ready(EmbeddedDataModule(name, split_seed=3))


# --------------------------------------------------------------------- embedded sets


@pytest.mark.parametrize(
    ("name", "total", "shape", "classes"),
    [
        ("digits", 1797, (1, 8, 8), list(range(10))),
        ("breast_cancer", 569, (30,), ["benign", "malignant"]),
        ("wine", 178, (13,), ["class_0", "class_1", "class_2"]),
        ("iris", 150, (4,), ["setosa", "versicolor", "virginica"]),
        ("diabetes", 442, (10,), None),
    ],
)
def test_embedded_sets_are_known_and_split_by_class_and_their_state_loads(
    name, total, shape, classes
):
    data = known(name)
    assert data.count("test") == round(0.2 * total)
    assert data.count("val") == round(0.1 * total)
    assert data.num_train == data.count("train")
    assert data.input_shape == shape
    assert data.preprocessing.classes == classes
    assert data.num_classes == (None if classes is None else len(classes))
    assert data.num_targets == 1
    x, y = data.examples("train")
    assert x.dtype == torch.float32
    assert y.dtype == (torch.float32 if classes is None else torch.int64)
    # Each example is in one part, in ascending order.
    assert sorted(data.split) == sorted(PARTS)
    together = np.concatenate([data.split[part] for part in PARTS])
    assert sorted(together.tolist()) == list(range(total))
    assert all((np.diff(data.split[part]) > 0).all() for part in PARTS)
    if classes is not None:
        counts = [torch.bincount(data.examples(part)[1], minlength=len(classes)) for part in PARTS]
        for part in counts:
            assert (part - part.sum() / total * sum(counts)).abs().max() < 2
    state = through_a_file(data.state_dict())
    data.load_state_dict(state)
    assert Preprocessing.from_state_dict(state["preprocessing"]).classes == classes


def test_embedded_labels_stay_with_their_examples():
    x, y = load_iris(return_X_y=True)
    data = ready(EmbeddedDataModule("iris", **RAW))
    for part in PARTS:
        inputs, targets = data.examples(part)
        np.testing.assert_array_equal(inputs.numpy(), x[data.split[part]])
        np.testing.assert_array_equal(targets.numpy(), y[data.split[part]])


# ----------------------------------------------------------------------------- split


def test_the_split_depends_on_split_seed_alone():
    def split(**options):
        data = ready(EmbeddedDataModule("wine", **options))
        return data.split_fingerprint, {k: v.tolist() for k, v in data.split.items()}

    assert split() == split(seed=5, batch_size=1, standardize=False, dtype="float64")
    assert split(split_seed=1) == split(split_seed=1)
    assert split(split_seed=1)[0] != split()[0]
    assert split(split_seed=1)[1] != split()[1]
    assert split(val_fraction=0.2)[0] != split()[0]


@pytest.mark.parametrize(
    ("val", "test", "sizes"),
    [
        (0.1, 0.2, (70, 10, 20)),
        (0.25, 0, (75, 25, 0)),
        (0, 0, (100, 0, 0)),
        (7, 13, (80, 7, 13)),
        (1, 1, (98, 1, 1)),
        (49, 50, (1, 49, 50)),
    ],
)
def test_fractions_and_counts_set_the_sizes(val, test, sizes):
    x, y = table(100)
    data = ready(ArrayDataModule(x, y, batch_size=1, val_fraction=val, test_fraction=test))
    assert tuple(data.count(part) for part in PARTS) == sizes
    assert (list(data.val_dataloader()) == []) == (sizes[1] == 0)
    assert (list(data.test_dataloader()) == []) == (sizes[2] == 0)


def test_a_class_of_one_example_is_a_class_wherever_it_falls():
    x, _ = table(30)
    for row in range(30):
        y = np.where(np.arange(30) == row, 2, np.arange(30) % 2)
        data = ready(ArrayDataModule(x, y, task="classification", batch_size=1))
        assert data.num_classes == 3
        assert sum(data.count(part) for part in PARTS) == 30


def test_set_up_twice_is_set_up_once_and_full_is_the_whole_training_part():
    data = ready(ArrayDataModule(*table(), batch_size="full"))
    first = data.examples("train")[0]
    data.setup("fit")
    assert data.examples("train")[0] is first
    assert data.examples_per_update == data.num_train == 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "whole number of at least 1, or full. Received: batch_size=0"),
        ({"batch_size": 2.0}, "Received: batch_size=2.0"),
        ({"batch_size": True}, "Received: batch_size=True"),
        ({"batch_size": "all"}, "or full. Received: batch_size='all'"),
        ({"micro_batch_size": 0}, "micro_batch_size must be a whole number"),
        ({"val_fraction": -0.1}, "val_fraction must be a fraction.*val_fraction=-0.1"),
        ({"test_fraction": 1.5}, "Received: test_fraction=1.5"),
        ({"test_fraction": float("nan")}, "Received: test_fraction=nan"),
        ({"dtype": "float16"}, "dtype must be float32 or float64. Received: dtype='float16'"),
    ],
)
def test_an_option_out_of_range_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        ArrayDataModule(*table(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 29}, "at most 28, the number of training examples.*batch_size=29"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leave nothing of 40 examples to train on"),
        ({"val_fraction": 50}, "val_fraction=50 and test_fraction=0.2 leave nothing"),
    ],
)
def test_data_too_few_for_the_options_are_refused(options, message):
    data = ArrayDataModule(*table(), **options)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            data.setup()


def test_another_split_or_order_is_refused_on_resuming():
    def state(**options):
        data = ready(EmbeddedDataModule("iris", **{"batch_size": 4, **options}))
        return data, data.state_dict()

    _, saved = state()
    for options in ({"split_seed": 1}, {"val_fraction": 0.2}):
        with pytest.raises(ValueError, match="another split of the data"):
            state(**options)[0].load_state_dict(saved)
    for options in ({"batch_size": 5}, {"seed": 1}, {"sampling": "sequential"}):
        with pytest.raises(ValueError, match="batch_size=4, sampling=reshuffle and seed=0"):
            state(**options)[0].load_state_dict(saved)
    state(updates_per_sweep=3, micro_batch_size=2)[0].load_state_dict(saved)


# --------------------------------------------------------------------- preprocessing


def test_features_are_standardised_with_the_training_part_alone():
    x = load_breast_cancer().data
    data = ready(EmbeddedDataModule("breast_cancer", dtype="float64"))
    train = x[data.split["train"]]
    for part in PARTS:
        wanted = (x[data.split[part]] - train.mean(0)) / train.std(0)
        np.testing.assert_allclose(data.examples(part)[0].numpy(), wanted, rtol=1e-10, atol=1e-12)


def assert_standardised(values, axes):
    wanted = torch.zeros(values.shape[1]).double()
    torch.testing.assert_close(values.mean(axes), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(values.std(axes, correction=0), wanted + 1, atol=1e-12, rtol=0)


def test_images_are_standardised_by_channel():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(20, 3, 4, 5)) * [[[1]], [[10]], [[100]]] + [[[0]], [[5]], [[-50]]]
    data = ready(ArrayDataModule(images, np.arange(20) % 2, batch_size=1, dtype="float64"))
    assert data.preprocessing.mean.shape == (3, 1, 1)
    assert_standardised(data.examples("train")[0], (0, 2, 3))


@pytest.mark.parametrize("columns", [1, 2])
def test_target_columns_are_standardised_each_and_answers_undoes_it(columns):
    x, _ = table()
    y = np.c_[x @ [1.0, 2.0, 3.0] * 10 + 5, x[:, 0] - 100][:, :columns]
    data = ready(ArrayDataModule(x, y, batch_size=1, dtype="float64"))
    assert data.num_targets == columns
    assert_standardised(data.examples("train")[1].reshape(-1, columns), 0)
    for part in PARTS:
        answers = data.preprocessing.answers(data.examples(part)[1].reshape(-1, columns))
        np.testing.assert_allclose(answers.reshape(-1, columns), y[data.split[part]], rtol=1e-12)


def test_what_is_not_standardised_stays_as_it_is_and_comes_back():
    x, _ = table()
    data = ready(ArrayDataModule(x, x[:, 0] * 7, **WHOLE))
    inputs, targets = data.examples("train")
    np.testing.assert_array_equal(inputs.numpy(), x)
    np.testing.assert_array_equal(targets.numpy(), x[:, 0] * 7)
    np.testing.assert_array_equal(data.preprocessing.answers(targets.unsqueeze(1)), x[:, 0] * 7)


@pytest.mark.parametrize("make", ["features", "images", "regression"])
def test_preprocessing_comes_back_from_plain_containers(make):
    rng = np.random.default_rng(0)
    shape = (12, 2, 3, 3) if make == "images" else (12, 4)
    x = rng.normal(2, 3, size=shape)
    y = rng.normal(size=12) if make == "regression" else np.array(["a", "b", "c"] * 4)
    known = {"feature_names": list("abcd") if x.ndim == 2 else None}
    known["classes"] = None if make == "regression" else ["a", "b", "c"]
    learnt = Preprocessing.learn(x, y, **known)
    state = learnt.state_dict()
    for value in state.values():
        assert value is None or isinstance(value, list | torch.Tensor)
    other = Preprocessing.from_state_dict(through_a_file(state))
    before = x.copy()
    assert torch.equal(other.inputs(x, torch.float64), learnt.inputs(x, torch.float64))
    np.testing.assert_array_equal(x, before)  # the raw array is as it was
    assert torch.equal(other.targets(y), learnt.targets(y))
    assert other.classes == learnt.classes
    assert other.feature_names == learnt.feature_names
    decided = torch.zeros(2, 1) if make == "regression" else torch.tensor([0, 1])
    np.testing.assert_array_equal(other.answers(decided), learnt.answers(decided))
    # Images may come flat; but another number of features is none.
    assert torch.equal(learnt.inputs(x.reshape(12, -1)), learnt.inputs(x))
    with pytest.raises(ValueError, match=r"Expected examples of shape .* Received: \(5,\)"):
        learnt.inputs(np.zeros((5, 5)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_no_number_is_named_by_row_and_column_of_the_source(bad):
    x, y = table()
    for row in (0, 17, 39):
        spoilt = x.copy()
        spoilt[row, 1] = bad
        with pytest.raises(ValueError, match=rf"{bad} in example {row} \(.*feature 1"):
            ready(ArrayDataModule(spoilt, y, batch_size=1))


# ------------------------------------------------------------------------- synthetic


def test_without_noise_least_squares_gives_the_true_weights():
    data = ready(SyntheticDataModule(200, 6, noise=0, condition=100, dtype="float64"))
    for part in ("train", "test"):
        x, y = (t.numpy() for t in data.examples(part))
        found = np.linalg.lstsq(np.c_[x, np.ones(len(x))], y, rcond=None)[0]
        np.testing.assert_allclose(found[:-1], data.true_weights.numpy(), atol=1e-12)
        assert found[-1] == pytest.approx(data.true_bias, abs=1e-12)


def test_the_covariance_and_the_noise_are_those_that_were_asked():
    options = {"noise": 0.5, "condition": 1000, "dtype": "float64", "val_fraction": 0}
    data = ready(SyntheticDataModule(40_000, 4, **options))
    x, y = data.examples("train")
    eigenvalues = np.linalg.eigvalsh(np.cov(x.numpy().T))
    np.testing.assert_allclose(eigenvalues, [1e-3, 1e-2, 1e-1, 1], rtol=0.05)
    residual = y - x @ data.true_weights - data.true_bias
    assert residual.std().item() == pytest.approx(0.5, rel=0.03)


def test_synthetic_data_depend_on_data_seed_alone():
    def draw(**options):
        return ready(SyntheticDataModule(50, 3, **options)).examples("train")[0]

    assert torch.equal(draw(), draw(seed=4))
    assert not torch.equal(draw(), draw(data_seed=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples must be a whole number of at least 1"),
        ({"num_features": 0}, "Received: num_features=0"),
        ({"noise": -1.0}, r"noise must be a number in \[0, ∞\). Received: noise=-1.0"),
        ({"condition": 0.5}, r"condition must be a number in \[1, ∞\)"),
        ({"noise": float("nan")}, r"noise must be a number in \[0, ∞\)"),
    ],
)
def test_synthetic_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SyntheticDataModule(**arguments)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (EmbeddedDataModule, "digits, breast_cancer, wine, iris, diabetes"),
        (TorchvisionDataModule, "mnist, fashion_mnist, cifar10"),
    ],
)
def test_an_unknown_name_is_told_with_those_that_are_known(make, names):
    with pytest.raises(ValueError, match=rf"name must be one of {names}\. Received: 'boston'"):
        make("boston")


# ---------------------------------------------------------------------------- arrays


def test_a_test_set_of_its_own_takes_nothing_from_the_others():
    x, y = table()
    more, labels = table(15, seed=1)
    data = ready(ArrayDataModule(x, y, test=(more, labels), **{**RAW, "val_fraction": 0.1}))
    assert [len(data.examples(part)[0]) for part in PARTS] == [36, 4, 15]
    np.testing.assert_array_equal(data.examples("test")[0].numpy(), more)
    np.testing.assert_array_equal(data.examples("test")[1].numpy(), labels)


@pytest.mark.parametrize(
    ("inputs", "targets", "options", "message"),
    [
        (np.zeros((4, 2)), np.zeros(3), {}, "4 examples and 3 targets"),
        (np.array([["a"], ["b"]]), np.zeros(2), {}, r"Inputs must be numbers.*dtype <U1"),
        (np.zeros((0, 2)), np.zeros(0), {}, r">= 1\. Received: shape \(0, 2\)"),
        (np.float64(3), np.zeros(1), {}, r"Received: shape \(\)"),
        (np.zeros((4, 0)), np.zeros(4), {}, r"Inputs must be numbers.*shape \(4, 0\)"),
        (np.zeros((4, 2)), np.zeros(4), {"task": "ranking"}, "task must be auto.*'ranking'"),
        (
            np.zeros((2, 2)),
            np.array(["a", "b"]),
            {"task": "regression"},
            "needs numbers as targets",
        ),
    ],
)
def test_arrays_that_do_not_fit_are_refused(inputs, targets, options, message):
    with pytest.raises(ValueError, match=message):
        ready(ArrayDataModule(inputs, targets, **WHOLE, **options))


# ------------------------------------------------------------------------------- NPY


@pytest.mark.parametrize("column", [0, 1, -3, None])
def test_npy_takes_the_column_that_is_named_as_target_or_the_last(tmp_path, column):
    x, _ = table()
    np.save(tmp_path / "t.npy", x)
    options = {} if column is None else {"target": column}
    inputs, targets = ready(NPYDataModule(tmp_path / "t.npy", **options, **WHOLE)).examples("train")
    place = -1 if column is None else column
    np.testing.assert_array_equal(targets.numpy(), x[:, place])
    np.testing.assert_array_equal(inputs.numpy(), np.delete(x, place, axis=1))


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (np.zeros((4, 3)), {"target": 3}, r"a column 3 for the target.*shape \(4, 3\)"),
        (np.zeros((4, 3)), {"target": -4}, "a column -4 for the target"),
        (np.zeros((4, 1, 2, 2)), {}, r"target_path must name a file.*shape \(4, 1, 2, 2\)"),
        (np.zeros(4), {}, r"shape \(4,\)"),
        (np.zeros((4, 1)), {}, r"Inputs must be numbers.*\(4, 0\)|no feature"),
        (np.array([["a", "1"]] * 4), {}, "Inputs must be numbers"),
        (np.array([[1, None]] * 4, dtype=object), {}, "could not be read as an array"),
    ],
)
def test_npy_says_what_is_wrong_with_an_array(tmp_path, array, options, message):
    np.save(tmp_path / "t.npy", array)
    with pytest.raises(ValueError, match=message):
        ready(NPYDataModule(tmp_path / "t.npy", **WHOLE, **options))


def test_npy_refuses_other_files(tmp_path):
    np.savez(tmp_path / "t.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"must hold one array \(\.npy\)\. Received: several"):
        ready(NPYDataModule(tmp_path / "t.npz", **WHOLE))
    with pytest.raises(ValueError, match="could not be read as an array"):
        ready(NPYDataModule(write(tmp_path / "t.npy", "no array"), **WHOLE))


# ---------------------------------------------------------------------------- LIBSVM


ONE, ZERO = "1 1:1 3:2\n-1 2:2\n", "1 0:1 2:2\n-1 1:2\n"  # counted from 1, and from 0


@pytest.mark.parametrize(
    ("train", "test", "kept", "said"),
    [
        (ONE, "1 2:5\n-1 1:6\n", [[0, 5, 0], [6, 0, 0]], None),
        (ZERO, "1 1:5\n-1 1:6\n", [[0, 5, 0], [0, 6, 0]], None),  # the test without feature 0
        (ONE, "1 3:5 7:9\n-1 1:6 9:9\n", [[0, 0, 5], [6, 0, 0]], "2, from 7 to 9"),
        (ZERO, "1 2:5 3:9\n-1 0:6\n", [[0, 0, 5], [6, 0, 0]], "3"),
        (ONE, "1 4:9\n-1 4:8\n", [[0, 0, 0], [0, 0, 0]], "4"),
    ],
)
@pytest.mark.parametrize("sparse", [True, False])
def test_libsvm_counts_the_features_of_both_files_alike_and_leaves_out_what_training_lacks(
    tmp_path, caplog, train, test, kept, said, sparse
):
    paths = [write(tmp_path / "train.svm", train * 3), write(tmp_path / "test.svm", test)]
    data = LIBSVMDataModule(paths[0], test_path=paths[1], sparse=sparse, **WHOLE)
    with caplog.at_level("INFO", "gdtrain"):
        x, y = ready(data).examples("test")
    assert data.input_shape == (3,)
    assert x[:].tolist() == kept
    assert y.tolist() == [1, 0]
    words = f"test.svm: features that training did not have are left out: {said}."
    assert (words in caplog.text) == (said is not None)


@pytest.mark.parametrize(
    ("make", "second"),
    [(NPYDataModule, "target_path"), (LIBSVMDataModule, "test_path"), (CSVDataModule, None)],
)
def test_a_missing_file_is_named_and_a_path_left_out_is_asked_for(tmp_path, make, second):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*away\.csv"):
        make(tmp_path / "away.csv")
    with pytest.raises(ValueError, match=r"data\.path must name the file"):
        make(None)
    if second is not None:
        with pytest.raises(FileNotFoundError, match=r"away\.npy"):
            make(write(tmp_path / "t.svm", "1 1:1\n"), **{second: tmp_path / "away.npy"})


# ----------------------------------------------------------------------- torchvision


def idx(array):
    """An IDX file of unsigned bytes."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">i4").tobytes()
    return head + array.astype(np.uint8).tobytes()


def write_mnist(folder, compress=False):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    made = {}
    for part, prefix, n in (("train", "train", 30), ("test", "t10k", 12)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = np.arange(n) % 10
        for name, content in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
            path = folder / f"{prefix}-{name}-ubyte"
            if compress:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
            else:
                path.write_bytes(content)
        made[part] = (images, labels)
    return made


@pytest.mark.parametrize(
    ("name", "folder", "compress"),
    [("mnist", "MNIST", False), ("mnist", "MNIST", True), ("fashion_mnist", "FashionMNIST", False)],
)
def test_idx_files_are_read_where_torchvision_puts_them(tmp_path, name, folder, compress):
    made = write_mnist(tmp_path / folder / "raw", compress)
    options = {**WHOLE, "val_fraction": 10}
    data = TorchvisionDataModule(name, root=tmp_path, download=False, **options)
    data.prepare_data()
    data.setup()
    assert data.input_shape == (1, 28, 28)
    assert data.num_classes == 10
    assert [data.count(part) for part in PARTS] == [20, 10, 12]
    for part, rows in (("train", data.split["train"]), ("test", slice(None))):
        (inputs, targets), (images, labels) = data.examples(part), made[part]
        np.testing.assert_array_equal(inputs[:, 0].numpy(), images[rows])
        assert targets.tolist() == labels[rows].tolist()


def test_cifar10_becomes_images_with_channels_first(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    made = {}
    for name, n in (("data_batch_1", 20), ("test_batch", 10)):
        made[name] = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        content = {"data": made[name], "labels": [i % 10 for i in range(n)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": None}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    data = ready(TorchvisionDataModule("cifar10", root=tmp_path, download=False, **WHOLE))
    assert data.input_shape == (3, 32, 32)
    assert data.num_classes == 10
    for part, name in (("train", "data_batch_1"), ("test", "test_batch")):
        np.testing.assert_array_equal(
            data.examples(part)[0].flatten(1).numpy(), made[name].astype(float)
        )


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("mnist", r"train-images-idx3-ubyte.*t10k-labels-idx1-ubyte .*into .*/MNIST/raw/"),
        ("fashion_mnist", r"train-images-idx3-ubyte.*into .*/FashionMNIST/raw/"),
        ("cifar10", r"cifar-10-python\.tar\.gz"),
    ],
)
def test_missing_files_are_an_error_that_says_where_to_put_them(tmp_path, name, place):
    data = TorchvisionDataModule(name, root=tmp_path, download=False)
    with pytest.raises(FileNotFoundError, match=place) as caught:
        data.prepare_data()
    assert str(tmp_path) in str(caught.value)
    assert "download is off" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        data.setup()
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_fails_says_why_and_where_to_put_the_files(tmp_path, monkeypatch, capsys):
    def offline(self):
        print("Downloading ...")
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", offline)
    with pytest.raises(FileNotFoundError, match=r"no route to host.*MNIST/raw/"):
        TorchvisionDataModule("mnist", root=tmp_path).prepare_data()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_not_reported_as_missing(tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"mnist.*could not be read"):
        ready(TorchvisionDataModule("mnist", root=tmp_path, download=False))
