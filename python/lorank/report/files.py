"""Reports as JSON, parquet and CSV."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorank._core import FormatError
from lorank._internal import extras
from lorank._internal.atomic import atomic_path, write_text
from lorank._internal.json_files import read_json
from lorank.modules.facts import ModelFacts
from lorank.report.json_report import number, plain
from lorank.report.spectral import METRICS, ModuleSpectrum, SpectralReport
from lorank.sources.base import Skipped

_FORMAT = "lorank.SpectralReport"
_VERSION = 1
_COUNTS = {"num_nonzero", "num_unresolved", "mp_spikes", "mp_spikes_error", "mp_spikes_median"}


def save(report: SpectralReport, path: Path) -> None:
    """Write a report in the format that the path's ending names."""
    writers = {".json": _save_json, ".parquet": _save_parquet, ".csv": _save_csv}
    _by_suffix(path, writers)(report, path)


def load(path: Path) -> SpectralReport:
    """Read a report in the format that the path's ending names."""
    readers = {".json": _load_json, ".parquet": _load_parquet, ".csv": _load_csv}
    reader = _by_suffix(path, readers)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        report: SpectralReport = reader(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise FormatError(f"{path}: is no lorank report: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: is no lorank report: {error!r}") from error
    return report


def _by_suffix(path: Path, table: Mapping[str, Any]) -> Any:
    if path.suffix not in table:
        raise ValueError(f"{path}: reports end with {', '.join(table)}")
    return table[path.suffix]


def columns(report: SpectralReport) -> dict[str, list[Any]]:
    """The rows as columns of plain values, without eigenvalues."""
    rows = report.modules
    table: dict[str, list[Any]] = {
        "name": [row.name for row in rows],
        "module": [row.module for row in rows],
        "kind": [row.kind for row in rows],
        "out": [row.shape[0] for row in rows],
        "in": [row.shape[1] for row in rows],
        "dtype": [row.dtype for row in rows],
        "expert": [row.expert for row in rows],
        "accuracy": [row.accuracy for row in rows],
    }
    table |= {metric: [_value(row, metric) for row in rows] for metric in METRICS}
    table["flags"] = ["; ".join(row.flags) for row in rows]
    return table


def _value(row: ModuleSpectrum, metric: str) -> Any:
    """A number of a row; None for a count where there was nothing to count in."""
    return None if metric in _COUNTS and not row.has_spectrum else getattr(row, metric)


def to_json(report: SpectralReport) -> dict[str, Any]:
    """The report as values that JSON knows: nan, and a count of nothing, is null, infinity "inf"."""
    table = columns(report)
    modules = [
        dict(zip(table, map(plain, values), strict=True)) for values in zip(*table.values(), strict=True)
    ]
    for row, entry in zip(report.modules, modules, strict=True):
        entry["flags"] = list(row.flags)
        if row.eigenvalues is not None:
            entry["eigenvalues"] = row.eigenvalues.tolist()
    return {**_header(report), "modules": modules}


def from_json(content: Mapping[str, Any]) -> SpectralReport:
    """The inverse of `to_json`."""
    return _report(content, [_row(entry, tuple(entry["flags"])) for entry in content["modules"]])


def _header(report: SpectralReport) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "source": report.source,
        "accuracy": report.accuracy,
        "num_parameters": report.num_parameters,
        "model": report.facts.to_json(),
        "unknown_parameters": report.unknown_parameters,
        "skipped": [{"name": s.name, "shape": s.shape, "reason": s.reason} for s in report.skipped],
    }


def _report(header: Mapping[str, Any], rows: list[ModuleSpectrum]) -> SpectralReport:
    if header["format"] != _FORMAT or header["version"] > _VERSION:
        raise ValueError(f"format {header['format']!r}, version {header['version']}")
    skipped = [Skipped(s["name"], tuple(s["shape"]), s["reason"]) for s in header["skipped"]]
    facts = ModelFacts.from_json(header["model"]) if "model" in header else ModelFacts()
    return SpectralReport(
        rows,
        skipped,
        header["source"],
        header["accuracy"],
        header["num_parameters"],
        header.get("unknown_parameters", ""),
        facts,
    )


def _row(entry: Mapping[str, Any], flags: tuple[str, ...]) -> ModuleSpectrum:
    metrics: dict[str, Any] = {
        name: int(entry[name] or 0) if name in _COUNTS else number(entry[name]) for name in METRICS
    }
    eigenvalues, expert = entry.get("eigenvalues"), entry["expert"]
    return ModuleSpectrum(
        name=entry["name"],
        module=entry["module"],
        kind=entry["kind"],
        shape=(int(entry["out"]), int(entry["in"])),
        dtype=entry["dtype"],
        expert=None if expert in (None, "") else int(expert),
        accuracy=entry["accuracy"],
        flags=flags,
        eigenvalues=None if eigenvalues is None else np.asarray(eigenvalues, dtype=np.float64),
        **metrics,
    )


def _save_json(report: SpectralReport, path: Path) -> None:
    write_text(path, json.dumps(to_json(report), indent=1, allow_nan=False) + "\n")


def _load_json(path: Path) -> SpectralReport:
    return from_json(read_json(path))


def _save_csv(report: SpectralReport, path: Path) -> None:
    table = columns(report)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def _load_csv(path: Path) -> SpectralReport:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := columns(SpectralReport([])).keys() - set(reader.fieldnames or ()):
            raise ValueError(f"without columns {', '.join(sorted(missing))}")
        rows = [_row(entry, _split_flags(entry["flags"])) for entry in reader]
    unknown = "the report was read from CSV, which keeps rows only, unlike JSON and parquet"
    facts = ModelFacts(doubts=(unknown,))
    return SpectralReport(rows, source=str(path), unknown_parameters=unknown, facts=facts)


def _split_flags(text: str) -> tuple[str, ...]:
    return tuple(text.split("; ")) if text else ()


def _save_parquet(report: SpectralReport, path: Path) -> None:
    pyarrow = extras.require("pyarrow", "report", "for parquet files")
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    table = columns(report)
    if any(row.eigenvalues is not None for row in report.modules):
        table["eigenvalues"] = [row.eigenvalues for row in report.modules]
    arrays = {name: pyarrow.array(values, type=_arrow_type(pyarrow, name)) for name, values in table.items()}
    content = pyarrow.table(arrays).replace_schema_metadata({_FORMAT: json.dumps(_header(report))})
    with atomic_path(path) as temporary:
        parquet.write_table(content, temporary)


def _arrow_type(pyarrow: Any, column: str) -> Any:
    if column in {"out", "in", "expert", *_COUNTS}:
        return pyarrow.int64()
    if column in METRICS:
        return pyarrow.float64()
    return pyarrow.list_(pyarrow.float64()) if column == "eigenvalues" else pyarrow.string()


def _load_parquet(path: Path) -> SpectralReport:
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    content = parquet.read_table(path)
    metadata = content.schema.metadata or {}
    if _FORMAT.encode() not in metadata:
        raise ValueError("a parquet file of another program")
    header = json.loads(metadata[_FORMAT.encode()])
    return _report(header, [_row(entry, _split_flags(entry["flags"])) for entry in content.to_pylist()])
