"""Rows of a report as HTML tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from lorank._internal.printable import printable, printable_name, shortened
from lorank.report.rows import Row

# Largest number of rows of a table in a notebook, and of characters of a text at either end.
_ROWS = 10
_ENDS = 2000


def html_text(text: str) -> str:
    """Return the HTML that shows a text, without elements; labels of plotly are HTML too."""
    return html.escape(printable(shortened(text, _ENDS)))


def html_name(name: str) -> str:
    """Return `html_text` of a name, so that different names differ."""
    return html.escape(printable_name(name))


def html_table(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Return the HTML of a table: name, shape, the numbers of the columns, flags."""
    head = "".join(f"<th>{html_text(name)}</th>" for name in ("module", "shape", *columns, "note"))
    body = []
    for row in rows:
        shape, flags = f"{row.shape[0]}x{row.shape[1]}", "; ".join(row.flags)
        cells = [html_name(row.name), *map(html_text, (shape, *map(row.text, columns), flags))]
        flagged = ' class="flagged"' if row.flags else ""
        body.append(f"<tr{flagged}>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(body)}</table>"


def notebook_table(title: str, rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the HTML of a title and a table of the first rows."""
    rest = f"<p>... {len(rows) - _ROWS:,} more</p>" if len(rows) > _ROWS else ""
    return f"<p>{html_text(title)}</p>{html_table(rows[:_ROWS], columns)}{rest}"
