"""The same update, however its examples are cut: micro-batches, files, processes, layers."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from commands import command, process
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import Trainer
from torch import nn
from torch.nn import functional as F
from watched_runs import SILENT

import gdtrain
from gdtrain import SGD, SupervisedModule
from gdtrain.callbacks import ExactBatchNorm, LossCurves
from gdtrain.data import ArrayDataModule, NPYDataModule
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.losses import CrossEntropy
from gdtrain.models import CNN, MLP, exact_batch_norm_
from gdtrain.models.dropout import Dropout, drawing
from gdtrain.objective import Objective, own_part
from gdtrain.runs.run import run


def problem(n=101, dropout=0.0, dtype=torch.float64):
    torch.manual_seed(0)
    model = MLP((5,), 3, hidden=[7], activation="tanh", dropout=dropout).to(dtype)
    return model, torch.randn(n, 5, dtype=dtype), torch.randint(0, 3, (n,))


def gradient(objective, indices, draw=0):
    value, grads = objective.value_and_grad(indices, draw)
    return torch.cat([value.reshape(1), *(g.reshape(-1) for g in grads)])


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 101), micro=st.integers(1, 101), seed=st.integers(0, 9), data=st.data())
def test_the_gradient_does_not_depend_on_the_micro_batches(count, micro, seed, data):
    model, x, y = problem()
    indices = torch.randperm(101, generator=torch.Generator().manual_seed(seed))[:count]
    loss = F.cross_entropy(model(x[indices]), y[indices])
    exact = torch.cat(
        [loss.detach().reshape(1)]
        + [g.reshape(-1) for g in torch.autograd.grad(loss, list(model.parameters()))]
    )
    ours = gradient(Objective(model, CrossEntropy(), x, y, micro), indices)
    assert torch.linalg.vector_norm(ours - exact) <= 1e-12 * torch.linalg.vector_norm(exact)


@settings(deadline=None, max_examples=40)
@given(count=st.integers(0, 200), ranks=st.integers(1, 9))
def test_the_parts_of_the_ranks_are_all_examples_once(count, ranks):
    parts = [range(*own_part(count, rank, ranks)) for rank in range(ranks)]
    assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# ---------------------------------------------------------------------- automatic micro-batches


def test_automatic_size_changes_nothing_but_the_cut():
    model, x, y = problem(n=2000)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    objective = Objective(model, CrossEntropy(), x, y, "auto")
    ours = gradient(objective, torch.arange(2000))
    assert 32 <= objective.micro_batch_size <= 2000
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    exact = gradient(Objective(model, CrossEntropy(), x, y), torch.arange(2000))
    assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (1, 10_000),  # all N
        (2**10, 2**20 // (2**10 + 2)),  # 4 MB
        (2**14, 256),  # of at most 64 MB
        (2**20, 15),  # 64 MB: at 2^20 + 2 numbers an example, not 16
    ],
)
def test_automatic_size_is_that_of_the_bytes_of_an_example(features, expected, monkeypatch):
    """A linear layer keeps its inputs, and the loss its two outputs."""

    class Mean(nn.Module):
        def forward(self, prediction, targets):
            return prediction.square().sum(1)

    x = torch.zeros(1, 1).expand(10_000, features)
    monkeypatch.setattr("time.perf_counter", lambda: pytest.fail("a clock was read"))
    sizes = {
        Objective(nn.Linear(features, 2), Mean(), x, torch.zeros(10_000), "auto").automatic_size()
        for _ in range(2)
    }
    assert sizes == {expected}


def test_m_does_not_depend_on_who_asks_first():
    """A look at all examples before the first update leaves the run's M alone."""
    model, x, y = problem(n=2000)
    sizes = set()
    for first in (3, 40, 2000):
        objective = Objective(model, CrossEntropy(), x, y, "auto")
        v = [torch.ones_like(p) for p in objective.params]
        objective.hessian_vector(torch.arange(first), v)
        sizes.add(objective.micro_batch_size)
    assert len(sizes) == 1


class Small(nn.Module):
    """A device for at most `room` examples."""

    def __init__(self, inner, room):
        super().__init__()
        self.inner, self.room, self.passes = inner, room, []

    def forward(self, x):
        if len(x) > self.room:
            raise torch.OutOfMemoryError
        self.passes.append(len(x))
        return self.inner(x)


def test_running_out_of_memory_halves_the_pass_and_loses_nothing():
    model, x, y = problem()
    exact = gradient(Objective(model, CrossEntropy(), x, y), torch.arange(101))
    small = Small(model, 20)
    objective = Objective(small, CrossEntropy(), x, y, "auto")
    objective.micro_batch_size = 101  # as if it had fitted before
    ours = gradient(objective, torch.arange(101))
    assert torch.allclose(ours, exact, rtol=1e-12, atol=1e-15)
    assert sum(small.passes) == 101
    assert objective.micro_batch_size <= 20
    with pytest.raises(torch.OutOfMemoryError):
        Objective(small, CrossEntropy(), x, y, 50).value_and_grad(torch.arange(101))
    with pytest.raises(torch.OutOfMemoryError):
        Objective(Small(model, 0), CrossEntropy(), x, y, "auto").value_and_grad(torch.arange(8))


def test_a_run_records_the_size_that_was_found_and_a_resumed_one_keeps_it(tmp_path):
    X = np.random.default_rng(0).normal(size=(1000, 5))
    options = {"variant": "gd", "epochs": 3, "micro_batch_size": "auto"}
    result = gdtrain.fit("mlp", X, X[:, 0] > 0, directory=tmp_path / "run", **options)
    assert result.summary["micro_batch_size"] >= 32
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["gdtrain"]["micro_batch_size"] == result.summary["micro_batch_size"]


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("variant", ["gd", "minibatch"])
def test_a_run_on_a_file_is_the_run_on_the_array(tmp_path, variant):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(301, 4))
    y = x @ [1.0, -2.0, 0.5, 3.0] + rng.normal(size=301)
    np.save(tmp_path / "x.npy", x)
    arrays = (x, np.load(tmp_path / "x.npy", mmap_mode="r"))
    results = [
        gdtrain.fit("linear", a, y, variant=variant, epochs=5, micro_batch_size=50, dtype="float64")
        for a in arrays
    ]
    assert isinstance(results[1].data.examples("train")[0], MappedInputs)
    assert results[0].metrics == results[1].metrics
    assert np.array_equal(results[0].predict(x), results[1].predict(arrays[1]))


def test_rows_read_piece_by_piece_are_those_of_the_file(tmp_path, monkeypatch):
    x = np.random.default_rng(0).normal(3, 5, size=(500, 7, 2)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    monkeypatch.setattr("gdtrain.data.mapped._FAULT", 4096)
    monkeypatch.setattr("gdtrain.data.mapped._RESIDENT", 3 * 4096)
    given_back = []
    monkeypatch.setattr("gdtrain.data.mapped.give_back", lambda array: given_back.append(1))
    kept = np.arange(0, 500, 2)
    preprocessing = Preprocessing.learn(x, np.zeros(500), kept)
    inputs = MappedInputs(array, kept, preprocessing, torch.float32)
    for rows in (torch.randperm(250), torch.arange(250), torch.tensor([3, 3, 249]), slice(9, 200)):
        assert torch.equal(inputs[rows], preprocessing.inputs(x[kept[rows]]))
    assert inputs[torch.arange(0)].shape == (0, 7, 2)
    # In random order nearly each row is in another block than that before; in a pass of 28 KB
    # there are seven blocks.
    assert 60 < len(given_back) < 120
    assert inputs.to("cpu", torch.float64)[torch.tensor([0])].dtype == torch.float64


def test_npy_files_are_mapped_where_the_targets_are_in_a_file_too(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((60, 3)))
    with pytest.raises(ValueError, match="memory_map=true needs the targets in a file"):
        NPYDataModule(tmp_path / "x.npy", memory_map=True)


PEAK = """
import resource, sys
import numpy as np
import gdtrain

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

y = np.arange(1_000_003, dtype=np.float32)
options = {"variant": "gd", "epochs": 1, "lr": 0.01, "val_fraction": 0, "test_fraction": 0.1}
gdtrain.fit("linear", np.random.rand(1000, 1000).astype(np.float32), y[:1000], **options)
before = peak()
array = np.load(sys.argv[1], mmap_mode="r")
result = gdtrain.fit("linear", array, y, task="regression", **options)
summary = result.summary
print(array.nbytes, peak() - before, summary["micro_batch_size"], summary["metrics"]["loss/train"])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kB on Linux only")
def test_a_full_batch_run_on_a_file_of_4_GB_needs_less_than_1_GB(tmp_path):
    path = tmp_path / "x.npy"
    array = np.lib.format.open_memmap(path, "w+", np.float32, (1_000_003, 1000))
    array[:: len(array) // 100] = 1.0  # the rest is a hole in the file, and reads as zeros
    array.flush()
    del array
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    size, peak, micro, loss = (float(word) for word in done.stdout.split())
    assert size > 4e9
    assert peak < 1e9
    assert micro < 1e6
    assert 0 < loss < 10


# ---------------------------------------------------------------------- random layers


def test_dropout_draws_the_same_whatever_the_micro_batches():
    model, x, y = problem(dropout=0.5)
    indices = torch.randperm(101, generator=torch.Generator().manual_seed(1))
    whole = gradient(Objective(model, CrossEntropy(), x, y), indices, draw=5)
    for micro in (1, 10, 100):
        part = gradient(Objective(model, CrossEntropy(), x, y, micro), indices, draw=5)
        assert torch.allclose(whole, part, rtol=1e-12, atol=1e-15)
    other = gradient(Objective(model, CrossEntropy(), x, y), indices, draw=6)
    assert not torch.allclose(whole, other)


def test_a_run_with_dropout_does_not_depend_on_the_micro_batches():
    X = np.random.default_rng(0).normal(size=(101, 5))
    mlp = partial(MLP, hidden=[16, 16], dropout=0.3)
    options = {"variant": "minibatch", "batch_size": 64, "lr": 0.1, "epochs": 10}
    whole, parts = (
        gdtrain.fit(mlp, X, X[:, 0] > 0, micro_batch_size=micro, dtype="float64", **options)
        for micro in (None, 7)
    )
    for p, q in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-10, atol=1e-13)


def test_dropout_keeps_the_right_share_independently_in_units_examples_layers_and_draws():
    x = torch.ones(200, 300)
    with drawing(1, 0):
        masks = [Dropout(0.3, layer=layer)(x) for layer in (0, 1)]
    with drawing(2, 0):
        masks.append(Dropout(0.3)(x))
    for mask in masks:
        kept = mask != 0
        assert kept.double().mean().item() == pytest.approx(0.7, abs=0.006)
        assert mask[kept].mean().item() == pytest.approx(1 / 0.7)
        assert kept.double().mean(0).std().item() == pytest.approx((0.21 / 200) ** 0.5, rel=0.15)
        assert kept.double().mean(1).std().item() == pytest.approx((0.21 / 300) ** 0.5, rel=0.15)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = ((masks[a] != 0) & (masks[b] != 0)).double().mean().item()
        assert both == pytest.approx(0.49, abs=0.008)


def test_dropout_outside_an_objective_follows_the_seed_of_torch():
    layer, x = Dropout(0.5), torch.ones(4, 50)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


# ---------------------------------------------------------------------- layers that mix examples


def normalised():
    torch.manual_seed(0)
    model = CNN((1, 8, 8), 3, channels=[4, 8], hidden=8, norm="batch").double()
    return model, torch.randn(60, 1, 8, 8).double(), torch.randint(0, 3, (60,))


def test_micro_batches_with_batch_norm_are_said_once_to_be_inexact():
    model, x, y = normalised()
    objective = Objective(model, CrossEntropy(), x, y, 16)
    with pytest.warns(UserWarning, match="Use norm=group"):
        objective.value_and_grad(torch.arange(60))
    # A further warning would be an error.
    objective.value_and_grad(torch.arange(60))
    Objective(model, CrossEntropy(), x, y, 60).value_and_grad(torch.arange(60))
    grouped = CNN((1, 8, 8), 3, norm="group").double()
    Objective(grouped, CrossEntropy(), x, y, 16).value_and_grad(torch.arange(60))


def test_exact_statistics_make_evaluation_what_one_pass_of_training_would_be():
    model, x, _ = normalised()
    for cut in (60, 7):
        assert exact_batch_norm_(model, lambda cut=cut: x.split(cut)) == 2
        with torch.no_grad():
            evaluated = model.eval()(x)
            in_training = model.train()(x)
        assert torch.allclose(evaluated, in_training, rtol=1e-10, atol=1e-12)


def test_exact_statistics_leave_modes_and_models_without_batch_norm_alone():
    grouped = CNN((1, 8, 8), 3, norm="group")
    assert exact_batch_norm_(grouped, lambda: [torch.zeros(2, 1, 8, 8)]) == 0
    model, x, _ = normalised()
    model.eval().layers[0].train()
    exact_batch_norm_(model, lambda: [x])
    assert (model.training, model.layers[0].training) == (False, True)
    with pytest.raises(ValueError, match="need examples"):
        exact_batch_norm_(model, list)


def test_the_callback_recomputes_before_the_last_checkpoint(tmp_path):
    _, x, y = normalised()
    data = ArrayDataModule(x.float(), y, batch_size=8)
    module = SupervisedModule(
        CNN((1, 8, 8), 3, channels=[4], norm="batch"), CrossEntropy(), partial(SGD, lr=0.1)
    )
    run(
        module,
        data,
        trainer=partial(Trainer, max_epochs=2, **SILENT),
        callbacks=[gdtrain.callbacks.BestAndLast, ExactBatchNorm(), LossCurves()],
        directory=tmp_path,
    )
    inputs, _ = data.examples("train")
    conv, norm = module.model.layers[0], module.model.layers[1]
    with torch.no_grad():
        expected = conv(inputs).mean(dim=(0, 2, 3))
    assert torch.allclose(norm.running_mean, expected, atol=1e-5)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.layers.1.running_mean"], norm.running_mean)


# ---------------------------------------------------------------------- processes


WORDS = (
    "data=npy",
    "data.path=x.npy",
    "data.target_path=y.npy",
    "data.val_fraction=0",
    "data.test_fraction=0.1",
    "data.dtype=float64",
    "trainer.precision=64-true",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=1000",
    "trainer.max_steps=50",
)
TWO = ("trainer=ddp", "trainer.devices=2")


def prime_files(folder):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(112, 6))  # 101 to train on
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", (x[:, 0] * x[:, 1] > 0).astype(int) + (x[:, 2] > 1))


CASES = [
    ["optimizer=gd", "optimizer.lr=0.3"],
    ["optimizer=gd", "optimizer.lr=0.3", "optimizer.momentum=0.9", "model.dropout=0.2"],
    ["optimizer=minibatch", "optimizer.lr=0.1", "data.batch_size=33"],
    ["optimizer=minibatch", "optimizer.lr=0.1", "data.batch_size=25", "optimizer.momentum=0.9",
     "data.micro_batch_size=4"],
]  # fmt: skip
# Rank 0 starts rank 1 as Lightning does, in its first run; both make all runs. In the last, a
# rank's clock is a thousand times too fast.
SCRIPT = """
import json, os, sys, time
from gdtrain.cli import train_main

*runs, last = json.loads(open("runs.json").read())
for words in (*runs, last):
    if words is last and os.environ.get("LOCAL_RANK") == "1":
        real = time.perf_counter
        time.perf_counter = lambda: 1000 * real()
    sys.argv[1:] = words
    try:
        train_main()
    except SystemExit as end:
        assert end.code == 0, (words, end.code)
"""


@pytest.mark.slow
def test_fifty_updates_on_two_ranks_are_those_on_one_and_clocks_may_differ(tmp_path):
    """Automatic sweeps are as long as time allows; what ranks agree on falls between sweeps."""
    prime_files(tmp_path)
    runs = [[*WORDS, *TWO, f"hydra.run.dir=two{i}", *words] for i, words in enumerate(CASES)]
    clocks = ["optimizer=minibatch", "data=digits", "model=linear", "data.batch_size=2"]
    clocks += ["optimizer.lr=0.01", *TWO, "trainer.accelerator=cpu", "trainer.max_epochs=2"]
    (tmp_path / "runs.json").write_text(json.dumps([*runs, clocks]))
    (tmp_path / "two_ranks.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "two_ranks.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished: all 50 updates made") == len(CASES)
    assert done.stdout.count("finished: all 1,258 updates made") == 1
    for i, words in enumerate(CASES):
        alone = command(tmp_path, "train", *WORDS, f"hydra.run.dir=one{i}", *words)
        assert alone.returncode == 0, alone.stderr
        assert alone.stdout.count("finished: all 50 updates made") == 1
        assert_same_run(tmp_path / f"one{i}", tmp_path / f"two{i}")


def assert_same_run(one, two):
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    assert [s["processes"] for s in summaries] == [1, 2]
    assert summaries[0]["data"]["train"] == 101
    for s in summaries:
        assert s["updates"] == 50
    assert summaries[0]["examples_seen"] == summaries[1]["examples_seen"]
    for tag, value in summaries[0]["metrics"].items():
        assert summaries[1]["metrics"][tag] == pytest.approx(value, rel=1e-6)
    states = [
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for run in (one, two)
    ]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-6, atol=1e-9), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "words", "message"),
    [
        (process, ["optimizer=sgd"], "One-example SGD is sequential"),  # two ranks stop
        (command, ["-m", "optimizer=gd"], "Start such runs one by one"),
    ],
)
def test_what_cannot_be_divided_over_ranks_is_refused_with_a_reason(
    tmp_path, start, words, message
):
    prime_files(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    done = start(tmp_path, "train", *WORDS, *TWO, "hydra.run.dir=run", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    left = sorted(p.name for p in tmp_path.iterdir() if p.name != "outputs")
    assert left == before
