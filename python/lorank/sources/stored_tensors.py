"""The interface of readers: named tensors of a checkpoint, whose matrices are read one at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, TypeAlias

from lorank._core import Matrix
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization

Entries: TypeAlias = "Mapping[str, tuple[str, tuple[int, ...]]]"
"""Element type and shape of tensors by name."""


class StoredTensors(Protocol):
    """Named tensors of a checkpoint, which are read one matrix at a time."""

    is_unordered: bool
    """True if the tensors are in the order of a file, not of the model."""

    def entries(self) -> Entries:
        """Return the element type and shape of every tensor by its name, in order."""
        ...

    def is_lazy(self, name: str) -> bool:
        """Return True if reading a matrix of the tensor copies its values."""
        ...

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of a tensor."""
        ...

    def shared_with(self, name: str) -> str | None:
        """Return the name of the first tensor with the same memory and shape; None if this is the first."""
        ...

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same numbers."""
        ...

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a tensor; None if they cannot be read."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files."""
        ...

    def decoded(self, packing: Packing, quantization: Quantization) -> StoredTensors:
        """Return the tensors with packed weights as plain ones, as far as the reader can decode them."""
        ...
