"""Files that appear whole or not at all."""

from __future__ import annotations

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
    """A temporary path beside `target`, renamed onto it when the block ends without an error.

    Raises
    ------
    OSError
        If the folder cannot be written to; the target is then as it was.
    """
    with made_folder(target.parent):
        temporary = _beside(target.parent, f"{target.name}.", target.suffix)
        try:
            temporary.touch(exist_ok=False)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(target)) from error
        try:
            yield temporary
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def made_folder(folder: Path) -> Iterator[None]:
    """A folder that exists within the block; where it fails, what was made and is still empty goes again."""
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
    """A temporary folder whose files appear in `folder` when the block ends without an error.

    A folder that does not exist appears as a whole. In one that does, all files are complete before the
    first of them takes its place, and the `stale` ones that are not replaced go.

    Raises
    ------
    OSError
        If there is no place for them.
    LorankError, MemoryError
        If the block raises one.

    The message names the file as it would have been called, and `folder` is then as it was.
    """
    is_new = not folder.exists()
    place = folder.parent if is_new else folder
    with made_folder(place):
        staging = _beside(place, f"{folder.name}.")
        try:
            staging.mkdir()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        try:
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
    """Find out now, before hours of work, whether a file or folder can be made there.

    Raises
    ------
    OSError
        If it cannot.
    """
    existing = next(path for path in (target, *target.absolute().parents) if path.exists())
    existing = target.absolute().parent if existing == target and target.is_file() else existing
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(error.errno, f"cannot be written to ({error.strerror})", str(existing)) from error


def write_text(target: Path, text: str) -> None:
    """Write a text file as a whole."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, "utf-8")


def _beside(folder: Path, beginning: str, end: str = "") -> Path:
    """A hidden name that nothing in the folder has.

    What `tempfile` makes is private; what is made by such a name is as open as any other file or folder.
    """
    return folder / f".{beginning}{secrets.token_hex(8)}{end}"
