"""Data: sources, the split, the index loader. The data modules alone import Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOME = {
    "ArrayDataModule": "sources",
    "CSVDataModule": "tables",
    "DataModule": "module",
    "DatasetDataModule": "dataset",
    "EmbeddedDataModule": "sources",
    "EvaluationLoader": "loader",
    "IndexLoader": "loader",
    "LIBSVMDataModule": "sources",
    "MappedInputs": "mapped",
    "NPYDataModule": "sources",
    "PairLoader": "dataset",
    "Preprocessing": "preprocessing",
    "Raw": "module",
    "SparseInputs": "sparse",
    "SyntheticDataModule": "sources",
    "Table": "tables",
    "TorchvisionDataModule": "sources",
    "features": "frames",
    "read_features": "files",
    "read_labelled": "files",
}


def __getattr__(name: str) -> Any:
    # Lazily: the loader and the order are used where no Lightning is.
    if name in _HOME:
        return getattr(import_module(f"gdtrain.data.{_HOME[name]}"), name)
    raise AttributeError(f"module 'gdtrain.data' has no attribute {name!r}")
