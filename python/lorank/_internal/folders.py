"""Folders: making, locking, and writing to the disk."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Seconds. Other processes hold the lock of a folder while they rename files.
_LONGEST_WAIT = 120.0

# Errors of file systems that do not write folders on request.
_NO_FOLDER_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES, errno.EPERM}


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; if the block fails, remove the empty folders that were made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in made:
            sync_folder(path.parent)
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def errors_name(target: Path, temporary: Path | None = None) -> Iterator[None]:
    """Add the name of a file to errors of the system in the block that name no file, or a temporary one.

    Failures of writing, such as a full disk, do not name the file: the system gives only their number.

    Parameters
    ----------
    target
        The file to name.
    temporary
        The temporary file that the block writes instead.
    """
    try:
        yield
    except OSError as error:
        is_named = error.filename is not None and str(error.filename) != str(temporary)
        if error.errno is None or is_named:
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, for which other processes wait.

    File systems without locks, and folders that cannot be read, are not an error.

    Raises
    ------
    OSError
        If another process holds the lock for two minutes.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        _wait_for_lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _wait_for_lock(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + _LONGEST_WAIT
    while not _is_free(descriptor):
        if time.monotonic() > end:
            reason = "another process is writing to the folder, and holds its lock"
            raise OSError(errno.EBUSY, reason, str(folder))
        time.sleep(0.01)


def _is_free(descriptor: int) -> bool:
    """Lock an open folder; return False if another process holds the lock."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # The file system has no locks.
        pass
    return True


def sync_file(path: Path) -> None:
    """Write the content of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        getattr(os, "fdatasync", os.fsync)(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, where the file system can do so."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise OSError(error.errno, error.strerror, str(folder)) from error
    finally:
        os.close(descriptor)
