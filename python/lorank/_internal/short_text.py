"""Short texts about long results."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Iterable
from itertools import islice
from typing import Any

_LINES = 3
_LENGTH = 80

# Unlike `repr`, it ends for values that are nested deeply.
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 3
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = _LENGTH


def counted(number: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun.

    Parameters
    ----------
    number
        The number of things.
    singular
        The noun for one thing.
    plural
        The noun for any other number; by default the singular and an "s".

    Examples
    --------
    >>> counted(1, "matrix", "matrices"), counted(1200, "tensor")
    ('1 matrix', '1,200 tensors')
    """
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"


def spanned(values: Collection[int], noun: str) -> str:
    """Return the least and the largest of values with their noun, or the value if all are equal.

    Examples
    --------
    >>> spanned([8, 8], "rank"), spanned([1, 19, 4], "rank")
    ('rank 8', 'ranks 1 to 19')
    """
    least, most = min(values, default=0), max(values, default=0)
    return f"{noun} {least}" if least == most else f"{noun}s {least} to {most}"


def shown(value: Any) -> str:
    """Return a value of unknown origin as text of at most 80 characters.

    Examples
    --------
    >>> shown("1"), shown([[[[[1]]]]])
    ("'1'", '[[[[...]]]]')
    """
    text = _SHORT.repr(value)
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 3]}..."


def listing(title: str, lines: Iterable[str], total: int, rest: str) -> str:
    """Return a title with the first lines of a long list, for a `repr`.

    Parameters
    ----------
    title
        The first line.
    lines
        One line for each entry of the list.
    total
        Number of entries.
    rest
        Expressions that return all entries.
    """
    first = [f"  {line}" for line in islice(lines, _LINES)]
    if total > _LINES:
        first.append(f"  ... {total - _LINES:,} more: see {rest}")
    return "\n".join([title, *first])
