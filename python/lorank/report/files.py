"""Spectral reports as JSON, parquet and CSV files: rows, and a header with the other fields."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from lorank._core import FormatError
from lorank._internal import extras
from lorank._internal.atomic import atomic_path, write_text
from lorank._internal.csv_cells import from_cell, to_cell
from lorank._internal.json_files import read_json
from lorank._internal.printable import encodable
from lorank.modules.facts import ModelFacts
from lorank.report.columns import columns, from_entry, to_entries
from lorank.report.json_values import skipped_from_json, skipped_to_json
from lorank.report.rows import COUNTS, METRICS, ModuleSpectrum
from lorank.sources.base import Skipped

_TEXTS = ("name", "module", "kind", "dtype", "accuracy", "flags")

FORMAT = "lorank.SpectralReport"
_VERSION = 1


class Header(TypedDict):
    """The fields of a `SpectralReport` other than its rows."""

    skipped: Sequence[Skipped]
    source: str
    accuracy: str
    num_parameters: int | None
    unknown_parameters: str
    facts: ModelFacts


class Content(NamedTuple):
    """Rows and header of a file."""

    rows: list[ModuleSpectrum]
    header: Header


def save(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    """Write rows and header in the format of the path's suffix; CSV holds rows only."""
    writers = {".json": _save_json, ".parquet": _save_parquet, ".csv": _save_csv}
    _by_suffix(path, writers)(path, rows, header)


def load(path: Path) -> Content:
    """Read a file in the format of its suffix.

    Raises
    ------
    FormatError
        If the file is not a report.
    """
    readers = {".json": _load_json, ".parquet": _load_parquet, ".csv": _load_csv}
    reader = _by_suffix(path, readers)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content: Content = reader(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
            raise
        raise FormatError(f"{path}: is not a lorank report: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: is not a lorank report: {error!r}") from error
    return content


def _by_suffix(path: Path, table: Mapping[str, Any]) -> Any:
    if path.suffix not in table:
        raise ValueError(f"{path}: the name of a report must end with {', '.join(table)}")
    return table[path.suffix]


def to_json(rows: Sequence[ModuleSpectrum], header: Header) -> dict[str, Any]:
    """Return JSON values. NaN becomes null, as do counts without a spectrum; infinity becomes "inf"."""
    return {**_header_to_json(header), "modules": to_entries(rows)}


def _from_json(content: Mapping[str, Any]) -> Content:
    header = _header_from_json(content)
    return Content([from_entry(entry) for entry in content["modules"]], header)


def _header_to_json(header: Header) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": _VERSION,
        "source": header["source"],
        "accuracy": header["accuracy"],
        "num_parameters": header["num_parameters"],
        "model": header["facts"].to_json(),
        "unknown_parameters": header["unknown_parameters"],
        "skipped": skipped_to_json(header["skipped"]),
    }


def _header_from_json(content: Mapping[str, Any]) -> Header:
    if content["format"] != FORMAT or content["version"] > _VERSION:
        raise ValueError(f"format {content['format']!r}, version {content['version']}")
    return Header(
        skipped=skipped_from_json(content["skipped"]),
        source=content["source"],
        accuracy=content["accuracy"],
        num_parameters=content["num_parameters"],
        unknown_parameters=content.get("unknown_parameters", ""),
        facts=ModelFacts.from_json(content["model"]) if "model" in content else ModelFacts(),
    )


def _save_json(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    write_text(path, json.dumps(to_json(rows, header), indent=1, allow_nan=False) + "\n")


def _load_json(path: Path) -> Content:
    return _from_json(read_json(path))


def _save_csv(path: Path, rows: Sequence[ModuleSpectrum], _header: Header) -> None:
    table = columns(rows)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row])


def _load_csv(path: Path) -> Content:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if missing := columns([]).keys() - set(reader.fieldnames or ()):
            raise ValueError(f"missing columns: {', '.join(sorted(missing))}")
        rows = [from_entry({key: _csv_value(value) for key, value in entry.items()}) for entry in reader]
    unknown = "the report was read from CSV, which keeps rows only, unlike JSON and parquet"
    header = Header(
        skipped=(),
        source=str(path),
        accuracy="exact",
        num_parameters=None,
        unknown_parameters=unknown,
        facts=ModelFacts(doubts=(unknown,)),
    )
    return Content(rows, header)


def _csv_value(cell: Any) -> Any:
    """Return the text of a cell; a list holds the cells beyond the header."""
    return from_cell(cell) if isinstance(cell, str) else cell


def _save_parquet(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    pyarrow = extras.require("pyarrow", "report", "for parquet files")
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    table = columns(rows)
    if any(row.eigenvalues is not None for row in rows):
        table["eigenvalues"] = [row.eigenvalues for row in rows]
    table |= {name: list(map(encodable, table[name])) for name in _TEXTS}
    arrays = {name: pyarrow.array(values, type=_arrow_type(pyarrow, name)) for name, values in table.items()}
    metadata = {FORMAT: json.dumps(_header_to_json(header))}
    content = pyarrow.table(arrays).replace_schema_metadata(metadata)
    # The file is opened here, because pyarrow takes only paths in UTF-8.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        parquet.write_table(content, file)


def _arrow_type(pyarrow: Any, column: str) -> Any:
    if column in {"out", "in", "expert", *COUNTS}:
        return pyarrow.int64()
    if column in METRICS:
        return pyarrow.float64()
    return pyarrow.list_(pyarrow.float64()) if column == "eigenvalues" else pyarrow.string()


def _load_parquet(path: Path) -> Content:
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    with path.open("rb") as file:
        content = parquet.read_table(file)
    metadata = content.schema.metadata or {}
    if FORMAT.encode() not in metadata:
        raise ValueError("a parquet file of another program")
    header = _header_from_json(json.loads(metadata[FORMAT.encode()]))
    return Content([from_entry(entry) for entry in content.to_pylist()], header)
