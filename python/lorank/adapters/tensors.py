"""The tensors of an adapter, in a safetensors file or in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lorank._core import Checkpoint, FormatError, Matrix
from lorank.adapters.stored import NAMES, Stored
from lorank.modules import naming
from lorank.sources import arrays


class Tensors(Protocol):
    """Named tensors that are read one at a time."""

    label: str
    metadata: Mapping[str, str]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor, in their order."""
        ...

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor by NumPy's name."""
        ...

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a tensor as a row-major matrix."""
        ...

    def number(self, name: str) -> float:
        """Return the one element of a tensor of any number type."""
        ...

    def stored(self, name: str) -> Stored:
        """Return a tensor for a writer that does not read its values."""
        ...

    def digest(self, seed: bytes, threads: int) -> str:
        """Return a digest of the names, types, shapes and bytes of all tensors and of `seed`."""
        ...


class FileTensors:
    """The tensors of a safetensors file, which stays open; values are read on demand."""

    def __init__(self, path: Path) -> None:
        self.label = str(path)
        self._checkpoint = Checkpoint(path, repeated=True)
        self.metadata: Mapping[str, str] = self._checkpoint.metadata()
        self._entries = {
            name: (position, dtype, tuple(shape))
            for position, (name, dtype, shape) in enumerate(self._checkpoint.tensors())
        }
        self._shapes = {name: shape for name, (_, _, shape) in self._entries.items()}
        naming.check_sizes(self.label, self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in their order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor by NumPy's name."""
        dtype = self._entries[name][1]
        return NAMES.get(dtype, dtype)

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a tensor as a row-major matrix."""
        return self._checkpoint.matrix(self._entries[name][0], rows, cols)

    def number(self, name: str) -> float:
        """Return the one element of a tensor of any number type."""
        position, _, shape = self._entries[name]
        dtype = self.dtype(name)
        if math.prod(shape) != 1:
            raise FormatError(f"{self.label}: tensor {name!r} of shape {list(shape)} is not a single number")
        if not dtype.startswith(("int", "uint")):
            return float(self.matrix(name, 1, 1).to_array()[0, 0])
        (value,) = np.frombuffer(self._checkpoint.stored_bytes(position), np.dtype(dtype).newbyteorder("<"))
        return float(value)

    def stored(self, name: str) -> Stored:
        """Return a tensor for a writer that does not read its values."""
        position, _, shape = self._entries[name]
        return Stored(self._checkpoint, position, shape, self.dtype(name))

    def digest(self, seed: bytes, threads: int) -> str:
        """Return a digest of the names, types, shapes and bytes of all tensors and of `seed`."""
        return self._checkpoint.digest(seed, threads)


class ArrayTensors:
    """Named NumPy arrays or torch tensors in memory."""

    def __init__(self, values: Mapping[str, Any], label: str) -> None:
        self.label = label
        self.metadata: Mapping[str, str] = {}
        self._values = values
        self._shapes = {name: tuple(value.shape) for name, value in values.items()}
        naming.check_sizes(label, self._shapes)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in their order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor by NumPy's name."""
        return arrays.dtype_name(self._values[name])

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a tensor as a row-major matrix."""
        return arrays.matrix(self._values[name], (rows, cols))

    def number(self, name: str) -> float:
        """Return the one element of a tensor of any number type."""
        if math.prod(self._shapes[name]) != 1:
            raise FormatError(f"{self.label}: tensor {name!r} is not a single number")
        return float(self._values[name].reshape(()))

    def stored(self, name: str) -> Stored:
        """Return a tensor for a writer that does not read its values."""
        return Stored(self._values[name], dtype=self.dtype(name))

    def digest(self, seed: bytes, threads: int) -> str:
        """Raise an error: values in memory may change, and no metadata state a digest of them."""
        del seed, threads
        raise FormatError(f"{self.label}: tensors in memory have no digest")
