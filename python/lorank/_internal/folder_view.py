"""A view of a folder after its changes, which takes the place of the folder while the changes are made.

Files cannot be replaced together, but two folders can be exchanged. The view is a folder of links: to the new
files, and to all files and sub-folders that stay. It is exchanged with the folder, the folder is changed out
of sight, and exchanged again. At every moment, the name of the folder leads to all old or to all new files,
and in the end to the same folder as before, with its permissions, and for the processes that have it open.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lorank import _core
from lorank._internal.folder_changes import Changes
from lorank._internal.folders import sync_file, sync_folder
from lorank._internal.hidden import remove_tree

MARK = ".lorank.view"
"""The file in a view that holds the name of its hidden folder."""

_VIEW, _NOTE, _SHOWN = "view", "view.json", "shown"

# Views of folders with more entries take too long.
_MOST_ENTRIES = 10_000

# Larger files get symbolic links, because a hard link changes a file's times, and overlay file systems copy a
# file to link it. Smaller files are readable even if the hidden folder is deleted.
_LARGEST_LINKED = 16 << 20


@dataclass(frozen=True, slots=True)
class FolderView:
    """A view of a folder in a hidden folder beside it.

    Attributes
    ----------
    holder
        The hidden folder, which holds the view, or the folder itself while the view takes its place.
    folder
        The path of the folder.
    staging
        The name of the staging folder in the folder, with the stored changes.
    made
        Inodes of each entry of the view, and of the folder's entry that it stands for, by relative path.
    """

    holder: Path
    folder: Path
    staging: str
    made: dict[str, list[int]]

    @classmethod
    def build(cls, holder: Path, folder: Path, staging: str, payload: Path, changes: Changes) -> FolderView:
        """Build a view in a hidden folder.

        Raises
        ------
        OSError
            If the file system has no links, or the folder has too many entries.
        """
        view = cls(holder, folder, staging, {})
        view.path.mkdir()
        (view.path / MARK).write_text(holder.name, "utf-8")
        view._mirror(".", payload, changes.by_folder(), {*changes.puts, *changes.removals})
        note = {"folder": folder.name, "staging": staging, "made": view.made}
        (holder / _NOTE).write_text(json.dumps(note), "utf-8")
        sync_file(view.path / MARK)
        sync_file(holder / _NOTE)
        sync_folder(holder)
        return view

    @classmethod
    def read(cls, holder: Path) -> FolderView | None:
        """Return the view of a hidden folder; None for other hidden folders and unfinished views."""
        try:
            note = json.loads((holder / _NOTE).read_text("utf-8"))
            return cls(holder, holder.parent / note["folder"], note["staging"], note["made"])
        except (OSError, ValueError, TypeError, KeyError):
            return None

    @property
    def path(self) -> Path:
        """The path that is exchanged with the folder."""
        return self.holder / _VIEW

    @property
    def covers(self) -> bool:
        """True while the view takes the place of its folder."""
        if os.path.lexists(self.path / MARK):
            return False
        try:
            return (self.folder / MARK).read_text("utf-8") == self.holder.name
        except (OSError, ValueError):
            return False

    @property
    def is_in_holder(self) -> bool:
        """True before the view takes the place of its folder, and afterwards."""
        return os.path.lexists(self.path / MARK)

    def show(self) -> None:
        """Exchange the view with the folder."""
        _core.exchange(self.path, self.folder)
        sync_folder(self.holder)
        sync_folder(self.folder.parent)
        self.mark_shown()

    def mark_shown(self) -> None:
        """Record that other programs may have made files in the view."""
        (self.holder / _SHOWN).touch()

    def hide(self) -> None:
        """Exchange the folder with the view, and remove the view."""
        _core.exchange(self.path, self.folder)
        sync_folder(self.holder)
        sync_folder(self.folder.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the view. Files that other programs made in it move to the folder."""
        with suppress(OSError):
            if (self.holder / _SHOWN).exists():
                self._carry_over()
            for path, entry in self._entries(self.path, "."):
                if not self._is_made(path, entry):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    Path(entry.path).rmdir()
                else:
                    Path(entry.path).unlink()
            if {entry.name for entry in os.scandir(self.path)} <= {MARK}:
                discard(self.holder)

    def _mirror(self, path: str, payload: Path, puts: Mapping[str, list[str]], gone: Collection[str]) -> None:
        """Fill a folder of the view.

        Parameters
        ----------
        path
            The relative path of the folder.
        payload
            The folder of new files.
        puts
            Paths of new files and folders by the path of their folder.
        gone
            Paths of files that are replaced or removed.
        """
        source = self.folder / path
        for entry in os.scandir(source) if source.is_dir() else ():
            inner = str(Path(path, entry.name))
            if inner in gone or inner in puts or inner == self.staging:
                continue
            if len(self.made) >= _MOST_ENTRIES:
                raise OSError(f"{self.folder}: has more than {_MOST_ENTRIES} entries")
            if entry.is_symlink():
                self._record(inner, partial(os.symlink, Path(entry.path).readlink()))
            else:
                self._refer(inner, is_folder=entry.is_dir())
        for inner in puts[path]:
            if inner not in puts:
                self._record(inner, partial(os.link, payload / inner))
                continue
            self._record(inner, os.mkdir)
            self._mirror(inner, payload, puts, gone)
            if not any(os.scandir(self.path / inner)):
                (self.path / inner).rmdir()
                del self.made[inner]
        _copy_permissions(source, self.path / path)
        sync_folder(self.path / path)

    def _refer(self, path: str, *, is_folder: bool) -> None:
        """Link to a file or sub-folder of the folder by its later path in the holder."""
        source = self.folder / path
        if not is_folder and source.lstat().st_size <= _LARGEST_LINKED:
            with suppress(OSError):
                self._record(path, partial(os.link, source, follow_symlinks=False))
                return
        up = "../" * (path.count("/") + 1)
        self._record(path, partial(os.symlink, f"{up}{self.holder.name}/{_VIEW}/{path}"))

    def _record(self, path: str, make: Callable[[Path], None]) -> None:
        make(self.path / path)
        source = self.folder / path
        stands_for = source.lstat().st_ino if os.path.lexists(source) else 0
        self.made[path] = [(self.path / path).lstat().st_ino, stands_for]

    def _is_made(self, path: str, entry: os.DirEntry[str]) -> bool:
        return path in self.made and entry.inode() == self.made[path][0]

    def _entries(self, folder: Path, path: str) -> Iterator[tuple[str, os.DirEntry[str]]]:
        """Yield the entries of the view with their relative paths, folders after their content."""
        with os.scandir(folder) as found:
            entries = list(found)
        for entry in entries:
            inner = str(Path(path, entry.name))
            if entry.is_dir(follow_symlinks=False) and self._is_made(inner, entry):
                yield from self._entries(Path(entry.path), inner)
            yield inner, entry

    def _carry_over(self) -> None:
        """Move entries that other programs made in the view to the folder."""
        for path, entry in [*self._entries(self.path, ".")]:
            if entry.name == MARK or self._is_made(path, entry):
                continue
            target = self.folder / path
            with suppress(OSError):
                if not os.path.lexists(target) or target.lstat().st_ino in self.made.get(path, ()):
                    Path(entry.path).replace(target)


def discard(holder: Path) -> None:
    """Remove a hidden folder, unless it holds a folder whose place a view takes."""
    path = holder / _VIEW
    with suppress(OSError):
        if os.path.lexists(path) and not os.path.lexists(path / MARK) and any(os.scandir(path)):
            return
    remove_tree(holder)


def _copy_permissions(source: Path, view: Path) -> None:
    """Give a folder of the view the owner and the permissions of its source, as far as possible."""
    with suppress(OSError):
        wanted, found = source.stat(), view.stat()
        if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
            os.chown(view, wanted.st_uid, wanted.st_gid)
        view.chmod(stat.S_IMODE(wanted.st_mode))
