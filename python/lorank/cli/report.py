"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorank.cli.checks import check_new, parse_targets
from lorank.cli.errors import UsageError
from lorank.cli.options import (
    Columns,
    Descending,
    Exclude,
    Include,
    Json,
    Overwrite,
    ShowSkipped,
    Sort,
    Top,
)
from lorank.cli.output import print_message
from lorank.cli.report_view import ReportView, with_rows
from lorank.modules import naming
from lorank.report import SpectralReport
from lorank.report.comparison import ComparisonReport
from lorank.report.gradients import GradientReport
from lorank.report.loading import AnyReport, load_report
from lorank.report.optional_metrics import OPTIONAL_COLUMNS
from lorank.report.tasks import TaskReport


def report(
    file: Annotated[
        Path,
        typer.Argument(
            help="A report of analyze or compare (.parquet, .csv, .json), profile_gradients or profile_tasks "
            "(.json)."
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    sort: Sort = None,
    descending: Descending = False,
    top: Top = None,
    columns: Columns = None,
    skipped: ShowSkipped = False,
    html: Annotated[
        Path | None, typer.Option(help="Write an HTML page with interactive plots of the spectra.")
    ] = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Show a saved report as a table, or write it as an HTML page."""
    view = ReportView(sort, descending, top, columns, skipped, json_output)
    classes: tuple[type[AnyReport], ...] = (SpectralReport, GradientReport, TaskReport, ComparisonReport)
    view.check(
        dict.fromkeys(column for report_class in classes for column in report_class.columns)
        | dict.fromkeys(OPTIONAL_COLUMNS)
    )
    if html is not None:
        check_new(html, overwrite)
    loaded = load_report(file)
    view.check(loaded.shown_columns)
    modules = {row.module for row in loaded.modules}
    names = set(naming.filtered(modules, parse_targets(include), parse_targets(exclude)))
    shown = with_rows(loaded, [row for row in loaded.modules if row.module in names])
    if not shown.modules:
        rows = f"{len(loaded)} {loaded.noun[1]}"
        raise ValueError(f"{file}: none of its {rows} is selected by --include and --exclude")
    if html is not None:
        if not isinstance(shown, SpectralReport):
            raise UsageError(f"--html draws spectra, but {file} is a report of {shown.provides}")
        shown.to_html(html)
        print_message(f"saved to {html}")
    view.show(shown)
