"""PyTorch's fused kernel of SGD, and what must be known and done where it is called."""

from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd as BelowAutograd
from torch._C import _increment_version as increment_version

__all__ = ["BelowAutograd", "TensorGuards", "fused_sgd_", "increment_version", "is_dense"]

# Compares type, dtype, device, shape and strides of many tensors with what they were, at 50 ns a
# tensor. Where it is missing, it is None.
TensorGuards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

fused_sgd_ = torch._fused_sgd_
is_dense = torch._prims_common.is_non_overlapping_and_dense_or_false
