"""The command `analyze`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast, get_args

import typer

import lorank
from lorank.cli.checks import check_choice, check_output_file, parse_targets
from lorank.cli.errors import IncompleteError, UsageError
from lorank.cli.options import (
    Columns,
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
from lorank.cli.signals import Interrupted
from lorank.report import METRICS, SpectralReport
from lorank.report.optional_metrics import GROUPS, columns_of
from lorank.statistics.spectrum import Accuracy


def analyze(
    source: Annotated[
        str,
        typer.Argument(
            help="A .safetensors or .gguf file, a folder of shards, a .bin/.pt state dict, or a hub id."
        ),
    ],
    include: Include = None,
    exclude: Exclude = None,
    sort: Sort = None,
    descending: Descending = False,
    top: Top = None,
    columns: Columns = None,
    skipped: ShowSkipped = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Save the report as .parquet, .csv or .json.")
    ] = None,
    keep_eigenvalues: Annotated[
        bool, typer.Option("--keep-eigenvalues", help="Store every spectrum in the saved report.")
    ] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Optional metrics, separated by commas: {', '.join(GROUPS)}, or 'all'.", show_default=False
        ),
    ] = None,
    accuracy: Annotated[
        str,
        typer.Option(
            help="exact: float64. fast: float32 where its error bounds allow. sampled: estimates of large "
            "matrices, with error bars."
        ),
    ] = "exact",
    resume: Annotated[
        Path | None,
        typer.Option(help="Journal of finished matrices, from which an interrupted run continues."),
    ] = None,
    threads: Threads = None,
    json_output: Json = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Compute spectral metrics of every weight matrix of a model."""
    if output is not None:
        check_output_file(output, overwrite)
    if is_report(source):
        raise UsageError(f"{source} looks like a saved report: show it with lorank report")
    view = ReportView(sort, descending, top, columns, skipped, json_output)
    groups = _groups(metrics)
    view.check((*METRICS, *columns_of(groups)))
    check_choice("--accuracy", accuracy, get_args(Accuracy))
    try:
        report = lorank.analyze(
            source,
            include=parse_targets(include),
            exclude=parse_targets(exclude),
            accuracy=cast(Accuracy, accuracy),
            threads=threads,
            resume=resume,
            progress=not quiet,
            keep_eigenvalues=keep_eigenvalues,
            metrics=groups,
        )
    except KeyboardInterrupt as error:
        if resume is None:
            raise
        raise Interrupted.by(error, f"the same command continues from {resume}") from error
    if output is not None:
        report.save(output)
    view.show(report)
    if output is not None and not json_output:
        print_message(f"saved to {output}")
    _check_complete(report)


def _groups(values: list[str] | None) -> list[str]:
    """Parse names of groups of optional metrics."""
    names = [name.strip() for value in values or () for name in value.split(",") if name.strip()]
    for name in names:
        check_choice("--metrics", name, (*GROUPS, "all"))
    return [name for name in GROUPS if name in names or "all" in names]


def _check_complete(report: SpectralReport) -> None:
    """Raise IncompleteError if a matrix has no spectrum."""
    failed = [row for row in report.modules if not row.has_spectrum]
    if failed:
        raise IncompleteError(
            f"{len(failed)} of {len(report)} matrices have no spectrum; the first is {failed[0].name}: "
            f"{'; '.join(failed[0].flags)}"
        )
