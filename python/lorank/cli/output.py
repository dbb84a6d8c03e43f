"""Output of messages, JSON and tables to the standard streams."""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from typing import Any

from lorank._internal.printable import printable, shortened
from lorank._internal.terminal import Terminal

# Characters, enough for the default columns.
_WIDTH_WITHOUT_TERMINAL = 160
# Characters of a message at either end that are shown.
_MESSAGE_ENDS = 4000


def print_message(message: str) -> None:
    """Print a message of one line to standard error, if there is a standard error that takes it."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(printable(shortened(message, _MESSAGE_ENDS)), file=sys.stderr)  # noqa: T201


def print_json(content: Any) -> None:
    """Print JSON values to standard output."""
    print(json.dumps(content, indent=1, allow_nan=False))  # noqa: T201


def console(width: int = 0) -> Terminal:
    """Return a console on standard output, at least `width` columns wide.

    The width is otherwise that of the terminal, or 160 columns for a pipe or a file.
    """
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    found = Terminal() if is_terminal else Terminal(width=_WIDTH_WITHOUT_TERMINAL)
    return found if found.width >= width else Terminal(width=width)
