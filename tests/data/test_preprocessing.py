"""What is centred or scaled is computed in float64, from every source, and rounded afterwards."""

import numpy as np
import pandas as pd
import pytest
import torch
from example_files import ready
from scipy import sparse
from sklearn.datasets import dump_svmlight_file

from gdtrain.data import ArrayDataModule, CSVDataModule, LIBSVMDataModule, NPYDataModule
from gdtrain.data.preprocessing import Preprocessing

N = 40
T = 1.7e9 + np.arange(N)  # seconds since 1970: float32 has every 128th
Z = (np.arange(N) - 19.5) / np.arange(N).std()  # what they become
Y = 1e9 + 0.5 * np.arange(N)  # money
ALL = {"val_fraction": 0, "test_fraction": 0, "batch_size": 1}


def standardised(data):
    inputs, targets = ready(data).examples("train")
    return inputs[torch.arange(len(inputs))], targets


def written(tmp_path, source):
    if source == "csv":
        pd.DataFrame({"t": T, "y": Y}).to_csv(tmp_path / "t.csv", index=False)
        return CSVDataModule(tmp_path / "t.csv", **ALL)
    if source == "svm":
        dump_svmlight_file(T[:, None], Y, str(tmp_path / "t.svm"))
        return LIBSVMDataModule(tmp_path / "t.svm", **ALL)
    np.save(tmp_path / "x.npy", T[:, None])
    np.save(tmp_path / "y.npy", Y)
    paths = {"target_path": tmp_path / "y.npy", "memory_map": source == "mapped"}
    return NPYDataModule(tmp_path / "x.npy", **paths, **ALL)


@pytest.mark.parametrize("source", ["csv", "svm", "npy", "mapped"])
def test_files_are_standardised_in_float64(tmp_path, source):
    x, y = standardised(written(tmp_path, source))
    assert x.dtype == y.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0], Z, rtol=2e-7)
    np.testing.assert_allclose(y, Z, rtol=2e-7)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: t[:, None],
        lambda t: t,
        lambda t: t[:, None].astype(np.int64),
        lambda t: t[:, None].tolist(),
        lambda t: torch.from_numpy(t[:, None]),
        lambda t: pd.DataFrame({"t": t}),
        lambda t: pd.Series(t),
        lambda t: pd.DataFrame({"t": pd.array(t.astype(np.int64), dtype="Int64")}),
        lambda t: t[:, None, None, None] + np.zeros((1, 1, 2, 2)),  # images
    ],
    ids=["array", "column", "int64", "list", "tensor", "frame", "series", "Int64", "images"],
)
def test_arrays_are_standardised_in_float64(make):
    data = ArrayDataModule(make(T), Y, **ALL)
    x, y = standardised(data)
    np.testing.assert_allclose(x.reshape(N, -1)[:, 0], Z, rtol=2e-7)
    np.testing.assert_allclose(y, Z, rtol=2e-7)
    # New examples, and the way back.
    new = data.preprocessing.inputs(np.full((1, *x.shape[1:]), T[7]))
    np.testing.assert_allclose(new.reshape(-1)[0], Z[7], rtol=2e-7)
    np.testing.assert_allclose(data.preprocessing.answers(y[:, None]), Y, atol=1e-6)


def test_sparse_examples_are_standardised_in_float64_where_a_dense_model_meets_them():
    data = ready(ArrayDataModule(T[:, None], Y, **ALL))
    new = data.preprocessing.inputs(sparse.csr_array(T[:, None]))
    np.testing.assert_allclose(new[:, 0], Z, rtol=2e-7)


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e6, 1.7e9, -3e12])
@pytest.mark.parametrize("spread", [1e-12, 1e-3, 1.0, 1e9])
def test_a_column_is_constant_only_to_the_rounding_of_its_own_numbers(offset, spread):
    rng = np.random.default_rng(0)
    x = offset + spread * rng.normal(size=(500, 1))
    preprocessing = Preprocessing.learn(x, Y)
    if spread > 1e-14 * abs(offset):
        made = preprocessing.inputs(x, torch.float64)
        assert made.std(correction=0).item() == pytest.approx(1, rel=1e-6)
        assert abs(made.mean().item()) < 1e-3
    else:
        assert preprocessing.scale.item() == 1.0


@pytest.mark.parametrize("value", [0.1, 1e6 + 0.1, 1.7e9 + 0.3, 1e-30])
def test_a_constant_column_becomes_zero_however_many_examples_there_are(value):
    x = np.column_stack([np.full(100_000, value), np.arange(100_000)])
    preprocessing = Preprocessing.learn(x, Y)
    assert preprocessing.scale[0] == 1.0
    assert not preprocessing.inputs(x[:9])[:, 0].any()


def test_numbers_beyond_float32_may_be_standardised():
    preprocessing = Preprocessing(mean=np.array([2e200]), scale=np.array([1e200]))
    assert preprocessing.inputs(np.array([[1e200], [3e200]])).tolist() == [[-1.0], [1.0]]


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1.0, 1e100])
def test_columns_of_any_scale_are_standardised(scale):
    z = np.random.default_rng(0).normal(size=(50, 2))
    made = Preprocessing.learn(z * scale, z[:, 0] * scale)
    expected = (z - z.mean(0)) / z.std(0)
    x = made.inputs(z * scale, torch.float64)
    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-9)
    y = made.targets(z[:, 0] * scale, torch.float64)
    np.testing.assert_allclose(y, expected[:, 0], rtol=1e-9, atol=1e-9)
