"""The comparison of a model with its base model and adapters, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lorank.baking.verify import TensorCheck, Verification
from lorank.cli.tables.layout import stacked, titled_table

_STYLES = {"holds": "green", "lost": "red", "differs": "red", "unknown": "yellow"}


def summary_table(found: Verification) -> Table:
    """Return the numbers of tensors of each status."""
    table = titled_table("tensors")
    table.add_column("tensors", no_wrap=True)
    for status in _STYLES:
        table.add_column(status, justify="right", no_wrap=True)
    for label, checks, more in (
        ("with an update", found.tensors, 0),
        ("without an update", found.others, found.unchanged),
    ):
        counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
        counts["holds"] += more
        table.add_row(label, *(str(counts[status]) for status in _STYLES))
    return table


def tensor_table(checks: Sequence[TensorCheck]) -> Table:
    """Return a table with a row for each tensor."""
    table = titled_table("comparison")
    table.add_column("tensor", overflow="fold")
    table.add_column("status", no_wrap=True)
    table.add_column(stacked(["error /", "update"]), justify="right", no_wrap=True)
    table.add_column(stacked(["largest", "error, ulp"]), justify="right", no_wrap=True)
    table.add_column(stacked(["share of", "update"]), justify="right", no_wrap=True)
    table.add_column("remark", overflow="fold")
    for check in checks:
        numbers = (check.relative_error, check.largest_error, check.share)
        cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
        table.add_row(check.name, Text(check.status, style=_STYLES[check.status]), *cells, check.reason)
    return table
