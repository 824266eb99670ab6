"""Runs in Python: exact counts, resumed runs, summaries, what a run leaves."""

import json
from functools import cache, partial

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Callback, Trainer, seed_everything
from sklearn.datasets import load_diabetes, load_digits, load_iris
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from watched_runs import QUIET, SILENT, Losses, StopAt

import gdtrain
from gdtrain import SGD, SupervisedModule
from gdtrain.callbacks import BestAndLast, LossCurves
from gdtrain.cli.composition import compose
from gdtrain.data import ArrayDataModule, EmbeddedDataModule
from gdtrain.losses import (
    CrossEntropy,
    Hinge,
    Logistic,
    OneHotSquaredError,
    SquaredError,
    SquaredHinge,
)
from gdtrain.models import CNN, MLP, Linear
from gdtrain.runs.run import run
from gdtrain.runs.train import build
from gdtrain.schedules import Constant, Cosine, ReduceOnPlateau

IRIS = load_iris(return_X_y=True)


def trainer(max_epochs=1, **options):
    """Lightning's, by itself."""
    return Trainer(max_epochs=max_epochs, **QUIET, **options)


def make(batch_size=1, dropout=0.5, schedule=None, momentum=0.9, **options):
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("iris", batch_size=batch_size, **options)
    module = SupervisedModule(
        MLP((4,), 3, hidden=[8], dropout=dropout),
        CrossEntropy(),
        partial(SGD, lr=0.05, momentum=momentum),
        schedule if schedule is not None else Cosine(),
    )
    return module, data


def train(module, data, folder=None, checkpoint=None, callbacks=(), **arguments):
    return run(
        module,
        data,
        trainer=partial(Trainer, **{"max_epochs": 3, **SILENT, **arguments}),
        callbacks=[LossCurves(), *([BestAndLast] if folder else []), *callbacks],
        directory=folder,
        checkpoint=checkpoint,
    )


class Notes(Callback):
    """Notes what a function of the module, its outputs and the batch gives after each block."""

    def __init__(self, note):
        self.note, self.found = note, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found += self.note(pl_module, outputs, batch)


def examples_seen():
    return Notes(lambda module, outputs, batch: batch.tolist())


def same_state(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


@pytest.mark.parametrize(("batch_size", "per_epoch"), [(1, 105), (16, 7), ("full", 1)])
def test_updates_are_counted_and_are_the_same_whatever_the_sweep(batch_size, per_epoch):
    states = []
    for updates_per_sweep in (1, 7, 64):
        module, data = make(batch_size, updates_per_sweep=updates_per_sweep)
        result = train(module, data)
        assert module.trainer.global_step == module.updates == 3 * per_epoch
        assert result.summary["updates"] == 3 * per_epoch
        assert result.summary["examples_seen"] == 3 * 105
        assert result.summary["stop_reason"] == "BUDGET"
        states.append(module.model.state_dict())
    assert same_state(states[0], states[1])
    assert same_state(states[0], states[2])


def test_max_steps_counts_updates():
    module, data = make(updates_per_sweep=64)
    result = train(module, data, max_epochs=-1, max_steps=130)
    assert result.summary["updates"] == module.trainer.global_step == 130
    assert module.total_updates == 130


def test_schedule_is_evaluated_at_each_update():
    module, data = make(16, updates_per_sweep=4, momentum=0)
    result = train(module, data)
    expected = 0.05 * Cosine()(torch.arange(21), total=21)
    assert result.history.array("train", "lr") == pytest.approx(expected.tolist(), rel=1e-12)
    assert result.history.array("train", "update").tolist() == list(range(1, 22))


@cache
def whole_run(batch_size):
    seen = examples_seen()
    result = train(*make(batch_size, updates_per_sweep=10), callbacks=[seen])
    return result, seen.found


def curves(result):
    parts = result.history.train, result.history.val
    return [{k: v for k, v in part.items() if k != "seconds"} for part in parts]


@pytest.mark.parametrize("batch_size", [1, 16, "full"])
@pytest.mark.parametrize("stop", [1, 40, 105, 150])
def test_a_resumed_run_is_the_same_run(tmp_path, batch_size, stop):
    result, seen = whole_run(batch_size)
    total = {1: 315, 16: 21, "full": 3}[batch_size]
    stop = max(1, stop * total // 315)
    half, data = make(batch_size, updates_per_sweep=10)
    first = examples_seen()
    train(half, data, tmp_path / "half", callbacks=[first, StopAt(stop)])
    assert half.updates == stop
    rest, data = make(batch_size, updates_per_sweep=10)
    torch.manual_seed(1234)  # whatever the generators were at, the checkpoint decides
    second = examples_seen()
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    resumed = train(rest, data, tmp_path / "rest", last, callbacks=[second])

    assert first.found + second.found == seen
    assert same_state(result.model.state_dict(), rest.model.state_dict())
    assert resumed.summary["updates"] == total
    assert resumed.summary["metrics"] == result.summary["metrics"]
    assert curves(resumed) == curves(result)


def test_a_run_resumed_from_its_best_checkpoint_is_the_same_run(tmp_path):
    whole, data = make(16)
    train(whole, data, tmp_path / "whole", max_epochs=6)
    checkpoints = tmp_path / "whole" / "checkpoints"
    state = torch.load(checkpoints / "best.ckpt", weights_only=True)
    if state["gdtrain"]["updates"] < 42:
        again, data = make(16)
        train(again, data, tmp_path / "again", checkpoints / "best.ckpt", max_epochs=6)
        assert same_state(whole.model.state_dict(), again.model.state_dict())
    again, data = make(16)
    with pytest.raises(ValueError, match="has made all its 42 updates"):
        train(again, data, None, checkpoints / "last.ckpt", max_epochs=6)
    # Twice as many epochs with the rate that a constant schedule keeps: training goes on.
    longer, data = make(16, schedule=Constant())
    train(longer, data, tmp_path / "longer", max_epochs=3)
    further, data = make(16, schedule=Constant())
    last = tmp_path / "longer" / "checkpoints" / "last.ckpt"
    train(further, data, tmp_path / "further", last, max_epochs=6)
    assert further.updates == 42


def test_the_best_checkpoint_of_a_resumed_run_is_the_best_of_the_whole(tmp_path):
    def climbing():
        seed_everything(0, verbose=False)
        data = EmbeddedDataModule("iris", batch_size=16)
        optimizer = partial(SGD, lr=0.05, maximize=True)  # the first validation is the best
        return SupervisedModule(Linear((4,), 3), CrossEntropy(), optimizer), data

    for name, callbacks in (("whole", ()), ("half", (StopAt(21),))):
        train(*climbing(), tmp_path / name, callbacks=callbacks, max_epochs=6)
    last = tmp_path / "half" / "checkpoints" / "last.ckpt"
    train(*climbing(), tmp_path / "rest", last, max_epochs=6)
    states = [
        torch.load(tmp_path / name / "checkpoints" / "best.ckpt", weights_only=True)
        for name in ("whole", "rest")
    ]
    assert states[0]["gdtrain"]["updates"] == states[1]["gdtrain"]["updates"] == 7
    assert same_state(states[0]["state_dict"], states[1]["state_dict"])


def test_the_last_update_is_validated_whatever_the_interval(tmp_path):
    for epochs, expected in ((5, [5]), (15, [10, 15]), (20, [10, 20])):
        module, data = make("full")
        result = train(
            module, data, tmp_path / str(epochs), max_epochs=epochs, check_val_every_n_epoch=10
        )
        assert result.history.val["update"] == expected
        assert (tmp_path / str(epochs) / "checkpoints" / "best.ckpt").exists()


def test_a_second_fit_of_a_module_starts_its_counts_anew():
    module, data = make(16)
    for _ in range(2):
        result = train(module, data)
        assert result.summary["updates"] == 21
        assert result.summary["examples_seen"] == 315


def test_validate_and_predict_work_outside_fit():
    module, data = make(16)
    lightning = trainer()
    lightning.fit(module, datamodule=data)
    assert lightning.validate(module, datamodule=data, verbose=False)[0]["loss/val"] > 0
    X, y = data.examples("test")
    answers = lightning.predict(module, DataLoader(TensorDataset(X, y), batch_size=10))
    assert torch.cat(answers).shape == y.shape


def test_double_precision_is_double_throughout():
    seed_everything(0, verbose=False)
    data = EmbeddedDataModule("diabetes", batch_size="full", dtype="float64")
    module = SupervisedModule(Linear((10,), 1, init="zeros"), SquaredError(), partial(SGD, lr=0.1))
    result = train(module, data, max_epochs=2, precision="64-true")
    X, y = (t.double() for t in data.examples("train"))
    w, b, losses = torch.zeros(10).double(), torch.zeros(1).double(), []
    for _ in range(2):
        error = X @ w + b - y
        losses.append(0.5 * error.square().mean().item())
        w, b = w - 0.1 * X.T @ error / len(y), b - 0.1 * error.mean()
    assert result.history.train["loss"] == pytest.approx(losses, rel=1e-14)
    final = 0.5 * (X @ w + b - y).square().mean().item()
    assert result.metrics["loss/train"] == pytest.approx(final, rel=1e-14)


def test_a_plateau_schedule_is_resumed(tmp_path):
    def plateau():
        return ReduceOnPlateau(gamma=0.5, patience=0, threshold=0.5)

    whole, data = make(16, schedule=plateau())
    train(whole, data, max_epochs=6)
    assert whole.schedule.factor < 1
    half, data = make(16, schedule=plateau())
    train(half, data, tmp_path, callbacks=[StopAt(21)], max_epochs=6)
    rest, data = make(16, schedule=plateau())
    train(rest, data, None, tmp_path / "checkpoints" / "last.ckpt", max_epochs=6)
    assert rest.schedule.factor == whole.schedule.factor
    assert same_state(whole.model.state_dict(), rest.model.state_dict())


def test_checkpoints_are_plain_and_the_best_has_the_lowest_validation_loss(tmp_path):
    module, data = make()
    result = train(module, data, tmp_path, max_epochs=8)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt"]
    updates = {
        path.stem: torch.load(path, weights_only=True)["gdtrain"]["updates"]
        for path in folder.iterdir()
    }
    best = int(np.argmin(result.history.array("val", "loss/val")))
    assert updates == {"best": result.history.val["update"][best], "last": 840}


def test_a_pair_of_tensors_from_any_loader_is_one_update():
    X, y = map(torch.tensor, IRIS)
    dataset = TensorDataset(X.float(), y)
    module = SupervisedModule(Linear((4,), 3), CrossEntropy(), partial(SGD, lr=0.05), Cosine())
    lightning, in_order = trainer(2), DataLoader(dataset, batch_size=50)
    lightning.fit(module, DataLoader(dataset, batch_size=16, shuffle=True), in_order)
    assert lightning.global_step == module.total_updates == 20
    assert module.examples_seen == 300
    assert lightning.callback_metrics["metric/accuracy/val"] > 0.5
    (tested,) = lightning.test(module, in_order, verbose=False)
    assert tested.keys() == {"loss/test", "metric/accuracy/test"}


def test_own_module_own_metrics_and_frozen_parameters():
    from torchmetrics.classification import MulticlassF1Score

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    module = SupervisedModule(
        model, CrossEntropy(), partial(SGD, lr=0.1), metrics={"f1": MulticlassF1Score(3)}
    )
    result = train(module, EmbeddedDataModule("iris", batch_size=8))
    assert torch.equal(before, model[0].weight)
    assert "metric/f1/test" in result.metrics


def test_weight_decay_spares_biases_unless_asked():
    module, _ = make()
    for decay_biases, expected in ((False, [2, 2]), (True, [4])):
        module.decay_biases = decay_biases
        groups = module.configure_optimizers().param_groups
        assert [len(group["params"]) for group in groups] == expected
    norm = SupervisedModule(CNN((1, 8, 8), 10, norm="batch"), CrossEntropy(), partial(SGD, lr=1.0))
    decayed, exempt = norm.configure_optimizers().param_groups
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in exempt["params"]} == {1}


def test_events_and_csv_hold_the_curves(tmp_path):
    result = gdtrain.fit("mlp", *IRIS, epochs=2, directory=tmp_path)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    tags = {"lr", *(f"loss/{part}" for part in ("train", "val", "test"))}
    tags |= {f"metric/accuracy/{part}" for part in ("val", "test")}
    tags |= {f"by_sample/loss/{part}" for part in ("train", "val")}
    assert tags <= set(events.Tags()["scalars"])
    for tag in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(tag)]
        assert min(steps) > 0
        if not tag.startswith("by_millisecond/"):
            assert steps[-1] == (2 if tag.startswith("by_epoch/") else 210)
    by_update, by_sample = (events.Scalars(tag) for tag in ("loss/train", "by_sample/loss/train"))
    assert [e.step for e in by_update] == result.history.train["update"] == list(range(1, 211))
    assert [e.step for e in by_sample] == result.history.train["examples"]
    assert [e.value for e in by_update] == pytest.approx(result.history.train["loss"], rel=1e-6)
    assert "custom_scalars__config__" in events.Tags()["tensors"]
    table = pd.read_csv(tmp_path / "metrics.csv")
    train_rows = table.dropna(subset="loss/train")
    assert train_rows["step"].tolist() == result.history.train["update"]
    assert train_rows["examples"].tolist() == result.history.train["examples"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    asked = "variant updates examples_seen fit_seconds stop_reason metrics versions"
    assert set(asked.split()) <= summary.keys()
    split = np.load(tmp_path / "split.npz")
    assert sorted(np.concatenate([split[k] for k in split.files]).tolist()) == list(range(150))


def test_fit_predicts_labels_and_numbers_in_their_own_units():
    digits = load_digits()
    names = np.array([f"digit {i}" for i in digits.target])
    result = gdtrain.fit("cnn", digits.images[:, None], names, variant="minibatch", epochs=5)
    flat = result.predict(digits.data[:50])
    assert (flat == result.predict(digits.images[:50, None])).all()
    assert (flat == names[:50]).mean() > 0.8
    X, y = load_diabetes(return_X_y=True)
    result = gdtrain.fit("linear", X, y, variant="gd")
    assert np.abs(result.predict(X) - y).mean() == pytest.approx(43, abs=2)
    assert result.metrics["metric/mae/train"] == pytest.approx(43, abs=2)
    figure = result.plot(by="examples")
    assert figure.axes[0].get_xlabel() == "examples seen"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "newton"}, "variant must be gd, sgd or minibatch"),
        ({"variant": "sgd", "batch_size": 32}, "Use variant='minibatch'"),
        ({"variant": "gd", "batch_size": 32}, "averages all examples"),
        ({"variant": "minibatch", "batch_size": 500}, "at most 105"),
        ({"lr": 0.0}, r"lr must be a number in \(0, ∞\).*Or set lr='auto'"),
        ({"lr": float("nan")}, r"lr must be a number in \(0, ∞\)"),
        ({"epochs": 0}, "epochs must be"),
        ({"model": "transformer"}, "model must be one of"),
        ({"model": "cnn"}, "is for images"),
        ({"loss": SquaredError(), "task": "classification"}, "use loss=cross_entropy"),
        ({"loss": CrossEntropy(), "task": "regression"}, "use loss=squared_error"),
        ({"val_fraction": -0.1}, "val_fraction must be"),
        ({"sampling": "sorted"}, "sampling must be one of"),
        ({"checkpoint": "missing.ckpt"}, "There is no checkpoint"),
        ({"momentum": -1.0}, "Invalid momentum value"),
        ({"model": nn.Linear(7, 3)}, "does not take examples of shape"),
        ({"model": nn.Linear(4, 2)}, "integer labels 0 … 1"),
    ],
)
def test_fit_refuses_with_one_message(arguments, message):
    model = arguments.pop("model", "mlp")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        gdtrain.fit(model, *IRIS, **arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not a checkpoint", "cannot be read"), (None, "no checkpoint of gdtrain")],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, message):
    path = tmp_path / "other.ckpt"
    torch.save({"weights": torch.ones(1)}, path)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        train(*make(), None, path)


@pytest.mark.parametrize(
    "argument", ["val_check_interval", "limit_train_batches", "overfit_batches"]
)
def test_trainer_arguments_that_count_lightning_steps_are_refused(argument):
    module, data = make()
    with pytest.raises(ValueError, match=f"{argument} counts Lightning steps"):
        train(module, data, **{argument: 2})


def test_fast_dev_run_makes_one_update():
    module, data = make()
    lightning = Trainer(fast_dev_run=True, logger=False, **{**SILENT, "num_sanity_val_steps": None})
    lightning.fit(module, datamodule=data)
    assert lightning.global_step == module.updates == 1


def test_a_run_without_validation_or_test_parts():
    module, data = make(val_fraction=0, test_fraction=0)
    result = train(module, data)
    assert result.summary["data"]["train"] == 150
    assert set(result.metrics) == {"loss/train", "metric/accuracy/train"}


def layout(module, *_):
    weight = module.model.layers[0].weight
    return [weight.is_contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize(("batch_size", "expected"), [(16, True), (1, False)])
def test_convolutions_train_in_the_faster_layout_and_end_in_the_usual_one(batch_size, expected):
    layouts = Notes(layout)
    images = np.random.default_rng(0).random((40, 2, 8, 8))
    data = ArrayDataModule(images, np.arange(40) % 2, batch_size=batch_size)
    seed_everything(0, verbose=False)
    module = SupervisedModule(
        CNN((2, 8, 8), 2, channels=[3]), CrossEntropy(), partial(SGD, lr=0.1, momentum=0.9)
    )
    train(module, data, callbacks=[layouts], max_epochs=1)
    assert set(layouts.found) == {expected}
    assert all(p.is_contiguous() for p in module.model.parameters())


# -------------------------------------------------------------------- targets and precision


def test_seconds_since_1970_and_money_are_fitted_to_rounding():
    t = 1.7e9 + np.arange(400)
    y = 3.5 + 0.25 * (t - 1.7e9)
    for dtype, error in (("float32", 2e-5), ("float64", 1e-6)):  # of a range of 100
        options = {"variant": "gd", "epochs": 300, "val_fraction": 0.0, "dtype": dtype}
        result = gdtrain.fit("linear", t[:, None], y, progress=False, **options)
        assert {p.dtype for p in result.model.parameters()} == {getattr(torch, dtype)}
        assert {t.dtype for t in result.data.examples("train")} == {getattr(torch, dtype)}
        assert result.metrics["metric/mae/train"] < error
        assert np.abs(result.predict(t[:, None]) - y).max() < 2 * error


def test_one_switch_trains_in_float64(monkeypatch):
    X, y = load_diabetes(return_X_y=True)
    arguments = {"variant": "gd", "epochs": 2, "progress": False}

    def types(model, **more):
        result = gdtrain.fit(model, X, y, **arguments, **more)
        tensors = [*result.model.parameters(), *result.data.examples("train")]
        return {t.dtype for t in tensors}, result.predict(X[:3]).dtype

    double = ({torch.float64}, np.dtype(np.float64))
    assert types("linear", dtype="float64") == double
    assert types(nn.Linear(10, 1), dtype="float64") == double
    assert types(nn.Linear(10, 1).double()) == double
    assert types(nn.Linear(10, 1).double(), dtype="float32")[0] == {torch.float32}
    assert types("linear")[0] == {torch.float32}
    torch.set_default_dtype(torch.float64)
    try:
        assert types("linear") == double
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("word", ["", "data.dtype=float64", "trainer.precision=64-true"])
def test_one_switch_of_the_command_trains_in_float64(word):
    words = ["data=diabetes", "model=linear", "optimizer=gd", *filter(None, [word])]
    data, module = build(compose(words, None))
    dtype = torch.float64 if word else torch.float32
    assert {t.dtype for t in (*data.examples("train"), *module.parameters())} == {dtype}


def test_two_precisions_are_a_contradiction():
    words = ["data=iris", "data.dtype=float64", "trainer.precision=bf16-mixed"]
    with pytest.raises(ValueError, match=r"trainer.precision=bf16-mixed in another. Set one"):
        build(compose(words, None))


def test_the_loss_of_the_command_decides_what_the_targets_are(tmp_path):
    table = tmp_path / "t.csv"
    rows = [f"{i},{i % 3}" for i in range(30)]
    table.write_text("\n".join(["x,y", *rows]))
    words = ["data=csv", f"data.path={table}", "model=linear", "optimizer=gd"]
    for loss, classes in ((None, 3), ("cross_entropy", 3), ("squared_error", None)):
        data, _ = build(compose([*words, *([f"loss={loss}"] if loss else [])], None))
        assert data.num_classes == classes


def test_what_the_target_is_stands_once_in_the_log_of_a_run(caplog):
    caplog.set_level("INFO", logger="gdtrain")
    gdtrain.fit("linear", *IRIS, variant="gd", epochs=3, progress=False)
    said = [text for text in caplog.messages if text.startswith("target")]
    assert said == ["target: 3 classes (0, 1, 2); task=regression would make them numbers"]


def test_a_loss_decides_in_python_too():
    for loss, classes in ((SquaredError(), None), (CrossEntropy(), 3), (None, 3)):
        options = {"variant": "gd", "epochs": 2, "loss": loss, "progress": False}
        assert gdtrain.fit("linear", *IRIS, **options).data.num_classes == classes
    data, settled = (ArrayDataModule(*IRIS, batch_size=1) for _ in range(2))
    module = SupervisedModule(nn.Linear(4, 1), SquaredError(), partial(SGD, lr=0.01))
    trainer().fit(module, data)
    assert data.num_classes is None
    settled.setup()  # before anybody knew of a loss
    with pytest.raises(ValueError, match=r"SquaredError is a loss for numbers.*3 classes"):
        trainer().fit(module, settled)


class Logits(nn.Module):
    """Fixed predictions, so that a loss can be worked out by hand."""

    def __init__(self, outputs):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(outputs))

    def forward(self, x):
        return x[:, :1] * self.scale


@pytest.mark.filterwarnings("ignore:You defined a .validation_step:UserWarning")
@pytest.mark.parametrize("loss", [Logistic(), Hinge(), SquaredHinge(), OneHotSquaredError(),
                                  CrossEntropy()], ids=repr)  # fmt: skip
def test_targets_of_a_loader_of_ones_own_mean_the_same_in_any_shape(loss):
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    x = torch.linspace(-1, 1, 6)[:, None]
    outputs = 1 if loss.task == "binary" else 2
    wanted = loss(x.expand(6, outputs), labels).mean().item()
    for targets in (
        labels,
        labels[:, None],
        labels.bool(),
        labels[:, None].float(),
        nn.functional.one_hot(labels, 2),
    ):
        seen = Losses()
        module = SupervisedModule(Logits(outputs), loss, partial(SGD, lr=0.1))
        loader = DataLoader(TensorDataset(x, targets), batch_size=6)
        trainer(callbacks=[seen]).fit(module, loader)
        assert seen.seen == pytest.approx([wanted], rel=1e-6)
        module.model.scale.data.fill_(1.0)
        found = module.evaluate([(x, targets)])
        assert found["loss/train"] == pytest.approx(wanted, rel=1e-6)
        right = (loss.decide(x.expand(6, outputs)) == labels).float().mean().item()
        assert found["metric/accuracy/train"] == pytest.approx(right)


@pytest.mark.filterwarnings("ignore:You defined a .validation_step:UserWarning")
def test_labels_out_of_range_are_named_in_every_batch_of_a_loader():
    batches = [(torch.ones(2, 1), torch.tensor([0, 1])), (torch.ones(2, 1), torch.tensor([0, -1]))]
    module = SupervisedModule(nn.Linear(1, 1), Logistic(), partial(SGD, lr=0.1))
    with pytest.raises(ValueError, match=r"integer labels 0 … 1.*from -1 to 0"):
        trainer().fit(module, DataLoader(batches, batch_size=None))


def test_the_score_of_numbers_far_from_zero_is_right():
    x = torch.randn(100, 1, generator=torch.Generator().manual_seed(0))
    y = 2e4 + x[:, 0]
    module = SupervisedModule(nn.Linear(1, 1), SquaredError(), partial(SGD, lr=0.1))
    with torch.no_grad():
        module.model.weight.fill_(0.5)
        module.model.bias.fill_(2e4)
    found = module.evaluate([(x, y)])
    p = (2e4 + 0.5 * x[:, 0]).double()
    wanted = 1 - ((y - p) ** 2).sum() / ((y - y.double().mean()) ** 2).sum()
    assert found["metric/r2/train"] == pytest.approx(wanted.item(), abs=1e-3)
