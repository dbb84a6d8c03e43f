"""The journal of an analysis, from which an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from lorank._core import FormatError
from lorank.report.columns import from_entry, to_entries
from lorank.report.rows import ModuleSpectrum

_FORMAT = "lorank.journal"


class Journal:
    """An append-only file with a header line, and a line for each finished matrix.

    Parameters
    ----------
    path
        Path of the file, which is made if it does not exist.
    identity
        Fingerprint of the source, and the options that change results.

    Attributes
    ----------
    finished
        Rows of the matrices that earlier runs finished, by name.

    Raises
    ------
    FormatError
        If the file is not a journal.
    ValueError
        If the journal belongs to another source or to other options.
    """

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.path = path
        header = {"format": _FORMAT, **identity}
        self.finished = {row.name: row for row in _read(path, header)} if path.exists() else {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            _drop_incomplete_line(path)
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._write(header)

    def add(self, row: ModuleSpectrum) -> None:
        """Write a finished row to disk."""
        self._write(to_entries([row])[0])

    def _write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _read(path: Path, header: dict[str, Any]) -> Iterable[ModuleSpectrum]:
    # The text after the last newline may be an incomplete line of an interrupted run.
    lines = path.read_text("utf-8").split("\n")[:-1]
    if not lines:
        return []
    try:
        found = json.loads(lines[0])
        if found["format"] != _FORMAT:
            raise ValueError(found["format"])
        rows = [from_entry(json.loads(line)) for line in lines[1:]]
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: is not a journal of lorank: {error!r}") from error
    different = [key for key in header if found.get(key) != header[key]]
    if different:
        raise ValueError(
            f"{path}: was written for another run (different {', '.join(different)}): "
            "name another file, or delete it to start over"
        )
    return rows


def _drop_incomplete_line(path: Path) -> None:
    """Remove an incomplete last line, which an interrupted run left."""
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
