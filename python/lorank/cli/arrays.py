"""Reading of samples from .npy and .npz files, which may be damaged."""

from __future__ import annotations

import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import FormatError
from lorank.cli.errors import UsageError

_FILES = "give one .npz file that holds X and Y, or two .npy files: X.npy Y.npy"
_NPY, _NPZ = b"\x93NUMPY", b"PK"
# Exceptions other than OSError that numpy, zipfile and their decoders raise for damaged files.
_UNREADABLE = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)

# An array of an .npz file is refused beyond this size in bytes and this multiple of its compressed size.
_LARGE, _EXPANSION = 1 << 28, 200


@dataclass(frozen=True, slots=True)
class NamedArray:
    """An array and its name for messages."""

    name: str
    values: npt.NDArray[Any]


def check_files(paths: Sequence[Path], x: str | None, y: str | None) -> None:
    """Raise UsageError for a wrong number or kind of files, before any file is read."""
    endings = [path.suffix.lower() for path in paths]
    if len(paths) > 2 or endings == [".npy"] or (len(paths) == 2 and ".npz" in endings):
        raise UsageError(_FILES)
    if len(paths) == 2 and (x is not None or y is not None):
        raise UsageError("--x and --y name arrays of an .npz file: an .npy file holds one array")


def open_samples(paths: Sequence[Path], x: str | None, y: str | None) -> tuple[NamedArray, NamedArray]:
    """Read `X` and `Y` from one .npz file, or map them into memory from two .npy files.

    Parameters
    ----------
    paths
        One .npz file, or two .npy files.
    x, y
        Names of the arrays in the .npz file; None for X and Y.

    Raises
    ------
    FormatError
        If a file is damaged or holds Python objects, or an array is missing.
    ValueError
        If the arrays do not have the shapes of samples, or their shapes do not agree.
    """
    if len(paths) == 1:
        inputs, outputs = _from_archive(paths[0], x, y)
    else:
        inputs, outputs = (_mapped(path) for path in paths)
    _check_shapes(inputs, outputs)
    return inputs, outputs


def _from_archive(path: Path, x: str | None, y: str | None) -> tuple[NamedArray, NamedArray]:
    _check_magic(path, _NPZ, ".npz")
    with _reading(str(path)), np.load(path, allow_pickle=False) as archive:
        keys = _key(path, archive.files, "x", x), _key(path, archive.files, "y", y)
        _check_expansion(path, archive.zip.infolist(), keys)
        inputs, outputs = (_member(path, archive, key) for key in keys)
    return inputs, outputs


def _check_expansion(path: Path, members: Sequence[zipfile.ZipInfo], keys: Sequence[str]) -> None:
    """Raise FormatError for an array that is large and expands as only repetitions do."""
    for member in members:
        key = member.filename.removesuffix(".npy")
        is_large = member.file_size > _LARGE and member.file_size > _EXPANSION * member.compress_size
        if key in keys and is_large:
            raise FormatError(
                f"{key} in {path}: expands from {member.compress_size:,} bytes to {member.file_size:,}: "
                "save it with numpy.save"
            )


def _member(path: Path, archive: Any, key: str) -> NamedArray:
    name = f"{key} in {path}"
    with _reading(name):
        values = archive[key]
    if not isinstance(values, np.ndarray):
        raise FormatError(f"{name}: is not an array")
    return NamedArray(name, values)


def _key(path: Path, keys: Sequence[str], option: str, given: str | None) -> str:
    """Return the key that equals a name, or the only key that equals it except for case."""
    name = option.upper() if given is None else given
    alike = [key for key in keys if key.lower() == name.lower()]
    if name in alike:
        return name
    if len(alike) == 1:
        return alike[0]
    holds = ", ".join(keys) or "nothing"
    raise FormatError(
        f"{path}: no array is named {name!r}; the file holds {holds}: choose one with --{option}"
    )


def _mapped(path: Path) -> NamedArray:
    _check_magic(path, _NPY, ".npy")
    # A size in the header beyond the file raises an error; NumPy's overflow warning is not needed.
    with _reading(str(path)), np.errstate(over="ignore"):
        return NamedArray(str(path), np.load(path, mmap_mode="r", allow_pickle=False))


def _check_magic(path: Path, magic: bytes, ending: str) -> None:
    """Raise FormatError unless a file starts with `magic`: NumPy reads other files as pickles."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder: {_FILES}")
    with path.open("rb") as file:
        start = file.read(len(_NPY))
    if start == _NPY != magic:
        raise ValueError(f"{path}: holds one array: {_FILES}")
    if not start.startswith(magic):
        raise FormatError(f"{path}: is not an {ending} file")


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Convert reading errors in the block to a FormatError that names the file."""
    try:
        yield
    except (FormatError, UsageError):
        raise
    except OSError as error:
        if error.filename is not None:
            raise
        raise FormatError(f"{name}: cannot be read: {error}") from error
    except _UNREADABLE as error:
        raise FormatError(f"{name}: cannot be read: {error}") from error


def _check_shapes(inputs: NamedArray, outputs: NamedArray) -> None:
    for array, dimensions in ((inputs, (2,)), (outputs, (1, 2))):
        shape, dtype = array.values.shape, array.values.dtype
        if dtype.kind not in "biuf":
            raise ValueError(f"{array.name}: must hold real numbers, not {dtype}")
        if len(shape) not in dimensions:
            raise ValueError(f"{array.name}: must have the shape (samples, features), not {shape}")
        if 0 in shape:
            raise ValueError(f"{array.name}: is empty: its shape is {shape}")
    rows, others = len(inputs.values), len(outputs.values)
    if rows != others:
        raise ValueError(f"{inputs.name} has {rows:,} rows and {outputs.name} has {others:,}")
