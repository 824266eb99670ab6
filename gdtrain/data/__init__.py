"""Data: sources, the split, the index loader."""

from gdtrain.data.dataset import DatasetDataModule, PairLoader
from gdtrain.data.loader import EvaluationLoader, IndexLoader
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.module import DataModule, Raw
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.sources import (
    ArrayDataModule,
    CSVDataModule,
    EmbeddedDataModule,
    LIBSVMDataModule,
    NPYDataModule,
    SyntheticDataModule,
    TorchvisionDataModule,
    features,
    read_features,
)
from gdtrain.data.sparse import SparseInputs

__all__ = [
    "ArrayDataModule",
    "CSVDataModule",
    "DataModule",
    "DatasetDataModule",
    "EmbeddedDataModule",
    "EvaluationLoader",
    "IndexLoader",
    "LIBSVMDataModule",
    "MappedInputs",
    "NPYDataModule",
    "PairLoader",
    "Preprocessing",
    "Raw",
    "SparseInputs",
    "SyntheticDataModule",
    "TorchvisionDataModule",
    "features",
    "read_features",
]
