"""Reports of gradients and tasks as tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from lorank.modules import naming
from lorank.report.gradients import GradientReport
from lorank.report.tasks import TaskReport

Profile: TypeAlias = GradientReport | TaskReport


def ordered(rows: Sequence[Any], sort: str | None, descending: bool, top: int | None) -> list[Any]:
    """Rows of any report by name or by a number of theirs; undefined numbers come last either way."""
    found = list(rows)
    if sort == "name":
        found.sort(key=lambda row: naming.natural_key(row.name), reverse=descending)
    elif sort is not None:
        known = [row for row in found if not math.isnan(getattr(row, sort))]
        unknown = [row for row in found if math.isnan(getattr(row, sort))]
        found = sorted(known, key=attrgetter(sort), reverse=descending) + unknown
    elif descending:
        found.reverse()
    return found if top is None else found[:top]


def profile_table(report: Profile, rows: Sequence[Any], columns: Sequence[str]) -> Table:
    """Rows of a report: name, shape, numbers, flags."""
    some = "" if len(rows) == len(report) else f", {len(rows)} shown"
    table = Table(
        title=Text(f"{report.source}: {len(report)} modules{some}, {_extent(report)}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("module", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    flagged = any(row.flags for row in rows)
    if flagged:
        table.add_column("note", overflow="fold")
    for row in rows:
        cells = [row.name, f"{row.shape[0]}x{row.shape[1]}"]
        cells += [_cell(getattr(row, column)) for column in columns]
        cells += ["; ".join(row.flags)] if flagged else []
        table.add_row(*cells, style="yellow" if row.flags else "")
    return table


def _extent(report: Profile) -> str:
    """What the numbers were taken from."""
    if isinstance(report, TaskReport):
        return f"{report.num_samples:,} samples"
    return f"{report.num_batches:,} batches, ranks for {100 * report.energy:g} % of the energy"


def _cell(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.4g}"
