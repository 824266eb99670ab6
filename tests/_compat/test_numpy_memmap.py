"""NumPy's memory-mapped arrays keep their map in `_mmap`."""

import mmap

import numpy as np

from gdtrain._compat.numpy_memmap import file_map


def test_the_map_is_found_under_views_and_nowhere_else(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(3, 2))
    array = np.load(tmp_path / "x.npy", mmap_mode="r")
    found = file_map(array)
    assert isinstance(found, mmap.mmap)
    assert file_map(array[1:][:, :1]) is found
    assert file_map(np.asarray(array)[::2]) is found
    assert file_map(np.array(array)) is None
