"""Journals of `analyze(resume=...)`: other files are never changed, and killed runs continue exactly."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorank
from lorank.analysis.line_file import LineFile
from tests.support.command_line import assert_one_line, run
from tests.support.forked_kills import kill_repeatedly


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    names = [*(f"layers.{i}.w" for i in range(4)), "a\nb.w", "schicht.\u00e4"]
    save_file(
        {f"{name}.weight": rng.standard_normal((8, 12)) for name in names}, tmp_path / "model.safetensors"
    )
    return tmp_path / "model.safetensors"


def analyze(checkpoint: Path, journal: Path) -> lorank.SpectralReport:
    return lorank.analyze(checkpoint, resume=journal, threads=1, progress=False)


OTHER_FILES = [
    b'{"precious": true}',
    b'{"precious": true}\n',
    b"precious",
    b"{",
    b"\n",
    b"\x00\xff\x01",
    b"\x89PNG\r\n\x1a\n",
    b"\x1f\x8b\x08\x00",
    b'{"format": "lorank.journal", "finger',
    b'{"format": "lorank.SpectralReport"}\n',
    b'{"format": ["lorank.journal"]}\n',
    b"[" * 200_000 + b"\n",
    b"1\n2\n",
    b"a,b\r\n1,2\r\n",
]


@pytest.mark.parametrize("content", OTHER_FILES, ids=[repr(content[:30]) for content in OTHER_FILES])
def test_other_files_are_not_changed(content: bytes, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.json"
    path.write_bytes(content)
    with pytest.raises(lorank.FormatError, match=r"notes\.json: is not a journal of lorank"):
        analyze(checkpoint, path)
    assert path.read_bytes() == content
    assert assert_one_line(["analyze", checkpoint, "--resume", path, "-q"], path) == 1
    assert path.read_bytes() == content


def test_empty_file_becomes_a_journal(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "journal").touch()
    assert analyze(checkpoint, tmp_path / "journal") == lorank.analyze(checkpoint)
    assert len((tmp_path / "journal").read_bytes().splitlines()) == 7


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_torn_last_line_is_analysed_again(cut: int, checkpoint: Path, tmp_path: Path) -> None:
    whole = analyze(checkpoint, tmp_path / "journal")
    content = (tmp_path / "journal").read_bytes()
    (tmp_path / "journal").write_bytes(content[:-cut])
    assert analyze(checkpoint, tmp_path / "journal") == whole
    assert (tmp_path / "journal").read_bytes() == content


def changed(journal: Path, line: int, **values: object) -> None:
    """Change values in a line of a journal."""
    lines = journal.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **values})
    journal.write_text("\n".join([*lines, ""]))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"alpha_hill": "2"}, "line 3.alpha_hill is '2'"),
        ({"num_nonzero": True}, "line 3.num_nonzero is True"),
        ({"num_nonzero": -1}, "line 3.num_nonzero is -1"),
        ({"kind": "other"}, "line 3.kind is 'other'"),
        ({"flags": [1]}, "line 3.flags"),
        ({"eigenvalues": [2, 1, 0]}, "line 3.eigenvalues"),
        ({"out": 9}, "has no matrix like"),
        ({"name": "elsewhere"}, "has no matrix like"),
        ({"dtype": "float16"}, "has no matrix like"),
    ],
)
def test_unfitting_rows_raise(
    values: dict[str, object], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    analyze(checkpoint, journal)
    changed(journal, 2, **values)
    content = journal.read_bytes()
    with pytest.raises(lorank.FormatError) as error:
        analyze(checkpoint, journal)
    assert str(journal) in str(error.value)
    assert reason in str(error.value)
    assert journal.read_bytes() == content


def test_row_that_occurs_twice_raises(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    analyze(checkpoint, journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, lines[2]]))
    with pytest.raises(lorank.FormatError, match="occurs more than once"):
        analyze(checkpoint, journal)


def test_rows_of_another_selection_stay(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    for index in (0, 1):
        lorank.analyze(checkpoint, include=[f"layers.{index}.w"], resume=journal)
    assert len(journal.read_bytes().splitlines()) == 3
    assert analyze(checkpoint, journal) == lorank.analyze(checkpoint)


def test_links_out_of_the_folder_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere/target"
    link = tmp_path / "journal"
    link.symlink_to(target)
    for content in (None, b"", b"text"):
        if content is not None:
            target.write_bytes(content)
        with pytest.raises(lorank.FormatError, match=r"is a link to .*target, outside its folder"):
            analyze(checkpoint, link)
        assert (target.read_bytes() if target.exists() else None) == content


def test_link_within_the_folder_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "journal").symlink_to("target")
    assert analyze(checkpoint, tmp_path / "journal") == analyze(checkpoint, tmp_path / "target")
    assert (tmp_path / "journal").is_symlink()


def test_pipes_devices_and_folders_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/stdin"), tmp_path / "folder"):
        assert assert_one_line(["analyze", checkpoint, "--resume", path, "-q"], path) == 1


def test_two_runs_cannot_share_a_journal(checkpoint: Path, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    analyze(checkpoint, journal)
    content = journal.read_bytes()
    file = LineFile(journal)
    result = run("analyze", checkpoint, "--resume", journal, "-q")
    assert result.returncode == 1
    assert (
        result.stderr
        == f"lorank: {journal}: another run is using this journal: wait for it, or name another file\n"
    )
    file.close()
    assert journal.read_bytes() == content
    assert run("analyze", checkpoint, "--resume", journal, "-q").returncode == 0


def test_line_that_does_not_fit_the_disk_is_not_half_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = LineFile(path)
    file.append("a" * 50)
    resource.setrlimit(resource.RLIMIT_FSIZE, (80, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            file.append("b" * 50)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.filename == str(path)
    file.append("c")
    file.close()
    assert path.read_text() == "a" * 50 + "\nc\n"


@pytest.mark.parametrize("kills", [5, pytest.param(250, marks=pytest.mark.slow)])
def test_killed_runs_continue_exactly(kills: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    weights = {f"layers.{i}.w.weight": rng.standard_normal((150, 150)) for i in range(20)}
    save_file(weights, tmp_path / "model.safetensors")
    journal, saved = tmp_path / "journal", tmp_path / "report.json"
    lorank.analyze(tmp_path / "model.safetensors", keep_eigenvalues=True).save(saved)
    expected = saved.read_bytes()

    def work() -> None:
        report = lorank.analyze(
            tmp_path / "model.safetensors", keep_eigenvalues=True, resume=journal, threads=2
        )
        report.save(saved)

    def after_kill() -> None:
        first, newline, _ = (journal.read_bytes() if journal.exists() else b"").partition(b"\n")
        assert not first or (newline and json.loads(first)["format"] == "lorank.journal")

    def after_end() -> None:
        assert saved.read_bytes() == expected
        assert len(journal.read_bytes().splitlines()) == 21
        journal.unlink()

    assert kill_repeatedly(work, after_kill, after_end, kills=kills) == kills
