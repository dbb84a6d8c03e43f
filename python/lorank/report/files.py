"""Spectral reports as JSON, parquet and CSV files: rows, and a header with the other fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_args

from lorank._internal.atomic import write_text
from lorank._internal.json_fields import Fields, check_unique, reading
from lorank._internal.json_files import read_json
from lorank.modules.facts import ModelFacts
from lorank.report import flat_files
from lorank.report.columns import columns, from_entry, to_entries
from lorank.report.json_values import skipped_from_json, skipped_to_json
from lorank.report.optional_metrics import OPTIONAL_COLUMNS, OPTIONAL_COUNTS, check_groups, groups_in
from lorank.report.rows import COUNTS, METRICS, ModuleSpectrum
from lorank.sources.base import Skipped
from lorank.statistics.spectrum import Accuracy

FORMAT = "lorank.SpectralReport"
REPORT = "a lorank report"
_VERSION = 1

# Columns of numbers in CSV.
_NUMBERS = frozenset({"out", "in", "expert", *METRICS, *OPTIONAL_COLUMNS})


class Header(TypedDict):
    """The fields of a `SpectralReport` other than its rows."""

    skipped: Sequence[Skipped]
    source: str
    accuracy: str
    num_parameters: int | None
    unknown_parameters: str
    facts: ModelFacts
    metrics: tuple[str, ...]


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
    OSError
        If the file cannot be read.
    """
    readers = {".json": _load_json, ".parquet": _load_parquet, ".csv": _load_csv}
    reader = _by_suffix(path, readers)
    with reading(path, REPORT):
        content: Content = reader(path)
    return content


def _by_suffix(path: Path, table: Mapping[str, Any]) -> Any:
    if path.suffix not in table:
        raise ValueError(f"{path}: the name of a report must end with {', '.join(table)}")
    return table[path.suffix]


def to_json(rows: Sequence[ModuleSpectrum], header: Header) -> dict[str, Any]:
    """Return JSON values. NaN becomes null, as do counts without a spectrum; infinity becomes "inf"."""
    return {**_header_to_json(header), "modules": to_entries(rows, header["metrics"])}


def from_json(content: Any) -> Content:
    """Build rows and header from the result of `to_json`.

    Raises
    ------
    ValueError
        If the content is malformed.
    """
    fields = Fields(content)
    return Content(_rows(fields.objects("modules")), _header_from_json(fields))


def _rows(entries: Iterable[Fields]) -> list[ModuleSpectrum]:
    rows = [from_entry(entry) for entry in entries]
    check_unique([row.name for row in rows])
    return rows


def _header_to_json(header: Header) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": _VERSION,
        "source": header["source"],
        "accuracy": header["accuracy"],
        **({"metrics": list(header["metrics"])} if header["metrics"] else {}),
        "num_parameters": header["num_parameters"],
        "model": header["facts"].to_json(),
        "unknown_parameters": header["unknown_parameters"],
        "skipped": skipped_to_json(header["skipped"]),
    }


def _header_from_json(content: Fields) -> Header:
    content.check_format(FORMAT, _VERSION)
    return Header(
        skipped=skipped_from_json(content),
        source=content.text("source"),
        accuracy=content.choice("accuracy", get_args(Accuracy)),
        num_parameters=content.optional_integer("num_parameters"),
        unknown_parameters=content.text("unknown_parameters", ""),
        facts=ModelFacts.from_json(content.object("model")) if "model" in content else ModelFacts(),
        metrics=_metrics(content),
    )


def _metrics(content: Fields) -> tuple[str, ...]:
    return check_groups(content.texts("metrics")) if "metrics" in content else ()


def _save_json(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    write_text(path, json.dumps(to_json(rows, header), indent=1, allow_nan=False) + "\n")


def _load_json(path: Path) -> Content:
    return from_json(read_json(path))


def _save_csv(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    flat_files.save_csv(path, columns(rows, header["metrics"]))


def _load_csv(path: Path) -> Content:
    rows = _rows(flat_files.load_csv(path, columns([]).keys(), _NUMBERS))
    unknown = "the report was read from CSV, which keeps rows only, unlike JSON and parquet"
    header = Header(
        skipped=(),
        source=str(path),
        accuracy="exact",
        num_parameters=None,
        unknown_parameters=unknown,
        facts=ModelFacts(doubts=(unknown,)),
        metrics=groups_in(flat_files.csv_names(path)),
    )
    return Content(rows, header)


def _save_parquet(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    table = columns(rows, header["metrics"])
    if any(row.eigenvalues is not None for row in rows):
        table["eigenvalues"] = [row.eigenvalues for row in rows]
    types = {name: _type_of(name) for name in table}
    flat_files.save_parquet(path, table, types, FORMAT, _header_to_json(header))


def _type_of(column: str) -> flat_files.ColumnType:
    if column in {"out", "in", "expert", *COUNTS, *OPTIONAL_COUNTS}:
        return "integer"
    if column in METRICS or column in OPTIONAL_COLUMNS:
        return "number"
    return "numbers" if column == "eigenvalues" else "text"


def _load_parquet(path: Path) -> Content:
    _, (header, entries) = flat_files.load_parquet(path, [FORMAT])
    return Content(_rows(entries), _header_from_json(header))
