"""Reads arrays whose memory is mapped from a file, such as `numpy.memmap`.

The system ends a process that reads mapped memory in place after the file was cut off. The core copies such
memory by system calls, which return an error instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import copy_mapped

# A view is copied in one piece if its memory is at most this many times the size of its elements.
_SPARSEST = 4


def unmapped(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return an array, or a copy of its elements if its memory is mapped from a file.

    Raises
    ------
    FormatError
        If the file was cut off or changed.
    """
    if array.base is None or array.size == 0 or array.dtype.hasobject:
        return array
    if copy_mapped(array[(slice(1),) * array.ndim]) is None:
        return array
    return _copy(array)


def _copy(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of a mapped array; parts of a view that lie far from each other are copied one by one."""
    if _reach(array) > _SPARSEST * array.nbytes and (axis := _outermost(array)) is not None:
        return np.stack([_copy(part) for part in np.moveaxis(array, axis, 0)], axis)
    found = copy_mapped(array)
    if found is None:
        return array
    memory, first = found
    copy: npt.NDArray[Any] = np.ndarray(array.shape, array.dtype, memory, first, array.strides)
    return copy


def _reach(array: npt.NDArray[Any]) -> int:
    """Return the number of bytes from the first byte of an array's elements to the last."""
    steps = zip(array.shape, array.strides, strict=True)
    reach: int = array.itemsize + sum((n - 1) * abs(stride) for n, stride in steps)
    return reach


def _outermost(array: npt.NDArray[Any]) -> int | None:
    """Return the axis with the largest stride among those longer than 1; None if there is no second axis."""
    axes = [axis for axis, n in enumerate(array.shape) if n > 1]
    return max(axes, key=lambda axis: abs(array.strides[axis])) if len(axes) > 1 else None
