"""Saved reports of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from lorank._core import FormatError
from lorank._internal.json_files import read_json
from lorank.report.gradients import GradientReport
from lorank.report.spectral import SpectralReport
from lorank.report.tasks import TaskReport

AnyReport: TypeAlias = SpectralReport | GradientReport | TaskReport

_CLASSES: dict[str, type[AnyReport]] = {
    "lorank.SpectralReport": SpectralReport,
    GradientReport.format: GradientReport,
    TaskReport.format: TaskReport,
}


def load_report(path: str | Path) -> AnyReport:
    """Read a saved report; a JSON file says itself of which kind it is.

    Parameters
    ----------
    path
        A ``.json`` file of any report, or a ``.parquet`` or ``.csv`` file of a `SpectralReport`.

    Raises
    ------
    FormatError
        If the file is no report.
    ValueError
        For another ending.
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
        raise FormatError(f"{path}: is no lorank report: {error}") from error
    says = content.get("format") if isinstance(content, dict) else None
    if not isinstance(says, str) or says not in _CLASSES:
        why = f"it is a {says}" if isinstance(says, str) else "it names no format"
        raise FormatError(f"{path}: is no lorank report: {why}")
    return _CLASSES[says]
