"""torch's private base of the batch norms: all of them, and what is read of it."""

import pytest
from torch import nn

from gdtrain._compat.torch_batch_norm import BatchNorm


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_it_is_the_base_of_all_batch_norms(kind):
    layer = kind(3)
    assert isinstance(layer, BatchNorm)
    assert layer.track_running_stats
    assert layer.running_mean.shape == layer.running_var.shape == (3,)


def test_other_norms_are_none():
    assert not isinstance(nn.GroupNorm(1, 3), BatchNorm)
    assert not isinstance(nn.LayerNorm(3), BatchNorm)
