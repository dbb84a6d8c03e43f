"""Tensors whose bytes are written as they were read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lorank._core import FormatError, Matrix
from lorank.sources import arrays
from lorank.sources.mapped import unmapped

# Names of element types: NumPy's or torch's name -> the name in safetensors headers.
SAFETENSORS_NAMES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
NAMES = {short: name for name, short in SAFETENSORS_NAMES.items()}

# Types that NumPy lacks: name in `RawTensor.dtype` -> the core's name, and the type of the bits.
_BITS = {
    "bfloat16": ("bfloat16", np.uint16),
    "F8_E4M3": ("float8_e4m3fn", np.uint8),
    "F8_E5M2": ("float8_e5m2", np.uint8),
}


@dataclass(frozen=True, slots=True)
class RawTensor:
    """The bytes of a tensor, in little-endian order.

    Attributes
    ----------
    data
        The bytes.
    dtype
        The element type by NumPy's name; by safetensors' name for types that NumPy lacks.
    shape
        The shape.
    """

    data: bytes = field(repr=False)
    dtype: str
    shape: tuple[int, ...]

    def to_array(self) -> np.ndarray[Any, Any]:
        """Return the values; floating-point values of up to 32 bits as float32."""
        if self.dtype in _BITS:
            name, bits = _BITS[self.dtype]
            row = np.frombuffer(self.data, bits).reshape(1, -1)
            return Matrix.from_array(row, name).to_array().reshape(self.shape)
        values = np.frombuffer(self.data, np.dtype(self.dtype).newbyteorder("<")).reshape(self.shape)
        return values.astype(np.float32) if self.dtype == "float16" else values


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is written unchanged: a tensor of a file, or an array.

    Pickling and deep copying copy the bytes, so that the copy does not depend on the file.

    Attributes
    ----------
    origin
        A checkpoint, an array, a torch tensor, or a `RawTensor`.
    position
        The tensor's position in the checkpoint; None for other origins.
    shape
        The shape of the checkpoint's tensor.
    dtype
        The element type to write, by NumPy's name; empty for an array that is written in its own type.
    """

    origin: Any
    position: int | None = None
    shape: tuple[int, ...] = ()
    dtype: str = ""

    def to_array(self) -> np.ndarray[Any, Any]:
        """Return the values of a floating-point tensor."""
        if self.position is not None:
            values: np.ndarray[Any, Any] = self.origin.matrix(
                self.position, 1, math.prod(self.shape)
            ).to_array()
            return values.reshape(self.shape)
        if isinstance(self.origin, RawTensor):
            return self.origin.to_array()
        return unmapped(arrays.as_numpy(self.origin))

    def held(self) -> Stored:
        """Return the tensor with a copy of values that other code may change in memory."""
        if self.position is not None or isinstance(self.origin, RawTensor):
            return self
        copied = self.origin.detach().clone() if arrays.is_tensor(self.origin) else np.array(self.origin)
        return replace(self, origin=copied)

    def for_torch(self) -> Any:
        """Return the stored torch tensor, or an array that `torch.as_tensor` accepts."""
        stored = self.packed() if self.dtype.startswith(("int", "uint", "bool")) else self
        if stored.position is not None or isinstance(stored.origin, RawTensor):
            return stored.to_array()
        return stored.origin

    def packed(self) -> Stored:
        """Return the tensor with a copy of its bytes, independent of files and torch.

        Raises
        ------
        FormatError
            If a safetensors file cannot hold the element type.
        """
        if self.position is not None:
            raw = self.origin.stored_bytes(self.position)
            return Stored(RawTensor(raw, self.dtype, self.shape), dtype=self.dtype)
        if not arrays.is_tensor(self.origin):
            return self
        values, name, shape = raw_bytes(self.origin, "tensor of a live model")
        return Stored(RawTensor(values.tobytes(), NAMES[name], shape), dtype=self.dtype)

    def __repr__(self) -> str:
        shape = self.shape if self.position is not None else tuple(self.origin.shape)
        return f"Stored({self.dtype or arrays.dtype_name(self.origin)}, {list(shape)})"

    def __reduce__(self) -> tuple[type[Stored], tuple[Any, ...]]:
        packed = self.packed()
        return Stored, (packed.origin, packed.position, packed.shape, packed.dtype)

    def __copy__(self) -> Stored:
        return replace(self)


def raw_bytes(value: Any, label: str) -> tuple[np.ndarray[Any, Any], str, tuple[int, ...]]:
    """Return the bytes of an array or tensor, its type by safetensors' name, and its shape.

    Raises
    ------
    FormatError
        If safetensors lacks the element type.
    """
    dtype = arrays.dtype_name(value)
    if dtype not in SAFETENSORS_NAMES:
        raise FormatError(f"{label}: {dtype} values cannot be stored in a safetensors file")
    shape = tuple(value.shape)
    if arrays.is_tensor(value):
        value = value.detach().cpu().contiguous()
        if dtype == "bfloat16":
            import torch

            value = value.view(torch.int16)
        value = value.numpy()
    contiguous = np.ascontiguousarray(value)
    return contiguous.reshape(-1).view(np.uint8), SAFETENSORS_NAMES[dtype], shape
