"""Regular expressions of unknown origin, matched by Python's `re` within a time limit.

PEFT reads its settings by `re`, so the results must be those of `re`, whose time may grow exponentially with
the length of a name. A match that takes few steps by its pattern's syntax runs in this process.
Any other match runs in a child process that ends itself.
"""

from __future__ import annotations

import re
from threading import Lock
from time import perf_counter
from typing import Any, Literal

from lorank._core import FormatError
from lorank._internal.pattern_cost import most_steps, syntax_tree
from lorank._internal.pattern_process import PatternProcess, Span, StoppedError

Method = Literal["match", "fullmatch", "search"]

_SECONDS = 5.0
_SECONDS_IN_ALL = 10.0
_FEW_STEPS = 300_000  # some 5 ms
_LONGEST = 4_000_000
# Compilation takes 30 ms for a set of characters without regard to case, and little for anything else.
_LONGEST_HERE, _LONGEST_WITH_SETS = 100_000, 1_000


class TimeLimit:
    """The time that several expressions may take together: 10 s, and 5 s for one match.

    Parameters
    ----------
    origin
        The file and the setting, or the option, that holds the expressions.
    """

    def __init__(self, origin: str) -> None:
        self._origin = origin
        self._left = _SECONDS_IN_ALL
        self._process = PatternProcess()
        self._lock = Lock()

    def spend(self, seconds: float, pattern: str) -> None:
        """Subtract time that a pattern took.

        Raises
        ------
        FormatError
            If no time is left.
        """
        self._left -= seconds
        if self._left <= 0:
            raise self._exceeded(pattern)

    def ask(self, method: Method | Literal[""], pattern: str, text: str) -> list[Span] | None:
        """Match a pattern in a child process; see `PatternProcess.ask`.

        Raises
        ------
        FormatError
            If no time is left.
        ValueError
            If the pattern is malformed.
        """
        with self._lock:
            self.spend(0, pattern)
            try:
                answer = self._process.ask(min(_SECONDS, self._left), method, pattern, text)
            except StoppedError:
                self._left = 0.0
                raise self._exceeded(pattern) from None
            self.spend(answer.seconds, pattern)
            return answer.spans

    def _exceeded(self, pattern: str) -> FormatError:
        return FormatError(
            f"{self._origin}: the regular expression {shortened(pattern)} takes more than {_SECONDS:.0f} s "
            "to match names of modules: give names instead, or an expression without nested repetitions"
        )


class Expression:
    """A regular expression of unknown origin; its results are those of Python's `re`.

    Parameters
    ----------
    text
        The expression.
    limit
        The time limit, which other expressions of the same origin may share.

    Raises
    ------
    ValueError
        If the expression is malformed, or too large or too deep for Python; the message does not give the
        origin.
    FormatError
        On compilation or on any match, if the time limit is exceeded.
    """

    def __init__(self, text: str, limit: TimeLimit) -> None:
        self.text = text
        self._limit = limit
        self._is_fast: dict[int, bool] = {}
        self._tree: Any = None
        self._pattern: re.Pattern[str] | None = None
        start = perf_counter()
        try:
            if len(text) > _LONGEST:
                raise ValueError(f"it has more than {_LONGEST:,} characters")
            if len(text) <= (_LONGEST_WITH_SETS if "[" in text else _LONGEST_HERE):
                self._pattern = re.compile(text)
                self._tree = syntax_tree(text)
            else:
                limit.ask("", text, "")
        except (re.error, OverflowError, RecursionError, ValueError) as error:
            raise ValueError(f"{shortened(text)} is not a regular expression: {error}") from None
        if self._pattern is not None:
            limit.spend(perf_counter() - start, text)

    def matches(self, name: str) -> bool:
        """Return True if the expression matches a whole name."""
        return self.spans("fullmatch", name) is not None

    def spans(self, method: Method, name: str) -> list[Span] | None:
        """Return the spans of a match and of its groups; None if there is no match."""
        if self._pattern is None or not self._takes_few_steps(method, len(name)):
            return self._limit.ask(method, self.text, name)
        start = perf_counter()
        found = getattr(self._pattern, method)(name)
        self._limit.spend(perf_counter() - start, self.text)
        return None if found is None else [found.span(i) for i in range(self._pattern.groups + 1)]

    def _takes_few_steps(self, method: Method, length: int) -> bool:
        """Return True if a match in a text of this length takes few steps."""
        # A search tries every start. The bound of the next power of two serves all shorter texts.
        size = max(1 << length.bit_length(), 64)
        key = -size if method == "search" else size
        if key not in self._is_fast:
            steps = most_steps(self._tree, size) if self._tree is not None else _FEW_STEPS + 1
            self._is_fast[key] = steps * (size if method == "search" else 1) <= _FEW_STEPS
        return self._is_fast[key]


def shortened(text: str) -> str:
    """Return the start of an expression in quotation marks, for a message."""
    return repr(text if len(text) <= 80 else f"{text[:77]}...")
