"""Spectral reports as JSON, parquet and CSV files: rows, and a header with the other fields."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, get_args

from lorank._internal import extras
from lorank._internal.atomic import atomic_path, write_text
from lorank._internal.csv_cells import from_cell, to_cell
from lorank._internal.json_fields import Fields, check_unique, reading
from lorank._internal.json_files import parse_json, read_json
from lorank._internal.printable import encodable
from lorank.modules.facts import ModelFacts
from lorank.report.columns import columns, from_entry, to_entries
from lorank.report.json_values import plain, skipped_from_json, skipped_to_json
from lorank.report.rows import COUNTS, METRICS, ModuleSpectrum
from lorank.sources.base import Skipped
from lorank.statistics.spectrum import Accuracy

_TEXTS = ("name", "module", "kind", "dtype", "accuracy", "flags")

FORMAT = "lorank.SpectralReport"
REPORT = "a lorank report"
_VERSION = 1

# Columns of numbers in CSV, and the spellings that `save` writes. `float` and `int` accept more.
_NUMBERS = frozenset({"out", "in", "expert", *METRICS})
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")


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
    return {**_header_to_json(header), "modules": to_entries(rows)}


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
    )


def _save_json(path: Path, rows: Sequence[ModuleSpectrum], header: Header) -> None:
    write_text(path, json.dumps(to_json(rows, header), indent=1, allow_nan=False) + "\n")


def _load_json(path: Path) -> Content:
    return from_json(read_json(path))


def _save_csv(path: Path, rows: Sequence[ModuleSpectrum], _header: Header) -> None:
    table = columns(rows)
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row])


def _load_csv(path: Path) -> Content:
    with path.open(newline="", encoding="utf-8") as file:
        rows = _rows(_csv_entries(file))
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


def _csv_entries(file: Iterable[str]) -> Iterator[Fields]:
    """Yield the lines of a CSV file as entries, with the types of JSON values."""
    reader = csv.reader(file, strict=True)
    names: list[str] = []
    try:
        names = next(reader, [])
        check_unique(names)
        if missing := columns([]).keys() - set(names):
            raise ValueError(f"missing columns: {', '.join(sorted(missing))}")
        for cells in reader:
            if len(cells) != len(names):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells instead of {len(names)}")
            values = {name: _json_value(name, cell) for name, cell in zip(names, cells, strict=True)}
            yield Fields(values, f"line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _json_value(column: str, cell: str) -> Any:
    """Return a cell as a JSON value; a malformed number stays a string, which `Fields` refuses."""
    if column not in _NUMBERS:
        return from_cell(cell)
    if cell in ("", "nan"):
        return None
    if _INTEGER.fullmatch(cell):
        return int(cell)
    return float(cell) if _DECIMAL.fullmatch(cell) else cell


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
    header, table = _parquet_content(parquet, path)
    entries = ({name: plain(value) for name, value in row.items()} for row in table.to_pylist())
    rows = _rows(Fields(entry, f"row {index}") for index, entry in enumerate(entries))
    return Content(rows, _header_from_json(Fields(parse_json(header))))


def _parquet_content(parquet: Any, path: Path) -> tuple[str, Any]:
    """Return header and table of a parquet file."""
    try:
        # `read_table` would add columns for folders that are named like KEY=VALUE.
        with path.open("rb") as source, parquet.ParquetFile(source) as file:
            metadata = file.schema_arrow.metadata or {}
            if FORMAT.encode() not in metadata:
                raise ValueError("it is a parquet file of another program")
            table = file.read()
            check_unique(table.column_names)
            return metadata[FORMAT.encode()].decode("utf-8"), table
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(str(error)) from error
    except Exception as error:  # pyarrow raises exceptions of many classes for damaged files.
        raise ValueError(str(error)) from error
