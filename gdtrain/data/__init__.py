"""The data modules, which import Lightning, and `Raw`: what `load` of one of your own returns."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from gdtrain.data.prepared import Raw

__all__ = [
    "ArrayDataModule",
    "CSVDataModule",
    "DataModule",
    "DatasetDataModule",
    "EmbeddedDataModule",
    "LIBSVMDataModule",
    "NPYDataModule",
    "Raw",
    "SyntheticDataModule",
    "TorchvisionDataModule",
]


def __getattr__(name: str) -> Any:
    # Lazily: the rest of the package is used without Lightning.
    if name in __all__:
        home = "prepared" if name == "Raw" else "modules"
        return getattr(import_module(f"gdtrain.data.{home}"), name)
    raise AttributeError(f"module 'gdtrain.data' has no attribute {name!r}")
