"""Data modules that are set up, and the files that tests of the data write."""

import gzip

from sklearn.datasets import dump_svmlight_file


def ready(data):
    """A data module after `setup`."""
    data.setup()
    return data


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_libsvm(path, x, y, zero_based=False):
    with gzip.open(path, "wb") if path.suffix == ".gz" else open(path, "wb") as file:
        dump_svmlight_file(x, y, file, zero_based=zero_based)
    return path
