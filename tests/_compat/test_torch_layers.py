"""The base classes of torch's layers are those that we take them for."""

import pytest
from torch import nn

from gdtrain._compat.torch_layers import (
    BatchNorm,
    Dropout,
    NormWithStatistics,
    TransposedConvolution,
)


@pytest.mark.parametrize(
    ("base", "layers", "others"),
    [
        (
            BatchNorm,
            [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.SyncBatchNorm(2)],
            [nn.GroupNorm(1, 2)],
        ),
        (NormWithStatistics, [nn.BatchNorm1d(2), nn.InstanceNorm2d(2)], [nn.LayerNorm(2)]),
        (Dropout, [nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout()], [nn.ReLU()]),
        (TransposedConvolution, [nn.ConvTranspose1d(1, 1, 1)], [nn.Conv1d(1, 1, 1)]),
    ],
)
def test_the_layers_of_a_kind_and_no_others(base, layers, others):
    assert all(isinstance(layer, base) for layer in layers)
    assert not any(isinstance(layer, base) for layer in others)


def test_a_transposed_convolution_tells_its_groups_and_a_dropout_its_share():
    assert nn.ConvTranspose2d(4, 6, 3, groups=2).groups == 2
    assert nn.Dropout(0.3).p == 0.3
