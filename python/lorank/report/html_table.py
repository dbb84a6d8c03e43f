"""Rows of a report as HTML tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from lorank.report.rows import Row

# Largest number of rows of a table in a notebook.
_ROWS = 10


def html_table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Return the HTML of a table: name, shape, the numbers of the columns, flags."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("module", "shape", *columns, "note"))
    body = []
    for row in rows:
        cells = [row.name, f"{row.shape[0]}x{row.shape[1]}", *map(row.text, columns), "; ".join(row.flags)]
        flagged = ' class="flagged"' if row.flags else ""
        body.append(f"<tr{flagged}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def notebook_table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the HTML of a title and a table of the first rows."""
    rest = f"<p>... {len(rows) - _ROWS:,} more</p>" if len(rows) > _ROWS else ""
    return f"<p>{html.escape(title)}</p>{html_table(rows[:_ROWS], columns)}{rest}"
