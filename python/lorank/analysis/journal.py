"""The journal of an analysis, from which an interrupted run continues."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from lorank._core import FormatError
from lorank._internal.json_fields import Fields, check_unique, reading
from lorank._internal.json_files import parse_json
from lorank.analysis.line_file import LineFile
from lorank.report.columns import from_entry, to_entries
from lorank.report.rows import ModuleSpectrum, identity
from lorank.sources.base import MatrixInfo

_FORMAT = "lorank.journal"
_JOURNAL = "a journal of lorank"


class Journal:
    """An append-only file with a header line, and a line for each finished matrix.

    Parameters
    ----------
    path
        Path of the file, which is made if it does not exist.
    fingerprint
        Fingerprint of the source, and the options that change results.
    matrices
        The matrices of the source.
    metrics
        Groups of optional metrics that the rows have.

    Attributes
    ----------
    finished
        Rows of the matrices that earlier runs finished, by name.

    Raises
    ------
    FormatError
        If the file is not a journal. It is not changed.
    OSError
        If the file cannot be written, or another run is using it.
    ValueError
        If the journal belongs to another source or to other options.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        matrices: Iterable[MatrixInfo],
        metrics: Sequence[str] = (),
    ) -> None:
        self.path = path
        self._metrics = metrics
        header = {"format": _FORMAT, **fingerprint}
        self._file = LineFile(path)
        try:
            lines = self._file.read()
            self.finished = {} if not lines else _finished(path, lines, header, matrices)
            self._file.drop_torn_line()
            if not lines:
                self._file.append(json.dumps(header))
        except BaseException:
            self._file.close()
            raise

    def add(self, row: ModuleSpectrum) -> None:
        """Write a finished row to the file."""
        self._file.append(json.dumps(to_entries([row], self._metrics)[0]))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _finished(
    path: Path, lines: list[bytes], header: Mapping[str, Any], matrices: Iterable[MatrixInfo]
) -> dict[str, ModuleSpectrum]:
    """Return the rows of a journal by name."""
    with reading(path, _JOURNAL):
        found = _fields(lines, 0)
        if found.value("format") != _FORMAT:
            raise found.error("format", found.value("format"), repr(_FORMAT))
    different = [key for key in header if key not in found or found.value(key) != header[key]]
    if different:
        raise ValueError(
            f"{path}: was written for another run (different {', '.join(different)}): "
            "name another file, or delete it to start over"
        )
    with reading(path, _JOURNAL):
        rows = [from_entry(_fields(lines, index)) for index in range(1, len(lines))]
        check_unique([row.name for row in rows])
    known = {info.name: identity(info) for info in matrices}
    for row in rows:
        if identity(row) != known.get(row.name):
            raise FormatError(
                f"{path}: does not fit the source, which has no matrix like {row!r}: "
                "name another file, or delete it to start over"
            )
    return {row.name: row for row in rows}


def _fields(lines: list[bytes], index: int) -> Fields:
    """Return the content of a line."""
    place = f"line {index + 1}"
    try:
        return Fields(parse_json(lines[index].decode("utf-8")), place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
