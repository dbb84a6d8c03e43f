"""Finds NaN and infinite values in tensors; every runtime loads such tensors and computes NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from lorank._core import Checkpoint
from lorank.adapters.tensors import Tensors

# The number of values that are read at a time: 512 KiB in float32, which fit in the processor's cache.
_PART = 1 << 17

_FLOATS = ("float64", "float32", "float16", "bfloat16", "F8_E4M3", "F8_E5M2")


def not_finite(tensors: Tensors) -> list[tuple[str, str]]:
    """Find the tensors with values that are not finite.

    Parameters
    ----------
    tensors
        The tensors of an adapter.

    Returns
    -------
    list of (str, str)
        Key of each such tensor, and ``"NaN"`` or ``"Inf"``, in the order of the file.
    """
    found = []
    for key, shape in tensors.shapes().items():
        if 0 in shape or tensors.dtype(key) not in _FLOATS:
            continue
        for values in _parts(tensors, key, shape):
            # A sum of finite values is finite unless it overflows.
            if math.isfinite(float(values.sum(dtype=np.float64))) or np.isfinite(values).all():
                continue
            found.append((key, "NaN" if np.isnan(values).any() else "Inf"))
            break
    return found


def _parts(tensors: Tensors, key: str, shape: tuple[int, ...]) -> Iterator[npt.NDArray[np.floating]]:
    """Yield a tensor in parts of equal size, as close to `_PART` as the divisors of its size allow."""
    size = math.prod(shape)
    stored = tensors.stored(key)
    if stored.position is None or not isinstance(stored.origin, Checkpoint):
        yield tensors.matrix(key, 1, size).to_array()
        return
    target = math.ceil(size / _PART)
    near = (parts for step in range(size) for parts in (target + step, target - step) if parts > 0)
    count = next(parts for parts in near if size % parts == 0)
    for index in range(count):
        yield stored.origin.matrix(stored.position, 1, size // count, index).to_array()
