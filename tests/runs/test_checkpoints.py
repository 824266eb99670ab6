"""A model made in Python is kept: in a file, in a checkpoint, in a pickle."""

import copy
import pickle
import pkgutil
import subprocess
import sys
from functools import partial

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer
from scipy.sparse import csr_array
from sklearn.datasets import load_diabetes, load_iris
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import QUIET, SILENT

import gdtrain
from gdtrain import GD, SGD, SupervisedModule
from gdtrain.data import ArrayDataModule, DatasetDataModule, EmbeddedDataModule, NPYDataModule
from gdtrain.lightning.description import describe, rebuild, structure
from gdtrain.losses import CrossEntropy, Huber, Loss, OneHotSquaredError
from gdtrain.models import CNN, MLP, Linear, resnet18
from gdtrain.models.activations import Activation
from gdtrain.runs.checkpoints import load_trained
from gdtrain.runs.run import run
from gdtrain.runs.tools import evaluate, landscape, predict_file
from gdtrain.schedules import Constant
from gdtrain.step_sizes import BarzilaiBorwein, ScheduleFree

IRIS = load_iris(return_X_y=True)
WORDS = np.array(["setosa", "versicolor", "virginica"])[IRIS[1]]


def trainer():
    """Lightning's, by itself, for one epoch."""
    return Trainer(max_epochs=1, **QUIET)


def copies(thing):
    return pickle.loads(pickle.dumps(thing)), copy.deepcopy(thing)


class Residual(nn.Module):
    """A model of the user's own."""

    def __init__(self, width=4, slope=0.1):
        super().__init__()
        self.slope = slope
        self.inner, self.out = nn.Linear(4, width), nn.Linear(width, 3)
        self.register_buffer("mask", torch.ones(width))

    def forward(self, x):
        return self.out(nn.functional.leaky_relu(self.inner(x), self.slope) * self.mask)


class Weighted(Loss):
    """A loss of the user's own, with a weight for each class."""

    task = "multiclass"

    def __init__(self, weight=(1.0, 2.0, 3.0)):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, prediction, target):
        return nn.functional.cross_entropy(prediction, target, self.weight, reduction="none")


def fit(model="mlp", X=IRIS[0], y=WORDS, **options):
    options = {"variant": "minibatch", "epochs": 2, "lr": 0.1, "progress": False, **options}
    return gdtrain.fit(model, X, y, **options)


def sequential():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, eps=1e-3), nn.LeakyReLU(0.3), nn.Dropout(0.2),
        nn.Sequential(nn.Linear(6, 3, bias=False), nn.Identity()),
    )  # fmt: skip


def images():
    return np.random.default_rng(0).random((60, 1, 8, 8)), np.arange(60) % 3


KINDS = {
    "linear": lambda: fit("linear"),
    "mlp": lambda: fit("mlp"),
    "mlp with options": lambda: fit(partial(MLP, hidden=[5, 4], activation="tanh", dropout=0.1)),
    "no bias": lambda: fit(Linear((4,), 3, bias=False)),
    "cnn": lambda: fit("cnn", *images()),
    "cnn with options": lambda: fit(partial(CNN, channels=[4], norm="batch"), *images()),
    "resnet18": lambda: fit(resnet18, *images(), epochs=1, batch_size=21),
    "sequential": lambda: fit(sequential()),
    "float64": lambda: fit(Linear((4,), 3).double(), dtype="float64"),
    "numbers": lambda: fit("linear", *load_diabetes(return_X_y=True)),
    "several": lambda: fit("linear", IRIS[0][:, :2], IRIS[0][:, 2:], loss=Huber(0.7)),
    "one hot": lambda: fit("linear", loss=OneHotSquaredError()),
    "an average": lambda: fit("linear", lr="auto", step_size=ScheduleFree(), schedule=Constant()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_answers_as_what_was_saved(tmp_path, kind):
    result = KINDS[kind]()
    again = gdtrain.load(result.save(tmp_path / "deep" / "model.pt"))
    X = images()[0] if result.data.input_shape == (1, 8, 8) else IRIS[0]
    X = {"numbers": load_diabetes().data, "several": IRIS[0][:, :2]}.get(kind, X)
    assert np.array_equal(again.predict(X), result.predict(X))
    assert again.metrics == result.metrics
    assert again.summary == result.summary
    assert again.stop == result.stop
    assert again.history == result.history
    assert again.module.loss.task == result.module.loss.task
    assert repr(again.module.loss) == repr(result.module.loss)
    assert structure(again.model) == structure(result.model)
    assert len(again.plot().axes[0].lines) == len(result.plot().axes[0].lines)
    # Plain, whole, and the only file; saved again it is the same.
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["model.pt"]
    torch.load(tmp_path / "deep" / "model.pt", weights_only=True)
    twice = gdtrain.load(again.save(tmp_path / "twice.pt"))
    assert np.array_equal(twice.predict(X), result.predict(X))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    result = fit("linear")
    path = result.save(tmp_path / "model.pt")
    before = path.read_bytes()
    result.data.preprocessing.classes = [np.datetime64("2020-01-01"), "b", "c"]
    with pytest.raises(ValueError, match="Only numbers, texts and tensors can be kept"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt"]


class Sine(Activation):
    """An activation of the user's own."""

    name = "sine"

    def forward(self, z):
        return z.sin()


def residual(shape=(4,), outputs=3):
    return Residual(5, slope=0.2)


# How it is made, what is said of it, and what is said of others that are given in its place.
OWN = {
    "class": (
        residual,
        r"own class, Residual.*model=Residual\(…\)",
        [
            (Residual(5, slope=0.3), "model.slope: 0.2 then, 0.3 now"),
            (Residual(6, slope=0.2), "model.inner: Linear"),
            (MLP((4,), 3), "model: Residual then, MLP now"),
        ],
    ),
    "activation": (
        partial(MLP, hidden=[5], activation=Sine),
        r"MLP, with something of your own.*model=MLP\(…\)",
        [(MLP((4,), 3, hidden=[5]), "model.activation: 'sine' then, 'relu' now")],
    ),
}


@pytest.mark.parametrize("kind", OWN)
def test_a_model_with_something_of_ones_own_is_given_and_filled(tmp_path, kind):
    make, asked, others = OWN[kind]
    result = fit(make, directory=tmp_path)
    last = tmp_path / "checkpoints" / "last.ckpt"
    for path in (last, result.save(tmp_path / "own.pt")):
        with pytest.raises(ValueError, match=asked):
            gdtrain.load(path)
        for given in (make, make((4,), 3)):
            again = gdtrain.load(path, model=given)
            assert np.array_equal(again.predict(IRIS[0]), result.predict(IRIS[0]))
        for other, message in others:
            with pytest.raises(ValueError, match="The model is not that of") as caught:
                gdtrain.load(path, model=other)
            assert message in str(caught.value)


def test_a_loss_of_ones_own_class_is_given_and_filled(tmp_path):
    result = fit("linear", loss=Weighted((3.0, 1.0, 2.0)))
    path = result.save(tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own class, Weighted.*loss=Weighted\(…\)"):
        gdtrain.load(path)
    again = gdtrain.load(path, loss=Weighted())
    assert again.module.loss.weight.tolist() == [3.0, 1.0, 2.0]


class Subclass(nn.Linear):
    pass


def hooked():
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda *_: None)
    return nn.Sequential(layer)


def tied():
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.ReLU(), layer)


def patched():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "described"),
    [
        (sequential, True),
        (lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", bias=False)), True),
        (lambda: nn.Sequential(nn.Conv2d(2, 4, (3, 1), groups=2, padding_mode="reflect")), True),
        (lambda: nn.Sequential(nn.ConvTranspose2d(2, 2, 2, stride=2)), True),
        (lambda: nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(1, (1, 2))), True),
        (lambda: nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm((2,)), nn.RMSNorm(2)), True),
        (lambda: nn.Sequential(nn.Softplus(2.0), nn.GELU("tanh"), nn.PReLU()), True),
        (lambda: nn.Sequential(nn.Softmax(1), nn.ZeroPad2d(1), nn.Upsample(scale_factor=2)), True),
        (lambda: nn.Bilinear(2, 3, 4), True),
        (lambda: Linear((3,), 2, init="zeros").double(), True),
        (lambda: nn.Linear(2, 2).bfloat16(), True),
        (lambda: nn.Linear(2, 2).requires_grad_(False), True),
        (lambda: Subclass(2, 2), False),
        (lambda: nn.Sequential(Subclass(2, 2)), False),
        (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), False),
        (lambda: nn.LSTM(2, 3), False),
        (hooked, False),
        (tied, False),
        (patched, False),
        (lambda: nn.ModuleList([nn.Linear(2, 2)]), False),
    ],
)  # fmt: skip
def test_what_is_described_is_built_again_with_the_same_outputs(make, described):
    model = make()
    state = torch.get_rng_state()
    found = describe(model)
    assert torch.equal(state, torch.get_rng_state())
    assert (found is not None) == described
    if found is None:
        return

    def build(node):
        node = dict(node)
        return pkgutil.resolve_name(node.pop("_target_"))(**node)

    again = rebuild(found, build)
    again.to(next((p.dtype for p in model.parameters()), None))
    again.load_state_dict(model.state_dict())
    assert structure(again) == structure(model)


# ---------------------------------------------------------------------- checkpoints of Python


def test_the_checkpoints_of_fit_are_loaded_and_taken_by_the_commands(tmp_path):
    X = pd.DataFrame(IRIS[0], columns=["a", "b", "c", "d"])
    result = fit("mlp", IRIS[0], directory=tmp_path / "run")
    last, best = (tmp_path / "run" / "checkpoints" / f"{n}.ckpt" for n in ("last", "best"))
    again = gdtrain.load(last)
    assert np.array_equal(again.predict(IRIS[0]), result.predict(IRIS[0]))
    assert again.metrics == result.metrics
    assert again.stop == result.stop
    assert again.history.train == result.history.train
    X.to_csv(tmp_path / "new.csv", index=False)
    np.save(tmp_path / "new.npy", IRIS[0])
    kept = result.save(tmp_path / "kept.pt")
    for path in (last, best, kept):
        output = tmp_path / f"{path.name}.csv"
        assert predict_file(path, tmp_path / "new.npy", output) == 150
        expected = gdtrain.load(path).predict(IRIS[0])
        assert pd.read_csv(output)["prediction"].tolist() == expected.tolist()
        with pytest.raises(ValueError, match="trained on arrays in Python"):
            evaluate(path)
        with pytest.raises(ValueError, match="trained on arrays in Python"):
            landscape(path, tmp_path / "pictures")
    (tmp_path / "run" / "summary.json").unlink()
    alone = gdtrain.load(last)
    assert (alone.metrics, alone.stop, alone.summary["updates"]) == ({}, None, 8)
    assert alone.plot().axes[0].get_title() == "minibatch: loss"


@pytest.mark.parametrize("source", ["embedded", "npy"])
def test_a_run_of_built_objects_is_evaluated_where_its_data_have_a_name(tmp_path, source):
    data = EmbeddedDataModule("iris", batch_size=20)
    if source == "npy":
        np.save(tmp_path / "table.npy", np.column_stack(IRIS))
        data = NPYDataModule(tmp_path / "table.npy", batch_size=20, val_fraction=0.2)
    module = SupervisedModule(MLP((4,), 3, hidden=[4]), CrossEntropy(), partial(SGD, lr=0.1))
    result = run(module, data, trainer=partial(Trainer, max_epochs=2, **SILENT))
    metrics = evaluate(result.save(tmp_path / "kept.pt"))
    assert metrics.keys() == {"loss/test", "metric/accuracy/test"}
    for tag, value in metrics.items():
        assert value == pytest.approx(result.metrics[tag], rel=1e-6)


def test_lightnings_own_checkpoints_are_loaded(tmp_path):
    X = torch.tensor(IRIS[0], dtype=torch.float32)
    loader = DataLoader(TensorDataset(X, torch.tensor(IRIS[1])), batch_size=50)
    module = SupervisedModule(sequential(), CrossEntropy(), partial(SGD, lr=0.1))
    lightning = trainer()
    lightning.fit(module, loader, loader)
    lightning.save_checkpoint(tmp_path / "own.ckpt")
    again = gdtrain.load(tmp_path / "own.ckpt")
    module.eval()
    assert np.array_equal(again.predict(IRIS[0]), module(X).argmax(1).numpy())


# ---------------------------------------------------------------------- pickles and copies

CASES = {
    "sgd": lambda: fit("mlp", variant="sgd", epochs=1),
    "gd": lambda: fit("linear", variant="gd", epochs=20, lr="auto"),
    "minibatch": lambda: fit("mlp", lr="auto"),
    "eager": lambda: fit("mlp", engine="eager"),
    "average": lambda: fit("linear", lr="auto", step_size=ScheduleFree(), schedule=Constant()),
    "module": lambda: fit(sequential()),
}


@pytest.mark.parametrize("case", CASES)
def test_results_are_pickled_and_copied(tmp_path, case):
    result = CASES[case]()
    joblib.dump(result, tmp_path / "result")
    for again in (*copies(result), joblib.load(tmp_path / "result")):
        assert np.array_equal(again.predict(IRIS[0]), result.predict(IRIS[0]))
        assert again.summary == result.summary
        # A copy trains on as any module: here from where it is.
        trainer().fit(again.module, datamodule=again.data)
        assert again.module.updates > 0
        assert result.predict(IRIS[0]).shape == (150,)


def test_a_pickle_gives_the_same_predictions_in_a_new_process(tmp_path):
    result = fit("mlp")
    with open(tmp_path / "result.pickle", "wb") as file:
        pickle.dump(result, file)
    path = result.save(tmp_path / "result.pt")
    code = (
        "import pickle, sys, gdtrain\n"
        "from sklearn.datasets import load_iris\n"
        "X = load_iris().data\n"
        "a = pickle.load(open(sys.argv[1], 'rb')).predict(X)\n"
        "b = gdtrain.load(sys.argv[2]).predict(X)\n"
        "assert (a == b).all()\n"
        "print(','.join(a))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "result.pickle"), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout.strip().split(",") == result.predict(IRIS[0]).tolist()


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return torch.tensor([i / 60.0, 1.0]), i % 3


def mapped(folder):
    np.save(folder / "x.npy", IRIS[0])
    np.save(folder / "y.npy", IRIS[1])
    options = {"target_path": folder / "y.npy", "memory_map": True, "batch_size": 10}
    return NPYDataModule(folder / "x.npy", **options)


SOURCES = {
    "arrays": lambda _: ArrayDataModule(*IRIS, batch_size=10),
    "sparse": lambda _: ArrayDataModule(
        csr_array(IRIS[0] * (IRIS[0] > 2)), IRIS[1], batch_size=10, standardize=False
    ),
    "mapped": mapped,
    "dataset": lambda _: DatasetDataModule(Numbers(), batch_size=10, num_workers=0),
}


@pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
@pytest.mark.parametrize("kind", SOURCES)
def test_data_modules_are_pickled_and_copied_after_training(tmp_path, kind):
    data = SOURCES[kind](tmp_path)
    data.setup()
    module = SupervisedModule(
        Linear(data.input_shape, data.num_classes), CrossEntropy(), partial(SGD, lr=0.1)
    )
    trainer().fit(module, datamodule=data)
    for again in copies(data):
        assert again.split_fingerprint == data.split_fingerprint
        pairs = zip(again.evaluation_loader("train"), data.evaluation_loader("train"), strict=True)
        assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)
        trainer().fit(module, datamodule=again)


@pytest.mark.parametrize("rule", [BarzilaiBorwein(), ScheduleFree()])
def test_optimizers_with_rules_are_pickled_and_copied(rule):
    theta = nn.Parameter(torch.tensor([4.0, -1.0]))
    made = GD if isinstance(rule, BarzilaiBorwein) else SGD
    optimizer = made([theta], step_size=rule)

    def step(p, o):
        def closure():
            o.zero_grad()
            value = (p**2 * torch.tensor([1.0, 3.0])).sum()
            value.backward()
            return value

        o.step(closure)

    for _ in range(3):
        step(theta, optimizer)
    pairs = copies((theta, optimizer))
    step(theta, optimizer)
    for p, o in pairs:
        step(p, o)
        assert torch.equal(p, theta)


def test_an_unpickled_module_with_an_optimizer_keeps_its_parameters_together():
    model = MLP((4,), 3, hidden=[3])
    module = SupervisedModule(model, CrossEntropy(), SGD(model.parameters(), lr=0.1))
    trainer().fit(module, datamodule=EmbeddedDataModule("iris", batch_size=50))
    for again in copies(module):
        held = {id(p) for g in again.configure_optimizers().param_groups for p in g["params"]}
        assert held == {id(p) for p in again.model.parameters()}


def test_a_loaded_model_is_the_start_of_another_run(tmp_path):
    first = fit("mlp", epochs=3)
    again = gdtrain.load(first.save(tmp_path / "first.pt"))
    second = fit(again.model, epochs=1, lr=1e-9)
    assert second.metrics["loss/train"] == pytest.approx(first.metrics["loss/train"], rel=1e-4)
    assert isinstance(load_trained(tmp_path / "first.pt").module.model, MLP)
    assert second.model.training
