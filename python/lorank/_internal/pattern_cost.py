"""A bound on the steps of Python's `re`, which backtracks: from a pattern's syntax tree and a length."""

from __future__ import annotations

import importlib
import math
import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple


class _Bound(NamedTuple):
    """Bounds for one start in a text.

    Attributes
    ----------
    ways
        Number of ways in which a part of a pattern matches.
    steps
        Number of steps in which all of these ways are found.
    """

    ways: float
    steps: float


_ONE = _Bound(1, 1)
_UNKNOWN = _Bound(math.inf, math.inf)


def syntax_tree(text: str) -> Any:
    """Return the syntax tree that `re` makes of a pattern; None if this version of Python shows none.

    Raises
    ------
    re.error, OverflowError, RecursionError
        If the pattern is malformed.
    """
    try:
        # The parser has no public name; without it, no pattern counts as fast.
        parser = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
        parse = parser.parse
    except (ImportError, AttributeError):
        return None
    return parse(text)


def most_steps(tree: Any, length: int) -> float:
    """Return a bound on the steps of one match at the start of a text; infinity if none is known.

    Parameters
    ----------
    tree
        The syntax tree of the pattern.
    length
        The length of the text.
    """
    try:
        return _sequence(tree, length).steps
    except (AttributeError, TypeError, ValueError, RecursionError):
        return math.inf  # A syntax tree of another version of Python.


def _sequence(parts: Iterable[Any], length: int) -> _Bound:
    """Return the bound of parts in a row: every way of a part is followed by a search of the rest."""
    ways, steps = 1.0, 1.0
    for operation, argument in parts:
        part = _part(str(operation), argument, length)
        steps += ways * part.steps
        ways *= part.ways
    return _Bound(ways, steps)


def _part(operation: str, argument: Any, length: int) -> _Bound:
    if operation in ("LITERAL", "NOT_LITERAL", "ANY", "AT"):
        return _ONE
    if operation == "IN":
        return _Bound(1, len(argument))
    if operation == "SUBPATTERN":
        return _longer(_sequence(argument[-1], length))
    if operation == "BRANCH":
        branches = [_sequence(branch, length) for branch in argument[1]]
        ways = float(_ways_of_words(argument[1])) or sum(b.ways for b in branches)
        return _longer(_Bound(ways, sum(b.steps for b in branches)))
    if operation in ("MAX_REPEAT", "MIN_REPEAT"):
        least, most, body = argument
        return _repeated(least, most, body, length)
    if operation in ("ASSERT", "ASSERT_NOT"):
        return _Bound(1, _longer(_sequence(argument[1], length)).steps)
    if operation == "GROUPREF":
        return _Bound(1, length + 1)
    return _UNKNOWN


def _ways_of_words(branches: Iterable[Any]) -> int:
    """Return the largest number of alternatives that match at one place; 0 if some are not literal text."""
    words = []
    for branch in branches:
        if any(str(operation) != "LITERAL" for operation, _ in branch):
            return 0
        words.append("".join(chr(code) for _, code in branch))
    count = Counter(words)
    # Alternatives that match at one place are the same, or start with each other.
    return max(sum(count[word[:end]] for end in range(len(word) + 1)) for word in words)


def _longer(bound: _Bound) -> _Bound:
    return _Bound(bound.ways, bound.steps + 2)


def _repeated(least: int, most: int, body: Any, length: int) -> _Bound:
    """Return the bound of a repetition: a way for every sequence of ways of its body."""
    shortest = body.getwidth()[0]
    if shortest == 0 and most > 1:
        return _UNKNOWN
    count = min(int(most), length // max(shortest, 1) + 1)
    once = _longer(_sequence(body, length))
    if once.ways <= 1:
        return _Bound(max(count - int(least), 0) + 1, (count + 1) * once.steps)
    try:
        before_last = (once.ways**count - 1) / (once.ways - 1)
        return _Bound(before_last + once.ways**count, (before_last + 1) * once.steps)
    except OverflowError:
        return _UNKNOWN
