"""Brightness as bytes, from whatever numbers it was saved in."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def as_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Whole numbers of 0..255, of any type, as they are; floats of 0..1 times 255, rounded.

    Nothing else is guessed at: floats of -1..1 or of zero mean are normalized already, and by what is not known.

    Args:
        values: numbers of any shape, not empty.

    Returns:
        The same shape, uint8.

    Raises:
        ValueError: other values.
    """
    if values.dtype == np.uint8:
        return np.asarray(values, dtype=np.uint8)
    low, high = values.min(), values.max()
    if np.isnan(low):
        raise ValueError("NaN among them")
    if low >= 0 and high <= 1 and values.dtype.kind == "f":
        values = np.rint(values * 255)
    elif not (low >= 0 and high <= 255 and (values.dtype.kind in "iu" or (np.rint(values) == values).all())):
        raise ValueError(f"{values.dtype} from {low:g} to {high:g}, neither whole numbers of 0..255 nor floats of 0..1")
    return values.astype(np.uint8)
