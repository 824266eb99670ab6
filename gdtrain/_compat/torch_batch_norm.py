"""The common base of torch's batch norms, which has no public name."""

from torch import nn

__all__ = ["BatchNorm"]

BatchNorm = nn.modules.batchnorm._BatchNorm
