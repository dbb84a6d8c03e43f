"""A process that matches regular expressions, and ends itself if a match takes too long.

Python's `re` holds the interpreter while it matches, so that no thread can stop it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from contextlib import suppress
from typing import Any, NamedTuple

Span = tuple[int, int]

# The system ends the process by the signal of the timer, even while `re` holds the interpreter.
_CHILD = """
import json, re, resource, signal, sys, time
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
try:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.getrlimit(resource.RLIMIT_AS)[1]))
except (OSError, ValueError):
    pass
for line in sys.stdin:
    seconds, method, pattern, text = json.loads(line)
    answer = {}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    start = time.perf_counter()
    try:
        compiled = re.compile(pattern)
        found = getattr(compiled, method)(text) if method else None
        answer["spans"] = found and [found.span(i) for i in range(compiled.groups + 1)]
    except (re.error, OverflowError, RecursionError) as error:
        answer["error"] = str(error)
    signal.setitimer(signal.ITIMER_REAL, 0)
    answer["seconds"] = time.perf_counter() - start
    print(json.dumps(answer), flush=True)
"""


class StoppedError(Exception):
    """The process ended before it answered: a match took too long, or too much memory."""


class Answer(NamedTuple):
    """The result of a match.

    Attributes
    ----------
    spans
        The spans of the match and of its groups; None if there is no match.
    seconds
        The time of the match, without that of the communication.
    """

    spans: list[Span] | None
    seconds: float


class PatternProcess:
    """A child process that runs Python's `re`; it starts on the first question."""

    def __init__(self) -> None:
        self._owner = 0
        self._child: subprocess.Popen[str] | None = None

    def ask(self, seconds: float, method: str, pattern: str, text: str) -> Answer:
        """Match a pattern.

        Parameters
        ----------
        seconds
            The time after which the process ends.
        method
            The name of a method of a compiled pattern; empty to compile the pattern only.
        pattern, text
            The pattern and the text.

        Raises
        ------
        ValueError
            If the pattern is malformed.
        StoppedError
            If the process ended.
        """
        answer = self._answer(json.dumps([seconds, method, pattern, text]))
        if "error" in answer:
            raise ValueError(answer["error"])
        spans = answer["spans"] and [(start, end) for start, end in answer["spans"]]
        return Answer(spans, answer["seconds"])

    def _answer(self, question: str) -> dict[str, Any]:
        child = self._running()
        assert child.stdin is not None
        assert child.stdout is not None
        line = ""
        try:
            child.stdin.write(f"{question}\n")
            child.stdin.flush()
            line = child.stdout.readline()
        except BrokenPipeError:
            pass  # The process ended.
        finally:
            # An interrupted question must not be answered to the next one.
            if not line.endswith("\n"):
                self._child = None
                _end(child)
        if not line.endswith("\n"):
            raise StoppedError
        content: dict[str, Any] = json.loads(line)
        return content

    def _running(self) -> subprocess.Popen[str]:
        """Return the child of this process; a fork does not share that of its parent."""
        if self._child is None or self._owner != os.getpid():
            if not sys.executable or getattr(sys, "frozen", False):
                raise OSError("a slow regular expression needs a Python interpreter in a process of its own")
            self._owner = os.getpid()
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            weakref.finalize(self, _end, self._child)
        return self._child


def _end(child: subprocess.Popen[str]) -> None:
    """End a child process and close its pipes."""
    child.kill()
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            # The process may not have read the last question.
            with suppress(OSError):
                pipe.close()
    child.wait()
