"""Presents the packed weights of files as plain tensors, under the names and shapes of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from lorank._core import FormatError, Matrix
from lorank.sources.decodings import Decoding, decoding
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization
from lorank.sources.stored_tensors import Entries, StoredTensors


class StoredCodes(StoredTensors, Protocol):
    """Stored tensors that the core can decode."""

    def dequantized(self, decoding: Decoding, index: int, view: tuple[int, int] | None = None) -> Matrix:
        """Return the `index`-th matrix of a packed weight, or all from there on as a matrix of a shape."""
        ...


class DecodedTensors:
    """The tensors of a file, in which a packed weight has one entry under its own name.

    Parts of packed weights keep their entries. The element type of a decoded weight is its scheme's name.

    Parameters
    ----------
    tensors
        The tensors of the file.
    packing
        The packed weights; those that can be decoded become plain weights.
    quantization
        The quantization that the configuration declares.
    label
        The name of the source in messages.

    Raises
    ------
    FormatError
        If the configuration, names and shapes of a packed weight contradict each other.
    """

    def __init__(
        self, tensors: StoredCodes, packing: Packing, quantization: Quantization, label: str
    ) -> None:
        self._tensors = tensors
        self.is_unordered = tensors.is_unordered
        self._entries: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._decodings: dict[str, Decoding] = {}
        entries = tensors.entries()
        for name, entry in entries.items():
            codes = packing.codes.get(name)
            if codes is None:
                self._entries[name] = entry
                continue
            if reason := quantization.contradiction(codes.scheme.name):
                raise FormatError(f"{label}: tensor `{name}`: {reason}")
            found = decoding(packing.packed(name), codes.scheme.name, codes.shape)
            if found is None or (codes.scheme.types == {"fp8"} and entry[0] not in _FLOAT8):
                self._entries[name] = entry
                continue
            if codes.weight != name and codes.weight in entries:
                raise FormatError(f"{label}: tensors `{name}` and `{codes.weight}` define the same weight")
            self._decodings[codes.weight] = found
            self._entries[codes.weight] = (codes.scheme.name, found.shape)
            packing.decode(name, found.shape)
            tensors.dequantized(found, 0)

    def entries(self) -> Entries:
        """Return the element type or scheme, and the shape, of every tensor by its name, in order."""
        return self._entries

    def is_lazy(self, name: str) -> bool:
        """Return True if reading a matrix of the tensor copies its values."""
        return name not in self._decodings and self._tensors.is_lazy(name)

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix of a tensor."""
        found = self._decodings.get(name)
        if found is None:
            return self._tensors.matrix(name, rows, cols, index)
        if (rows, cols) == found.unit:
            return self._tensors.dequantized(found, index)
        return self._tensors.dequantized(found, index * (rows * cols) // max(1, _size(found)), (rows, cols))

    def shared_with(self, name: str) -> str | None:
        """Return the name of the first tensor with the same memory and shape; None if this is the first."""
        return None if name in self._decodings else self._tensors.shared_with(name)

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same numbers."""
        one, other = self._decodings.get(a), self._decodings.get(b)
        if one is None or other is None:
            return one is other and self._tensors.are_equal(a, b)
        if (one.scheme, one.shape, one.settings) != (other.scheme, other.shape, other.settings):
            return False
        if one.parts.keys() != other.parts.keys():
            return False
        return all(self._tensors.are_equal(one.parts[role], other.parts[role]) for role in one.parts)

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a tensor; None for a decoded weight."""
        return None if name in self._decodings else self._tensors.content(name)

    def decoded(self, packing: Packing, quantization: Quantization) -> StoredTensors:
        """Return the tensors themselves: they are decoded."""
        del packing, quantization
        return self

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files."""
        return self._tensors.metadata


_FLOAT8 = {"F8_E4M3", "F8_E5M2"}


def _size(found: Decoding) -> int:
    rows, cols = found.unit
    return rows * cols
