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
    EmbeddedDataModule,
    LIBSVMDataModule,
    NPYDataModule,
    SyntheticDataModule,
)
from gdtrain.data.files import read_libsvm, read_npy
from gdtrain.data.prepared import prepare
from gdtrain.data.sources import embedded, synthetic
from gdtrain.data.tables import read_csv

DIGITS = """
import sys
import torch
import gdtrain
from gdtrain.data.loader import IndexLoader
from gdtrain.data.prepared import prepare
from gdtrain.data.sources import embedded

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
    ("read", "make", "source"),
    [
        (embedded, EmbeddedDataModule, "wine"),
        (lambda n: synthetic(n, 10, 0.1, 10, 0)[0], SyntheticDataModule, 50),
        (read_npy, NPYDataModule, "t.npy"),
        (read_csv, CSVDataModule, "t.csv"),
        (read_libsvm, LIBSVMDataModule, "t.svm"),
    ],
)
def test_a_source_and_its_module_give_the_same_tensors(read, make, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files(tmp_path)
    options = {"standardize": True, "standardize_targets": True, "batch_size": 4}
    plain, shell = prepare(read(source)), ready(make(source, **options))
    for part in ("train", "val", "test"):
        for one, other in zip(plain.examples(part), shell.examples(part), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert plain.state_dict().keys() | {"order"} == shell.state_dict().keys()
    assert plain.fingerprints().items() <= shell.settings().items()
    plain.check_same_data(shell.state_dict())


def test_data_that_are_not_there_yet_say_so():
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        EmbeddedDataModule("iris").examples("train")
