"""Text in the cells of CSV files, which spreadsheets would calculate if it looked like a formula."""

from __future__ import annotations

import re

from lorank._internal.printable import encodable

# The beginnings of formulas, and the texts that `from_cell` would change.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def to_cell(text: str) -> str:
    """Return a text for a cell: an apostrophe, which spreadsheets hide, stands before a formula.

    Lone surrogates, which UTF-8 cannot express, become escapes.

    Examples
    --------
    >>> to_cell("=1+1"), to_cell("layers.0"), from_cell(to_cell("'=1+1"))
    ("'=1+1", 'layers.0', "'=1+1")
    """
    text = encodable(text)
    return f"'{text}" if _FORMULA.match(text) else text


def from_cell(cell: str) -> str:
    """Return the text of a cell that `to_cell` made."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
