"""Files that appear complete or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lorank._internal.folder_changes import keep_mode
from lorank._internal.folders import errors_name, made_folder, sync_file, sync_folder
from lorank._internal.hidden import hidden_file, remove_leftover_files

# The longest name of a file of an adapter in a staging folder, with its folders.
_LONGEST_INNER = "x" * 80


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `target` if the block ends without an error.

    The file reaches the disk before its name does. If `target` is a link, the file that it points to is
    replaced. Hidden files that killed processes left in the folder are removed.

    Raises
    ------
    OSError
        If the folder of `target` cannot be written to, or `target` is not a regular file. The target then
        stays unchanged.
    """
    place = Path(os.path.realpath(target))
    _check_replaceable(place)
    with made_folder(place.parent):
        remove_leftover_files(place.parent)
        try:
            hidden = hidden_file(place.parent)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error
        try:
            with errors_name(target, hidden.path):
                yield hidden.path
                sync_file(hidden.path)
                keep_mode(hidden.path, place)
                hidden.path.replace(place)
                sync_folder(place.parent)
        except BaseException:
            with suppress(OSError):
                hidden.path.unlink()
            raise
        finally:
            hidden.release()


def check_writable(target: Path) -> None:
    """Check that a file or folder can be made at a path, before long work.

    Raises
    ------
    OSError
        If the path is too long or leads through a file, or the folder that would hold the target cannot be
        written to.
    ValueError
        If the path holds a NUL character.
    """
    if "\0" in str(target):
        raise ValueError(f"{str(target)!r}: a path cannot hold a NUL character")
    place = Path(os.path.realpath(target))
    _check_names(place, target)
    existing = next(path for path in (place, *place.parents) if path.exists())
    if existing == place and not place.is_dir():
        _check_replaceable(place)
        existing = place.parent
    elif not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is a file, not a folder", str(existing))
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to ({error.strerror})", str(existing)) from error


def write_text(target: Path, text: str) -> None:
    """Write a text file, which appears complete or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, "utf-8", errors="backslashreplace")


def _check_names(place: Path, target: Path) -> None:
    """Raise OSError for a path that the system cannot store."""
    try:
        for path in (place, place / _LONGEST_INNER):
            with suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error


def _check_replaceable(place: Path) -> None:
    """Raise OSError if a pipe, a device or a folder is in the place of a file."""
    if place.exists() and not place.is_file():
        kind = errno.EISDIR if place.is_dir() else errno.EINVAL
        raise OSError(kind, "is not a regular file", str(place))
