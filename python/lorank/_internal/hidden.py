"""Hidden files and folders of running processes, and removal of those that killed processes left.

A process holds a lock on each of its hidden files, and on the file `lock` in each of its hidden folders. The
system releases locks when a process ends.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LOCK = "lock"

# The first form is that of this file, the second one that of the core.
_NAME = re.compile(r"\.lorank\.(?:[0-9a-f]{16}|[0-9]+\.[0-9]+)\.part")


def is_hidden_name(name: str) -> bool:
    """Return True for the name of a hidden file or folder of this program."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Hidden:
    """A hidden file or folder, and the open file that holds its lock.

    Attributes
    ----------
    path
        The file or folder.
    descriptor
        The open file.
    """

    path: Path
    descriptor: int

    def release(self) -> None:
        """Release the lock."""
        os.close(self.descriptor)


def hidden_file(folder: Path) -> Hidden:
    """Make an empty file with the default permissions in a folder, and lock it."""
    while True:
        path = _unused(folder)
        descriptor = _locked(path, os.O_CREAT | os.O_EXCL)
        if descriptor is not None:
            return Hidden(path, descriptor)


def hidden_folder(folder: Path) -> Hidden:
    """Make a folder that holds only its lock."""
    while True:
        path = _unused(folder)
        path.mkdir()
        # Another process may take the folder for a leftover, and remove it before the lock is held.
        with suppress(FileNotFoundError):
            descriptor = _locked(path / LOCK, os.O_CREAT | os.O_EXCL)
            if descriptor is not None:
                return Hidden(path, descriptor)


def remove_leftover_files(folder: Path) -> None:
    """Remove the hidden files that killed processes left in a folder. Errors are ignored."""
    for path in _hidden_in(folder, stat.S_ISREG):
        with suppress(OSError):
            descriptor = _locked(path, needs_lock=True)
            if descriptor is not None:
                path.unlink()
                os.close(descriptor)


def leftover_folders(folder: Path) -> Iterator[Path]:
    """Yield the hidden folders that killed processes left in a folder, and lock each meanwhile."""
    for path in _hidden_in(folder, stat.S_ISDIR):
        try:
            descriptor = _locked(path / LOCK, needs_lock=True)
        except FileNotFoundError:
            # The process was killed before it made the lock. A folder with files is not removed.
            with suppress(OSError):
                path.rmdir()
            continue
        except OSError:
            continue
        if descriptor is not None:
            try:
                yield path
            finally:
                os.close(descriptor)


def remove_tree(folder: Path) -> None:
    """Remove a hidden folder without following links, and its lock last. Errors are ignored."""
    with suppress(OSError):
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name != LOCK:
                Path(entry.path).unlink()
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _hidden_in(folder: Path, is_kind: Callable[[int], bool]) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            paths = [Path(entry.path) for entry in entries if is_hidden_name(entry.name)]
    except OSError:
        return []
    kept = []
    for path in paths:
        with suppress(OSError):
            if is_kind(path.lstat().st_mode):
                kept.append(path)
    return kept


def _locked(path: Path, flags: int = 0, *, needs_lock: bool = False) -> int | None:
    """Open and lock a file; return None if another process has locked or removed it.

    Parameters
    ----------
    path
        The file.
    flags
        Flags for `os.open`.
    needs_lock
        True to return None on file systems without locks.
    """
    flags |= os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_mine = True
    except BlockingIOError:
        is_mine = False
    except OSError:
        is_mine = not needs_lock
    if is_mine and _is_at(descriptor, path):
        return descriptor
    os.close(descriptor)
    return None


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _unused(folder: Path) -> Path:
    return folder / f".lorank.{secrets.token_hex(8)}.part"
