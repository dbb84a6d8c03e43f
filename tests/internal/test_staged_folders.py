"""Sets of files in folders: links, pipes, names, permissions, leftovers and several processes at once."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorank import _core
from lorank._internal import atomic, folder_view, staging
from lorank._internal.folders import locked_folder
from lorank._internal.hidden import hidden_file, hidden_folder
from lorank._internal.staging import is_interrupted, is_occupied, staged_folder
from tests.support.kills import contents, leftovers

NEW = {"a.json": b"new a", "b.bin": b"new b"}
OLD = {"a.json": b"old a", "b.bin": b"old b", "sub/c": b"mine", "d": b"mine"}
AFTER = OLD | NEW


def write(folder: Path, files: dict[str, bytes] = NEW, **options: Any) -> None:
    with staged_folder(folder, heads=["a.json"], **options) as payload:
        for name, content in files.items():
            (payload / name).parent.mkdir(exist_ok=True)
            (payload / name).write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    target = tmp_path / "inner" / "target"
    for name, content in OLD.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(content)
    return target


def refuse(error: int) -> Callable[..., None]:
    def exchange(_: Path, b: Path) -> None:
        raise OSError(error, os.strerror(error), str(b))

    return exchange


@pytest.mark.parametrize("error", [None, errno.EINVAL, errno.EXDEV, errno.EBUSY, errno.ENOSYS])
def test_files_are_replaced_and_others_stay(
    error: int | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if error is not None:
        monkeypatch.setattr(_core, "exchange", refuse(error))
    inodes = {name: (folder / name).stat().st_ino for name in (".", "sub", "sub/c", "d")}
    write(folder)
    assert contents(folder) == AFTER
    assert {name: (folder / name).stat().st_ino for name in inodes} == inodes
    assert not leftovers(folder.parent)


def test_folder_keeps_its_mode_and_files_keep_theirs(folder: Path) -> None:
    folder.chmod(0o750)
    (folder / "b.bin").chmod(0o600)
    write(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    assert stat.S_IMODE((folder / "b.bin").stat().st_mode) == 0o600


def test_working_directory_stays_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    write(Path())
    assert Path("b.bin").read_bytes() == b"new b"
    assert Path.cwd() == folder


def test_folder_is_written_through_a_link(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    write(link)
    assert link.is_symlink()
    assert contents(folder) == AFTER
    (tmp_path / "later").symlink_to(tmp_path / "made")
    write(tmp_path / "later")
    assert contents(tmp_path / "made") == NEW


def test_links_without_hard_links_are_symbolic(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link, shown = os.link, []
    show = folder_view.FolderView.show

    def only_new(source: Path, target: Path, **options: Any) -> None:
        if options:  # A file of the folder, which another user may own.
            raise PermissionError(errno.EPERM, "Operation not permitted")
        link(source, target)

    def seen(view: folder_view.FolderView) -> None:
        show(view)
        shown.append((contents(folder), (folder / "d").is_symlink(), (folder / "sub").is_symlink()))

    monkeypatch.setattr(os, "link", only_new)
    monkeypatch.setattr(folder_view.FolderView, "show", seen)
    write(folder)
    assert shown == [(AFTER, True, True)]
    assert contents(folder) == AFTER
    assert not (folder / "d").is_symlink()


def test_files_that_others_make_in_the_view_stay(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show = folder_view.FolderView.show

    def busy(view: folder_view.FolderView) -> None:
        show(view)
        (folder / "log").write_text("theirs")
        (folder / "sub" / "log").write_text("theirs")
        (folder / "made").mkdir()
        (folder / "made" / "log").write_text("theirs")
        (folder / "other").write_text("theirs")
        (folder / "other").replace(folder / "d")

    monkeypatch.setattr(folder_view.FolderView, "show", busy)
    write(folder)
    theirs = dict.fromkeys(("log", "sub/log", "made/log", "d"), b"theirs")
    assert contents(folder) == AFTER | theirs
    assert not leftovers(folder.parent)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_failures_amid_changes_are_finished(
    error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply, calls = staging.Changes.apply, []

    def failing(changes: staging.Changes, root: Path, payload: Path) -> None:
        calls.append(root)
        if len(calls) == 1:
            raise error
        apply(changes, root, payload)

    monkeypatch.setattr(staging.Changes, "apply", failing)
    with pytest.raises(type(error)):
        write(folder)
    assert contents(folder) == AFTER
    assert not leftovers(folder.parent)


def test_error_after_the_exchange_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    show, calls = folder_view.FolderView.show, []

    def failing(view: folder_view.FolderView) -> None:
        show(view)
        calls.append(view)
        raise OSError(errno.EIO, "Input/output error", str(view.folder))

    monkeypatch.setattr(folder_view.FolderView, "show", failing)
    with pytest.raises(OSError, match="Input/output"):
        write(folder)
    assert contents(folder) == AFTER
    assert not leftovers(folder.parent)


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_failing_disks_leave_the_old_files(
    error: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fdatasync", fail)
    for target in (folder, tmp_path / "made" / "new"):
        with pytest.raises(OSError, match=os.strerror(error)) as raised:
            write(target)
        assert raised.value.filename == str(target / "a.json")
    with pytest.raises(OSError, match=os.strerror(error)) as raised:
        atomic.write_text(folder / "d", "new")
    assert raised.value.filename == str(folder / "d")
    assert contents(folder) == OLD
    assert not leftovers(tmp_path)
    assert not (tmp_path / "made").exists()


def test_errors_without_a_name_get_one(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space") as raised, staged_folder(tmp_path / "a"):
        raise full
    assert raised.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match="No space") as raised, atomic.atomic_path(tmp_path / "b"):
        raise full
    assert raised.value.filename == str(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_interrupted_changes_are_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "exchange", refuse(errno.EINVAL))

    def half(_: staging.Changes, root: Path, payload: Path) -> None:
        (payload / "b.bin").replace(root / "b.bin")
        (root / "a.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(staging.Changes, "apply", half)
    monkeypatch.setattr(staging, "remove_tree", lambda _: None)
    with pytest.raises(KeyboardInterrupt):
        write(folder)
    monkeypatch.undo()
    assert is_interrupted(folder)
    write(folder, {"b.bin": b"newer"})
    assert contents(folder) == AFTER | {"b.bin": b"newer"}
    assert not is_interrupted(folder)
    assert not leftovers(folder.parent)


def test_only_leftovers_of_dead_processes_are_removed(folder: Path) -> None:
    precious = dict.fromkeys(
        (".lorank.0.part", ".lorank.x", "lorank.1.2.part", ".lorank.1.2.part.txt"), b"mine"
    )
    for name, content in precious.items():
        (folder / name).write_bytes(content)
    (folder / ".lorank.1.2.part").write_bytes(b"dead")
    (folder / f".lorank.{'0' * 16}.part").mkdir()
    (folder / f".lorank.{'1' * 16}.part").symlink_to("sub")
    (folder / f".lorank.{'2' * 16}.part").mkdir()
    (folder / f".lorank.{'2' * 16}.part" / "file").write_text("not a hidden folder of lorank")
    living = [hidden_file(folder), hidden_folder(folder), hidden_folder(folder.parent)]
    dead = [hidden_file(folder), hidden_folder(folder), hidden_folder(folder.parent)]
    for hidden in dead:
        hidden.release()
    write(folder)
    kept = {hidden.path.name for hidden in living if hidden.path.parent == folder}
    assert {path.name for path in folder.iterdir()} == {
        *precious,
        *kept,
        *(f".lorank.{digit * 16}.part" for digit in "12"),
        *(path.split("/")[0] for path in AFTER),
    }
    assert living[2].path.exists()
    assert not dead[2].path.exists()
    for hidden in living:
        hidden.release()
    write(folder)
    assert not any(hidden.path.exists() for hidden in living)
    assert contents(folder) == AFTER | precious


def test_leftovers_do_not_occupy_a_folder(tmp_path: Path) -> None:
    hidden_folder(tmp_path).release()
    (tmp_path / ".lorank.1.2.part").touch()
    assert not is_occupied(tmp_path)
    (tmp_path / "file").touch()
    assert is_occupied(tmp_path)


def test_many_writers_leave_one_whole_set(folder: Path) -> None:
    sets = [{name: f"{k}".encode() * 1000 for name in NEW} for k in range(4)]

    def loop(files: dict[str, bytes]) -> None:
        for _ in range(5):
            write(folder, files)

    with ThreadPoolExecutor(len(sets)) as executor:
        writers = [executor.submit(loop, files) for files in sets]
        while not all(writer.done() for writer in writers):
            assert (folder / "sub" / "c").read_bytes() == b"mine"
            assert (folder / "d").read_bytes() == b"mine"
        for writer in writers:
            writer.result()
    assert contents(folder) in [OLD | files for files in sets]
    assert not leftovers(folder.parent)


def write_after_another(target: Path, **options: Any) -> None:
    """Write a file into a new folder, which another writer makes meanwhile."""
    with staged_folder(target, **options) as payload:
        (payload / "a.json").write_text("last")
        write(target)


def test_first_of_two_writers_wins_without_overwriting(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with pytest.raises(FileExistsError, match="exists"):
        write_after_another(target, replaces=False)
    assert contents(target) == NEW
    assert not leftovers(tmp_path)


def test_folder_made_meanwhile_is_changed(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_after_another(target)
    assert contents(target) == NEW | {"a.json": b"last"}
    assert not leftovers(tmp_path)


def test_locked_folders_are_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorank._internal.folders._LONGEST_WAIT", 0.05)
    with (
        locked_folder(tmp_path),
        pytest.raises(OSError, match="another process is writing"),
        staged_folder(tmp_path / "target"),
    ):
        pass


def test_folder_in_the_place_of_a_file_changes_nothing(folder: Path) -> None:
    for name in ("sub", "d/e"):
        with pytest.raises(OSError, match=r"is (not )?a folder"):
            write(folder, {"a.json": b"new", name: b"new"})
        assert contents(folder) == OLD


@pytest.mark.parametrize(
    "name",
    [
        "x" * 250 + ".json",
        "-o.json",
        "a\nb.json",
        " dot. ",
        "\N{SNOWMAN}",
        os.fsdecode(b"\xff\xfe.json"),
        "[red]x[/red]",
    ],
)
def test_names_that_the_disk_allows_work(name: str, tmp_path: Path) -> None:
    atomic.check_writable(tmp_path / name)
    atomic.write_text(tmp_path / name, name)
    atomic.write_text(tmp_path / name, "new")
    assert (tmp_path / name).read_text() == "new"
    folder = tmp_path / "folders" / name
    write(folder)
    write(folder, {"a.json": b"newer", "b.bin": b"newer"})
    assert contents(folder) == {"a.json": b"newer", "b.bin": b"newer"}
    assert not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("x" * 256, "File name too long"),
        ("y/" * 2030 + "z", "File name too long"),
        ("file/a", "is a file, not a folder|Not a directory"),
        ("file/a/b", "is a file, not a folder|Not a directory"),
        ("pipe", "is not a regular file"),
        ("loop/a", "Too many levels of symbolic links"),
        ("a\0b", "cannot hold a NUL character"),
    ],
)
def test_names_that_the_disk_refuses_fail_before_the_work(path: str, error: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises((OSError, ValueError), match=error):
        atomic.check_writable(tmp_path / path)
    assert {found.name for found in tmp_path.iterdir()} == {"file", "pipe", "loop"}


def test_pipes_and_devices_are_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OSError, match="is not a regular file"):
            atomic.write_text(target, "new")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_file_is_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    target, link = tmp_path / "a" / "file", tmp_path / "b" / "link"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to("../a/file")
    atomic.write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    (tmp_path / "b" / "later").symlink_to("../a/later")
    atomic.write_text(tmp_path / "b" / "later", "made")
    assert (tmp_path / "a" / "later").read_text() == "made"
