"""A text file of lines that one process appends to, and that a killed run leaves readable."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from lorank._core import FormatError
from lorank._internal.folders import errors_name

# Seconds between writes to the disk itself. A failure of power can take the lines of this time.
_INTERVAL = 5.0

# O_NONBLOCK keeps the opening of a pipe from waiting for another process.
_FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class LineFile:
    """A file of lines, locked against other processes.

    Every line is handed to the system at once, so that the end of the process takes no line. A failure of
    power takes at most the lines of the last seconds.

    Parameters
    ----------
    path
        Path of the file, which is made if it does not exist. A link is followed only within its folder.

    Raises
    ------
    FormatError
        If the path is a link to another folder, or is not a regular file.
    OSError
        If the file cannot be written, or another process has locked it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        target = _within_folder(path)
        self._file = _opened(path, target)
        self._folder = target.parent
        self._synced = time.monotonic()
        self._whole = 0

    def read(self) -> list[bytes]:
        """Return the complete lines.

        Raises
        ------
        FormatError
            If the file holds text but no complete line.
        """
        with errors_name(self._path):
            size = os.fstat(self._file).st_size
            content = b"".join(iter(lambda: os.read(self._file, 1 << 20), b""))
        self._whole = content.rfind(b"\n") + 1
        if size and not self._whole:
            raise FormatError(f"{self._path}: is not a journal of lorank: it has no complete line")
        return content[: self._whole].split(b"\n")[:-1]

    def drop_torn_line(self) -> None:
        """Remove the text after the last complete line, which an interrupted run left."""
        with errors_name(self._path):
            os.ftruncate(self._file, self._whole)

    def append(self, line: str) -> None:
        """Append a line, or nothing if the disk is full.

        Raises
        ------
        OSError
            If the line cannot be written. The error names the file.
        """
        with errors_name(self._path):
            content = memoryview(f"{line}\n".encode())
            try:
                while content:
                    content = content[os.write(self._file, content) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, self._whole)
                raise
            self._whole = os.fstat(self._file).st_size
            if time.monotonic() - self._synced > _INTERVAL:
                self._sync()

    def close(self) -> None:
        """Write the lines to the disk itself, and close the file.

        Raises
        ------
        OSError
            If the disk fails. The error names the file.
        """
        try:
            with errors_name(self._path):
                self._sync()
        finally:
            os.close(self._file)

    def _sync(self) -> None:
        os.fsync(self._file)
        with suppress(OSError):  # Some file systems cannot write a folder by itself.
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        self._synced = time.monotonic()


def _within_folder(path: Path) -> Path:
    """Return the file that a path stands for."""
    if not path.is_symlink():
        return path
    target = path.resolve()
    if target.parent != path.parent.resolve():
        raise FormatError(f"{path}: is a link to {target}, outside its folder: name that file instead")
    return target


def _opened(path: Path, target: Path) -> int:
    """Return the descriptor of a regular file that this process has locked."""
    if target.exists() and not stat.S_ISREG(target.stat().st_mode) and not target.is_dir():
        raise FormatError(f"{path}: is not a regular file")
    with errors_name(path, target):
        file = os.open(target, _FLAGS, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FormatError(f"{path}: is not a regular file")
        _lock(path, file)
    except BaseException:
        os.close(file)
        raise
    return file


def _lock(path: Path, file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return  # Some network file systems have no locks.
        raise OSError(
            errno.EBUSY, "another run is using this journal: wait for it, or name another file", str(path)
        ) from error
