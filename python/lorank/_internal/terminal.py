"""A terminal on which strings are shown as they are."""

from __future__ import annotations

from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from lorank._internal.printable import printable, shortened

# Terminals outside these widths, in characters, wrap or leave space beside the lines of tables.
NARROWEST, _WIDEST = 40, 1000
# Characters of a text that are shown at either end.
_ENDS = 5000


class Terminal(Console):
    """A console of rich without markup, emoji codes and highlighting.

    A `str`, also as a cell or title of a table, is text of any origin: it is shown on one line, in a
    printable form, with escapes for characters that the encoding lacks. A `Text` is trusted.

    Parameters
    ----------
    stderr
        True for standard error, False for standard output.
    width
        Width in characters, from 40 to 1,000; None for that of the terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)
        if not NARROWEST <= self.width <= _WIDEST:
            self.width = min(max(self.width, NARROWEST), _WIDEST)

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a string as a `Text`, whatever markup it holds."""
        kept = {name: options[name] for name in ("style", "justify", "overflow") if name in options}
        return Text(self._encodable(printable(shortened(text, _ENDS))), **kept)

    def _encodable(self, text: str) -> str:
        encoding = self.encoding
        if text.isascii() or encoding.startswith("utf"):
            return text
        return text.encode(encoding, "backslashreplace").decode(encoding)

    def on_broken_pipe(self) -> NoReturn:
        """Raise the BrokenPipeError, instead of an exit with status 1."""
        raise  # Rich calls this method while it handles the error.
