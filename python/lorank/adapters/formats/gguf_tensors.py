"""The tensors and fields of a GGUF file, read and written by the package `gguf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorank._core import FormatError, Matrix, NumericalError
from lorank._internal import extras
from lorank.adapters.formats.base import Array, WrittenTensor
from lorank.adapters.stored import Stored
from lorank.modules import naming
from lorank.sources import arrays

_MAGIC = b"GGUF"

# Names of element types: in GGUF -> in NumPy. Other types are decoded to float32.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def is_gguf(path: Path) -> bool:
    """Return True for a file with the magic number of GGUF."""
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def package() -> Any:
    """Return the package `gguf`.

    Raises
    ------
    ImportError
        If it is not installed; the message gives the extra.
    """
    return extras.require("gguf", "gguf", "to read and write adapters of llama.cpp (.gguf)")


class GgufTensors:
    """The tensors of a GGUF file, in NumPy's order of dimensions."""

    def __init__(self, path: Path) -> None:
        gguf = package()
        self.label = str(path)
        self.metadata: Mapping[str, str] = {}
        try:
            reader = gguf.GGUFReader(path)
            self._fields = {name: field.contents() for name, field in reader.fields.items()}
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
            if len(self._tensors) != len(reader.tensors):
                raise ValueError("two tensors have one name")
            self._shapes = {
                name: tuple(int(size) for size in reversed(tensor.shape))
                for name, tensor in self._tensors.items()
            }
        except OSError:
            raise
        except Exception as error:  # The package raises errors of any type for damaged files.
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise FormatError(f"{path}: cannot be read as a GGUF file: {text[:200]}") from error
        naming.check_sizes(self.label, self._shapes)

    def field(self, name: str) -> Any:
        """Return the value of a field; None if the file lacks it."""
        return self._fields.get(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, in their order."""
        return self._shapes

    def dtype(self, name: str) -> str:
        """Return the element type of a tensor by NumPy's name; float32 for packed types."""
        return _TYPES.get(self._tensors[name].tensor_type.name, "float32")

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """Return a tensor as a row-major matrix."""
        return arrays.matrix(np.ascontiguousarray(self._values(name).reshape(rows, cols)))

    def _values(self, name: str) -> Array:
        tensor = self._tensors[name]
        kind = tensor.tensor_type.name
        values: Array = tensor.data
        if kind not in ("F64", "F32", "F16"):
            try:
                values = package().quants.dequantize(tensor.data, tensor.tensor_type)
            except (NotImplementedError, ValueError) as error:
                raise FormatError(f"{self.label}: tensor {name!r}: cannot be decoded from {kind}") from error
        return np.array(values).reshape(self._shapes[name])

    def number(self, name: str) -> float:
        """Return the one element of a tensor."""
        return float(self._values(name).reshape(()))

    def stored(self, name: str) -> Stored:
        """Return a tensor with its values in memory."""
        return Stored(self._values(name), dtype=self.dtype(name))

    def digest(self, seed: bytes, threads: int) -> str:
        """Raise an error, because GGUF files hold no digest."""
        del seed, threads
        raise FormatError(f"{self.label}: a GGUF file has no digest")


def write(file: Path, tensors: Sequence[WrittenTensor], architecture: str, fields: Mapping[str, Any]) -> None:
    """Write a GGUF file of an adapter.

    Parameters
    ----------
    file
        The path.
    tensors
        The tensors, of types that GGUF has.
    architecture
        The name of the base model's architecture in llama.cpp.
    fields
        Further fields: texts, numbers (float32) and lists of integers (uint32).
    """
    gguf = package()
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    for name, value in fields.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            kinds = gguf.GGUFValueType
            writer.add_key_value(name, list(value), kinds.ARRAY, kinds.UINT32)
    for key, shape, values, kind in tensors:
        assert isinstance(values, Matrix)
        array = np.ascontiguousarray(values.to_array().reshape(shape))
        if kind == "BF16":
            bits = gguf.quants.quantize(array.astype(np.float32), gguf.GGMLQuantizationType.BF16)
            writer.add_tensor(key, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
            continue
        with np.errstate(over="ignore"):
            typed = array.astype(np.float16 if kind == "F16" else np.float32)
        if not np.array_equal(np.isfinite(array), np.isfinite(typed)):
            raise NumericalError(f"{file}: tensor {key!r}: a value does not fit {kind}")
        writer.add_tensor(key, typed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
