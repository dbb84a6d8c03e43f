"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from lorank.report import METRICS

Include = Annotated[
    list[str] | None,
    typer.Option(
        "--include",
        "-i",
        help="Select these modules: names or suffixes, or re:REGEX. Repeatable, or separated by commas.",
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", "-x", help="Leave out these modules, written as for --include."),
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Largest number of threads (default: all processors).")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
Guess = Annotated[
    bool,
    typer.Option("--guess", help="Continue if names and shapes leave doubts about the kinds of modules."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Hide the progress bar.")]

Sort = Annotated[str | None, typer.Option(help="Sort rows by name or by a metric.")]
Descending = Annotated[bool, typer.Option("--descending", "-d", help="Sort in descending order.")]
Top = Annotated[int | None, typer.Option(min=1, help="Show only this many rows.")]
Columns = Annotated[
    str | None,
    typer.Option(
        help=f"Columns of the table, separated by commas, or 'all': {', '.join(METRICS)}.", show_default=False
    ),
]
ShowSkipped = Annotated[bool, typer.Option("--skipped", help="List the skipped tensors with the reasons.")]
