"""The command `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import lorank
from lorank.analysis.comparison import DEFAULT_RANK, LARGEST_RANK
from lorank.cli.checks import check_choice, check_output_file, parse_targets
from lorank.cli.errors import IncompleteError, UsageError
from lorank.cli.options import (
    Descending,
    Exclude,
    Include,
    Json,
    Overwrite,
    Quiet,
    ShowSkipped,
    Sort,
    Threads,
    Top,
)
from lorank.cli.output import print_message
from lorank.cli.report_view import ReportView, is_report
from lorank.report.comparison import COMPARED, ComparisonReport
from lorank.statistics.spectrum import Accuracy


def compare(
    a: Annotated[str, typer.Argument(help="The first model: a file, a folder or a hub id.")],
    b: Annotated[str, typer.Argument(help="The second model, of the same architecture.")],
    include: Include = None,
    exclude: Exclude = None,
    rank: Annotated[
        int,
        typer.Option("--rank", "-k", min=1, max=LARGEST_RANK, help="Dimension of the compared subspaces."),
    ] = DEFAULT_RANK,
    sort: Sort = None,
    descending: Descending = False,
    top: Top = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help=f"Columns of the table, separated by commas, or 'all': {', '.join(COMPARED)}.",
            show_default=False,
        ),
    ] = None,
    skipped: ShowSkipped = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the report as .parquet, .csv or .json.")
    ] = None,
    accuracy: Annotated[
        str, typer.Option(help="Arithmetic of the spectra: exact, fast or sampled, as in analyze.")
    ] = "exact",
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compare the weight matrices of two models of one architecture.

    The angles are principal angles in degrees between the leading singular subspaces of A and B.
    """
    if output is not None:
        check_output_file(output, overwrite)
    for source in (a, b):
        if is_report(source):
            raise UsageError(f"{source} looks like a saved report: name a model")
    view = ReportView(sort, descending, top, columns, skipped, json_output)
    view.check(COMPARED)
    check_choice("--accuracy", accuracy, get_args(Accuracy))
    report = lorank.compare(
        a,
        b,
        include=parse_targets(include),
        exclude=parse_targets(exclude),
        rank=rank,
        accuracy=cast(Accuracy, accuracy),
        threads=threads,
        progress=not quiet,
    )
    if output is not None:
        report.save(output)
    view.show(report)
    if output is not None and not json_output:
        print_message(f"saved to {output}")
    _check_complete(report)


def _check_complete(report: ComparisonReport) -> None:
    """Raise IncompleteError if a pair has no numbers."""
    failed = [row for row in report.modules if not row.has_numbers]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {len(report)} pairs have no numbers; the first is {failed[0].name}: "
            f"{'; '.join(failed[0].flags)}"
        )
