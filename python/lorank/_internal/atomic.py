"""Files and folders that appear complete or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lorank._core import LorankError
from lorank._internal.core_calls import reworded


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path, whose file replaces `target` if the block ends without an error.

    Raises
    ------
    OSError
        If the folder of `target` cannot be written to, or the disk is full. The error names the target, which
        stays unchanged.
    """
    with _made_folder(target.parent):
        temporary = _hidden_path(target.parent, f"{target.name}.", target.suffix)
        try:
            with errors_name(target, temporary):
                temporary.touch(exist_ok=False)
                yield temporary
                temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
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
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error


@contextmanager
def _made_folder(folder: Path) -> Iterator[None]:
    """Make a folder with its parents; if the block fails, remove the empty folders that were made."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def staged_folder(folder: Path, stale: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a temporary folder whose files move to `folder` when the block ends without an error.

    A new folder appears with all its files at once. In an existing folder, files are replaced when all new
    ones are complete. After an error of the block, `folder` is unchanged; the error names final paths.

    Parameters
    ----------
    folder
        The final folder.
    stale
        Names of files in an existing folder to remove unless they are replaced.

    Raises
    ------
    OSError
        If the folder cannot be written to.
    LorankError, MemoryError
        If the block raises one of them.
    """
    is_new = not folder.exists()
    place = folder.parent if is_new else folder
    with _made_folder(place):
        staging = _hidden_path(place, f"{folder.name}.")
        try:
            with errors_name(folder, staging):
                staging.mkdir()
                yield staging
                _move(staging, folder, stale, is_new=is_new)
        except OSError as error:
            file = Path(str(error.filename))
            if error.errno is None or not file.is_relative_to(staging):
                raise
            named = str(folder / file.relative_to(staging))
            raise OSError(error.errno, error.strerror, named) from error
        except (LorankError, MemoryError) as error:
            if str(staging) not in str(error):
                raise
            raise reworded(error, lambda message: message.replace(str(staging), str(folder))) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, folder: Path, stale: Sequence[str], *, is_new: bool) -> None:
    if is_new:
        staging.rename(folder)
        return
    files = sorted(staging.iterdir())
    for file in files:
        file.replace(folder / file.name)
    for name in set(stale) - {file.name for file in files}:
        (folder / name).unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Check that a file or folder can be made at a path, before long work.

    Raises
    ------
    OSError
        If the folder that would hold the target cannot be written to.
    """
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    existing = target.absolute().parent if existing == target and target.is_file() else existing
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to ({error.strerror})", str(existing)) from error


def write_text(target: Path, text: str) -> None:
    """Write a text file, which appears complete or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, "utf-8")


def _hidden_path(folder: Path, beginning: str, end: str = "") -> Path:
    """Return an unused hidden path in a folder.

    Files made at this path get the default permissions; `tempfile` would make them private.
    """
    return folder / f".{beginning}{secrets.token_hex(8)}{end}"
