"""Tensors that hold NaN or infinite values: every runtime loads them, and computes nothing but NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lorank._core import Checkpoint
from lorank.adapters.tensors import Tensors

# So many values are read at a time: 64 MiB in float32.
_PART = 1 << 24

_NO_NUMBERS = ("int", "uint", "bool")


def not_finite(tensors: Tensors) -> list[tuple[str, str]]:
    """Find the tensors with values that are not finite.

    Parameters
    ----------
    tensors
        An adapter's tensors, read a part at a time.

    Returns
    -------
    list of (str, str)
        Key, and ``"NaN"`` or ``"Inf"``, in the order of the file.
    """
    found = []
    for key, shape in tensors.shapes().items():
        if 0 in shape or tensors.dtype(key).startswith(_NO_NUMBERS):
            continue
        for values in _parts(tensors, key, shape):
            # A sum of finite values is finite, but for overflow.
            if math.isfinite(float(values.sum(dtype=np.float64))) or np.isfinite(values).all():
                continue
            found.append((key, "NaN" if np.isnan(values).any() else "Inf"))
            break
    return found


def _parts(tensors: Tensors, key: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.floating]]:
    """Read a tensor in parts of equal size."""
    rows, cols = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    stored = tensors.stored(key)
    if stored.position is None or not isinstance(stored.origin, Checkpoint):
        yield tensors.matrix(key, rows, cols).to_array()
        return
    least = math.ceil(rows * cols / _PART)
    count = next(parts for parts in range(min(least, rows), rows + 1) if rows % parts == 0)
    for index in range(count):
        yield stored.origin.matrix(stored.position, rows // count, cols, index).to_array()
