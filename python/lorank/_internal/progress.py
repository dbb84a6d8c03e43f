"""Signs of long work, on the terminal only: a progress bar, or a line where the end is not known."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(title: str, total: int, *, enabled: bool) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that takes finished work, in units of `total`, and a word on what it was.

    Nothing is drawn when disabled or when standard error is no terminal.
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
    """Show a line while work goes on whose length is not known.

    Nothing is drawn when disabled or when standard error is not a terminal.
    """
    if not enabled or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(title):
        yield
