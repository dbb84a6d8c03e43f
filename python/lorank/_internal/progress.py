"""Progress of long work on a terminal: a bar, or a line if the length of the work is unknown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lorank._internal.printable import printable, shortened

# Characters of an item's name at either end that are shown beside the bar.
_LABEL_ENDS = 60


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool) -> Iterator[Callable[[int, str], None]]:
    """Draw a progress bar, and yield the function that advances it.

    The function takes the finished work, in the unit of `total`, and the name of the finished item. Nothing
    is drawn if `enabled` is False or standard error is not a terminal.
    """
    if not enabled or not _is_shown():
        yield lambda _amount, _label: None
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    from lorank._internal.terminal import Terminal

    shown = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[label]}", style="dim", markup=False),
        console=Terminal(stderr=True),
        transient=True,
    )
    with shown:
        task = shown.add_task(printable(title), total=total, label="")
        yield lambda amount, label: shown.update(
            task, advance=amount, label=printable(shortened(label, _LABEL_ENDS))
        )


@contextmanager
def waiting(title: str, *, enabled: bool) -> Iterator[None]:
    """Show a line during work of unknown length.

    Nothing is drawn if `enabled` is False or standard error is not a terminal.
    """
    if not enabled or not _is_shown():
        yield
        return
    from rich.text import Text

    from lorank._internal.terminal import Terminal

    with Terminal(stderr=True).status(Text(printable(title))):
        yield


def _is_shown() -> bool:
    """Return True if standard error is a terminal; it is None in a process without one."""
    return sys.stderr is not None and sys.stderr.isatty()
