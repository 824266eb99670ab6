"""Sparse inputs: the same numbers as dense ones, without ever making them dense."""

import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from example_files import ready, write, write_libsvm
from optimizers import through_a_file
from scipy import sparse

from gdtrain import fit
from gdtrain.data import ArrayDataModule, LIBSVMDataModule, NPYDataModule
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.sparse import SparseInputs
from gdtrain.schedules import Constant

PARTS = ("train", "val", "test")
RAW = {"standardize": False, "batch_size": 1}
FORMATS = ["csr", "csc", "coo", "lil", "dok", "bsr", "dia"]


def dense(n=60, d=9, share=0.2, seed=0):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n, d)) < share, rng.normal(size=(n, d)), 0.0)
    x[5] = 0  # an example with nothing in it
    x[7] = 1.5  # and one with everything
    return x


def labels(n=60):
    return np.arange(n) % 2


def inputs_of(x, **options):
    return SparseInputs.from_scipy(sparse.csr_array(x), **options)


# ---------------------------------------------------------------------- SparseInputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([3]),
        torch.tensor([5]),
        torch.tensor([7, 5, 7, 0, 59]),
        torch.tensor([-1, 2]),
        torch.arange(60).flip(0),
        torch.arange(60) % 3 == 1,
        torch.tensor([], dtype=torch.int64),
        slice(10, 20),
        slice(None),
        slice(40, 4, -5),
        slice(3, 3),
        np.array([4, 4]),
    ],
    ids=str,
)
def test_rows_are_those_of_the_dense_array(indices, dtype):
    x = dense()
    rows = inputs_of(x, dtype=dtype)[indices]
    key = indices.numpy() if isinstance(indices, torch.Tensor) else indices
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.from_numpy(x[key].copy()).to(dtype))


def test_an_example_that_is_not_there_is_an_error():
    with pytest.raises(IndexError):
        inputs_of(dense())[torch.tensor([60])]


def test_the_arrays_are_what_a_kernel_needs():
    # Row 0: columns 2, 0, 2 (twice); row 1: a stored zero; row 2: empty.
    matrix = sparse.csr_array(
        (np.array([1.0, 2.0, 4.0, 0.0]), np.array([2, 0, 2, 1]), np.array([0, 3, 4, 4])),
        shape=(3, 4),
    )
    inputs = SparseInputs.from_scipy(matrix)
    assert inputs.values.tolist() == [2.0, 5.0]
    assert inputs.columns.tolist() == [0, 2]
    assert inputs.row_starts.tolist() == [0, 2, 2, 2]
    assert (inputs.values.dtype, inputs.columns.dtype, inputs.row_starts.dtype) == (
        np.float32,
        np.int32,
        np.int64,
    )
    assert all(
        a.flags.c_contiguous and a.flags.writeable
        for a in (inputs.values, inputs.columns, inputs.row_starts)
    )
    assert matrix.nnz == 4  # the user's matrix is as it was
    assert matrix.indices.tolist() == [2, 0, 2, 1]
    matrix.data[:] = 9
    assert inputs[:].tolist() == [[2, 0, 5, 0], [0] * 4, [0] * 4]


def test_to_changes_the_type_of_tensors_and_values():
    x = dense()
    inputs = inputs_of(x)
    double = inputs.to("cpu", torch.float64)
    assert double.dtype == torch.float64
    assert double.values.dtype == np.float64
    np.testing.assert_array_equal(double[:].numpy(), x.astype(np.float32))
    assert inputs.to("cpu").dtype == torch.float32
    half = inputs.to("cpu", torch.bfloat16)
    assert half.values.dtype == np.float32  # NumPy has no such type
    assert torch.equal(half[:], inputs[:].bfloat16())
    assert half.is_floating_point()


def test_split_yields_every_row_once_and_so_does_that_of_a_pickled_copy():
    inputs = inputs_of(dense())
    parts = list(pickle.loads(pickle.dumps(inputs)).split(25))
    assert [len(part) for part in parts] == [25, 25, 10]
    assert torch.equal(torch.cat(parts), inputs[:])


# --------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("kind", ["array", "matrix"])
def test_every_format_of_scipy_is_taken(form, kind):
    x = dense(20)
    made = getattr(sparse, f"{form}_{kind}")(x)
    data = ready(ArrayDataModule(made, labels(20), **RAW, dtype="float64"))
    got = data.examples("train")[0]
    assert isinstance(got, SparseInputs)
    np.testing.assert_array_equal(got[:].numpy(), x[data.split["train"]])


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint16])
@pytest.mark.parametrize("x", [dense(20) != 0, np.zeros((20, 3))], ids=["some", "zeros"])
def test_whole_numbers_booleans_and_zeros_are_features(x, dtype):
    data = ready(ArrayDataModule(sparse.csr_array(x.astype(dtype)), labels(20), **RAW))
    wanted = torch.from_numpy(x[data.split["train"]]).float()
    assert torch.equal(data.examples("train")[0][:], wanted)


def test_standardising_is_refused_and_told_how_to_go_on():
    data = ArrayDataModule(sparse.csr_array(dense()), labels(), batch_size=1)
    with pytest.raises(ValueError, match=r"centring would fill.*standardize=False"):
        data.setup()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_entry_that_is_not_finite_is_named(value):
    x = dense()
    x[8, 4] = value
    with pytest.raises(ValueError, match=rf"Received: {value} in example 8 .*feature 4\."):
        ready(ArrayDataModule(sparse.csr_array(x), labels(), **RAW))
    with pytest.raises(ValueError, match=r"in example 8 "):
        Preprocessing(input_shape=[9]).inputs(sparse.csr_array(x))


def test_a_number_too_large_for_the_type_is_named():
    x = dense()
    x[7, 2] = 1e300
    with pytest.raises(ValueError, match=r"Received: inf in example \d+ .*feature 2\."):
        ready(ArrayDataModule(sparse.csr_array(x), labels(), **RAW))
    ready(ArrayDataModule(sparse.csr_array(x), labels(), **RAW, dtype="float64"))


def test_the_split_is_that_of_the_dense_data():
    x, y = dense(), labels()
    a = ready(ArrayDataModule(x, y, **RAW, dtype="float64"))
    b = ready(ArrayDataModule(sparse.csc_array(x), y, **RAW, dtype="float64"))
    assert a.split_fingerprint == b.split_fingerprint
    for part in PARTS:
        (p, r), (q, s) = a.examples(part), b.examples(part)
        assert torch.equal(p, q[:])
        assert torch.equal(r, s)
    assert (b.num_train, b.input_shape, b.num_classes) == (a.num_train, a.input_shape, 2)
    assert b.settings() == a.settings()


@pytest.mark.parametrize("sparse_train", [False, True])
def test_a_test_set_of_its_own_may_be_of_the_other_kind(sparse_train):
    x, more = dense(), dense(20, seed=1)
    kinds = (sparse.csr_array, np.asarray) if sparse_train else (np.asarray, sparse.csr_array)
    test = (kinds[1](more), labels(20))
    options = {**RAW, "standardize": not sparse_train, "dtype": "float64"}
    data = ready(ArrayDataModule(kinds[0](x), labels(), test=test, **options))
    wanted = data.preprocessing.inputs(more, torch.float64)
    assert torch.equal(data.examples("test")[0][:], wanted)


def test_another_number_of_features_is_refused():
    preprocessing = Preprocessing(input_shape=[9])
    with pytest.raises(ValueError, match=r"Expected examples of shape \(9,\).*Received: \(8,\)"):
        preprocessing.inputs(sparse.csr_array(dense(d=8)))


def test_the_state_loads_with_weights_only_and_an_older_one_is_taken():
    data = ready(ArrayDataModule(sparse.csr_array(dense()), labels(), **RAW))
    state = through_a_file(data.state_dict())
    data.load_state_dict(state)
    del state["preprocessing"]["first_feature"]
    data.load_state_dict(state)
    assert Preprocessing.from_state_dict(state["preprocessing"]).first_feature is None


def test_the_dense_array_is_never_made():
    n, d = 2000, 200_000  # 1.6 GB if it were
    rng = np.random.default_rng(0)
    columns = np.sort(rng.integers(0, d, (n, 10)), axis=1)
    matrix = sparse.csr_array(
        (np.ones(10 * n), columns.ravel(), np.arange(0, 10 * n + 1, 10)), shape=(n, d)
    )
    tracemalloc.start()
    try:
        data = ready(ArrayDataModule(matrix, labels(n), **RAW))
        assert data.examples("train")[0][torch.tensor([3, 4])].shape == (2, d)
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------- LIBSVM


def one_hot(n=60, d=40):
    """Two of forty features, and one class for each."""
    rng = np.random.default_rng(0)
    x = np.zeros((n, d), np.float32)
    x[np.arange(n), rng.integers(0, d // 2, n)] = 1
    x[np.arange(n), rng.integers(d // 2, d, n)] = 0.5
    x[0, [0, d - 1]] = 2
    return x, 2 * labels(n) - 1


@pytest.mark.parametrize("zero_based", [False, True])
@pytest.mark.parametrize("name", ["t.svm", "t.svm.gz"])
def test_a_libsvm_file_is_the_same_sparse_and_dense(tmp_path, zero_based, name):
    x, y = one_hot()
    path = write_libsvm(tmp_path / name, x, y, zero_based)
    a = ready(LIBSVMDataModule(path, sparse=False, **RAW))
    b = ready(LIBSVMDataModule(path, sparse=True, **RAW))
    assert isinstance(b.examples("train")[0], SparseInputs)
    assert a.split_fingerprint == b.split_fingerprint
    for part in PARTS:
        np.testing.assert_array_equal(a.examples(part)[0].numpy(), x[a.split[part]])
        assert torch.equal(a.examples(part)[0], b.examples(part)[0][:])
        assert torch.equal(a.examples(part)[1], b.examples(part)[1])
    assert b.preprocessing.classes == [-1.0, 1.0]
    assert b.preprocessing.first_feature == (0 if zero_based else 1)


def test_auto_is_sparse_for_few_entries_that_are_not_standardised(tmp_path):
    path = write_libsvm(tmp_path / "few.svm", *one_hot())
    x, y = dense(60, 9, share=0.4), labels()
    many = write_libsvm(tmp_path / "many.svm", x, y)

    def kept(path, **options):
        data = ready(LIBSVMDataModule(path, batch_size=1, **options))
        return isinstance(data.examples("train")[0], SparseInputs)

    assert kept(path, standardize=False)
    assert not kept(path)
    assert not kept(path, standardize=False, sparse=False)
    assert not kept(many, standardize=False)
    assert kept(many, standardize=False, sparse=True)


def test_what_would_be_too_large_dense_is_kept_sparse_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("gdtrain.data.files._DENSE_BYTES", 1000)
    path = write_libsvm(tmp_path / "t.svm", dense(60, 9, share=0.4), labels())
    assert isinstance(ready(LIBSVMDataModule(path, **RAW)).examples("train")[0], SparseInputs)
    for options in ({"batch_size": 1}, {**RAW, "sparse": False}):
        with pytest.raises(ValueError, match=r"60 examples of 9 features.*standardize=false"):
            ready(LIBSVMDataModule(path, **options))


def test_a_float64_module_reads_float64(tmp_path):
    (tmp_path / "t.svm").write_text("1 1:0.1\n-1 9:0.3\n" * 3)
    for stay in (True, False):
        data = ready(LIBSVMDataModule(tmp_path / "t.svm", **RAW, sparse=stay, dtype="float64"))
        assert set(data.examples("train")[0][:].unique().tolist()) <= {0.0, 0.1, 0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse": True}, "sparse=true needs standardize=false"),
        ({"sparse": "yes"}, "sparse must be true, false or auto. Received: sparse='yes'"),
        ({"sparse": 1}, "sparse must be true, false or auto. Received: sparse=1"),
    ],
)
def test_a_contradiction_is_told_before_the_file_is_read(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LIBSVMDataModule(write(tmp_path / "t.svm", "no such format"), **options)


def test_npz_of_scipy_trains_with_targets_in_a_file(tmp_path):
    x, y = one_hot()
    sparse.save_npz(tmp_path / "x.npz", sparse.coo_array(x))
    np.save(tmp_path / "y.npy", y)
    data = ready(NPYDataModule(tmp_path / "x.npz", target_path=tmp_path / "y.npy", **RAW))
    np.testing.assert_array_equal(data.examples("train")[0][:].numpy(), x[data.split["train"]])
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(ValueError, match=r"could not be read as a matrix of scipy\.sparse"):
        ready(NPYDataModule(tmp_path / "x.npz", target_path=tmp_path / "y.npy", **RAW))


def test_a_resumed_run_is_the_same_run(tmp_path):
    x, y = sparse.csr_array(dense()), labels()
    options = {"variant": "sgd", "lr": 0.1, "standardize": False, "schedule": Constant()}
    whole = fit("linear", x, y, epochs=4, **options)
    fit("linear", x, y, epochs=2, **options, directory=tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = fit("linear", x, y, epochs=4, **options, checkpoint=last)
    assert resumed.summary["updates"] == whole.summary["updates"]
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
