"""Files of settings that are pipes, devices, links, too large, or not text."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest

from lorank._internal.json_files import parse_json, read_json
from lorank._internal.regular_files import SETTINGS_BYTES, open_regular, read_bytes, read_text


def test_reads_a_file_and_a_link_to_it(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"r": 1}\n')
    (tmp_path / "link").symlink_to("a")
    assert read_bytes(tmp_path / "link", 9) == b'{"r": 1}\n'
    assert read_text(tmp_path / "a") == '{"r": 1}\n'
    assert read_json(tmp_path / "a") == {"r": 1}
    with open_regular(tmp_path / "a") as file:
        assert file.read(3) == b'{"r'


def test_file_that_states_no_size() -> None:
    assert read_bytes("/proc/self/status", 1 << 20).startswith(b"Name:")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "device", "terminal"])
def test_other_kinds_are_refused_without_waiting(tmp_path: Path, kind: str) -> None:
    path, held = tmp_path / "config.json", None
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe")
    elif kind == "socket":
        held = socket.socket(socket.AF_UNIX)
        held.bind(str(path))
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "/dev/ptmx")
    with pytest.raises(OSError, match="not a regular file") as caught:
        read_json(path)
    assert caught.value.filename == str(path)
    if held is not None:
        held.close()


def test_kind_is_checked_again_after_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "regular").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    regular = (tmp_path / "regular").stat()
    handles = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: regular)
    with pytest.raises(OSError, match="named pipe"):
        open_regular(tmp_path / "pipe")
    assert len(list(Path("/proc/self/fd").iterdir())) == handles


def test_folders_missing_files_and_circular_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    (tmp_path / "dangling").symlink_to("missing")
    for name, error in (("", IsADirectoryError), ("dangling", FileNotFoundError), ("a", OSError)):
        with pytest.raises(error) as caught:
            read_text(tmp_path / name)
        assert caught.value.filename is not None
        assert str(caught.value.filename) == str(tmp_path / name)


def test_large_and_growing_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 16,777,216 bytes") as caught:
        read_json(path, SETTINGS_BYTES)
    assert caught.value.filename == str(path)
    path.write_bytes(b" " * SETTINGS_BYTES)
    with pytest.raises(ValueError, match="Expecting value"):
        read_json(path, SETTINGS_BYTES)
    path.write_bytes(b"")
    is_read = threading.Event()

    def grow() -> None:
        with path.open("ab", buffering=0) as file:
            while not is_read.is_set():
                file.write(b" " * (1 << 16))

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(20):
            if path.stat().st_size > 1 << 24:
                os.truncate(path, 0)
            with pytest.raises((OSError, ValueError)):
                read_json(path, 1 << 20)
    finally:
        is_read.set()
        writer.join()


def test_failed_read_names_the_file() -> None:
    with pytest.raises(OSError, match="Input/output error") as caught:
        read_bytes("/proc/self/mem", 1 << 20)
    assert caught.value.filename == "/proc/self/mem"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\ufeff{}",
        "[" * 100_000,
        '{"a":' * 100_000,
        "9" * 5000,
        "[,]",
        '{"a": 1}}',
        "\0",
        "[" * 33_000_000,
    ],
    ids=range(10),
)
def test_texts_that_are_not_json(text: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        read_json(tmp_path / "a")
