"""The group of commands: signals and wrong arguments as exceptions that the process can show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup

from lorank._internal.printable import printable, shortened
from lorank.cli.signals import Interrupted

# Characters of a message that are shown at either end.
_ENDS = 1000


class CommandGroup(TyperGroup):
    """Commands whose errors of arguments are printable, and which end by a signal with `Interrupted`."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Parse the arguments."""
        with _converted():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        """Run the command of a context."""
        with _converted():
            return super().invoke(ctx)


@contextmanager
def _converted() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted.by(error) from error
    except Exception as error:
        # The exceptions of click, which Typer has a copy of or depends on.
        shown: Any = error
        if hasattr(error, "format_message") and isinstance(getattr(error, "message", None), str):
            shown.message = printable(shortened(shown.message, _ENDS))
        raise
