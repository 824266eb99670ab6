import gzip
import json
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import throughput
import torch
from contenders import Timing, scikit_learn
from sklearn.linear_model import LogisticRegression, SGDClassifier
from sklearn.metrics import log_loss
from throughput import ROWS, Bench
from torch import nn

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def bench():
    x, y = throughput.synthetic_images(200, side=8, classes=4)
    return Bench(
        x,
        y,
        (1, 8, 8),
        partial(throughput.synthetic_a9a, 60, 12, 3),
        repetitions=2,
        seconds=0.01,
        passes=2,
        sparse_passes=3,
    )


# (baseline, ratio that is asked for) of each row.
ASKED = {
    "mlp-1": [("plain Lightning", 100), ("plain torch loop", 25)],
    "mlp-1-momentum": [("plain Lightning", 25)],
    "logistic": [("scikit-learn", 1.5)],
    "svm": [("scikit-learn", 1.5)],
    "a9a": [("scikit-learn", 1)],
    "cnn-1": [("plain Lightning", 4)],
    "custom-1": [("plain Lightning", 15)],
    "mlp-64": [("plain Lightning", 4), ("plain torch loop", 1.6)],
    "mlp-full": [
        ("plain Lightning", 3),
        ("plain torch, resident tensor", 1),
        ("plain torch, resident tensor", None),
        ("half of the examples", 0.8),
    ],
    "cnn-64": [("plain torch loop", 1.1)],
    "logging": [("the same without a logger", 1 / 1.05)],
}


def test_every_row_is_tested():
    assert set(ROWS) == {*ASKED, "softmax"}


def no_compilation(engine):
    return "eager" if engine == "compiled" else engine


@pytest.mark.parametrize("name", ASKED)
def test_rows(bench, name, monkeypatch):
    fit = throughput.fit
    monkeypatch.setattr(
        throughput,
        "fit",
        lambda *a, engine="auto", **k: fit(*a, engine=no_compilation(engine), **k),
    )
    monkeypatch.setattr(throughput, "in_child", lambda *_: (3_000_000, 64))
    rows = ROWS[name](bench)
    assert [(row.against, row.asked) for row in rows] == ASKED[name]
    for row in rows:
        assert row.engine in ("eager", "native", "compiled")
        numbers = row.numbers()
        json.dumps(numbers, allow_nan=False)
        if row.unit != "MB":
            repetitions = 4 if name == "logging" else 2
            assert len(numbers["baseline_repetitions"]) == repetitions
            assert len(numbers["ours_repetitions"]) == repetitions
        if name in ("mlp-1", "mlp-1-momentum", "custom-1"):
            assert row.details["live_relus"] >= 0.3


def test_softmax_compares_at_equal_loss(bench):
    rows = throughput.softmax(bench)
    assert [row.asked for row in rows] == [5, 5]
    details = rows[1].details
    ours, theirs = (
        details["ours_normalised_and_one_vs_all"],
        details["theirs_normalised_and_one_vs_all"],
    )
    assert ours[0] <= theirs[0]
    assert ours[1] <= theirs[1]
    assert rows[0].baseline == rows[1].baseline


def test_softmax_says_when_there_is_no_equal_loss(bench, monkeypatch):
    monkeypatch.setattr(
        throughput,
        "class_losses",
        lambda s, y, one_vs_all: (0.1,) * 2 if one_vs_all else (0.2,) * 2,
    )
    (row,) = throughput.softmax(bench)
    assert "none" in row.note


# ---------------------------------------------------------------------------- data


def test_synthetic_images_look_like_digits_and_can_be_learnt():
    x, y = throughput.synthetic_images(3000)
    assert x.shape == (3000, 784)
    assert x.dtype == np.float32
    assert 0.16 < (x > 0).mean() < 0.22
    assert x.min() == 0
    assert x.max() <= 1
    assert np.bincount(y).min() > 200
    model = SGDClassifier(random_state=0).fit(x[:2000], y[:2000])
    assert model.score(x[2000:], y[2000:]) > 0.9
    again = throughput.synthetic_images(3000)
    assert np.array_equal(x, again[0])


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_files(tmp_path, packed):
    pixels = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    for name, array in (("train-images-idx3-ubyte", pixels), ("train-labels-idx1-ubyte", [7, 2])):
        array = np.asarray(array, np.uint8)
        content = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
        content += array.tobytes()
        if packed:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (tmp_path / name).write_bytes(content)
    x, y = throughput.mnist(tmp_path)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, pixels.reshape(2, -1) / 255, rtol=1e-6)
    assert y.tolist() == [7, 2]


def test_synthetic_a9a_has_its_shape():
    x, y = throughput.synthetic_a9a(500)
    assert x.shape == (500, 123)
    assert x.dtype == np.float32
    assert x.has_canonical_format
    assert (np.diff(x.indptr) == 14).all()
    assert set(x.data) == {1}
    assert 0.2 < y.mean() < 0.28
    assert LogisticRegression(C=1).fit(x, y).score(x, y) > 0.8


def test_a9a_file(tmp_path):
    path = tmp_path / "a9a"
    path.write_text("-1 3:1 123:1 \n+1 1:1 \n")
    x, y = throughput.a9a(path)
    assert x.shape == (2, 123)
    assert x.dtype == np.float32
    scikit_learn(x, y, loss="log_loss", lr=0.1, weight_decay=0.0, epochs=1)  # takes it as it is
    assert (x.toarray().nonzero()[1] == [2, 122, 0]).all()
    assert y.tolist() == [0, 1]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the data")
def test_the_real_files():
    x, y = throughput.a9a(SHARED / "libsvm" / "a9a.gz")
    assert x.shape == (32_561, 123)
    assert y.sum() == 7841
    x, y = throughput.mnist(SHARED / "mnist")
    assert x.shape == (60_000, 784)
    assert y.max() == 9


# ---------------------------------------------------------------------------- measures


def test_class_losses_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    scores, y = rng.normal(size=(6, 3)), np.arange(6) % 3
    q = 1 / (1 + np.exp(-scores))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    own = np.eye(3, dtype=bool)[y]
    expected = {
        True: (
            log_loss(y, q / q.sum(1, keepdims=True)),
            -np.log(np.where(own, q, 1 - q)).sum(1).mean(),
        ),
        False: (log_loss(y, p), -np.log(np.where(own, p, 1 - p)).sum(1).mean()),
    }
    for one_vs_all, values in expected.items():
        found = throughput.class_losses(torch.from_numpy(scores), torch.from_numpy(y), one_vs_all)
        np.testing.assert_allclose(found, values, rtol=1e-12)
    sure = throughput.class_losses(torch.tensor([[800.0, 0, -800]]), torch.tensor([0]), False)
    np.testing.assert_allclose(sure, (0.0, 0.0), atol=1e-12)


def test_live_share_and_its_limit(bench):
    model = nn.Sequential(nn.Linear(1, 4, bias=False), nn.ReLU())
    model[0].weight.data = torch.tensor([[1.0], [-1.0], [-1.0], [-1.0]])
    assert throughput.live_share(model, torch.ones(3, 1)) == 0.25
    dead = bench.mlp()
    dead.layers[1].bias.data.fill_(-100.0)
    with pytest.raises(ValueError, match="Only 0% of the hidden units"):
        throughput.check_live(bench, Timing(1.0, 1, 1.0, 1, dead), [])


@pytest.mark.parametrize("ours", [True, False])
def test_memory_of_a_full_batch_is_measured(ours):
    peak, micro = throughput.full_batch_peak(ours, 512, (1, 8, 8), 4, "cpu", 1)
    assert peak >= 1
    assert 1 <= micro <= 512


# ---------------------------------------------------------------------------- the command


def test_command(tmp_path, monkeypatch, capsys):
    small = partial(throughput.synthetic_images, side=28, classes=3)
    monkeypatch.setattr(throughput, "synthetic_images", lambda n: small(300))
    path = tmp_path / "figures.json"
    arguments = "--only mlp-64,cnn-64 --repetitions 1 --seconds 0.01 --json"
    assert throughput.main([*arguments.split(), str(path)]) == 0
    content = json.loads(path.read_text())
    assert [row["asked"] for row in content["rows"]] == [4, 1.6, 1.1]
    assert content["environment"]["options"]["repetitions"] == 1
    out = capsys.readouterr().out
    assert "plain torch loop" in out
    assert "1.6×" in out


def test_what_was_measured_before_an_error_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "synthetic_images", lambda n: (np.ones((1, 784)), np.ones(1)))
    rows = [throughput.Row("work", "theirs", [2.0], [1.0])]
    monkeypatch.setattr(
        throughput, "ROWS", {"good": lambda bench: rows, "bad": lambda bench: 1 / 0}
    )
    path = tmp_path / "figures.json"
    with pytest.raises(ZeroDivisionError):
        throughput.main(["--json", str(path)])
    assert [row["work"] for row in json.loads(path.read_text())["rows"]] == ["work"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "mlp"], "mlp-64"),
        (["--mnist", "nowhere"], "neither nowhere/train-images-idx3-ubyte nor"),
        (["--a9a", "nowhere"], "no file nowhere"),
        (["--device", "abacus"], "abacus cannot be used"),
        (["--engine", "steam"], "invalid choice"),
    ],
)
def test_wrong_options_are_told(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(throughput, "synthetic_images", lambda n: (None, None))
    with pytest.raises(SystemExit) as stopped:
        throughput.main(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
