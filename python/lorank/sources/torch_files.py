"""Reads state dicts in files written by `torch.save`. No code in such a file runs."""

from __future__ import annotations

import re
import struct
import sys
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorank._core import FormatError
from lorank._internal import extras
from lorank._internal.json_files import read_json
from lorank.modules import quantized
from lorank.sources import arrays, pickle_nesting, tensor_claims

# Keys under which training frameworks wrap a state dict.
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module")

# The part of torch's message that names a refused global of a pickle.
_REFUSED_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")

# Place, in the header of a member of an archive, of the lengths of its name and its extra field.
_LENGTHS_IN_HEADER = 26

# Oldest torch that runs no code of a file: earlier ones do, by CVE-2025-32434 and CVE-2026-24747.
_SAFE_TORCH = (2, 10)


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """The named tensors of one or more files written by `torch.save`.

    Attributes
    ----------
    tensors
        The tensors by name.
    unread
        Shape of each tensor that `tensors` lacks, and the reason, by name: the tensor repeats the numbers of
        its storage, or the file holds it beside the state dict, as a moving average.
    states
        Size, modification time and inode of each file before it was read.
    """

    tensors: Mapping[str, Any]
    unread: Mapping[str, tuple[tuple[int, ...], str]]
    states: Mapping[Path, tuple[int, ...]]

    def check_unchanged(self) -> None:
        """Raise FormatError if a file is not the one that was opened."""
        for file, state in self.states.items():
            if _state(file) != state:
                raise FormatError(f"{file}: was changed after it was opened: run the command again")


def read_model(path: Path) -> TensorFiles:
    """Read the tensors of a model, in one file or in shards.

    Files are mapped into memory and unpickled with `weights_only=True`: no code in them runs.

    Raises
    ------
    FormatError
        If a file does not hold a state dict, or a weight in it repeats numbers.
    ImportError
        If torch is not installed, or runs code of files.
    """
    places = _pickle_files(path)
    owners = {name: file for file, names in places.items() for name in names}
    tensors: dict[str, Any] = {}
    unread: dict[str, tuple[tuple[int, ...], str]] = {}
    states = {}
    for file, promised in places.items():
        states[file] = _state(file)
        found, beside = _state_dicts(file)
        unread |= beside
        if missing := sorted(promised - found.keys()):
            raise FormatError(f"{file}: holds no tensor {missing[0]!r}, which the index places there")
        for name, reason in tensor_claims.repeated(found).items():
            shape = tuple(found[name].shape)
            if len(shape) >= 2 and found[name].is_floating_point():
                raise FormatError(f"{file}: tensor {name!r} {reason}")
            unread[name] = shape, reason
        for name in found:
            if (other := owners.setdefault(name, file)) != file:
                raise FormatError(f"{file}: tensor {name!r} is also in {other.name}: keep one of them")
        tensors |= found
    kept = {name: value for name, value in tensors.items() if name not in unread}
    return TensorFiles(kept, unread, states)


def read_tensors(file: Path) -> Mapping[str, Any]:
    """Return the named tensors of a file written by `torch.save`, mapped into memory; no code in it runs.

    Raises
    ------
    FormatError
        If the file does not hold a state dict, or a tensor in it repeats numbers.
    ImportError
        If torch is not installed, or runs code of files.
    """
    found, _ = _state_dicts(file)
    for name, reason in tensor_claims.repeated(found).items():
        raise FormatError(f"{file}: tensor {name!r} {reason}")
    return found


def _state_dicts(file: Path) -> tuple[Mapping[str, Any], Mapping[str, tuple[tuple[int, ...], str]]]:
    """Return the state dict in a file, and shapes of the tensors beside it with the reason to skip them.

    The tensors of the state dict claim no more than the file stores.
    """
    torch = _safe_torch(file)
    if file.exists() and not file.is_file():
        raise FormatError(f"{file}: is not a regular file")
    try:
        is_archive = is_mapped = zipfile.is_zipfile(file)
        _check_pickle(file, is_archive)
        # Files of torch before 1.6 are not archives and cannot be mapped.
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_archive)
        found, beside = _unwrapped(file, content)
        if is_archive and not all(map(_is_readable_in_place, found.values())):
            found, _ = _unwrapped(file, torch.load(file, map_location="cpu", weights_only=True, mmap=False))
            is_mapped = False
        reason = tensor_claims.excess(found, file.stat().st_size)
        if reason is None and is_mapped:
            reason = tensor_claims.beyond_records(found, _records(file))
    except FormatError:
        raise
    except Exception as error:  # a broken pickle can raise anything
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; an error without a name comes from a truncated file
        raise FormatError(
            f"{file}: is not a state dict that can be read safely (weights only): {_reason(error)}"
        ) from error
    if reason is not None:
        raise FormatError(f"{file}: {reason}")
    return found, beside


def _safe_torch(file: Path) -> Any:
    """Return torch; raise ImportError for a version that runs code of files."""
    torch = extras.require("torch", "peft", "to read .bin, .pt and .pth files")
    version = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(a|b|rc|\.dev)?.*", str(torch.__version__))
    release = (int(version[1]), int(version[2])) if version else (0, 0)
    is_preview = version is not None and version[4] is not None and int(version[3] or 0) == 0
    if release < _SAFE_TORCH or (release == _SAFE_TORCH and is_preview):
        oldest = ".".join(map(str, _SAFE_TORCH))
        raise ImportError(
            f"{file}: torch {torch.__version__} may run code that a pickled file contains: update to "
            f"torch {oldest} or later, or convert the file to .safetensors",
            name="torch",
        )
    return torch


def _check_pickle(file: Path, is_archive: bool) -> None:
    """Raise FormatError for archives that cannot be mapped, and for pickles nested too deeply."""
    if is_archive:
        with zipfile.ZipFile(file) as archive:
            too_deep = any(map(pickle_nesting.is_too_deep, _pickles(file, archive)))
    else:
        with file.open("rb") as stream:
            too_deep = pickle_nesting.is_any_too_deep(stream)
    if too_deep:
        raise FormatError(f"{file}: its containers are nested more than {pickle_nesting.LIMIT} levels deep")


def _pickles(file: Path, archive: zipfile.ZipFile) -> Iterator[bytes]:
    """Yield the pickles of an archive; raise FormatError unless its bytes can be read in place."""
    members = archive.infolist()
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise FormatError(
                f"{file}: its member {member.filename!r} is compressed, which torch.save never does: load "
                "and save the file with torch"
            )
    for member in members:
        name = member.filename.rpartition("/")[2]
        if name == "byteorder" and archive.read(member) != sys.byteorder.encode():
            raise FormatError(
                f"{file}: has the byte order of another machine: convert it to .safetensors there"
            )
        if name == "data.pkl":
            yield archive.read(member)


def _records(file: Path) -> dict[int, int]:
    """Return the size of every record of an archive by its offset in the file."""
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        records = {}
        for member in archive.infolist():
            stream.seek(member.header_offset + _LENGTHS_IN_HEADER)
            name, extra = struct.unpack("<HH", stream.read(4))
            records[member.header_offset + _LENGTHS_IN_HEADER + 4 + name + extra] = member.file_size
    return records


def _is_readable_in_place(value: Any) -> bool:
    """Return True unless a value is a tensor whose numbers are not plain numbers in memory.

    torch itself reads quantized, sparse and other special tensors. A mapped file that is cut off would end
    the process.
    """
    if not arrays.is_tensor(value) or value.device.type == "meta":
        return True
    is_direct = arrays.is_dense(value) and not quantized.is_quantized(None, value)
    return is_direct and not value.is_neg() and not value.is_conj()


def _state(file: Path) -> tuple[int, ...]:
    """Return the size, modification time, device and inode of a file."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino


def _reason(error: Exception) -> str:
    """Return the reason why torch refused a pickle, without its advice to disable the check."""
    if refused := _REFUSED_GLOBAL.search(str(error)):
        return f"it refers to {refused[1]}"
    message = str(error).split("WeightsUnpickler error:")[-1].strip()
    if not message or message.startswith("Weights only load failed"):
        return "it holds more than tensors and plain containers"
    return message.splitlines()[0]


def _unwrapped(
    file: Path, content: Any
) -> tuple[Mapping[str, Any], Mapping[str, tuple[tuple[int, ...], str]]]:
    """Return the state dict in the wrappers of training frameworks, and the tensors of others beside it."""
    beside: dict[str, tuple[tuple[int, ...], str]] = {}
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            for key, other in content.items():
                if key != wrapper and isinstance(key, str) and isinstance(other, Mapping):
                    beside |= _tensors_beside(key, other, wrapper)
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise FormatError(f"{file}: holds an object of type {type(content).__name__}, not a state dict")
    return content, beside


def _tensors_beside(
    key: str, state: Mapping[Any, Any], wrapper: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape of every tensor of a state dict beside the one that is read, and the reason."""
    reason = f"in {key!r}, beside the weights in {wrapper!r}"
    tensors = {name: value for name, value in state.items() if arrays.is_tensor(value)}
    return {f"{key}.{name}": (tuple(value.shape), reason) for name, value in tensors.items()}


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
