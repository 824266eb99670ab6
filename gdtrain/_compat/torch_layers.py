"""Base classes of torch's layers, which have no public name (torch.nn.modules)."""

from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics
from torch.nn.modules.conv import _ConvTransposeNd as TransposedConvolution
from torch.nn.modules.dropout import _DropoutNd as Dropout

__all__ = ["BatchNorm", "Dropout", "NormWithStatistics", "TransposedConvolution"]
