"""Any source of data × type × shape of target × entrance: the same answer as a float64 loop.

Each case draws a small problem, hands it over in one of the ways in which people have data, makes a
few full-batch updates from zero, and compares what the targets were taken for, the standardised
tensors (scikit-learn's StandardScaler), and the predictions on raw examples.
"""

from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from lightning import Trainer
from scipy import sparse
from sklearn.datasets import dump_svmlight_file
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.utils.data import Dataset, TensorDataset
from watched_runs import SILENT

import gdtrain
from gdtrain import GD, SupervisedModule
from gdtrain.data import (
    ArrayDataModule,
    CSVDataModule,
    DatasetDataModule,
    LIBSVMDataModule,
    NPYDataModule,
)
from gdtrain.objective import Objective
from gdtrain.runs.descriptions import default_loss
from gdtrain.runs.result import predict
from gdtrain.runs.run import run

N, D, UPDATES, RATE = 36, 3, 4, 0.2
IN_MEMORY = ("array", "frame", "list", "tensor", "sparse")
FILES = ("csv", "npy", "mapped", "libsvm")
DATASETS = ("tensors", "pairs")
NUMBERS = ("numbers", "column of numbers", "two columns", "counts", "few counts")
CLASSES = ("digits", "from one", "signs", "column of classes", "one-hot", "text", "booleans")
FORMS = (*NUMBERS, *CLASSES)
CASES = [
    case
    for case in product((*IN_MEMORY, *FILES, *DATASETS), ("float32", "float64", "int64"), FORMS,
                        ("float32", "float64"), ("fit", "loop"))
    if not (case[0] == "libsvm" and case[2] in ("text", "booleans", "one-hot", "two columns"))
    and not (case[0] == "csv" and case[2] in ("one-hot", "two columns"))
    and not (case[0] in ("npy", "mapped") and case[2] == "text")
    and not (case[0] in DATASETS and case[2] in ("text", "signs", "from one"))
]  # fmt: skip
CHOSEN = np.random.default_rng(13)
PICKED = [CASES[i] for i in CHOSEN.choice(len(CASES), 100, replace=False)]


class Pairs(Dataset):
    """Examples that must be fetched one by one."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i]


def problem(source, kind, form, rng):
    """Raw features, raw targets, and what they are: the labels, or None for numbers."""
    plain = source in (*DATASETS, "sparse")  # used as they are
    x = rng.normal(size=(N, D))
    if kind == "int64":
        x = np.round(x * 10 if not plain else x)
    elif not plain:
        x = x * 10.0 ** rng.uniform(0, 3, D) + (1e6 if kind == "float64" else 10)
    x = x.astype(kind)
    if source == "sparse":
        x[rng.random(x.shape) < 0.5] = 0
    choice = rng.permutation(np.arange(N) % 3)
    y = x.astype(float) @ rng.normal(size=(D, 2)) + rng.normal(size=(N, 2))
    y = (y - y.mean(0)) / y.std(0) * 2 + (0 if plain else 1e4)
    made = {
        "numbers": (y[:, 0], None),
        "column of numbers": (y[:, :1], None),
        "two columns": (y, None),
        "counts": (np.arange(N) * 7 if not plain else np.arange(N) // 2 - 9, None),
        "few counts": (rng.permutation(np.repeat(np.arange(5.0), [14, 12, 6, 3, 1])), None),
        "digits": (choice, [0, 1, 2]),
        "from one": (choice + 1.0, [1, 2, 3]),
        "signs": (np.where(choice, 1, -1), [-1, 1]),
        "column of classes": (choice[:, None], [0, 1, 2]),
        "one-hot": (np.eye(3)[choice], [0, 1, 2]),
        "text": (np.array(["a", "b", "c"])[choice], ["a", "b", "c"]),
        "booleans": (choice > 0, [False, True]),
    }
    return (x, *made[form])


def handed_over(source, x, y, folder, options):
    """(inputs, targets) for `fit`, or a data module; and raw examples to predict from."""
    names = [f"x{k}" for k in range(D)]
    frame = pd.DataFrame(x, columns=names)
    if source == "array":
        return (x, y), x
    if source == "frame":
        targets = pd.DataFrame(y) if y.ndim > 1 else pd.Series(y)
        return (frame, targets), frame[names[::-1]]
    if source == "list":
        return (x.tolist(), y.tolist()), x.tolist()
    if source == "tensor":
        return (torch.tensor(x), y.tolist() if y.dtype.kind == "U" else torch.tensor(y)), x
    if source == "sparse":
        return (sparse.csr_array(x), y), sparse.csr_array(x)
    if source == "csv":
        written = frame.astype(float if x.dtype.kind == "f" else int)  # all digits
        written.assign(target=y.reshape(N)).to_csv(folder / "t.csv", index=False)
        return CSVDataModule(folder / "t.csv", "target", **options), frame[names[::-1]]
    if source in ("npy", "mapped"):
        np.save(folder / "x.npy", x)
        np.save(folder / "y.npy", y)
        more = {"target_path": folder / "y.npy", "memory_map": source == "mapped"}
        return NPYDataModule(folder / "x.npy", **more, **options), x
    if source == "libsvm":
        dump_svmlight_file(x.astype(float), y.reshape(N), str(folder / "t.svm"), zero_based=False)
        return LIBSVMDataModule(folder / "t.svm", **options), x
    x, y = torch.tensor(x), torch.tensor(y)
    x = x if x.is_floating_point() else x.double()
    made = (TensorDataset if source == "tensors" else Pairs)(x, y)
    options.pop("standardize", None)
    return DatasetDataModule(made, **{**options, "num_workers": 0}), x.numpy()


def zero(shape, outputs):
    model = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(shape)), outputs))
    for p in model.parameters():
        nn.init.zeros_(p)
    return model


def descended(x, y, classes):
    """W and b after full-batch updates from zero, in float64, as they are written."""
    goal = np.eye(len(classes))[y] if classes is not None else y.reshape(N, -1)
    w, b = np.zeros((D, goal.shape[1])), np.zeros(goal.shape[1])
    for _ in range(UPDATES):
        z = x @ w + b
        if classes is not None:
            z = np.exp(z) / np.exp(z).sum(1, keepdims=True)
        w, b = w - RATE * x.T @ (z - goal) / N, b - RATE * (z - goal).mean(0)
    return w, b


@pytest.mark.parametrize(
    ("source", "kind", "form", "dtype", "entrance"), PICKED, ids=lambda value: str(value)
)
def test_every_entrance_gives_the_answer_of_a_float64_loop(
    source, kind, form, dtype, entrance, tmp_path
):
    rng = np.random.default_rng([FORMS.index(form), len(source), len(kind)])
    raw_x, raw_y, labels = problem(source, kind, form, rng)
    plain = source in (*DATASETS, "sparse")
    options = {"val_fraction": 0, "test_fraction": 0, "batch_size": "full", "dtype": dtype}
    if source == "sparse":
        options["standardize"] = False
    given, new = handed_over(source, raw_x, raw_y, tmp_path, dict(options))

    if entrance == "fit" and source in IN_MEMORY:
        options.pop("batch_size")
        result = gdtrain.fit(zero, *given, variant="gd", lr=RATE, schedule=CONSTANT,
                             epochs=UPDATES, progress=False, **options)  # fmt: skip
        module, data = result.module, result.data
    else:
        data = ArrayDataModule(*given, **options) if isinstance(given, tuple) else given
        data.setup()
        loss = default_loss(data.num_classes)
        model = zero(data.input_shape, loss.outputs(data.num_classes, data.num_targets))
        module = SupervisedModule(model.to(data.dtype), loss, partial(GD, lr=RATE), CONSTANT)
        if entrance == "fit":
            run(module, data, trainer=partial(Trainer, max_epochs=UPDATES, **SILENT))
        else:
            pairs = list(data.evaluation_loader("train"))
            inputs, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
            objective = Objective(model, loss, inputs, targets)
            optimizer = GD(model.parameters(), lr=RATE)
            for _ in range(UPDATES):
                gradient = objective.value_and_grad(torch.arange(N))[1]
                for p, g in zip(model.parameters(), gradient, strict=True):
                    p.grad = g
                optimizer.step()

    found = data.preprocessing.classes
    if source in DATASETS and labels is not None:
        labels = list(range(len(labels)))
    assert found == labels
    x = raw_x.astype(float)
    if not plain:
        x = StandardScaler().fit_transform(x)
    if labels is None:
        y = raw_y.astype(float).reshape(N, -1)
        scaler = StandardScaler(with_mean=source not in DATASETS, with_std=source not in DATASETS)
        y = scaler.fit_transform(y)
    elif form == "one-hot":
        y = raw_y.argmax(1)
    else:
        y = np.unique(raw_y.reshape(N), return_inverse=True)[1]
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    tolerance = {"rtol": 1e-8, "atol": 1e-8} if dtype == "float64" else {"rtol": 1e-4, "atol": 1e-5}
    w, b = descended(x, y, labels)
    layer = module.model[1]
    np.testing.assert_allclose(layer.weight.detach().T, w, **tolerance)
    np.testing.assert_allclose(layer.bias.detach(), b, **tolerance)

    answers = predict(module, data.preprocessing, new)
    z = x @ w + b
    if labels is not None:
        sure = np.sort(z, 1)[:, -1] - np.sort(z, 1)[:, -2] > 1e-3
        assert answers[sure].tolist() == np.array(labels)[z.argmax(1)][sure].tolist()
    else:
        back = scaler.inverse_transform(z)
        spread = back.std()
        wanted = back if back.shape[1] > 1 else back[:, 0]
        np.testing.assert_allclose(answers, wanted, rtol=0, atol=1e-4 * max(spread, 1e-9))


CONSTANT = gdtrain.schedules.Constant()


def test_the_cases_meet_every_source_form_and_type():
    for position in range(5):
        assert {case[position] for case in PICKED} == {case[position] for case in CASES}
