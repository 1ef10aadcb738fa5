"""Read the files in which CIFAR-10 and Fashion-MNIST are published."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ARRAY = {"_reconstruct": np.empty(0).__reduce__()[0], "ndarray": np.ndarray, "dtype": np.dtype}


class _PlainUnpickler(pickle.Unpickler):
    """Unpickler for plain values and NumPy arrays. Anything else that a pickle names is rejected before its import."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] != "numpy" or name not in _ARRAY:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which is not allowed in a data set")
        return _ARRAY[name]


def download(name: str, folder: Path) -> None:
    """Download both splits of a data set, given the name of its torchvision class."""
    from torchvision import datasets  # deferred: the import takes a second

    for train in (True, False):
        getattr(datasets, name)(folder, train, download=True)


def read_cifar10(folder: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images [N, 32, 32, 3] and labels [N] from the files of cifar-10-batches-py/.

    Raises:
        ValueError: a file is missing or is not the official one.
    """
    from torchvision.datasets import CIFAR10  # deferred: the import takes a second

    batches = [_read_batch(folder / name, md5) for name, md5 in (CIFAR10.train_list if train else CIFAR10.test_list)]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return images.transpose(0, 2, 3, 1), np.concatenate(
        [np.asarray(batch["labels"], dtype=np.int64) for batch in batches]
    )


def _read_batch(path: Path, md5: str) -> Any:
    _check_there(path)
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise ValueError(f"{path.name} is not the official file: its MD5 sum differs")
    return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()


def read_fashion_mnist(folder: Path, train: bool) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images [N, 28, 28] and labels [N] from the files of FashionMNIST/raw/.

    Raises:
        ValueError: a file is missing, or is not an IDX file of bytes.
    """
    from torchvision.datasets.mnist import read_image_file, read_label_file  # deferred: the import takes a second

    split = "train" if train else "t10k"
    images = _read_idx(folder / f"{split}-images-idx3-ubyte", read_image_file)
    return images, _read_idx(folder / f"{split}-labels-idx1-ubyte", read_label_file)


def _read_idx(path: Path, read: Any) -> NDArray[Any]:
    _check_there(path)
    try:
        array: NDArray[Any] = read(str(path)).numpy()
    except Exception as error:  # torchvision's reader checks little, and may fail with any exception
        raise ValueError(f"{path.name} is not an IDX file of bytes ({str(error) or type(error).__name__})") from error
    return array


def _check_there(path: Path) -> None:
    if not path.is_file():
        packed = path.with_name(f"{path.name}.gz").is_file()
        raise ValueError(f"{path.name} is missing{f' (unpack {path.name}.gz)' if packed else ''}")
