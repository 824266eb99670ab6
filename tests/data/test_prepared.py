"""The data of a run without Lightning: the very same tensors as from the data modules."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_files import ready, write_libsvm

import gdtrain.data
from gdtrain.data import (
    CSVDataModule,
    DatasetDataModule,
    EmbeddedDataModule,
    FetchedData,
    LIBSVMDataModule,
    NPYDataModule,
    SyntheticDataModule,
    embedded,
    prepare,
    read_csv,
    read_libsvm,
    read_npy,
    synthetic,
)

DIGITS = """
import sys
import torch
import gdtrain
from gdtrain.data import IndexLoader, embedded, prepare

data = prepare(embedded("digits"))
inputs, targets = data.examples("train")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, data.num_classes))
optimizer = gdtrain.MiniBatchSGD(model.parameters(), lr=0.1)
loader = IndexLoader(data.num_train, 32)
for _ in range(3):
    for indices in (row for block in loader for row in block):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs[indices]), targets[indices])
        loss.backward()
        optimizer.step()
right = [model(x).argmax(1) == y for x, y in data.evaluation_loader("test")]
print(float(torch.cat(right).double().mean()), "lightning" in sys.modules)
"""


def test_digits_are_learnt_without_lightning():
    words = [sys.executable, "-c", DIGITS]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    accuracy, imported = done.stdout.split()
    assert float(accuracy) > 0.85
    assert imported == "False"


def test_lightning_is_known_to_the_data_modules_alone():
    folder = Path(gdtrain.data.__file__).parent
    known = r"^(from|import) (lightning|gdtrain\.data\.modules?)\b"
    found = [p.name for p in folder.glob("*.py") if re.search(known, p.read_text("utf-8"), re.M)]
    assert sorted(found) == ["module.py", "modules.py"]


def files(folder):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 3)), rng.integers(0, 2, 30)
    np.save(folder / "t.npy", np.column_stack([x, y]))
    np.savetxt(
        folder / "t.csv", np.column_stack([x, y]), header="a,b,c,kind", comments="", delimiter=","
    )
    write_libsvm(folder / "t.svm", x, y)


@pytest.mark.parametrize(
    ("raw", "module"),
    [
        (lambda folder: embedded("wine"), lambda folder: EmbeddedDataModule("wine")),
        (
            lambda folder: synthetic(50, 4)[0],
            lambda folder: SyntheticDataModule(50, 4, standardize=True, standardize_targets=True),
        ),
        (lambda f: read_npy(f / "t.npy"), lambda f: NPYDataModule(f / "t.npy", batch_size=4)),
        (lambda f: read_csv(f / "t.csv"), lambda f: CSVDataModule(f / "t.csv", batch_size=4)),
        (lambda f: read_libsvm(f / "t.svm"), lambda f: LIBSVMDataModule(f / "t.svm", batch_size=4)),
    ],
    ids=["embedded", "synthetic", "npy", "csv", "libsvm"],
)
def test_a_source_and_its_module_give_the_same_tensors(raw, module, tmp_path):
    files(tmp_path)
    plain, shell = prepare(raw(tmp_path)), ready(module(tmp_path))
    for part in ("train", "val", "test"):
        for one, other in zip(plain.examples(part), shell.examples(part), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert plain.state_dict().keys() | {"order"} == shell.state_dict().keys()
    assert plain.fingerprints().items() <= shell.settings().items()
    plain.check_same_data(shell.state_dict())


def test_a_dataset_is_split_alike_without_lightning():
    pairs = [(torch.tensor([float(i)]), i % 3) for i in range(40)]
    plain = FetchedData({"train": pairs}, val_fraction=0.25)
    shell = ready(DatasetDataModule(pairs, val_fraction=0.25, batch_size=5))
    assert (plain.num_train, plain.num_classes) == (shell.num_train, shell.num_classes) == (30, 3)
    (x, y), (u, v) = (next(iter(d.evaluation_loader("val"))) for d in (plain, shell))
    assert torch.equal(x, u)
    assert torch.equal(y, v)


def test_data_that_are_not_there_yet_say_so():
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        EmbeddedDataModule("iris").examples("train")
