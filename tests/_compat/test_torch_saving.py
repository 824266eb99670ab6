"""torch.save names these functions, with the arguments that our reader follows."""

import pickletools
import zipfile

import torch

from gdtrain._compat.torch_saving import REBUILD_PARAMETER, REBUILD_TENSOR
from gdtrain.data.checkpoint_reading import check_checkpoint


def test_torch_save_asks_for_these_functions(tmp_path):
    path = tmp_path / "saved.ckpt"
    torch.save({"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2))}, path)
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        opcodes = list(pickletools.genops(archive.read(name)))
    asked = {argument for opcode, argument, _ in opcodes if opcode.name == "GLOBAL"}
    assert {REBUILD_TENSOR, REBUILD_PARAMETER} <= asked
    check_checkpoint(path)  # which knows what they are called with
