"""A checkpoint that Lightning cannot restore fails within a frame that is known as restoring."""

import traceback

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from gdtrain._compat.lightning_restoring import restores


@pytest.mark.filterwarnings("ignore")
def test_a_failure_within_restoring_is_told_from_others(tmp_path):
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False)
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "bad.ckpt")
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(BoringModel(), ckpt_path=tmp_path / "bad.ckpt")
    steps = [
        f.f_code.co_name for f, _ in traceback.walk_tb(caught.value.__traceback__) if restores(f)
    ]
    assert "restore_model" in steps
