"""The tensors of an adapter, wherever they lie: in a safetensors file, or in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lorank._core import Checkpoint, FormatError, Matrix
from lorank.sources import arrays

# Element types by the names that safetensors headers and NumPy or torch give them.
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


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor that is written as it is found: the bytes of a file's tensor, or an array's.

    Attributes
    ----------
    origin
        A checkpoint, or an array or tensor.
    position
        The tensor's position in the checkpoint; None for an array.
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
        """Read the values, which are floating-point numbers."""
        if self.position is None:
            return arrays.as_numpy(self.origin)
        size = math.prod(self.shape)
        values: np.ndarray[Any, Any] = self.origin.matrix(self.position, 1, size).to_array()
        return values.reshape(self.shape)


def values_of(stored: Stored) -> Any:
    """Return a stored tensor's values: torch's tensor as it is, or an array that torch can take over."""
    if stored.position is None:
        return stored.origin
    _, short, shape = stored.origin.tensors()[stored.position]
    dtype = NAMES.get(short, short)
    if dtype.startswith(("int", "uint", "bool")):
        raw = stored.origin.stored_bytes(stored.position)
        return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)
    return stored.origin.matrix(stored.position, 1, math.prod(shape)).to_array().reshape(shape)


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    label: str
    metadata: Mapping[str, str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor's shape, in order."""
        ...

    def dtype(self, name: str) -> str:
        """A tensor's element type by NumPy's name."""
        ...

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A tensor as a row-major matrix."""
        ...

    def number(self, name: str) -> float:
        """The one element of a tensor, of any type that is a number."""
        ...

    def stored(self, name: str) -> Stored:
        """A tensor for a writer that does not look at it."""
        ...


class FileTensors:
    """The tensors of a safetensors file, which stays open and unread."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._checkpoint = Checkpoint(path)
        self.metadata: Mapping[str, str] = self._checkpoint.metadata()
        self._entries = {
            name: (position, dtype, tuple(shape))
            for position, (name, dtype, shape) in enumerate(self._checkpoint.tensors())
        }
        self._shapes = {name: shape for name, (_, _, shape) in self._entries.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """A tensor's element type by NumPy's name."""
        dtype = self._entries[name][1]
        return NAMES.get(dtype, dtype)

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A tensor as a row-major matrix."""
        return self._checkpoint.matrix(self._entries[name][0], rows, cols)

    def number(self, name: str) -> float:
        """The one element of a tensor, of any type that is a number."""
        position, _, shape = self._entries[name]
        dtype = self.dtype(name)
        if math.prod(shape) != 1:
            raise FormatError(f"{self.label}: tensor {name!r} of shape {list(shape)} is not one number")
        if not dtype.startswith(("int", "uint")):
            return float(self.matrix(name, 1, 1).to_array()[0, 0])
        (value,) = np.frombuffer(self._checkpoint.stored_bytes(position), np.dtype(dtype).newbyteorder("<"))
        return float(value)

    def stored(self, name: str) -> Stored:
        """A tensor for a writer that does not look at it."""
        position, _, shape = self._entries[name]
        return Stored(self._checkpoint, position, shape, self.dtype(name))


class ArrayTensors:
    """NumPy arrays or torch tensors in memory."""

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.metadata: Mapping[str, str] = {}
        self._values = values
        self._shapes = {name: tuple(value.shape) for name, value in values.items()}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, in order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """A tensor's element type by NumPy's name."""
        return arrays.dtype_name(self._values[name])

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A tensor as a row-major matrix."""
        return arrays.matrix(self._values[name].reshape(rows, cols))

    def number(self, name: str) -> float:
        """The one element of a tensor, of any type that is a number."""
        if math.prod(self._shapes[name]) != 1:
            raise FormatError(f"{self.label}: tensor {name!r} is not one number")
        return float(self._values[name].reshape(()))

    def stored(self, name: str) -> Stored:
        """A tensor for a writer that does not look at it."""
        return Stored(self._values[name], dtype=self.dtype(name))


def raw_bytes(value: Any, name: str) -> tuple[np.ndarray[Any, Any], str, tuple[int, ...]]:
    """An array's bytes, its type by safetensors' name, and its shape.

    Raises
    ------
    FormatError
        If safetensors has no such type.
    """
    dtype = arrays.dtype_name(value)
    if dtype not in SAFETENSORS_NAMES:
        raise FormatError(f"tensor {name!r}: {dtype} values cannot be stored in a safetensors file")
    shape = tuple(value.shape)
    if arrays.is_tensor(value):
        value = value.detach().cpu().contiguous()
        if dtype == "bfloat16":
            import torch

            value = value.view(torch.int16)
        value = value.numpy()
    contiguous = np.ascontiguousarray(value)
    return contiguous.reshape(-1).view(np.uint8), SAFETENSORS_NAMES[dtype], shape
