"""Folders of families: an elastic parent, and its children of several ranks."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path

from lorank._core import LorankError
from lorank.adapters.metadata import CERTIFICATE_FILE, DIGEST_KEY, SPECTRAL_KEY
from lorank.adapters.reading import is_as_written
from lorank.adapters.tensors import FileTensors
from lorank.peft_format.names import CONFIG_FILE, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE

_MEMBER = re.compile(r"elastic|(rank|ratio|energy|budget)-[0-9.e+-]+[A-Za-z]{0,3}")
_FILES = {CERTIFICATE_FILE, CONFIG_FILE, WEIGHTS_FILE, "README.md"}


def member_name(knob: str, value: float | str) -> str:
    """Return the name of a member, such as ``"rank-4"`` or ``"budget-1.5M"``."""
    if isinstance(value, str):
        return f"{knob}-{re.sub('[ ,_]', '', value)}"
    return f"{knob}-{value}" if isinstance(value, int) else f"{knob}-{value:g}"


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
    if (path / PICKLED_WEIGHTS_FILE).exists():
        return False
    file = path / WEIGHTS_FILE if path.is_dir() else path
    return not file.exists() or is_as_written(path) or _is_of_an_older_version(file)


def _is_of_an_older_version(file: Path) -> bool:
    """Return True if a file has the metadata of lorank, but not the digest that later versions write."""
    try:
        metadata = FileTensors(file).metadata
    except (OSError, ValueError, LorankError):
        return False
    return SPECTRAL_KEY in metadata and DIGEST_KEY not in metadata
