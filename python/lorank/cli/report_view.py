"""Prints a report on the terminal, with options for the order, columns and number of rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorank._internal.terminal import Terminal
from lorank.allocation.rank_allocation import RankAllocation
from lorank.cli.checks import REPORT_ENDINGS, check_choice
from lorank.cli.output import console, print_json
from lorank.cli.tables import reports
from lorank.modules.facts import ModelFacts
from lorank.report.loading import AnyReport


def is_report(source: str) -> bool:
    """Return True if the source is an existing file with the suffix of a saved report."""
    path = Path(source)
    return path.suffix in REPORT_ENDINGS and not path.name.endswith(".index.json") and path.is_file()


def with_rows(report: AnyReport, rows: Sequence[Any]) -> AnyReport:
    """Return a copy of a report with other rows."""
    return replace(report, modules=rows)  # type: ignore[arg-type]  # The rows are of the report's class.


@dataclass(frozen=True, slots=True)
class ReportView:
    """The options for printing a report.

    Attributes
    ----------
    sort
        Name of the column by which rows are sorted, or ``"name"``; None for the report's order.
    descending
        True to reverse the order.
    top
        Number of rows to show; None for all.
    columns
        Names of columns, separated by commas, or ``"all"``; None for those that fit the terminal.
    skipped
        True to list skipped tensors.
    as_json
        True to print JSON instead of tables.
    """

    sort: str | None
    descending: bool
    top: int | None
    columns: str | None
    skipped: bool
    as_json: bool

    def check(self, known: Collection[str]) -> None:
        """Raise UsageError if `sort` or `columns` names an unknown column."""
        for column in [] if self.columns in (None, "all") else str(self.columns).split(","):
            check_choice("--columns", column, known)
        if self.sort is not None:
            check_choice("--sort", self.sort, ("name", *known))

    def show(self, report: AnyReport) -> None:
        """Print a report."""
        rows = reports.ordered(report.modules, self.sort, self.descending, self.top)
        if self.as_json:
            print_json(with_rows(report, rows).to_json())
            return
        terminal = console()
        if self.columns is None:
            columns = reports.fitting(report.shown_leading, terminal.width)
            hidden = report.shown_leading[len(columns) :]
        else:
            columns = report.shown_columns if self.columns == "all" else self.columns.split(",")
            hidden = ()
            # Wrapped lines are easier to read than columns that are one letter wide.
            terminal = console(reports.width_of(columns))
        terminal.print(reports.report_table(report, rows, columns))
        show_remark(terminal, report)
        if hidden:
            terminal.print(reports.hidden_columns(hidden), style="dim", soft_wrap=True)
        if self.skipped:
            terminal.print(reports.skipped_table(report))
        elif report.skipped:
            terminal.print(reports.skipped_summary(report), style="dim", soft_wrap=True)


def show_remark(terminal: Terminal, shown: AnyReport | RankAllocation) -> None:
    """Print the remark on guessed names, if names were guessed."""
    facts = getattr(shown, "facts", None)
    if isinstance(facts, ModelFacts) and facts.remark:
        terminal.print(facts.remark, style="yellow", soft_wrap=True)
