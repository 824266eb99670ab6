"""Data: sources, the split, the index loader."""

from gdtrain.data.loader import EvaluationLoader, IndexLoader
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
    read_features,
)

__all__ = [
    "ArrayDataModule",
    "CSVDataModule",
    "DataModule",
    "EmbeddedDataModule",
    "EvaluationLoader",
    "IndexLoader",
    "LIBSVMDataModule",
    "NPYDataModule",
    "Preprocessing",
    "Raw",
    "SyntheticDataModule",
    "TorchvisionDataModule",
    "read_features",
]
