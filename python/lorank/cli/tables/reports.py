"""Reports and allocations as tables for a terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from lorank.allocation.rank_allocation import RankAllocation
from lorank.modules import naming
from lorank.report.base import Report
from lorank.report.spectral import METRICS, ModuleSpectrum, SpectralReport

DEFAULT_COLUMNS = (
    "alpha_hill",
    "mp_spikes",
    "powerlaw_alpha",
    "powerlaw_distance",
    "stable_rank",
    "effective_rank",
    "spectral_norm",
)

# Widths on a terminal: of a column of numbers, and of what must be left for names and shapes.
_COLUMN_WIDTH = 12
_NAME_WIDTH = 44

# The column of modules that are no part of a numbered block.
_ITSELF = "(itself)"

# Reasons that name another tensor: the same for many tensors apart from that name.
_TIED = re.compile(r"^tied to .*")
_OF_PACKED = re.compile(r"^(scale|part) of the packed weight \S+")
_EXPERT_NUMBER = re.compile(r"\bexperts\.\d+")
# Below that width, names of blocks are folded into too many lines.
_NARROWEST_BLOCK = 20

# From few ranks to many.
_PALETTE = ("bright_black", "blue", "cyan", "green", "yellow", "red")


def fitting(columns: Sequence[str], width: int) -> Sequence[str]:
    """As many of the columns as a terminal of that width shows beside the names."""
    return columns[: max(2, (width - _NAME_WIDTH) // _COLUMN_WIDTH)]


def left_out(columns: Sequence[str]) -> str:
    """One line: which columns a terminal has no room for, and how to see them."""
    return f"no room for {', '.join(columns)}: a wider terminal or `--columns all` shows more"


def width_of(columns: Sequence[str]) -> int:
    """What a terminal needs for these columns beside the names."""
    return _NAME_WIDTH + _COLUMN_WIDTH * len(columns)


def spectral_table(report: SpectralReport, rows: Sequence[ModuleSpectrum], columns: Sequence[str]) -> Table:
    """Rows of a report.

    Raises
    ------
    ValueError
        If a column is no metric.
    """
    if unknown := [column for column in columns if column not in METRICS]:
        raise ValueError(f"no column {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    some = "" if len(rows) == len(report) else f", {len(rows)} shown"
    table = Table(
        title=f"{report.source}: {len(report)} matrices{some}", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("module", overflow="fold")
    table.add_column("shape", justify="right", no_wrap=True)
    for column in columns:
        table.add_column(column.replace("_", "\n"), justify="right", no_wrap=True)
    flagged = any(row.flags for row in rows)
    if flagged:
        table.add_column("note", overflow="fold")
    for row in rows:
        cells = [row.name, f"{row.shape[0]}x{row.shape[1]}"]
        # Counts of what could not be computed would be zeros.
        cells += [_number(getattr(row, column)) if row.has_spectrum else "-" for column in columns]
        table.add_row(
            *cells, *(["; ".join(row.flags)] if flagged else []), style="yellow" if row.flags else ""
        )
    return table


def skipped_table(report: Report[Any]) -> Table:
    """What has no row, and why."""
    table = Table(title=f"{len(report.skipped)} tensors skipped", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("tensor", overflow="fold")
    table.add_column("shape", justify="right")
    table.add_column("reason", overflow="fold")
    for entry in report.skipped:
        table.add_row(entry.name, "x".join(map(str, entry.shape)), entry.reason)
    return table


def skipped_summary(report: Report[Any]) -> str:
    """One line: how many tensors were skipped, by reason."""
    reasons: dict[str, int] = {}
    for entry in report.skipped:
        reason = _OF_PACKED.sub(r"\1 of a packed weight", _TIED.sub("tied", entry.reason))
        reasons[reason] = reasons.get(reason, 0) + 1
    counted = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items(), key=lambda e: -e[1]))
    return f"{len(report.skipped)} tensors skipped: {counted}" if reasons else ""


def rank_map(ranks: Mapping[str, int], title: str, width: int) -> Table:
    """Ranks by block (rows) and by module within the block (columns); a list by block where that is too wide.

    Experts that are modules of their own share a column, which shows their smallest and largest rank.
    """
    cells: dict[str, dict[str, list[int]]] = {}
    columns: dict[str, None] = {}
    for name, rank in ranks.items():
        block, inner = _place_of(name)
        inner = _EXPERT_NUMBER.sub("experts.*", inner)
        columns.setdefault(inner)
        cells.setdefault(block, {}).setdefault(inner, []).append(rank)
    headings = {inner: _shortest_unique_suffix(inner, columns) for inner in columns}
    low, high = min(ranks.values()), max(ranks.values())
    texts = {
        block: {inner: _coloured(of_one, low, high) for inner, of_one in found.items()}
        for block, found in cells.items()
    }
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("block", overflow="fold")
    if _NARROWEST_BLOCK + sum(map(_heading_width, headings.values())) > width:
        table.add_column("ranks")
        for block, found in texts.items():
            listed = (Text(f"{headings[inner]} ") + text for inner, text in found.items())
            table.add_row(block, Text(", ").join(listed))
        return table
    for heading in headings.values():
        table.add_column(heading.replace(".", "\n"), justify="right", no_wrap=True)
    for block, found in texts.items():
        table.add_row(block, *(found.get(inner, Text("")) for inner in columns))
    return table


def _heading_width(heading: str) -> int:
    """Return the width of a column with its padding."""
    return 3 + max(map(len, heading.split(".")))


def _place_of(name: str) -> tuple[str, str]:
    """A module's block, and its name within the block.

    Image adapters have underscores where modules have dots.
    """
    dotted = name if "." in name else name.replace("_", ".")
    block = naming.block_of(dotted)
    return name[: len(block)], dotted[len(block) + 1 :] or _ITSELF


def _shortest_unique_suffix(name: str, names: Iterable[str]) -> str:
    """The shortest dotted suffix of a name that no other name ends with."""
    others = [other for other in names if other != name]
    # A parameter's own name says nothing without its module's.
    named = [suffix for suffix in naming.suffixes(name) if suffix != "weight"]
    unique = [s for s in named if not any(naming.is_suffix(s, other) for other in others)]
    return unique[-1] if unique else name


def allocation_summary(allocation: RankAllocation) -> str:
    """One line: modules, ranks, parameters."""
    ranks = allocation.ranks.values()
    base = allocation.base_parameters
    share = f" ({100 * allocation.num_parameters / base:.3g} % of the base model)" if base else ""
    return (
        f"{len(ranks)} modules, ranks {min(ranks)} to {max(ranks)}, average {allocation.average_rank:.2f}: "
        f"{allocation.num_parameters:,} parameters{share}"
    )


def _coloured(ranks: Sequence[int], low: int, high: int) -> Text:
    """Return the ranks of a cell, coloured by the largest among all from `low` to `high`."""
    least, most = min(ranks), max(ranks)
    step = 0 if high == low else (most - low) * (len(_PALETTE) - 1) // (high - low)
    return Text(str(most) if least == most else f"{least}-{most}", style=_PALETTE[step])


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "-"
    return f"{value:.4g}"
