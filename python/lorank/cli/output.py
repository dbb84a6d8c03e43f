"""Output of messages, JSON and tables to the standard streams."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.console import Console

# Characters, enough for the default columns.
_WIDTH_WITHOUT_TERMINAL = 160


def print_message(message: str) -> None:
    """Print a message to standard error."""
    print(message, file=sys.stderr)  # noqa: T201


def print_json(content: Any) -> None:
    """Print JSON values to standard output."""
    print(json.dumps(content, indent=1, allow_nan=False))  # noqa: T201


def console(width: int = 0) -> Console:
    """Return a console on standard output, at least `width` columns wide.

    The width is otherwise that of the terminal, or 160 columns for a pipe or a file.
    """
    found = Console() if sys.stdout.isatty() else Console(width=_WIDTH_WITHOUT_TERMINAL)
    return found if found.width >= width else Console(width=width)
