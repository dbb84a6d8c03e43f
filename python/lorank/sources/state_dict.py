"""Sources of state dicts: mappings from names to arrays and tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from lorank._core import Matrix
from lorank.modules import quantized
from lorank.modules.building import Unknown
from lorank.modules.model_config import ModelConfig
from lorank.sources import arrays, recognise
from lorank.sources.assembly import assemble
from lorank.sources.base import Skipped, Source
from lorank.sources.mapped import unmapped
from lorank.sources.packing import Packing
from lorank.sources.quantization import Quantization
from lorank.sources.stored_tensors import StoredTensors


def from_mapping(mapping: Mapping[str, Any], label: str = "mapping") -> Source:
    """Open a source that reads arrays without moving them.

    Tensors that share memory and shape are tied: the first one counts and the others are skipped.
    """
    tensors = StoredArrays(mapping, label)
    source = assemble(label, tensors, ModelConfig(), lambda _: Unknown("arrays come without their model"))
    return replace(source, skipped=(*tensors.skipped, *source.skipped))


class StoredArrays:
    """Arrays and tensors of a mapping, by their names in the base model. Values are not moved.

    Parameters
    ----------
    mapping
        The arrays and tensors by name.
    label
        The name of the source in messages.
    check_unchanged
        A function that raises an error if the files of the arrays were changed; called before each read.

    Raises
    ------
    FormatError
        If the tensors are those of an adapter.
    TypeError
        If a name is not a string.
    """

    is_unordered = False

    def __init__(
        self, mapping: Mapping[str, Any], label: str, check_unchanged: Callable[[], None] = lambda: None
    ) -> None:
        self._check_unchanged = check_unchanged
        self.skipped: list[Skipped] = []
        self._values: dict[str, Any] = {}
        self._shared: dict[str, str] = {}
        # Names of tensor subclasses of quantization libraries, which can be dequantized.
        self._quantized: set[str] = set()
        owners: dict[object, str] = {}
        if unnamed := [name for name in mapping if not isinstance(name, str)]:
            raise TypeError(f"names must be strings, got {unnamed[0]!r}")
        base = recognise.base_tensors(label, mapping)
        for key, value in mapping.items():
            name = base.get(key, key)
            if key not in base:
                self.skipped.append(Skipped(key, _shape(value), recognise.exclusion_reason(key)))
            elif not arrays.is_array(value):
                self.skipped.append(Skipped(name, (), f"{type(value).__name__}, not an array"))
            elif not arrays.is_dense(value):
                reason = "a sparse tensor: make it dense to analyse it"
                self.skipped.append(Skipped(name, tuple(value.shape), reason))
            elif arrays.is_tensor(value) and value.device.type == "meta":
                reason = "on the meta device: it has no values"
                self.skipped.append(Skipped(name, tuple(value.shape), reason))
            else:
                self._values[name] = value
                if quantized.is_quantized(None, value) and quantized.loader(None, value) is not None:
                    self._quantized.add(name)
                owner = owners.setdefault(arrays.identity(value), name)
                if owner != name:
                    self._shared[name] = owner
        self._entries = {name: (self._type(name), quantized.shape(x)) for name, x in self._values.items()}

    def entries(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """Return the element type and shape of every tensor, in the order of the mapping."""
        return self._entries

    def _type(self, name: str) -> str:
        """Return the element type of a tensor's dequantized values."""
        return "float32" if name in self._quantized else arrays.dtype_name(self._values[name])

    def is_lazy(self, name: str) -> bool:
        """Return True if reading a matrix of the tensor copies its values."""
        return name in self._quantized or arrays.needs_copy(self._values[name])

    def matrix(self, name: str, rows: int, cols: int, index: int = 0) -> Matrix:
        """Return the `index`-th matrix: the tensor, an expert of a stack, or a flattened kernel."""
        self._check_unchanged()
        value = self._values[name]
        if name in self._quantized and (load := quantized.loader(None, value)) is not None:
            value = load()
        if value.ndim == 3 and tuple(value.shape[1:]) == (rows, cols):
            value = value[index]
        return arrays.matrix(value, (rows, cols))

    def shared_with(self, name: str) -> str | None:
        """Return the name of the first tensor with the same memory and shape; None if this is the first."""
        return self._shared.get(name)

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same numbers."""
        self._check_unchanged()
        first, second = (unmapped(arrays.as_numpy(self._values[name])) for name in (a, b))
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=True)

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a tensor; None if they cannot be read."""
        self._check_unchanged()
        return arrays.content(self._values[name])

    def decoded(self, packing: Packing, quantization: Quantization) -> StoredTensors:
        """Return the tensors themselves: packed weights are decoded from safetensors files alone."""
        del packing, quantization
        return self

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files: empty, because arrays have no metadata."""
        return {}


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an array; an empty shape for other values."""
    return tuple(value.shape) if arrays.is_array(value) else ()
