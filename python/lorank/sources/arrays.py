"""Converts NumPy arrays and torch tensors to matrices for the core, without a copy if strides allow it.

torch is imported only for values that are tensors of torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lorank._core import Matrix
from lorank.sources.mapped import unmapped

# Element types whose spectrum can be computed: their name in NumPy and torch, by their name in any library.
FLOAT_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
} | {name: name for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")}

# The core receives floating-point types that NumPy lacks as integers: the integer types of torch and NumPy.
_CONTAINERS = {
    "bfloat16": ("uint16", np.uint16),
    "float8_e4m3fn": ("uint8", np.uint8),
    "float8_e5m2": ("uint8", np.uint8),
}


def is_array(value: object) -> bool:
    """Return True for a NumPy array or a torch tensor."""
    return isinstance(value, np.ndarray) or is_tensor(value)


def is_tensor(value: object) -> bool:
    """Return True for a torch tensor, without importing torch."""
    return any(
        base.__module__.startswith("torch") and base.__name__ == "Tensor" for base in type(value).__mro__
    )


def dtype_name(value: Any) -> str:
    """Return the name of the element type, as NumPy, torch and ml_dtypes spell it."""
    # str() of a NumPy type in the other byte order is ">f8". Types of torch have no attribute `name`.
    return str(getattr(value.dtype, "name", value.dtype)).removeprefix("torch.")


def is_dense(value: Any) -> bool:
    """Return True if all elements lie in strided memory."""
    return not is_tensor(value) or str(value.layout) == "torch.strided"


def identity(value: Any) -> object:
    """Return a key that is equal for arrays of the same memory, shape and strides."""
    if is_tensor(value):
        if value.device.type == "meta" or value.numel() == 0:
            return id(value)
        return (str(value.device), value.data_ptr(), tuple(value.shape), tuple(value.stride()))
    if value.size == 0:
        return id(value)
    return (value.__array_interface__["data"][0], value.shape, value.strides)


def needs_copy(value: Any) -> bool:
    """Return True if the conversion to a matrix copies the values."""
    return is_tensor(value) and value.device.type != "cpu"


def matrix(value: Any, shape: tuple[int, int] | None = None) -> Matrix:
    """Convert an array or tensor to a matrix for the core.

    Parameters
    ----------
    value
        An array or tensor; of two dimensions unless `shape` is given.
    shape
        The shape of the matrix, whose elements are those of `value` in row-major order.

    Raises
    ------
    TypeError
        If the elements are not floating-point numbers, or the tensor is on the meta device of torch.
    """
    name = dtype_name(value)
    if name not in FLOAT_TYPES:
        raise TypeError(f"{name} values have no spectrum: pass floating-point numbers")
    if is_tensor(value):
        if value.device.type == "meta":
            raise TypeError("the tensor is on the meta device: it has no values")
        value = value.detach().cpu()
        if name in _CONTAINERS:
            import torch

            array = value.view(getattr(torch, _CONTAINERS[name][0])).numpy()
        else:
            array = value.numpy()
    else:
        array = readable(value)
        array = array.view(_CONTAINERS[name][1]) if name in _CONTAINERS else array
    if shape is not None and array.shape != shape:
        # Changing the shape of other arrays copies them.
        array = (array if array.flags.c_contiguous else unmapped(array)).reshape(shape)
    return Matrix.from_array(array, name) if name in _CONTAINERS else Matrix.from_array(array)


def as_numpy(values: Any) -> np.ndarray[Any, Any]:
    """Convert an array, or a tensor of any element type and device, to a NumPy array.

    Memory that is mapped from a file stays mapped: read it by `unmapped`.
    """
    if is_tensor(values):
        values = values.detach().cpu()
        if dtype_name(values) in _CONTAINERS:
            values = values.float()
    found: np.ndarray[Any, Any] = np.asarray(values)
    return found


def content(values: Any) -> bytes | None:
    """Return the bytes of an array's elements; None for a tensor on the meta device, which has no values."""
    if is_tensor(values) and values.device.type == "meta":
        return None
    return readable(unmapped(as_numpy(values))).tobytes()


def readable(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array, or a copy if the core cannot read its strides or byte order."""
    if not array.dtype.isnative:
        array = unmapped(array)
        array = array.astype(array.dtype.newbyteorder("="))
    regular = all(
        s >= 0 and s % array.itemsize == 0 for s, n in zip(array.strides, array.shape, strict=True) if n > 1
    )
    return array if regular else np.ascontiguousarray(unmapped(array))
