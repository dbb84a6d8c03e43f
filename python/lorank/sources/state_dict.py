"""State dicts: pickled by torch, or any mapping name -> array."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from lorank import extras
from lorank._core import FormatError, Matrix
from lorank.sources import arrays
from lorank.sources.base import Skipped, Source, SourceMatrix
from lorank.sources.layout import FLOAT_TYPES, Layout

# Keys under which training frameworks wrap a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")


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
        shapes[name] = tuple(value.shape)
    layout = Layout(shapes, config or {})
    matrices: list[SourceMatrix] = []
    owners: dict[object, str] = {}
    num_parameters = 0
    for name, shape in shapes.items():
        value, dtype = mapping[name], arrays.dtype_name(mapping[name])
        owner = owners.setdefault(arrays.identity(value), name)
        if owner != name:
            skipped.append(Skipped(name, shape, f"tied to {owner}"))
            continue
        num_parameters += math.prod(shape) if dtype in FLOAT_TYPES else 0
        found = layout.matrices(name, dtype)
        if isinstance(found, str):
            vector = len(shape) == 1 and dtype in FLOAT_TYPES
            load = partial(_load, value, 0, 1, shape[0]) if vector else None
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


def from_pickles(path: Path, label: str, config: Mapping[str, Any]) -> Source:
    """A source over one or more files written by `torch.save`.

    Files are mapped into memory and unpickled with `weights_only=True`: no code in them runs.
    """
    merged: dict[str, Any] = {}
    for file in _pickle_files(path):
        merged |= read_pickle(file)
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
    except OSError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"{file}: is no state dict that can be read safely (weights only): {reason}"
        ) from error


def _unwrapped(file: Path, content: Any) -> Mapping[str, Any]:
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FormatError(f"{file}: holds a {type(content).__name__}, not a state dict of named tensors")
    return content


def _pickle_files(path: Path) -> Iterable[Path]:
    if path.is_file() and not path.name.endswith(".json"):
        return [path]
    index = path if path.is_file() else next(iter(sorted(path.glob("*.bin.index.json"))), None)
    if index is not None:
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise FormatError(f"{index}: is no shard index: {error!r}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or name in {"", ".", ".."}:
                raise FormatError(f"{index}: names the shard {name!r}, which is not a plain file name")
        return [index.parent / name for name in names]
    single = path / "pytorch_model.bin"
    found = [single] if single.exists() else sorted(path.glob("*.bin"))
    if len(found) != 1:
        what = (
            "several .bin files and no index: name one of them" if found else "no .safetensors or .bin file"
        )
        raise FormatError(f"{path}: holds {what}")
    return found
