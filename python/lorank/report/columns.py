"""Rows of a `SpectralReport` as columns or dictionaries of plain values, for files and data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lorank.report.json_values import number, plain
from lorank.report.rows import COUNTS, METRICS, ModuleSpectrum


def columns(rows: Sequence[ModuleSpectrum]) -> dict[str, list[Any]]:
    """Return rows as columns, without eigenvalues; flags are joined by "; "."""
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
    """Return a metric of a row; None for a count in a row without a spectrum."""
    return row.number(metric) if metric in COUNTS else getattr(row, metric)


def to_entries(rows: Sequence[ModuleSpectrum]) -> list[dict[str, Any]]:
    """Return rows as JSON values, with a list of flags, and with eigenvalues if they were kept."""
    table = columns(rows)
    entries = [
        dict(zip(table, map(plain, values), strict=True)) for values in zip(*table.values(), strict=True)
    ]
    for row, entry in zip(rows, entries, strict=True):
        entry["flags"] = list(row.flags)
        if row.eigenvalues is not None:
            entry["eigenvalues"] = row.eigenvalues.tolist()
    return entries


def from_entry(entry: Mapping[str, Any]) -> ModuleSpectrum:
    """Build a row from an entry, whose flags are a list or a string joined by "; ".

    Raises
    ------
    KeyError, TypeError, ValueError
        If the entry is malformed.
    """
    metrics: dict[str, Any] = {
        name: int(entry[name] or 0) if name in COUNTS else number(entry[name]) for name in METRICS
    }
    eigenvalues, expert, flags = entry.get("eigenvalues"), entry["expert"], entry["flags"]
    if isinstance(flags, str):
        flags = flags.split("; ") if flags else ()
    return ModuleSpectrum(
        name=entry["name"],
        module=entry["module"],
        kind=entry["kind"],
        shape=(int(entry["out"]), int(entry["in"])),
        dtype=entry["dtype"],
        expert=None if expert in (None, "") else int(expert),
        accuracy=entry["accuracy"],
        flags=tuple(flags),
        eigenvalues=None if eigenvalues is None else np.asarray(eigenvalues, dtype=np.float64),
        **metrics,
    )
