"""Convert pixel values of any number type to bytes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Convert pixel values to bytes.

    Whole numbers in 0..255, of any type, stay as they are; floats in 0..1 are multiplied by 255 and rounded.
    Other values are rejected rather than guessed at: floats in -1..1 or with zero mean are already normalized, by an
    unknown mean and standard deviation.

    Args:
        values: numbers of any shape, not empty.

    Returns:
        The same shape, uint8.

    Raises:
        ValueError: the values are in another range, or contain NaN.
    """
    if values.dtype == np.uint8:
        return np.asarray(values, dtype=np.uint8)
    low, high = values.min(), values.max()
    if np.isnan(low):
        raise ValueError("values contain NaN")
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        values = np.rint(values * 255)
    elif not (low >= 0 and high <= 255 and (values.dtype.kind in "iu" or (np.rint(values) == values).all())):
        raise ValueError(
            f"values are {values.dtype} from {low:g} to {high:g}; must be whole numbers in 0..255 or floats in 0..1"
        )
    return values.astype(np.uint8)
