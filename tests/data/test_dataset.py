"""Datasets that only have `__getitem__`: every example in the plan's order, as tensors would be."""

import logging
import multiprocessing
import pickle
import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from example_files import ready
from hydra import compose, initialize_config_dir
from lightning import Trainer, seed_everything
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset, random_split
from torchvision.datasets import FakeData

import gdtrain
from gdtrain.callbacks import BestAndLast, ExactBatchNorm
from gdtrain.data import ArrayDataModule, DatasetDataModule
from gdtrain.data import dataset as under_test
from gdtrain.data.loader import IndexLoader, PairLoader
from gdtrain.lightning.module import SupervisedModule
from gdtrain.losses import CrossEntropy, SquaredError
from gdtrain.runs.configuration import conf_directory
from gdtrain.runs.result import predict
from gdtrain.runs.run import run
from gdtrain.runs.train import train as train_config
from gdtrain.schedules import Cosine

N, D, C = 50, 4, 3
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def table(n=N):
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=(n, D))).float(), torch.arange(n) % C


class Pairs(Dataset):
    """Example i is row i of two tensors; `seen` tells which were fetched in this process."""

    def __init__(self, inputs, targets, seconds=0.0):
        self.inputs, self.labels, self.seconds = inputs, targets, seconds
        self.seen = []

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        self.seen.append(i)
        if self.seconds:
            time.sleep(self.seconds)
        return self.inputs[i], self.labels[i]


class Noisy(Pairs):
    """Draws from each of the global generators."""

    def __getitem__(self, i):
        x, y = super().__getitem__(i)
        noise = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])  # noqa: NPY002
        return torch.cat([x, noise]), y


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


def epochs(data, count=1):
    """All pairs of some epochs, as a trainer would ask for them."""
    loader = data.train_dataloader()
    made = 0
    loader.plan.start = lambda: made
    pairs = []
    for _ in range(count):
        pairs.extend(loader)
        made = len(pairs)
    loader.close()
    return pairs


def trained(data, *, epochs=2, **options):
    torch.manual_seed(0)
    module = SupervisedModule(
        torch.nn.Linear(*data.input_shape, data.num_classes or data.num_targets),
        CrossEntropy() if data.num_classes else SquaredError(),
        partial(gdtrain.SGD, lr=0.1, momentum=0.9),
        Cosine(),
        engine="eager",
    )
    trainer = partial(Trainer, max_epochs=epochs, num_sanity_val_steps=0, **QUIET)
    return run(module, data, trainer=trainer, **options)


def weights(result):
    return torch.cat([p.detach().reshape(-1) for p in result.model.parameters()])


# ----------------------------------------------------------------------- the loader


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampling", ["reshuffle", "shuffle_once", "replacement", "sequential"])
def test_the_order_is_that_of_the_index_loader(sampling, workers):
    x, y = table()
    data = ready(
        DatasetDataModule(Pairs(x, y), batch_size=8, sampling=sampling, seed=3, num_workers=workers)
    )
    pairs = epochs(data, 2)
    plan = IndexLoader(N, 8, sampling=sampling, seed=3)
    order = torch.cat([plan.order(0), plan.order(1)])
    assert [len(inputs) for inputs, _ in pairs] == 2 * [8, 8, 8, 8, 8, 8, 2]
    assert torch.equal(torch.cat([inputs for inputs, _ in pairs]), x[order])
    assert torch.equal(torch.cat([targets for _, targets in pairs]), y[order])


def test_an_iteration_starts_at_the_update_that_it_is_told():
    x, y = table()
    loader = ready(DatasetDataModule(Pairs(x, y), batch_size=8, num_workers=0)).train_dataloader()
    whole = list(loader)
    loader.plan.start = lambda: 5
    for got, wanted in zip(list(loader), whole[5:], strict=True):
        assert torch.equal(got[0], wanted[0])
    loader.plan.total = 6
    assert len(list(loader)) == 1
    with pytest.raises(TypeError):  # Lightning must not fix a length
        len(loader)
    examples = pickle.loads(pickle.dumps(loader.examples))  # as workers get them
    assert torch.equal(examples[(0, [3, 1])][0], x[[3, 1]])


def test_what_is_drawn_depends_on_the_update_alone_and_moves_no_generator():
    x, y = table()

    def draws(workers, start=0):
        data = ready(DatasetDataModule(Noisy(x, y), batch_size=8, num_workers=workers, seed=1))
        loader = data.train_dataloader()
        loader.plan.start = lambda: start
        made = [inputs for inputs, _ in loader]
        loader.close()
        return torch.cat(made)

    def numbers():
        return torch.rand(()).item(), random.random(), np.random.rand()  # noqa: NPY002

    seed_everything(5, verbose=False)
    wanted = numbers()
    seed_everything(5, verbose=False)
    whole = draws(0)
    assert numbers() == wanted  # the global generators are left alone
    assert torch.equal(draws(2), whole)
    assert torch.equal(draws(0, start=4), whole[32:])
    noise = whole[:, D:]
    assert len(noise.unique()) == noise.numel()  # nothing is drawn twice
    other = ready(DatasetDataModule(Noisy(x, y), batch_size=8, num_workers=0, seed=2))
    assert not torch.equal(torch.cat([a for a, _ in epochs(other)]), whole)


def test_worker_processes_live_for_all_epochs_and_end_with_the_fit():
    x, y = table()
    data = ready(DatasetDataModule(Pairs(x, y), batch_size=8, num_workers=1))
    loader = data.train_dataloader()
    list(loader)
    before = [child.pid for child in multiprocessing.active_children()]
    list(loader)
    assert [child.pid for child in multiprocessing.active_children()] == before != []
    data.teardown("fit")
    assert multiprocessing.active_children() == []


def test_items_may_be_numbers_arrays_and_lists_and_come_several_at_once():
    class Several(list):
        def __getitems__(self, numbers):
            return [list.__getitem__(self, i) for i in numbers]

        def __getitem__(self, i):
            raise AssertionError("one by one")

    made = {
        "tensors": [(torch.tensor([i, 1.0]), torch.tensor(i % 2)) for i in range(6)],
        "arrays": [(np.array([i, 1.0]), np.int32(i % 2)) for i in range(6)],
        "lists": [[[float(i), 1.0], i % 2] for i in range(6)],
        "booleans": [(np.float32([i, 1.0]), i % 2 == 1) for i in range(6)],
        "several": Several([([float(i), 1.0], i % 2) for i in range(6)]),
    }
    for name, dataset in made.items():
        data = ready(DatasetDataModule(dataset, batch_size=6, sampling="sequential"))
        ((inputs, targets),) = epochs(data)
        assert inputs.dtype == torch.float32, name
        assert inputs.tolist() == [[float(i), 1.0] for i in range(6)], name
        assert targets.dtype == torch.int64, name
        assert targets.tolist() == [0, 1, 0, 1, 0, 1], name


def test_types_of_inputs_and_targets():
    def first(item, **options):
        data = ready(DatasetDataModule([item] * 4, batch_size=2, **options))
        inputs, targets = epochs(data)[0]
        return inputs.dtype, tuple(inputs.shape), targets.dtype, tuple(targets.shape)

    double = torch.float64
    assert first((np.zeros(3), 0.5), dtype="float64") == (double, (2, 3), double, (2,))
    assert first((1.0, np.full(2, 0.5))) == (torch.float32, (2, 1), torch.float32, (2, 2))
    image = np.zeros((1, 4, 4), np.uint8)
    assert first((image, 1.5))[:2] == (torch.float32, (2, 1, 4, 4))
    tokens = torch.tensor([3, 4])  # for an embedding
    assert first((tokens, 1.5))[:2] == (torch.int64, (2, 2))
    assert first((tokens, 2), task="regression")[2] == torch.int64


# --------------------------------------------------------------------------- set-up


def test_the_data_are_described():
    x, y = table()
    data = ready(
        DatasetDataModule(Pairs(x, y), Pairs(x[:7], y[:7]), Pairs(x[:9], y[:9]), batch_size=5)
    )
    assert [data.count(part) for part in ("train", "val", "test")] == [N, 7, 9]
    assert (data.num_train, data.input_shape, data.num_classes) == (N, (D,), C)
    assert data.preprocessing.classes == [0, 1, 2]
    regression = ready(DatasetDataModule([(x[i], x[i, :2]) for i in range(N)]))
    assert (regression.num_classes, regression.num_targets) == (None, 2)
    with pytest.raises(ValueError, match=r"fetched one by one: use evaluation_loader\('val'\)"):
        data.examples("val")


def test_fractions_are_held_out_once_for_all():
    x, y = table()

    def split(**options):
        data = DatasetDataModule(Pairs(x, y), batch_size=1, **options)
        return ready(data).split, data.split_fingerprint

    parts, fingerprint = split(val_fraction=0.1, test_fraction=9)
    assert [len(parts[name]) for name in ("train", "val", "test")] == [36, 5, 9]
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(N))
    assert split(val_fraction=0.1, test_fraction=9, seed=4)[1] == fingerprint
    assert split(val_fraction=0.1, test_fraction=9, split_seed=1)[1] != fingerprint
    assert split()[0]["train"].tolist() == list(range(N))
    own = Pairs(x[:3], y[:3])
    assert [len(p) for p in split(val=own, val_fraction=0.5, test_fraction=0.2)[0].values()] == [
        40,
        3,
        10,
    ]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_loaders_yield_their_part_in_order(num_workers, monkeypatch):
    monkeypatch.setattr(under_test, "_SLICE_BYTES", 16 * 4 * D)  # 16 examples
    monkeypatch.setattr(under_test, "_WORTH_STARTING", 0.0)
    x, y = table()
    data = ready(
        DatasetDataModule(
            Pairs(x, y),
            test_fraction=40,
            batch_size=1,
            num_workers=num_workers,
        )
    )
    loader = data.test_dataloader()
    assert len(loader) == 3
    pairs = list(loader)
    assert [len(inputs) for inputs, _ in pairs] == [16, 16, 8]
    assert torch.equal(torch.cat([inputs for inputs, _ in pairs]), x[data.split["test"]])
    assert torch.equal(torch.cat([targets for _, targets in pairs]), y[data.split["test"]])
    assert [len(a) for a, _ in data.evaluation_loader("test", batch_size=30)] == [16, 16, 8]
    assert [len(a) for a, _ in data.evaluation_loader("test", batch_size=10)] == [10] * 4
    assert list(data.val_dataloader()) == []


def test_classes_are_told_counted_or_given(caplog):
    caplog.set_level(logging.INFO, logger="gdtrain")
    x, _ = table(8)

    def classes(labels, attributes=None, **options):
        dataset = Pairs(x, torch.tensor(labels))
        for name, value in (attributes or {}).items():
            setattr(dataset, name, value)
        data = ready(DatasetDataModule(dataset, batch_size=1, **options))
        return data.num_classes, len(dataset.seen)

    labels = [0, 1, 2, 3, 0, 1, 2, 3]
    looks = classes(labels, num_classes=9)[1]
    assert classes(labels, num_classes=6) == (6, looks)
    looks += 8  # a few are looked at, 16 if there are as many
    assert "all 8 examples" not in caplog.text
    assert classes(labels) == (4, looks + 8)  # all were fetched
    assert "seen from all 8 examples" in caplog.text
    assert classes(labels, {"classes": list("abcdefg")}) == (7, looks)
    assert classes(labels, {"targets": labels}) == (4, looks)
    assert classes(labels, {"num_classes": 8}) == (8, looks)
    assert classes([0, 1, 0, 1, 0, 1, 0, 4], task="classification")[0] == 5
    assert classes([0, 1, 0, 1, 0, 1, 0, 4])[0] is None
    half = Pairs(x, torch.tensor(labels))
    half.classes = list("abcde")
    assert ready(DatasetDataModule(Subset(half, [0, 1]), batch_size=1)).num_classes == 5


@pytest.mark.parametrize(
    ("seconds", "batch_size", "cores", "workers"),
    [(0.0, 8, 4, 0), (0.002, 1, 4, 3), (0.002, 8, 1, 0), (0.002, 8, 64, 7), (0.002, 1, 64, 16)],
    ids=["cheap", "slow", "one core", "seven batches", "many cores"],
)
def test_there_are_workers_where_they_pay(seconds, batch_size, cores, workers, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="gdtrain")
    monkeypatch.setattr(under_test, "_cores", lambda: cores)
    dataset = Pairs(*table(), seconds)
    dataset.classes = [0, 1, 2]
    data = ready(DatasetDataModule(dataset, batch_size=batch_size))
    assert data.train_dataloader().num_workers == workers
    (said,) = caplog.messages
    assert data.target_said == "target: 3 classes"
    by = f"by {workers} worker process(es)" if workers else "in this process"
    assert f"The 50 training examples are fetched one by one through a DataLoader {by}" in said
    assert "examples/s" in said
    assert "ArrayDataModule" in said


# ----------------------------------------------------------------- resident tensors


def test_a_tensor_dataset_is_trained_by_index(caplog):
    caplog.set_level(logging.INFO, logger="gdtrain")
    x, y = table()
    data = ready(DatasetDataModule(TensorDataset(x, y), batch_size=5))
    assert isinstance(data.train_dataloader(), IndexLoader)
    inputs, targets = data.examples("train")
    assert inputs.data_ptr() == x.data_ptr()  # nothing is copied
    assert torch.equal(targets, y)
    assert "its tensors are used by index, as they are (not standardised)" in caplog.text


def test_subsets_of_a_tensor_dataset_are_resident_too():
    x, y = table()
    dataset = TensorDataset(x, y)
    inner = Subset(dataset, list(range(40, 0, -1)))
    train, val = random_split(inner, [30, 10], generator=torch.Generator().manual_seed(0))
    data = ready(DatasetDataModule(train, val, batch_size=5, test_fraction=4))
    for part, subset in (("val", val), ("train", train), ("test", train)):
        rows = data.split[part]
        wanted = torch.stack([subset[i][0] for i in rows])
        assert torch.equal(data.examples(part)[0], wanted)
        assert torch.equal(data.examples(part)[1], torch.stack([subset[i][1] for i in rows]))
    assert data.count("train") == 26


def test_a_resident_training_set_and_a_validation_set_that_is_not():
    x, y = table()
    for train, val in ((TensorDataset, Pairs), (Pairs, TensorDataset)):
        data = ready(DatasetDataModule(train(x, y), val(x, y), batch_size=5))
        ((inputs, _),) = data.val_dataloader()
        assert torch.equal(inputs, x)
        assert isinstance(data.train_dataloader(), PairLoader) == (train is Pairs)


def test_a_subclass_of_tensor_dataset_is_asked_for_its_items():
    class Doubled(TensorDataset):
        def __getitem__(self, i):
            x, y = super().__getitem__(i)
            return 2 * x, y

    x, y = table()
    ((inputs, _),) = epochs(ready(DatasetDataModule(Doubled(x, y), batch_size="full")))
    assert torch.equal(inputs, 2 * x)


# --------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([torch.zeros(3)], r"must be a pair \(input, target\). Received: Tensor of 3 as example 0"),
        ([(1.0, 2, 3)], "Received: tuple of 3 as example 0"),
        ([{"x": 1.0, "y": 2}], "Received: dict of 2 as example 0"),
        ([7.0], r"Received: 7\.0 as example 0"),
        ([("text", 1)], r"input of an example must be a tensor.*Received: str in example 0"),
        ([*FakeData(2, (1, 4, 4))], r"transform=torchvision\.transforms\.ToTensor\(\)"),
        ([(1.0, "text")], r"The target of an example must be a tensor.*Received: str"),
        ([(1.0, None)], "Received: NoneType"),
        ([(1.0, 0), (np.nan, 1)], r"Inputs must be finite.*in example 1 "),
        ([(1.0, 0.5), (1.0, np.inf)], r"Targets must be finite.*in example 1 "),
        ([(np.zeros(2), 0), (np.zeros(3), 1)], r"one shape, \(2,\).*Received: \(3,\) in example 1"),
        ([(1.0, 0), (1.0, -1)], r"0 … C−1\. Received: -1 as that of example 1"),
    ],
)
def test_examples_that_cannot_be_used_are_named(items, message):
    with pytest.raises(ValueError, match=message):
        epochs(ready(DatasetDataModule(items * (3 - len(items)), batch_size="full")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_wrong_example_met_in_training_is_told_alike_by_workers(workers):
    x, y = table()
    y[49] = 7
    data = ready(DatasetDataModule(Pairs(x, y), batch_size=8, num_classes=C, num_workers=workers))
    with pytest.raises(ValueError, match=r"^Labels must be whole numbers 0 … 2\. Received: 7"):
        epochs(data)


def test_tensors_are_checked_too():
    x, y = table()
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match=r"Inputs must be finite numbers.*example 3"):
        ready(DatasetDataModule(TensorDataset(x, y), batch_size=1))
    with pytest.raises(ValueError, match=r"0 … 1\. Received: 2 as that of example 2"):
        ready(DatasetDataModule(TensorDataset(table()[0], y), batch_size=1, num_classes=2))
    with pytest.raises(ValueError, match=r"pair.*Received: tuple of 1"):
        ready(DatasetDataModule(TensorDataset(y), batch_size=1))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (Stream(), {}, r"train must be a map-style Dataset.*Received: Stream"),
        (iter([]), {}, r"with __len__ and __getitem__"),
        ([], {}, "train must hold at least one example"),
        ([1], {"val": Stream()}, "val must be a map-style Dataset"),
        ([1], {"num_workers": -1}, "num_workers must be a whole number of at least 0, or a"),
        ([1], {"num_workers": True}, "Received: num_workers=True"),
        ([1], {"num_classes": 1}, "num_classes must be a whole number of at least 2, or nu"),
        ([1], {"task": "ranking"}, "task must be auto.*'ranking'"),
        ([1], {"standardize": True}, "standardize and standardize_targets must be false"),
        ([1], {"batch_size": 0}, "batch_size must be a whole number"),
        ([(0.0, 0.5)] * 4, {"batch_size": 5}, "at most 4, the number of training examples"),
        ([(0.0, 0.5)] * 4, {"val_fraction": 4}, "leave nothing of 4 examples"),
        ([(0.0, 0.5)] * 4, {"task": "classification"}, "Labels must be whole numbers"),
        (
            [(0.0, 0.5)] * 4,
            {"batch_size": 2, "micro_batch_size": "auto"},
            "micro_batch_size=auto is chosen for resident examples",
        ),
    ],
)
def test_an_argument_that_cannot_be_is_named(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        ready(DatasetDataModule(dataset, **{"batch_size": 1, **options}))


def test_what_the_dataset_itself_raises_comes_through():
    class Broken(Pairs):
        def __getitem__(self, i):
            if i == 20:  # not one that setup looks at
                raise OSError("photo20.jpg is damaged")
            return super().__getitem__(i)

    for workers in (0, 1):
        data = ready(
            DatasetDataModule(Broken(*table()), batch_size=8, num_classes=C, num_workers=workers)
        )
        with pytest.raises(OSError, match=r"photo20\.jpg is damaged"):
            epochs(data)


# -------------------------------------------------------------------------- training


@pytest.mark.parametrize(
    ("batch_size", "workers", "make"),
    [(1, 0, Pairs), (8, 0, Pairs), (8, 1, Pairs), ("full", 1, Pairs), (8, 0, TensorDataset)],
)
def test_training_is_that_of_the_same_tensors(batch_size, workers, make):
    x, y = table()
    pairs = DatasetDataModule(make(x, y), batch_size=batch_size, num_workers=workers, seed=2)
    tensors = ArrayDataModule(
        x, y, batch_size=batch_size, seed=2, standardize=False, val_fraction=0, test_fraction=0
    )
    got, wanted = (trained(ready(data)) for data in (pairs, tensors))
    assert torch.equal(weights(got), weights(wanted))
    assert got.summary["updates"] == wanted.summary["updates"]
    assert got.metrics == pytest.approx(wanted.metrics)
    rates = [r.history.array("train", "lr").tolist() for r in (got, wanted)]
    assert rates[0] == rates[1]  # the schedule knew the end
    np.testing.assert_array_equal(got.predict(x), wanted.predict(x))
    assert multiprocessing.active_children() == []


def test_micro_batches_change_no_update():
    x, y = table()
    one, other = (
        weights(trained(ready(DatasetDataModule(Pairs(x, y), batch_size=8, micro_batch_size=m))))
        for m in (None, 3)
    )
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_the_same_run(tmp_path, workers):
    """Stopped in the middle of an epoch, with noise in the examples."""
    x, y = table()

    def data(count):
        return ready(
            DatasetDataModule(
                Noisy(x, y), val_fraction=0.2, batch_size=7, num_workers=count, seed=1
            )
        )

    class Stopping(gdtrain.callbacks.Interrupt):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if pl_module.updates == 9:  # of 6 in an epoch
                trainer.should_stop = True

    whole = trained(data(0), epochs=4)
    keep = [BestAndLast, Stopping()]
    trained(data(workers), epochs=4, callbacks=keep, directory=tmp_path / "a")
    last = tmp_path / "a" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["gdtrain"]["updates"] == 9
    resumed = trained(data(workers), epochs=4, checkpoint=last)
    assert resumed.summary["updates"] == whole.summary["updates"] == 24
    assert torch.equal(weights(resumed), weights(whole))


def test_a_plain_trainer_takes_it():
    x, y = table()
    data = DatasetDataModule(Pairs(x, y), val_fraction=0.2, batch_size=8)
    module = SupervisedModule(torch.nn.Linear(D, C), CrossEntropy(), partial(gdtrain.SGD, lr=0.1))
    options = {"logger": False, "enable_checkpointing": False, **QUIET}
    trainer = Trainer(max_epochs=2, callbacks=[ExactBatchNorm()], **options)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == module.updates == 10
    assert "loss/val" in trainer.callback_metrics
    answers = predict(module, data.preprocessing, x)
    assert set(answers.tolist()) <= {0, 1, 2}


def test_several_processes_are_refused():
    x, y = table()
    data = ready(DatasetDataModule(Pairs(x, y), batch_size=8))
    data.trainer = type("Two", (), {"world_size": 2, "max_epochs": 1, "max_steps": -1})()
    with pytest.raises(ValueError, match=r"fetched for one device. Received: 2 processes"):
        data.train_dataloader()


def test_the_command_trains_on_a_dataset_that_it_is_told(tmp_path):
    words = [
        "data=dataset",
        "optimizer=minibatch",
        "model=linear",
        "data.train._target_=torchvision.datasets.FakeData",
        "+data.train.size=60",
        "+data.train.image_size=[1,4,4]",
        "+data.train.num_classes=3",
        "+data.train.transform._target_=torchvision.transforms.ToTensor",
        "data.batch_size=6",
        "trainer.max_epochs=2",
        "callbacks=none",
        "logger=none",
    ]
    with initialize_config_dir(str(conf_directory()), version_base="1.3"):
        config = compose("train", words)
    result = train_config(config, tmp_path / "run")
    assert result.summary["updates"] == 2 * 7
    assert result.summary["data"]["val"] == 6
    assert result.module.model(torch.zeros(1, 1, 4, 4)).shape == (1, 3)
