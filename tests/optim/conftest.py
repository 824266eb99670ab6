import pickle
import subprocess
import sys

import pytest
import torch

# torch.testing._internal wants expecttest (which no test here does), and changes global flags:
# so it is imported in a process of its own.
DUMP = """
import pickle, sys, types, unittest
try:
    import expecttest
except ModuleNotFoundError:
    sys.modules["expecttest"] = types.SimpleNamespace(TestCase=unittest.TestCase)
import torch
from torch.testing._internal import common_optimizers as common
inputs = [(i.desc, i.kwargs) for i in common.optim_inputs_func_sgd("cpu")]
errors = [
    (e.optimizer_error_input.desc, e.optimizer_error_input.params,
     e.optimizer_error_input.kwargs, e.error_type, e.error_regex)
    for e in common.optim_error_inputs_func_sgd("cpu", torch.float32)
]
info = next(i for i in common.optim_db if i.optim_cls is torch.optim.SGD)
newer = info.not_og_supported_flags
sys.stdout.buffer.write(pickle.dumps((inputs, errors, newer)))
"""


@pytest.fixture(scope="session")
def conformance():
    """Inputs, error inputs and newer flags of torch's own tests of torch.optim.SGD."""
    done = subprocess.run([sys.executable, "-c", DUMP], capture_output=True, check=True)
    return pickle.loads(done.stdout)


@pytest.fixture(autouse=True)
def _one_seed_one_thread():
    """The fused kernel wakes all threads for the smallest tensor."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
