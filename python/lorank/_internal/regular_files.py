"""Files of unknown origin: only regular files are read, and at most a given number of bytes.

A folder from elsewhere may hold a named pipe, a device or an endless file under any name. Reading a pipe
waits for a writer, and reading a device may never end.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

SETTINGS_BYTES = 16 << 20
"""Most bytes of a file of settings; the largest known, with a rank for each expert, have some 10 MB."""

TABLE_BYTES = 512 << 20
"""Most bytes of a file with an entry for each tensor or module: an index, a report, a journal."""

_CHUNK = 1 << 20
# An open pipe or terminal must neither wait nor become the controlling terminal. Windows lacks both flags.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading; the caller closes it.

    Raises
    ------
    OSError
        If the file cannot be opened, or is a folder, pipe, socket or device; `filename` is the path.
    """
    # The first check avoids opening a device; the second sees a file that was exchanged since.
    _check_kind(Path(path).stat(), path)
    file = os.open(path, _FLAGS)
    try:
        _check_kind(os.fstat(file), path)
        return os.fdopen(file, "rb")
    except BaseException:
        os.close(file)
        raise


def check_size(path: str | Path, limit: int) -> None:
    """Raise OSError for a file of more than `limit` bytes, before another program reads it."""
    _check_size(Path(path).stat().st_size, limit, path)


def read_bytes(path: str | Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises
    ------
    OSError
        If the file cannot be read, is not a regular file, or is larger; `filename` is the path.
    """
    with open_regular(path) as file:
        _check_size(os.fstat(file.fileno()).st_size, limit, path)
        content = BytesIO()
        try:
            # The stated size may be wrong: files grow, and those in /proc state 0.
            while chunk := os.read(file.fileno(), _CHUNK):
                content.write(chunk)
                _check_size(content.tell(), limit, path)
        except OSError as error:
            error.filename = str(path)
            raise
    return content.getvalue()


def read_text(path: str | Path, limit: int = SETTINGS_BYTES) -> str:
    """Return the text of a regular file in UTF-8 of at most `limit` bytes.

    Raises
    ------
    OSError
        If the file cannot be read, is not a regular file, or is larger; `filename` is the path.
    UnicodeDecodeError
        If the file is not UTF-8; a `ValueError` that does not name the file.
    """
    return read_bytes(path, limit).decode("utf-8")


def _check_kind(status: os.stat_result, path: str | Path) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "of another kind")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file", str(path))


def _check_size(size: int, limit: int, path: str | Path) -> None:
    if size > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit:,} bytes, the most that is read", str(path))
