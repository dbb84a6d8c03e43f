"""The layout of all tables: the box, the title, and headings of several lines."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table
from rich.text import Text

from lorank._internal.printable import printable


def titled_table(title: str, *, show_header: bool = True) -> Table:
    """Return an empty table with a title, whose strings are foreign text for a `Terminal`."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=show_header)


def stacked(parts: Iterable[str]) -> Text:
    """Return a heading with each part on a line of its own."""
    return Text("\n").join(Text(printable(part)) for part in parts)
