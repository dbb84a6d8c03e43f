"""Saved reports of any class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from lorank._internal.json_fields import Fields, reading
from lorank._internal.json_files import read_json
from lorank._internal.short_text import shown
from lorank.report import files, flat_files
from lorank.report.comparison import ComparisonReport
from lorank.report.gradients import GradientReport
from lorank.report.spectral import SpectralReport
from lorank.report.tasks import TaskReport

AnyReport: TypeAlias = SpectralReport | GradientReport | TaskReport | ComparisonReport

_JSON_REPORTS = (GradientReport, TaskReport, ComparisonReport)


def load_report(path: str | Path) -> AnyReport:
    """Read a saved report of any class.

    Parameters
    ----------
    path
        A ``.json`` file of any report, or a ``.parquet`` or ``.csv`` file of a `SpectralReport` or a
        `ComparisonReport`.

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
        return ComparisonReport.load(path) if _is_comparison(path) else SpectralReport.load(path)
    with reading(path, files.REPORT):
        return _from_json(read_json(path))


def _is_comparison(path: Path) -> bool:
    """Return True if a parquet or CSV file is a comparison; files that are no reports fail when loaded."""
    with reading(path, files.REPORT):
        if path.suffix == ".csv":
            return "relative_change" in flat_files.csv_names(path)
        if path.suffix == ".parquet":
            key = flat_files.parquet_key(path, [files.FORMAT, ComparisonReport.format])
            return key == ComparisonReport.format
    return False


def _from_json(content: Any) -> AnyReport:
    """Build a report from the content of a JSON file."""
    found = Fields(content).text("format")
    for report in _JSON_REPORTS:
        if found == report.format:
            return report.from_json(content)
    if found != files.FORMAT:
        raise ValueError(f"it is a {shown(found)}")
    rows, header = files.from_json(content)
    return SpectralReport(rows, **header)
