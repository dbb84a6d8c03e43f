"""Rows of a `SpectralReport` as columns or dictionaries of plain values, for files and data frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from lorank._internal.json_fields import LARGEST_SIDE, Fields
from lorank.modules.weight import Kind
from lorank.report.json_values import plain
from lorank.report.optional_metrics import OPTIONAL_COLUMNS, OPTIONAL_COUNTS, columns_of
from lorank.report.rows import COUNTS, METRICS, ModuleSpectrum
from lorank.statistics.spectrum import Accuracy


def columns(rows: Sequence[ModuleSpectrum], metrics: Sequence[str] = ()) -> dict[str, list[Any]]:
    """Return rows as columns, with groups of optional metrics, without eigenvalues.

    Flags are joined by "; ".
    """
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
    table |= {column: [getattr(row, column) for row in rows] for column in columns_of(metrics)}
    table["flags"] = ["; ".join(row.flags) for row in rows]
    return table


def _value(row: ModuleSpectrum, metric: str) -> Any:
    """Return a metric of a row; None for a count in a row without a spectrum."""
    return row.number(metric) if metric in COUNTS else getattr(row, metric)


def to_entries(rows: Sequence[ModuleSpectrum], metrics: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return rows as JSON values, with a list of flags, and with eigenvalues if they were kept."""
    table = columns(rows, metrics)
    entries = [
        dict(zip(table, map(plain, values), strict=True)) for values in zip(*table.values(), strict=True)
    ]
    for row, entry in zip(rows, entries, strict=True):
        entry["flags"] = list(row.flags)
        if row.eigenvalues is not None:
            entry["eigenvalues"] = row.eigenvalues.tolist()
    return entries


def from_entry(entry: Fields) -> ModuleSpectrum:
    """Build a row from an entry, whose flags are a list or a string joined by "; ".

    Optional metrics are read if the entry has them.

    Raises
    ------
    ValueError
        If the entry is malformed.
    """
    shape = entry.integer("out", 1, LARGEST_SIDE), entry.integer("in", 1, LARGEST_SIDE)
    metrics: dict[str, Any] = {
        name: entry.measure(name, _LEAST.get(name, 0)) for name in METRICS if name not in COUNTS
    }
    metrics |= {
        name: _count(entry, name, has_spectrum=not math.isnan(metrics["frobenius_norm"])) for name in COUNTS
    }
    if not math.isnan(metrics["frobenius_norm"]):
        metrics |= {name: _optional(entry, name) for name in OPTIONAL_COLUMNS if name in entry}
    return ModuleSpectrum(
        name=entry.text("name"),
        module=entry.text("module"),
        kind=entry.choice("kind", get_args(Kind)),
        shape=shape,
        dtype=entry.text("dtype"),
        expert=entry.optional_integer("expert"),
        accuracy=entry.choice("accuracy", get_args(Accuracy)),
        flags=_flags(entry),
        eigenvalues=_eigenvalues(entry, min(shape)),
        **metrics,
    )


# Lower bounds of metrics; all others are at least 0.
_LEAST = {"alpha_weighted": -math.inf}


def _count(entry: Fields, name: str, *, has_spectrum: bool) -> int:
    if has_spectrum:
        return entry.integer(name)
    if entry.value(name) not in (None, 0):
        raise entry.error(name, entry.value(name), "null, as frobenius_norm")
    return 0


def _optional(entry: Fields, name: str) -> float | int | None:
    if name in OPTIONAL_COUNTS:
        return entry.optional_integer(name)
    return entry.measure(name)


def _flags(entry: Fields) -> tuple[str, ...]:
    if not isinstance(entry.value("flags"), str):
        return entry.texts("flags")
    flags = entry.text("flags")
    return tuple(flags.split("; ")) if flags else ()


def _eigenvalues(entry: Fields, count: int) -> npt.NDArray[np.float64] | None:
    if "eigenvalues" not in entry or entry.value("eigenvalues") is None:
        return None
    values = entry.numbers("eigenvalues")
    if len(values) != count or np.any(np.diff(values, prepend=0.0) < 0):
        raise entry.error("eigenvalues", values.tolist(), f"{count} numbers from 0 in ascending order")
    return values
