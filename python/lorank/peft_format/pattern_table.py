r"""Looks up modules in PEFT's `rank_pattern` and `alpha_pattern`.

PEFT matches the keys as ``(.*\.)?(KEY)$``, one after another. Nearly all keys are names, or alternatives of
names, in which a dot matches any character. Such keys are found by the suffixes of a module's name, in a time
that does not grow with the number of keys.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

from lorank._internal.patterns import Expression, TimeLimit

Value = TypeVar("Value")

# Dots that match any character are stored as a line break, the only character that they do not match.
_ANY = "\n"
_LONGEST_NAME = 10_000
# Most choices of the positions of such dots in names of one length; each is looked up.
_MOST_CHOICES = 64

_GROUP = re.compile(r"(\^?)\((?:\?:)?([^()]*)\)\$?")
# Literal characters, escaped punctuation, and dots, as `re.escape` writes names.
_NAME = re.compile(r"(\^?)((?:[^\\^$*+?{}()\[\]|\n]|\\[^0-9A-Za-z\n])+)(\$?)")
_DOT_OR_ESCAPE = re.compile(r"\\(.)|\.")


class _Name(NamedTuple):
    """A name in a key: its text, with a line break for any character, and True if it allows no prefix."""

    text: str
    is_whole: bool


class PatternTable(Generic[Value]):
    """The values of a pattern. The first key that matches a module's name decides, as in PEFT.

    Parameters
    ----------
    pattern
        The values by key.
    origin
        The file and the setting that hold the pattern.

    Raises
    ------
    ValueError
        If a key is not a regular expression.

    Examples
    --------
    >>> table = PatternTable({"layers.0.q_proj": 4, "q_proj": 8}, "rank_pattern")
    >>> table.get("model.layers.0.q_proj", 16), table.get("model.layers.1.q_proj", 16)
    (4, 8)
    """

    def __init__(self, pattern: Mapping[str, Value], origin: str) -> None:
        self._values = list(pattern.values())
        self._keys = list(pattern)
        self._limit = TimeLimit(origin)
        # Positions of keys that are names, by text; the other keys as expressions, by position.
        self._names: dict[_Name, int] = {}
        self._choices: dict[int, dict[tuple[int, ...], None]] = defaultdict(dict)
        self._expressions: dict[int, Expression] = {}
        for position, key in enumerate(self._keys):
            names = _names_in(key)
            if names and all(map(self._has_room, names)):
                for name in names:
                    self._names.setdefault(name, position)
            else:
                self._expressions[position] = self._expression(position)

    def get(self, name: str, default: Value) -> Value:
        """Return the value of the first key that matches a module's name, or the default."""
        if _ANY in name:  # `$` also matches before a line break at the end.
            matching = (i for i in range(len(self._keys)) if self._expression(i).spans("match", name))
            found = next(matching, len(self._keys))
        else:
            found = self._first_name(name)
            for position, expression in self._expressions.items():
                if position > found:
                    break
                if expression.spans("match", name):
                    found = position
                    break
        return self._values[found] if found < len(self._keys) else default

    def _has_room(self, name: _Name) -> bool:
        """Record the positions of any characters in a name; return False if its length has too many."""
        choices, positions = self._choices[len(name.text)], _positions(name.text)
        if positions not in choices and len(choices) == _MOST_CHOICES:
            return False
        choices[positions] = None
        return True

    def _first_name(self, name: str) -> int:
        """Return the position of the first key that is a suffix of a name; the number of keys if none is."""
        found, start = len(self._keys), 0
        while True:
            if choices := self._choices.get(len(name) - start):
                suffix = name[start:]
                for positions in choices:
                    text = _blanked(suffix, positions)
                    found = min(found, self._names.get(_Name(text, False), found))
                    if start == 0:
                        found = min(found, self._names.get(_Name(text, True), found))
            start = name.find(".", start) + 1
            if start == 0:
                return found

    def _expression(self, position: int) -> Expression:
        return Expression(rf"(.*\.)?({self._keys[position]})$", self._limit)


def _names_in(key: str) -> list[_Name]:
    """Return the names that a key consists of; empty if it is another expression."""
    group = _GROUP.fullmatch(key)
    start, alternatives = group.groups() if group else ("", key)
    names = []
    for alternative in alternatives.split("|"):
        name = _NAME.fullmatch(alternative) if len(alternative) <= _LONGEST_NAME else None
        if name is None:
            return []
        text = _DOT_OR_ESCAPE.sub(lambda found: found[1] or _ANY, name[2])
        names.append(_Name(text, bool(start or name[1])))
    return names


def _positions(text: str) -> tuple[int, ...]:
    return tuple(i for i, character in enumerate(text) if character == _ANY)


def _blanked(text: str, positions: tuple[int, ...]) -> str:
    """Return a text with a line break at each position."""
    pieces, end = [], 0
    for position in positions:
        pieces += [text[end:position], _ANY]
        end = position + 1
    return "".join([*pieces, text[end:]])
