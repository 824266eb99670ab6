"""Gradient descent for PyTorch and Lightning, in its three variants: exact, fast and visible."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdtrain.descent.minimization import Minimum, minimize
    from gdtrain.lightning.module import SupervisedModule
    from gdtrain.optim import GD, SGD, MiniBatchSGD
    from gdtrain.runs.checkpoints import load
    from gdtrain.runs.fit import fit
    from gdtrain.runs.result import Result

__version__ = "0.1.0"

__all__ = [
    "GD",
    "SGD",
    "MiniBatchSGD",
    "Minimum",
    "Result",
    "SupervisedModule",
    "fit",
    "load",
    "minimize",
]

_HOME = {
    "GD": "gdtrain.optim",
    "SGD": "gdtrain.optim",
    "MiniBatchSGD": "gdtrain.optim",
    "Minimum": "gdtrain.descent.minimization",
    "Result": "gdtrain.runs.result",
    "SupervisedModule": "gdtrain.lightning.module",
    "fit": "gdtrain.runs.fit",
    "load": "gdtrain.runs.checkpoints",
    "minimize": "gdtrain.descent.minimization",
}


def __getattr__(name: str) -> Any:
    # Lazily, so that `import gdtrain` and `gdtrain.optim` do not import Lightning.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in ("callbacks", "data", "losses", "models", "optim", "schedules", "step_sizes"):
        return import_module(f"gdtrain.{name}")
    raise AttributeError(f"module 'gdtrain' has no attribute {name!r}")
