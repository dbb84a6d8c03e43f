"""Reports as parquet and CSV files: columns of plain values, and in parquet a header of JSON."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from lorank._internal import extras
from lorank._internal.atomic import atomic_path
from lorank._internal.csv_cells import from_cell, to_cell
from lorank._internal.json_fields import Fields, check_unique
from lorank._internal.json_files import parse_json
from lorank._internal.printable import encodable
from lorank.report.json_values import plain

Columns: TypeAlias = "Mapping[str, Sequence[Any]]"
"""Values by the name of the column."""

ColumnType = Literal["integer", "number", "text", "numbers"]
"""The type of a column; "numbers" is a list of numbers in each row, which CSV does not store."""

# The spellings of numbers in CSV that `save_csv` writes. `float` and `int` accept more.
_INTEGER = re.compile(r"-?[0-9]{1,19}")
_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][-+]?[0-9]+)?")


class FlatContent(NamedTuple):
    """The header of a file, and its rows."""

    header: Fields
    entries: list[Fields]


def save_csv(path: Path, table: Columns) -> None:
    """Write columns to a CSV file."""
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        for row in zip(*table.values(), strict=True):
            writer.writerow([to_cell(value) if isinstance(value, str) else value for value in row])


def csv_names(path: Path) -> list[str]:
    """Return the names of the columns of a CSV file; empty if its first line is not CSV."""
    with path.open(newline="", encoding="utf-8") as file:
        try:
            return next(csv.reader(file, strict=True), [])
        except csv.Error:
            return []


def load_csv(path: Path, required: Collection[str], numbers: Collection[str]) -> list[Fields]:
    """Return the rows of a CSV file as entries, with the types of JSON values.

    Parameters
    ----------
    path
        The file.
    required
        Names of columns that the file must have.
    numbers
        Names of columns of numbers.

    Raises
    ------
    ValueError
        If the file is malformed.
    """
    with path.open(newline="", encoding="utf-8") as file:
        return list(_csv_entries(file, required, numbers))


def _csv_entries(
    file: Iterable[str], required: Collection[str], numbers: Collection[str]
) -> Iterator[Fields]:
    reader = csv.reader(file, strict=True)
    try:
        names = next(reader, [])
        check_unique(names)
        if missing := set(required) - set(names):
            raise ValueError(f"missing columns: {', '.join(sorted(missing))}")
        for cells in reader:
            if len(cells) != len(names):
                raise ValueError(f"line {reader.line_num} has {len(cells)} cells instead of {len(names)}")
            values = {
                name: _number(cell) if name in numbers else from_cell(cell)
                for name, cell in zip(names, cells, strict=True)
            }
            yield Fields(values, f"line {reader.line_num}")
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from error


def _number(cell: str) -> Any:
    """Return a cell as a JSON value; a malformed number stays a string, which `Fields` refuses."""
    if cell in ("", "nan"):
        return None
    if _INTEGER.fullmatch(cell):
        return int(cell)
    return float(cell) if _DECIMAL.fullmatch(cell) else cell


def save_parquet(
    path: Path, table: Columns, types: Mapping[str, ColumnType], key: str, header: Mapping[str, Any]
) -> None:
    """Write columns to a parquet file, with a header of JSON values under a key of its metadata."""
    pyarrow = extras.require("pyarrow", "report", "for parquet files")
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    arrow_types = {
        "integer": pyarrow.int64(),
        "number": pyarrow.float64(),
        "text": pyarrow.string(),
        "numbers": pyarrow.list_(pyarrow.float64()),
    }
    arrays = {
        name: pyarrow.array(
            list(map(encodable, values)) if types[name] == "text" else values, type=arrow_types[types[name]]
        )
        for name, values in table.items()
    }
    content = pyarrow.table(arrays).replace_schema_metadata({key: json.dumps(header)})
    # The file is opened here, because pyarrow takes only paths in UTF-8.
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        parquet.write_table(content, file)


def parquet_key(path: Path, keys: Sequence[str]) -> str:
    """Return the first key that the metadata of a parquet file has.

    Raises
    ------
    ValueError
        If the file is malformed, or has none of the keys.
    """
    with _parquet_file(path, keys) as (key, _):
        return key


def load_parquet(path: Path, keys: Sequence[str]) -> tuple[str, FlatContent]:
    """Return the first key that the metadata of a parquet file has, the header under it, and the rows.

    Raises
    ------
    ValueError
        If the file is malformed, or has none of the keys.
    """
    with _parquet_file(path, keys) as (key, file):
        table = file.read()
        check_unique(table.column_names)
        header = file.schema_arrow.metadata[key.encode()].decode("utf-8")
    entries = ({name: plain(value) for name, value in row.items()} for row in table.to_pylist())
    rows = [Fields(entry, f"row {index}") for index, entry in enumerate(entries)]
    return key, FlatContent(Fields(parse_json(header)), rows)


@contextmanager
def _parquet_file(path: Path, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """Open a parquet file; yield the first key that its metadata has, and the file."""
    parquet = extras.require("pyarrow.parquet", "report", "for parquet files")
    try:
        # `read_table` would add columns for folders that are named like KEY=VALUE.
        with path.open("rb") as source, parquet.ParquetFile(source) as file:
            metadata = file.schema_arrow.metadata or {}
            key = next((key for key in keys if key.encode() in metadata), None)
            if key is None:
                raise ValueError("it is a parquet file of another program")
            yield key, file
    except MemoryError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise ValueError(str(error)) from error
    except Exception as error:  # pyarrow raises exceptions of many classes for damaged files.
        raise ValueError(str(error)) from error
