"""Saved reports of any class."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from lorank._core import FormatError
from lorank._internal.json_files import read_json
from lorank.report import files
from lorank.report.gradients import GradientReport
from lorank.report.spectral import SpectralReport
from lorank.report.tasks import TaskReport

AnyReport: TypeAlias = SpectralReport | GradientReport | TaskReport

_CLASSES: dict[str, type[AnyReport]] = {
    files.FORMAT: SpectralReport,
    GradientReport.format: GradientReport,
    TaskReport.format: TaskReport,
}


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
    ValueError
        If the name has another ending.
    """
    path = Path(path)
    if path.suffix != ".json":
        return SpectralReport.load(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return _class_of(path).load(path)


def _class_of(path: Path) -> type[AnyReport]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise FormatError(f"{path}: is not a lorank report: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if not isinstance(found, str) or found not in _CLASSES:
        reason = f"it is a {found}" if isinstance(found, str) else "it does not give its format"
        raise FormatError(f"{path}: is not a lorank report: {reason}")
    return _CLASSES[found]
