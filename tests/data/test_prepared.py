"""The data of a run without Lightning: the very same tensors as from the data modules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import gdtrain.data
from gdtrain.data import (
    EmbeddedDataModule,
)

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


def test_data_that_are_not_there_yet_say_so():
    with pytest.raises(RuntimeError, match=r"call setup\(\) first"):
        EmbeddedDataModule("iris").examples("train")
