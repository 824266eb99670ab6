"""Data: sources, the split, the index loader."""

from gdtrain.data.dataset import DatasetDataModule, PairLoader
from gdtrain.data.files import read_features, read_labelled
from gdtrain.data.frames import features
from gdtrain.data.loader import EvaluationLoader, IndexLoader
from gdtrain.data.mapped import MappedInputs
from gdtrain.data.module import DataModule, Raw
from gdtrain.data.preprocessing import Preprocessing
from gdtrain.data.sources import (
    ArrayDataModule,
    EmbeddedDataModule,
    LIBSVMDataModule,
    NPYDataModule,
    SyntheticDataModule,
    TorchvisionDataModule,
)
from gdtrain.data.sparse import SparseInputs
from gdtrain.data.tables import CSVDataModule, Table

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
    "Table",
    "TorchvisionDataModule",
    "features",
    "read_features",
    "read_labelled",
]
