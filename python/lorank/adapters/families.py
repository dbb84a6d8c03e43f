"""A folder of one adapter in many sizes: an elastic parent and its children."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lorank.adapters.metadata import CERTIFICATE_FILE
from lorank.peft_format.names import CONFIG_FILE, WEIGHTS_FILE

_MEMBER = re.compile(r"elastic|rank-[0-9.e+-]+")
_OURS = {CERTIFICATE_FILE, CONFIG_FILE, WEIGHTS_FILE, "README.md"}


def remove_stale(folder: Path, members: Collection[str]) -> list[str]:
    """Remove an earlier family's members that these do not replace, so that no other adapter's lie beside.

    Parameters
    ----------
    folder
        Where the family is.
    members
        What is in it from now on.

    Returns
    -------
    list of str
        Notes of what has the name of a member, but files of somebody else in it: that stays.
    """
    notes = []
    for path in sorted(folder.iterdir()):
        if path.name in members or not path.is_dir() or not _MEMBER.fullmatch(path.name):
            continue
        files = {file.name for file in path.iterdir()}
        if CERTIFICATE_FILE not in files or files - _OURS:
            notes.append(f"{path} was kept: not all of it was written by lorank")
            continue
        for file in files:
            (path / file).unlink()
        path.rmdir()
    return notes
