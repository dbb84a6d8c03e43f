"""Folders of families: an elastic parent, and its children of several ranks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Collection, Iterable
from pathlib import Path

from lorank._core import LorankError
from lorank._internal.json_files import read_json
from lorank.adapters.metadata import CERTIFICATE_FILE, SPECTRAL_KEY
from lorank.adapters.tensors import FileTensors
from lorank.peft_format.names import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE

_MEMBER = re.compile(r"elastic|rank-[0-9.e+-]+")
_FILES = {CERTIFICATE_FILE, CONFIG_FILE, WEIGHTS_FILE, "README.md"}

# The entry of a certificate file with digests by file.
_DIGESTS = "sha256"


def stale_members(folder: Path, members: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the files of an earlier family's members that new members do not replace, and notes.

    Parameters
    ----------
    folder
        The family's folder.
    members
        Names of the new members.

    Returns
    -------
    tuple
        Relative paths of files to remove, and notes on members that are kept because they hold files of
        other programs, or may have been trained since they were written.
    """
    stale: list[str] = []
    notes: list[str] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in members or path.is_symlink() or not path.is_dir():
            continue
        if not _MEMBER.fullmatch(path.name):
            continue
        files = {file.name for file in path.iterdir()}
        if CERTIFICATE_FILE not in files or files - _FILES:
            notes.append(f"{path} was kept, because it holds files that lorank did not write")
        elif not is_as_written(path):
            notes.append(f"{path} was kept, because it may have been trained since lorank wrote it")
        else:
            stale += [str(Path(path.name, file)) for file in sorted(files)]
    return stale, notes


def record_digests(member: Path) -> None:
    """Add digests of a member's settings and factors to its certificate file, if it has one."""
    file = member / CERTIFICATE_FILE
    if file.is_file():
        text = file.read_text("utf-8").rstrip()
        digests = {name: _digest(member / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        file.write_text(f'{text[:-1].rstrip()},\n"{_DIGESTS}": {json.dumps(digests)}}}\n', "utf-8")


def is_as_written(member: Path) -> bool:
    """Return True if a member's files have the digests that were recorded when lorank wrote them."""
    try:
        content = read_json(member / CERTIFICATE_FILE)
        return all(_digest(member / name) == content[_DIGESTS][name] for name in (CONFIG_FILE, WEIGHTS_FILE))
    except (OSError, ValueError, TypeError, KeyError):
        return False


def check_replaceable(folder: Path, members: Iterable[str]) -> None:
    """Check that no member of an earlier family, which new members would replace, was trained meanwhile.

    Members without digests were written by another version; they must have lorank's metadata, which other
    programs do not keep.

    Raises
    ------
    FileExistsError
        If a member was trained.
    """
    for name in members:
        for path in (folder / name, folder / f"{name}.safetensors"):
            if not _may_be_replaced(path):
                raise FileExistsError(
                    f"{path} may have been trained since lorank wrote it: move it away, or delete it"
                )


def _may_be_replaced(path: Path) -> bool:
    if path.is_file():
        return _has_metadata(path)
    if (path / PICKLED_WEIGHTS_FILE).exists():
        return False
    if not (path / WEIGHTS_FILE).exists():
        return True
    return is_as_written(path) or (not _has_digests(path) and _has_metadata(path / WEIGHTS_FILE))


def _has_digests(member: Path) -> bool:
    try:
        return _DIGESTS in read_json(member / CERTIFICATE_FILE)
    except (OSError, ValueError, TypeError):
        return False


def _has_metadata(file: Path) -> bool:
    try:
        return SPECTRAL_KEY in FileTensors(file).metadata
    except (OSError, ValueError, LorankError):
        return False


def _digest(file: Path) -> str:
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(file))
        digest = hashlib.sha256()
        while piece := opened.read(1 << 20):
            digest.update(piece)
        return digest.hexdigest()
