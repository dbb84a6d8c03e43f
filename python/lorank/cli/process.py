"""The conventions of a process: its streams, the signals that end it, and the text of tracebacks."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from lorank._internal.terminal import NARROWEST
from lorank.cli.output import print_message
from lorank.cli.signals import Interrupted, ending_signals_raise
from lorank.cli.streams import standard_streams


def conventional(command: Callable[[], None]) -> Callable[[], None]:
    """Return a command that ends by SystemExit for every signal, error and failure of its output.

    A signal prints one line, with the status 128 and its number. An exception prints its traceback, with
    status 1.
    """

    @wraps(command)
    def run() -> None:
        with _usable_width(), standard_streams():
            try:
                with ending_signals_raise():
                    command()
            except Interrupted as stop:
                _stop(stop)
            except KeyboardInterrupt as error:
                _stop(Interrupted.by(error))
            except Exception:  # noqa: BLE001  # A traceback may hold foreign text, which Python would not escape.
                for line in traceback.format_exc().splitlines():
                    print_message(line)
                sys.exit(1)

    return run


@contextmanager
def _usable_width() -> Iterator[None]:
    """Ignore the variable COLUMNS in the block if it is too small for any text, such as 0."""
    given = os.environ.get("COLUMNS", "")
    if not given.isdigit() or int(given) >= NARROWEST:
        yield
        return
    del os.environ["COLUMNS"]
    try:
        yield
    finally:
        os.environ["COLUMNS"] = given


def _stop(stop: Interrupted) -> None:
    print_message(f"lorank: {stop}")
    sys.exit(stop.status)
