"""Data: sources, what is prepared of them, the index loader. The data modules import Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdtrain.data.dataset import FetchedData
    from gdtrain.data.files import read_features, read_labelled, read_libsvm, read_npy
    from gdtrain.data.frames import features
    from gdtrain.data.loader import EvaluationLoader, IndexLoader, PairLoader
    from gdtrain.data.mapped import MappedInputs
    from gdtrain.data.modules import (
        ArrayDataModule,
        CSVDataModule,
        DataModule,
        DatasetDataModule,
        EmbeddedDataModule,
        LIBSVMDataModule,
        NPYDataModule,
        SyntheticDataModule,
        TorchvisionDataModule,
    )
    from gdtrain.data.prepared import PreparedData, Raw, prepare
    from gdtrain.data.preprocessing import Preprocessing
    from gdtrain.data.sources import embedded, synthetic, torchvision_images
    from gdtrain.data.sparse import SparseInputs
    from gdtrain.data.tables import Table, read_csv

__all__ = [
    "ArrayDataModule",
    "CSVDataModule",
    "DataModule",
    "DatasetDataModule",
    "EmbeddedDataModule",
    "EvaluationLoader",
    "FetchedData",
    "IndexLoader",
    "LIBSVMDataModule",
    "MappedInputs",
    "NPYDataModule",
    "PairLoader",
    "PreparedData",
    "Preprocessing",
    "Raw",
    "SparseInputs",
    "SyntheticDataModule",
    "Table",
    "TorchvisionDataModule",
    "embedded",
    "features",
    "prepare",
    "read_csv",
    "read_features",
    "read_labelled",
    "read_libsvm",
    "read_npy",
    "synthetic",
    "torchvision_images",
]

_HOME = {
    "EvaluationLoader": "loader",
    "FetchedData": "dataset",
    "IndexLoader": "loader",
    "MappedInputs": "mapped",
    "PairLoader": "loader",
    "PreparedData": "prepared",
    "Preprocessing": "preprocessing",
    "Raw": "prepared",
    "SparseInputs": "sparse",
    "Table": "tables",
    "embedded": "sources",
    "features": "frames",
    "prepare": "prepared",
    "read_csv": "tables",
    "read_features": "files",
    "read_labelled": "files",
    "read_libsvm": "files",
    "read_npy": "files",
    "synthetic": "sources",
    "torchvision_images": "sources",
}


def __getattr__(name: str) -> Any:
    # Lazily: only the data modules are to import Lightning.
    if name in __all__:
        return getattr(import_module(f"gdtrain.data.{_HOME.get(name, 'modules')}"), name)
    raise AttributeError(f"module 'gdtrain.data' has no attribute {name!r}")
