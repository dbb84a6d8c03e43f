"""A set of changes of a folder, which is stored so that another process can finish it."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lorank._internal.folders import sync_file, sync_folder

_FILE = "changes.json"


@dataclass(frozen=True, slots=True)
class Changes:
    """Files to put into a folder, and files to remove from it. All paths are relative.

    Attributes
    ----------
    puts
        Files that move from the payload to the folder.
    removals
        Files of the folder that are removed.
    heads
        Those of `puts` without which no program reads the files beside them.
    is_covered
        True if a view covers the folder during the changes, so that their order does not matter.
    """

    puts: Sequence[str]
    removals: Sequence[str]
    heads: Sequence[str]
    is_covered: bool = False

    @classmethod
    def of(cls, payload: Path, folder: Path, stale: Iterable[str], heads: Iterable[str]) -> Changes:
        """Return the changes that bring the files of a payload into a folder.

        Parameters
        ----------
        payload
            The folder of new files and folders.
        folder
            The folder to change.
        stale
            Files to remove from the folder unless they are replaced.
        heads
            Names of files without which no program reads the files beside them.
        """
        puts = sorted(
            os.path.relpath(Path(root, name), payload)
            for root, _, names in os.walk(payload)
            for name in names
        )
        removals = [
            path for path in dict.fromkeys(stale) if path not in puts and os.path.lexists(folder / path)
        ]
        names = set(heads)
        return cls(puts, removals, [path for path in puts if Path(path).name in names])

    @classmethod
    def read(cls, staging: Path) -> Changes | None:
        """Return the changes that are stored in a staging folder; None if it holds none."""
        try:
            return cls(**json.loads((staging / _FILE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, staging: Path, *, is_covered: bool) -> Changes:
        """Store the changes in a staging folder; return those with `is_covered`."""
        changes = replace(self, is_covered=is_covered)
        unfinished = staging / f"{_FILE}.part"
        unfinished.write_text(json.dumps(asdict(changes)), "utf-8")
        sync_file(unfinished)
        unfinished.replace(staging / _FILE)
        sync_folder(staging)
        return changes

    @property
    def folders(self) -> set[str]:
        """The folders of all paths and their parents, except the folder itself."""
        parents = (parent for path in (*self.puts, *self.removals) for parent in Path(path).parents)
        return {str(parent) for parent in parents} - {"."}

    def by_folder(self) -> dict[str, list[str]]:
        """Return the new files, and all folders with changes, by the path of their folder."""
        found: dict[str, list[str]] = {path: [] for path in (".", *sorted(self.folders))}
        for path in (*found, *self.puts):
            if path != ".":
                found[str(Path(path).parent)].append(path)
        return found

    def check(self, folder: Path, *, replaces: bool) -> None:
        """Check that files can take the places of others.

        Raises
        ------
        OSError
            If a folder is in the place of a file, another file in the place of a folder, or, unless
            `replaces`, any file in the place of a new one.
        """
        for path in self.folders:
            if os.path.lexists(folder / path) and not _is_folder(folder / path):
                raise NotADirectoryError(errno.ENOTDIR, "is not a folder", str(folder / path))
        for path in self.puts:
            if _is_folder(folder / path):
                raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(folder / path))
            if not replaces and os.path.lexists(folder / path):
                raise FileExistsError(errno.EEXIST, "exists (overwrite replaces it)", str(folder / path))

    def prepare(self, payload: Path, folder: Path) -> None:
        """Give new files the permissions of those that they replace, and write all to the disk."""
        for path in self.puts:
            sync_file(payload / path)
            keep_mode(payload / path, folder / path)
        for path in {str(Path(path).parent) for path in self.puts} | {"."}:
            sync_folder(payload / path)

    def apply(self, folder: Path, payload: Path) -> None:
        """Make the changes, or those that an interrupted process did not make.

        Without a view, the heads are removed first and put last: no program then reads new files beside old
        ones.
        """
        if not self.is_covered:
            for path in self.heads:
                if os.path.lexists(payload / path):
                    (folder / path).unlink(missing_ok=True)
            self._sync(folder, self.heads)
        last = () if self.is_covered else self.heads
        _move(payload, folder, (path for path in self.puts if path not in last))
        for path in self.removals:
            (folder / path).unlink(missing_ok=True)
        for path in sorted({str(Path(path).parent) for path in self.removals} - {"."}, reverse=True):
            with suppress(OSError):
                (folder / path).rmdir()
        self._sync(folder, (*self.puts, *self.removals))
        if last:
            _move(payload, folder, last)
            self._sync(folder, last)

    def is_outdated(self, folder: Path, payload: Path) -> bool:
        """Return True if another program has put a head into the folder that these changes would replace."""
        waiting = [path for path in self.heads if os.path.lexists(payload / path)]
        return any(os.path.lexists(folder / path) for path in waiting)

    @staticmethod
    def _sync(folder: Path, paths: Iterable[str]) -> None:
        for parent in {str(Path(path).parent) for path in paths} | {"."}:
            sync_folder(folder / parent)


def keep_mode(new: Path, old: Path) -> None:
    """Give a new file the permissions of the file that it will replace, if there is one."""
    with suppress(OSError):
        mode = old.lstat().st_mode
        if stat.S_ISREG(mode):
            new.chmod(stat.S_IMODE(mode))


def _move(payload: Path, folder: Path, paths: Iterable[str]) -> None:
    for path in paths:
        target = folder / path
        if not os.path.lexists(payload / path):
            continue  # An interrupted process has moved the file.
        target.parent.mkdir(parents=True, exist_ok=True)
        (payload / path).replace(target)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
