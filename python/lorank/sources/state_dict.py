"""Sources of state dicts: files pickled by torch, or mappings from names to arrays."""

from __future__ import annotations

import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorank._core import FormatError, Matrix
from lorank._internal import extras
from lorank._internal.json_files import read_json
from lorank.modules import quantized
from lorank.modules.building import Unknown
from lorank.modules.model_config import ModelConfig
from lorank.sources import arrays, recognise
from lorank.sources.assembly import assemble
from lorank.sources.base import Skipped, Source

# Keys under which training frameworks wrap a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# The part of torch's message that names a refused global of a pickle.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def from_mapping(mapping: Mapping[str, Any], label: str = "mapping") -> Source:
    """Open a source that reads arrays without moving them.

    Tensors that share memory and shape are tied: the first one counts and the others are skipped.
    """
    tensors = StoredArrays(mapping, label)
    source = assemble(label, tensors, ModelConfig(), lambda _: Unknown("arrays come without their model"))
    return replace(source, skipped=(*tensors.skipped, *source.skipped))


class StoredArrays:
    """Arrays and tensors of a mapping, by their names in the base model. Values are not moved.

    Raises
    ------
    FormatError
        If the tensors are those of an adapter.
    TypeError
        If a name is not a string.
    """

    is_unordered = False

    def __init__(self, mapping: Mapping[str, Any], label: str) -> None:
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
        value = self._values[name]
        if name in self._quantized and (load := quantized.loader(None, value)) is not None:
            value = load()
        if value.ndim == 3 and tuple(value.shape[1:]) == (rows, cols):
            value = value[index]
        elif value.ndim != 2 or tuple(value.shape) != (rows, cols):
            value = value.reshape(rows, cols)
        return arrays.matrix(value)

    def shared_with(self, name: str) -> str | None:
        """Return the name of the first tensor with the same memory and shape; None if this is the first."""
        return self._shared.get(name)

    def are_equal(self, a: str, b: str) -> bool:
        """Return True if two tensors hold the same numbers."""
        first, second = (arrays.as_numpy(self._values[name]) for name in (a, b))
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=True)

    def content(self, name: str) -> bytes | None:
        """Return the bytes of a tensor; None if they cannot be read."""
        return arrays.content(self._values[name])

    @property
    def metadata(self) -> Mapping[str, str]:
        """The metadata of the files: empty, because arrays have no metadata."""
        return {}


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an array; an empty shape for other values."""
    return tuple(value.shape) if arrays.is_array(value) else ()


def read_pickles(path: Path) -> Mapping[str, Any]:
    """Return the named tensors of one or more files written by `torch.save`.

    Files are mapped into memory and unpickled with `weights_only=True`: no code in them runs.
    """
    merged: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for file, promised in _pickle_files(path).items():
        found = read_pickle(file)
        if missing := sorted(promised - found.keys()):
            raise FormatError(f"{file}: holds no tensor {missing[0]!r}, which the index places there")
        for name in found:
            if (other := places.setdefault(name, file)) != file:
                raise FormatError(f"{file}: tensor {name!r} is also in {other.name}: keep one of them")
        merged |= found
    return merged


def read_pickle(file: Path) -> Mapping[str, Any]:
    """Return the named tensors of a file written by `torch.save`, mapped into memory; no code in it runs.

    Raises
    ------
    FormatError
        If the file does not hold a state dict.
    """
    return _unwrapped(file, _unpickled(file))


def _unpickled(file: Path) -> Any:
    """Return the content of a pickled file."""
    torch = extras.require("torch", "peft", "to read .bin, .pt and .pth files")
    try:
        # Files of torch before 1.6 are not archives and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a broken pickle can raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; an error without a name comes from a truncated file
        raise FormatError(
            f"{file}: is not a state dict that can be read safely (weights only): {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return the reason why torch refused a pickle, without its advice to disable the check."""
    if refused := _REFUSED_GLOBAL.search(str(error)):
        return f"it refers to {refused[1]}"
    message = str(error).split("WeightsUnpickler error:")[-1].strip()
    if not message or message.startswith("Weights only load failed"):
        return "it holds more than tensors and plain containers"
    return message.splitlines()[0]


def _unwrapped(file: Path, content: Any) -> Mapping[str, Any]:
    """Return the state dict in the content of a file, without the wrappers of training frameworks."""
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FormatError(f"{file}: holds an object of type {type(content).__name__}, not a state dict")
    return content


def _pickle_files(path: Path) -> Mapping[Path, set[str]]:
    """Return the files to read, each with the tensors that an index places in it."""
    if path.is_file() and not path.name.endswith(".json"):
        return {path: set()}
    index = path if path.is_file() else next(iter(sorted(path.glob("*.bin.index.json"))), None)
    if index is not None:
        return _shards(index)
    single = path / "pytorch_model.bin"
    found = [single] if single.exists() else sorted(path.glob("*.bin"))
    if len(found) != 1:
        content = (
            "several .bin files and no index: name one of them" if found else "no .safetensors or .bin file"
        )
        raise FormatError(f"{path}: holds {content}")
    return {found[0]: set()}


def _shards(index: Path) -> Mapping[Path, set[str]]:
    """Return the shards that an index lists, each with the tensors in it."""
    try:
        places = sorted(
            (str(shard), shard, tensor) for tensor, shard in read_json(index)["weight_map"].items()
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index}: is not a shard index: {error!r}") from error
    shards: dict[Path, set[str]] = defaultdict(set)
    for name, shard, tensor in places:
        if name != shard or Path(name).name != name or name in {"", ".", ".."}:
            raise FormatError(f"{index}: names the shard {shard!r}, which is not a plain file name")
        shards[index.parent / name].add(tensor)
    return shards
