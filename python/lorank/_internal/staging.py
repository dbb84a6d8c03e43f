"""Sets of files that appear in a folder together or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorank._core import LorankError
from lorank._internal.core_calls import reworded
from lorank._internal.folder_changes import Changes
from lorank._internal.folder_view import MARK, FolderView, discard
from lorank._internal.folders import errors_name, locked_folder, made_folder, sync_folder
from lorank._internal.hidden import (
    Hidden,
    hidden_folder,
    is_hidden_name,
    leftover_folders,
    remove_leftover_files,
    remove_tree,
)

_PAYLOAD = "new"


@contextmanager
def staged_folder(
    folder: Path, stale: Sequence[str] = (), heads: Sequence[str] = (), *, replaces: bool = True
) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `folder` when the block ends without an error.

    All files appear at once, in a new folder and in an existing one, even if the process is killed or the
    power fails: see `lorank._internal.folder_view`. Where folders cannot be exchanged, the heads disappear
    first and appear last, and the next call finishes what a killed process has begun. Other files of the
    folder stay. After an error of the block, `folder` is unchanged; the error names final paths.

    Parameters
    ----------
    folder
        The final folder, or a link to it.
    stale
        Relative paths of files in an existing folder to remove unless they are replaced. Sub-folders that
        become empty are removed.
    heads
        Names of files without which no program reads the files beside them.
    replaces
        False to refuse to replace a file.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    LorankError, MemoryError
        If the block raises one of them.
    """
    place = Path(os.path.realpath(folder))
    with made_folder(place.parent):
        try:
            staging = _staging(place)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        payload = staging.path / _PAYLOAD
        try:
            with errors_name(folder):
                yield payload
            with locked_folder(place.parent):
                _commit(staging, place, stale, heads, replaces)
        except OSError as error:
            file = Path(str(error.filename))
            if error.errno is None or not file.is_relative_to(payload):
                raise
            raise OSError(error.errno, error.strerror, str(folder / file.relative_to(payload))) from error
        except (LorankError, MemoryError) as error:
            if str(payload) not in str(error):
                raise
            raise reworded(error, lambda message: message.replace(str(payload), str(folder))) from None
        finally:
            remove_tree(staging.path)
            staging.release()
            _repair_if_covered(place)


def repair(folder: Path) -> None:
    """Finish or undo what killed processes left in a folder and beside it. Errors are ignored.

    The caller holds the lock of the folder's parent.
    """
    for holder in leftover_folders(folder.parent):
        with suppress(OSError):
            _repair_beside(holder)
    remove_leftover_files(folder)
    for staging in leftover_folders(folder):
        with suppress(OSError):
            _finish(staging, folder)


def is_interrupted(folder: Path) -> bool:
    """Return True if a killed process left a folder with some of its new files."""
    try:
        paths = [path for path in folder.iterdir() if is_hidden_name(path.name)]
    except OSError:
        return False
    found = [(path, Changes.read(path)) for path in paths]
    return any(
        changes is not None and not changes.is_covered and not changes.is_outdated(folder, path / _PAYLOAD)
        for path, changes in found
    )


def is_occupied(folder: Path) -> bool:
    """Return True for a folder that holds files other than those that killed processes left.

    Raises
    ------
    OSError
        If the folder cannot be read.
    """
    return any(not is_hidden_name(path.name) and path.name != MARK for path in folder.iterdir())


def _staging(place: Path) -> Hidden:
    """Make a staging folder in an existing folder, or beside a new one."""
    with locked_folder(place.parent):
        repair(place)
        staging = hidden_folder(place if place.is_dir() else place.parent)
    (staging.path / _PAYLOAD).mkdir()
    return staging


def _commit(
    staging: Hidden, folder: Path, stale: Sequence[str], heads: Sequence[str], replaces: bool
) -> None:
    payload = staging.path / _PAYLOAD
    changes = Changes.of(payload, folder, stale, heads)
    if staging.path.parent == folder.parent:
        changes.prepare(payload, folder)
        try:
            payload.replace(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process made the folder meanwhile.
            inner = folder / staging.path.name
            staging.path.replace(inner)
            try:
                _change(inner, folder, Changes.of(inner / _PAYLOAD, folder, stale, heads), replaces)
            finally:
                remove_tree(inner)
            return
        sync_folder(folder.parent)
        return
    _change(staging.path, folder, changes, replaces)


def _change(staging: Path, folder: Path, changes: Changes, replaces: bool) -> None:
    """Make changes of an existing folder that holds the staging folder."""
    payload = staging / _PAYLOAD
    changes.check(folder, replaces=replaces)
    changes.prepare(payload, folder)
    if len(changes.puts) == 1 and not changes.removals and not changes.folders:
        (name,) = changes.puts
        (payload / name).replace(folder / name)
        sync_folder(folder)
        return
    sync_folder(folder)
    with _covered(staging, folder, changes) as view:
        if view is None:
            changes.write(staging, is_covered=False).apply(folder, payload)
            return
        changed = view.path / staging.name
        changes.apply(view.path, changed / _PAYLOAD)
        view.hide()


@contextmanager
def _covered(staging: Path, folder: Path, changes: Changes) -> Iterator[FolderView | None]:
    """Show a view of a folder; yield None where folders cannot be exchanged."""
    try:
        holder = hidden_folder(folder.parent)
    except OSError:
        yield None
        return
    try:
        try:
            view = FolderView.build(holder.path, folder, staging.name, staging / _PAYLOAD, changes)
            changes.write(staging, is_covered=True)
            view.show()
        except OSError:
            if (folder / MARK).exists():
                raise
            discard(holder.path)
            yield None
        else:
            yield view
    finally:
        holder.release()


def _repair_if_covered(folder: Path) -> None:
    """Finish a change that an error or an interrupt of this process has ended."""
    if (folder / MARK).exists():
        with locked_folder(folder.parent):
            repair(folder)


def _repair_beside(holder: Path) -> None:
    """Finish or undo what a killed process began beside a folder."""
    view = FolderView.read(holder)
    if view is None and Changes.read(holder) is not None:
        _finish(holder, holder.parent)
    elif view is None:
        discard(holder)
    elif view.is_in_holder:
        view.remove()
    elif view.covers:
        staging = view.path / view.staging
        changes = Changes.read(staging)
        if changes is not None:
            view.mark_shown()
            changes.apply(view.path, staging / _PAYLOAD)
            view.hide()
    else:
        discard(holder)


def _finish(staging: Path, folder: Path) -> None:
    """Finish or undo a change that a killed process began without a view."""
    changes, payload = Changes.read(staging), staging / _PAYLOAD
    if changes is not None and not changes.is_covered and not changes.is_outdated(folder, payload):
        changes.apply(folder, payload)
    remove_tree(staging)
