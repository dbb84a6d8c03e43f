"""Reports as tables for a terminal."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from rich.table import Table

from lorank._internal.printable import printable_name
from lorank._internal.short_text import counted
from lorank.cli.tables.layout import stacked, titled_table
from lorank.modules import naming
from lorank.report.base import Report
from lorank.report.comparison import ComparisonReport
from lorank.report.gradients import GradientReport
from lorank.report.rows import Row
from lorank.report.tasks import TaskReport

# Widths in characters: a column of numbers, and the names and shapes together.
_COLUMN_WIDTH = 12
_NAME_WIDTH = 44

# Reasons that name a packed weight; without the name, tensors with equal reasons can be counted.
_OF_PACKED = re.compile(r"^(scale|part) of the packed weight \S+")


def fitting(columns: Sequence[str], width: int) -> Sequence[str]:
    """Return the first columns that fit a terminal of this width, but at least two."""
    return columns[: max(2, (width - _NAME_WIDTH) // _COLUMN_WIDTH)]


def hidden_columns(columns: Sequence[str]) -> str:
    """Return a line with the columns that do not fit the terminal, and the ways to show them."""
    return f"not shown: {', '.join(columns)}; use a wider terminal or --columns all"


def width_of(columns: Sequence[str]) -> int:
    """Return the width that a table of these columns needs, in characters."""
    return _NAME_WIDTH + _COLUMN_WIDTH * len(columns)


def ordered(rows: Sequence[Any], sort: str | None, descending: bool, top: int | None) -> list[Any]:
    """Sort and cut the rows of a report; rows with an undefined number come last.

    Parameters
    ----------
    rows
        The rows.
    sort
        Column to sort by, or ``"name"``; None for the given order.
    descending
        True to reverse the order.
    top
        Number of rows to return; None for all.
    """
    found = list(rows)
    if sort == "name":
        found.sort(key=lambda row: naming.natural_key(row.name), reverse=descending)
    elif sort is not None:
        known: list[Any] = []
        unknown: list[Any] = []
        for row in found:
            value = getattr(row, sort)
            (unknown if value is None or math.isnan(value) else known).append(row)
        found = sorted(known, key=attrgetter(sort), reverse=descending) + unknown
    elif descending:
        found.reverse()
    return found if top is None else found[:top]


def report_table(report: Report[Any], rows: Sequence[Row], columns: Sequence[str]) -> Table:
    """Return a table of rows of a report: name, shape, the numbers of the columns, flags."""
    some = "" if len(rows) == len(report) else f", {len(rows)} shown"
    title = f"{report.source}: {counted(len(report), *report.noun)}{some}{_extent(report)}"
    table = titled_table(title)
    table.add_column("module", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(stacked(column.split("_")), justify="right", no_wrap=True)
    has_notes = any(row.flags for row in rows)
    if has_notes:
        table.add_column("note", overflow="fold")
    for row in rows:
        cells = [printable_name(row.name), f"{row.shape[0]}x{row.shape[1]}", *map(row.text, columns)]
        cells += ["; ".join(row.flags)] if has_notes else []
        table.add_row(*cells, style="yellow" if row.flags else "")
    return table


def _extent(report: Report[Any]) -> str:
    """Return the amount of data that a profile measured, or the model of a comparison; empty for spectra."""
    if isinstance(report, ComparisonReport):
        return f", compared with {report.compared_with}, subspaces of rank {report.rank}"
    if isinstance(report, TaskReport):
        return f", {counted(report.num_samples, 'sample')}"
    if isinstance(report, GradientReport):
        batches = counted(report.num_batches, "batch", "batches")
        return f", {batches}, ranks for {100 * report.energy:g} % of the energy"
    return ""


def skipped_table(report: Report[Any]) -> Table:
    """Return a table of the skipped tensors with the reasons."""
    title = f"{counted(len(report.skipped), 'tensor')} skipped"
    table = titled_table(title)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("reason", overflow="fold")
    for entry in report.skipped:
        table.add_row(printable_name(entry.name), "x".join(map(str, entry.shape)), entry.reason)
    return table


def skipped_summary(report: Report[Any]) -> str:
    """Return a line with the number of skipped tensors by reason; empty if there are none."""
    if not report.skipped:
        return ""
    reasons = Counter(
        "tied" if entry.is_tied else _OF_PACKED.sub(r"\1 of a packed weight", entry.reason)
        for entry in report.skipped
    )
    listed = [
        reason if len(reasons) == 1 else f"{count:,} x {reason}" for reason, count in reasons.most_common()
    ]
    return f"{counted(len(report.skipped), 'tensor')} skipped: {', '.join(listed)}"
