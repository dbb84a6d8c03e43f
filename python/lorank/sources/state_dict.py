"""State dicts: pickled by torch, or any mapping name -> array."""

from __future__ import annotations

import math
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorank import extras
from lorank._core import FormatError, Matrix
from lorank.json_files import read_json
from lorank.sources import arrays, recognise
from lorank.sources.base import Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout

# Keys under which training frameworks wrap a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# Where torch names what a pickle refers to beside tensors and plain containers.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


def from_mapping(
    mapping: Mapping[str, Any], label: str = "mapping", config: Mapping[str, Any] | None = None
) -> Source:
    """A source over arrays that stay where they are.

    Tensors that share memory and shape are tied: the first name counts, the others are skipped.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    skipped: list[Skipped] = []
    for name, value in mapping.items():
        if not isinstance(name, str):
            raise TypeError(f"names are strings, got {name!r}")
        if not arrays.is_array(value):
            skipped.append(Skipped(name, (), f"{type(value).__name__}, not an array"))
            continue
        if not arrays.is_dense(value):
            skipped.append(Skipped(name, tuple(value.shape), "a sparse tensor: make it dense to analyse it"))
            continue
        shapes[name] = tuple(value.shape)
    base = recognise.base_tensors(label, mapping)
    layout = Layout({base[name]: shape for name, shape in shapes.items() if name in base}, config or {})
    matrices: list[SourceMatrix] = []
    owners: dict[object, str] = {}
    num_parameters = 0
    for name, shape in shapes.items():
        value, dtype = mapping[name], arrays.dtype_name(mapping[name])
        owner = owners.setdefault(arrays.identity(value), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        is_counted = dtype in FLOAT_TYPES and name in base
        num_parameters += math.prod(shape) if is_counted else 0
        found = layout.matrices(base[name], dtype) if name in base else recognise.left_out(name)
        if isinstance(found, str):
            readable = math.prod(shape) > 0 and dtype in FLOAT_TYPES
            load = partial(_as_row, value) if readable else None
            skipped.append(Skipped(name, shape, found, load))
            continue
        matrices += [
            SourceMatrix(
                m.info,
                partial(_load, value, m.index, m.rows, m.cols),
                lazy=arrays.needs_copy(value),
                transposed=m.transposed,
                kernel=m.kernel,
            )
            for m in found
        ]
    return Source(label, tuple(matrices), tuple(skipped), num_parameters)


def _load(value: Any, index: int, rows: int, cols: int) -> Matrix:
    """The `index`-th matrix of an array: itself, an expert of a stack, or a flattened kernel."""
    if value.ndim == 3 and tuple(value.shape[1:]) == (rows, cols):
        value = value[index]
    elif value.ndim != 2:
        value = value.reshape(rows, cols)
    return arrays.matrix(value)


def _as_row(value: Any) -> Matrix:
    return arrays.matrix(value.reshape(1, -1))


def from_pickles(path: Path, label: str, config: Mapping[str, Any]) -> Source:
    """A source over one or more files written by `torch.save`.

    Files are mapped into memory and unpickled with `weights_only=True`: no code in them runs.
    """
    merged: dict[str, Any] = {}
    for file, promised in _pickle_files(path).items():
        found = read_pickle(file)
        if missing := sorted(promised - found.keys()):
            raise FormatError(f"{file}: holds no tensor {missing[0]!r}, which the index places there")
        merged |= found
    return from_mapping(merged, label, config)


def read_pickle(file: Path) -> Mapping[str, Any]:
    """The named tensors of a file written by `torch.save`, mapped into memory; no code in it runs.

    Raises
    ------
    FormatError
        If it holds anything but a state dict.
    """
    return _unwrapped(file, _unpickled(file))


def _unpickled(file: Path) -> Any:
    torch = extras.require("torch", "peft", "to read .bin, .pt and .pth files")
    try:
        # Files of torch before 1.6 are no archives and cannot be mapped.
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a broken pickle can raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file could not be opened; without a name, it is cut off and could not be mapped
        raise FormatError(
            f"{file}: is no state dict that can be read safely (weights only): {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Why a pickle was refused, without torch's advice to switch the safety off."""
    if refused := _REFUSED_GLOBAL.search(str(error)):
        return f"it refers to {refused[1]}"
    told = str(error).split("WeightsUnpickler error:")[-1].strip()
    if not told or told.startswith("Weights only load failed"):
        return "it holds more than tensors and plain containers"
    return told.splitlines()[0]


def _unwrapped(file: Path, content: Any) -> Mapping[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FormatError(f"{file}: holds a {type(content).__name__}, not a state dict of named tensors")
    return content


def _pickle_files(path: Path) -> Mapping[Path, set[str]]:
    """The files to read, with the tensors that an index says are in them."""
    if path.is_file() and not path.name.endswith(".json"):
        return {path: set()}
    index = path if path.is_file() else next(iter(sorted(path.glob("*.bin.index.json"))), None)
    if index is not None:
        return _shards(index)
    single = path / "pytorch_model.bin"
    found = [single] if single.exists() else sorted(path.glob("*.bin"))
    if len(found) != 1:
        what = (
            "several .bin files and no index: name one of them" if found else "no .safetensors or .bin file"
        )
        raise FormatError(f"{path}: holds {what}")
    return {found[0]: set()}


def _shards(index: Path) -> Mapping[Path, set[str]]:
    try:
        places = sorted(
            (str(shard), shard, tensor) for tensor, shard in read_json(index)["weight_map"].items()
        )
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormatError(f"{index}: is no shard index: {error!r}") from error
    shards: dict[Path, set[str]] = defaultdict(set)
    for name, shard, tensor in places:
        if name != shard or Path(name).name != name or name in {"", ".", ".."}:
            raise FormatError(f"{index}: names the shard {shard!r}, which is not a plain file name")
        shards[index.parent / name].add(tensor)
    return shards
