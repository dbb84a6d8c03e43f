"""Verdicts of runtimes as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from lorank.cli.tables.layout import titled_table
from lorank.runtimes import Verdict

_STYLES = {"right": "green", "wrong": "red", "refuses": "yellow"}


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """Return a table with the verdict of each runtime on an adapter."""
    table = titled_table("runtimes")
    table.add_column("runtime", no_wrap=True)
    table.add_column("version", no_wrap=True)
    table.add_column("loads", no_wrap=True)
    table.add_column("scale / right", justify="right", no_wrap=True)
    table.add_column("remark", overflow="fold")
    for verdict in verdicts:
        low, high = verdict.factors or (float("nan"),) * 2
        factor = (
            "-" if verdict.factors is None else f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
        )
        table.add_row(
            verdict.runtime,
            verdict.version,
            Text(verdict.status, style=_STYLES[verdict.status]),
            factor,
            verdict.reason,
        )
    return table
