"""Folders of families: an elastic parent, and its children of several ranks."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lorank.adapters.metadata import CERTIFICATE_FILE
from lorank.peft_format.names import CONFIG_FILE, WEIGHTS_FILE

_MEMBER = re.compile(r"elastic|rank-[0-9.e+-]+")
_FILES = {CERTIFICATE_FILE, CONFIG_FILE, WEIGHTS_FILE, "README.md"}


def remove_stale(folder: Path, members: Collection[str]) -> list[str]:
    """Remove the members of an earlier family that the new members do not replace.

    Parameters
    ----------
    folder
        The family's folder.
    members
        Names of the new members.

    Returns
    -------
    list of str
        Notes on folders that are kept because they hold files of other programs.
    """
    notes = []
    for path in sorted(folder.iterdir()):
        if path.name in members or not path.is_dir() or not _MEMBER.fullmatch(path.name):
            continue
        files = {file.name for file in path.iterdir()}
        if CERTIFICATE_FILE not in files or files - _FILES:
            notes.append(f"{path} was kept, because it holds files that lorank did not write")
            continue
        for file in files:
            (path / file).unlink()
        path.rmdir()
    return notes
