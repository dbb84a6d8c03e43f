"""Saved reports of any class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from lorank._internal.json_fields import Fields, reading
from lorank._internal.json_files import read_json
from lorank._internal.short_text import shown
from lorank.report import files
from lorank.report.gradients import GradientReport
from lorank.report.spectral import SpectralReport
from lorank.report.tasks import TaskReport

AnyReport: TypeAlias = SpectralReport | GradientReport | TaskReport

_PROFILES = (GradientReport, TaskReport)


def load_report(path: str | Path) -> AnyReport:
    """Read a saved report of any class; a JSON file contains the name of its class.

    Parameters
    ----------
    path
        A ``.json`` file of any report, or a ``.parquet`` or ``.csv`` file of a `SpectralReport`.

    Raises
    ------
    FormatError
        If the file is not a report.
    OSError
        If the file cannot be read.
    ValueError
        If the name has another ending.
    """
    path = Path(path)
    if path.suffix != ".json":
        return SpectralReport.load(path)
    with reading(path, files.REPORT):
        return _from_json(read_json(path))


def _from_json(content: Any) -> AnyReport:
    """Build a report from the content of a JSON file."""
    found = Fields(content).text("format")
    for profile in _PROFILES:
        if found == profile.format:
            return profile.from_json(content)
    if found != files.FORMAT:
        raise ValueError(f"it is a {shown(found)}")
    rows, header = files.from_json(content)
    return SpectralReport(rows, **header)
