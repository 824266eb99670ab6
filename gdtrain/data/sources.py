"""Data sets that have a name: embedded in scikit-learn, synthetic, or torchvision's.

N examples, D features. They are read here, and prepared by `gdtrain.data.prepare`.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gdtrain.data.prepared import Raw

__all__ = ["Embedded", "TorchvisionName", "embedded", "synthetic", "torchvision_images"]

Embedded = Literal["digits", "breast_cancer", "wine", "iris", "diabetes"]
TorchvisionName = Literal["mnist", "fashion_mnist", "cifar10"]

_IDX = (
    "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte (or these with .gz)"
)
# torchvision's class, the folder of its files below the root, and the files.
_TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw", _IDX),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", _IDX),
    "cifar10": (
        "CIFAR10",
        "",
        "cifar-10-python.tar.gz, or the folder cifar-10-batches-py that is in it,",
    ),
}


def embedded(name: Embedded) -> Raw:
    """A data set that comes inside scikit-learn: see `EmbeddedDataModule`."""
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    if name == "digits":
        return Raw(bunch.images[:, None], bunch.target, "classification")
    classify = name != "diabetes"
    targets = bunch.target_names[bunch.target] if classify else bunch.target
    names = [str(name) for name in bunch.feature_names]  # NumPy's str_ would not unpickle
    return Raw(bunch.data, targets, "classification" if classify else "regression", names)


def synthetic(
    n: int, d: int, noise: float, condition: float, seed: int
) -> tuple[Raw, NDArray[np.float64], float]:
    """y = X w* + b* + noise, with w* (D,) and b*: see `SyntheticDataModule`."""
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    eigenvalues = np.logspace(0, -np.log10(condition), d)
    x = rng.normal(size=(n, d)) * np.sqrt(eigenvalues) @ rotation.T
    w, b = rng.normal(size=d), rng.normal()
    return Raw(x, x @ w + b + noise * rng.normal(size=n), "regression"), w, float(b)


def torchvision_images(name: TorchvisionName, root: Path, download: bool) -> Raw:
    """MNIST, Fashion-MNIST or CIFAR-10: see `TorchvisionDataModule`."""
    train, test = (_read(name, root, part, download) for part in (True, False))
    return Raw(*train, "classification", test=test)


def _read(name: str, root: Path, train: bool, download: bool) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images (N, C, H, W) and classes (N,) of the training or the test set."""
    from torchvision import datasets

    kind, folder, files = _TORCHVISION[name]
    cls = getattr(datasets, kind)
    for packed in (root / kind / "raw").glob("*-ubyte.gz"):
        if not packed.with_suffix("").exists():
            datasets.utils.extract_archive(str(packed), str(packed.parent))
    try:
        dataset = cls(root=root, train=train, download=False)
    except (RuntimeError, ValueError, AssertionError) as error:
        if not str(error).startswith("Dataset not found"):
            raise ValueError(f"The files of {name} in {root} could not be read: {error}") from None
        made = [path for path in (root, *root.parents) if not path.exists()]
        noise = io.StringIO()  # torchvision prints while it downloads
        try:
            if not download:
                raise OSError("download is off") from None
            with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
                dataset = cls(root=root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            for path in (root / kind / "raw", root / kind, *made) if download else ():
                with contextlib.suppress(OSError):  # only if it is there and empty
                    path.rmdir()
            raise FileNotFoundError(
                f"The files of {name} are not in {root} and could not be fetched "
                f"({' '.join(str(error).split()) or type(error).__name__}). Put {files} into "
                f"{root / folder}/, or set data.root to the folder that has them."
            ) from None
    images = np.asarray(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return images, np.asarray(dataset.targets)
