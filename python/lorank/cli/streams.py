"""The standard streams of a process: they exist, take every character, and are named in errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from lorank.cli.output import print_message

# Exit status of a process whose reader has closed the pipe: 128 and the number of SIGPIPE.
_BROKEN_PIPE = 141


class _Stream:
    """A standard stream that keeps its first error.

    Parameters
    ----------
    stream
        The stream.
    name
        Name of the stream in its errors; None if the text may be lost and errors are not raised.
    """

    def __init__(self, stream: TextIO, name: str | None) -> None:
        self._stream = stream
        self._name = name
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named_errors():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._named_errors():
            self._stream.flush()

    def close_after_error(self) -> None:
        """Send the text that is left to nowhere, so that the end of Python does not fail on it."""
        if self.error is not None:
            with suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = self.error or error
            if self._name is not None:
                raise OSError(error.errno, error.strerror, self._name) from error


@contextmanager
def standard_streams() -> Iterator[None]:
    """Run a block whose output reaches standard output, or which ends with the status of an error.

    Standard error may lose messages; the block continues.

    Raises
    ------
    SystemExit
        If standard output does not take the text of the block: with status 141 if it is a pipe whose reader
        has ended, and with status 1 and a message otherwise.
    """
    _open_closed()
    found = sys.stdout, sys.stderr
    for stream in found:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    output, messages = _Stream(found[0], "standard output"), _Stream(found[1], None)
    sys.stdout, sys.stderr = cast("TextIO", output), cast("TextIO", messages)
    try:
        yield
    finally:
        is_reported = output.error is not None
        with suppress(OSError):
            output.flush()
        if output.error is not None and not isinstance(output.error, BrokenPipeError) and not is_reported:
            print_message(f"lorank: standard output: {_reason(output.error)}")
        messages.flush()
        for kept in (output, messages):
            kept.close_after_error()
        sys.stdout, sys.stderr = found
        if output.error is not None:
            sys.exit(_BROKEN_PIPE if isinstance(output.error, BrokenPipeError) else 1)


def _reason(error: OSError) -> str:
    reason = error.strerror or "cannot be written"
    return f"{reason[0].lower()}{reason[1:]}"


def _open_closed() -> None:
    """Open the standard streams that are closed.

    Otherwise the next files to be opened would get their numbers, and text would be written into them.
    """
    if sys.stdout is not None and sys.stderr is not None and sys.stdin is not None:
        return
    number = 0
    while number <= 2:
        number = os.open(os.devnull, os.O_RDWR)
    os.close(number)
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w", encoding="utf-8"))
