"""Progress of long work on a terminal: a bar, or a line if the length of the work is unknown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool) -> Iterator[Callable[[int, str], None]]:
    """Draw a progress bar, and yield the function that advances it.

    The function takes the finished work, in the unit of `total`, and the name of the finished item. Nothing
    is drawn if `enabled` is False or standard error is not a terminal.
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda _amount, _label: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    shown = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[label]}"),
        console=Console(stderr=True),
        transient=True,
    )
    with shown:
        task = shown.add_task(title, total=total, label="")
        yield lambda amount, label: shown.update(task, advance=amount, label=label)


@contextmanager
def waiting(title: str, *, enabled: bool) -> Iterator[None]:
    """Show a line during work of unknown length.

    Nothing is drawn if `enabled` is False or standard error is not a terminal.
    """
    if not enabled or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
