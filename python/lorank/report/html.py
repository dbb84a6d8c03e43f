"""Spectra as a self-contained HTML page: interactive plots and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorank._internal import extras
from lorank._internal.atomic import write_text
from lorank._internal.short_text import counted
from lorank.modules import naming
from lorank.report.html_table import html_name, html_table, html_text
from lorank.report.rows import METRICS, ModuleSpectrum
from lorank.sources.base import Skipped

_FIRST_METRIC = "alpha_hill"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px }
body { margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2em .7em; text-align: right }
th { position: sticky; top: 0; background: #eee } tr:nth-child(even) { background: #f7f7f7 }
th:first-child, td:first-child, td:last-child { text-align: left } .flagged { color: #a40 }
.scroll { overflow: auto; max-height: 40em }
"""


def write_page(
    path: Path,
    rows: Sequence[ModuleSpectrum],
    skipped: Sequence[Skipped],
    *,
    title: str,
    num_parameters: int | None,
    accuracy: str,
    columns: Sequence[str] = METRICS,
) -> None:
    """Write a page that needs neither a network nor another file.

    Parameters
    ----------
    path
        The file to write.
    rows
        Rows of the matrices.
    skipped
        Tensors without a row.
    title
        Name of the analysed source.
    num_parameters
        Number of parameters of the model; None if unknown.
    accuracy
        Requested accuracy of the analysis.
    columns
        Names of the metrics to show.
    """
    graph_objects = extras.require("plotly.graph_objects", "report", "for HTML reports")
    figures = [_by_block(graph_objects, rows, columns)]
    if kept := [row for row in rows if row.eigenvalues is not None]:
        figures.append(_spectra(graph_objects, kept))
    pictures = "\n".join(
        figure.to_html(full_html=False, include_plotlyjs=position == 0)
        for position, figure in enumerate(figures)
    )
    parameters = "" if num_parameters is None else f", {counted(num_parameters, 'parameter')}"
    escaped = html_text(title)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escaped}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escaped}</h1>"
        f"<p>{counted(len(rows), 'matrix', 'matrices')}{parameters}; accuracy: {html_text(accuracy)}.</p>"
        f'{pictures}<h2>Matrices</h2><div class="scroll">{html_table(rows, columns)}</div>'
        f"{_skipped_list(skipped)}</body></html>\n"
    )
    write_text(path, page)


def _by_block(graph_objects: Any, rows: Sequence[ModuleSpectrum], columns: Sequence[str]) -> Any:
    """Return a plot with one line per module type over the blocks; a menu selects the metric."""
    blocks: dict[str, list[ModuleSpectrum]] = {}
    for row in rows:
        block = naming.block_of(row.module)
        blocks.setdefault(row.module[len(block) + 1 :] or "outside the blocks", []).append(row)
    figure = graph_objects.Figure()
    for role, members in blocks.items():
        figure.add_scatter(
            x=[html_name(naming.block_of(row.module)) for row in members],
            y=_finite(members, _FIRST_METRIC),
            text=[f"{html_name(row.name)}, {row.shape[0]}x{row.shape[1]}" for row in members],
            mode="lines+markers" if len(members) > 1 else "markers",
            name=html_name(role),
        )
    buttons = [
        {
            "label": metric,
            "method": "update",
            "args": [
                {"y": [_finite(members, metric) for members in blocks.values()]},
                {"yaxis.title.text": metric},
            ],
        }
        for metric in columns
    ]
    figure.update_layout(
        title="Metrics by block",
        # Without explicit categories, plotly orders blocks by the first line that has them.
        # With this type, it does not read names as numbers or dates.
        xaxis={
            "type": "category",
            "categoryorder": "array",
            "categoryarray": [html_name(naming.block_of(row.module)) for row in rows],
        },
        yaxis_title=_FIRST_METRIC,
        height=560,
        updatemenus=[
            {
                "buttons": buttons,
                "x": 1,
                "xanchor": "right",
                "y": 1.12,
                "active": columns.index(_FIRST_METRIC),
            }
        ],
    )
    return figure


def _spectra(graph_objects: Any, rows: Sequence[ModuleSpectrum]) -> Any:
    """Return a histogram of eigenvalues with the Marchenko-Pastur edge; a menu selects the matrix."""
    figure = graph_objects.Figure()
    for position, row in enumerate(rows):
        assert row.eigenvalues is not None
        positive = row.eigenvalues[row.eigenvalues > 0]
        figure.add_histogram(
            x=np.log10(positive), nbinsx=100, visible=position == 0, name=html_name(row.name)
        )
    buttons = [
        {
            "label": html_name(row.name),
            "method": "update",
            "args": [{"visible": [i == position for i in range(len(rows))]}, {"shapes": _edge(row)}],
        }
        for position, row in enumerate(rows)
    ]
    figure.update_layout(
        title="Eigenvalues of W^T W (dashed: Marchenko-Pastur edge)",
        xaxis_title="log10 of the eigenvalue",
        yaxis_title="count",
        showlegend=False,
        shapes=_edge(rows[0]),
        height=480,
        updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.15}],
    )
    return figure


def _edge(row: ModuleSpectrum) -> list[dict[str, Any]]:
    """Return a dashed line at the Marchenko-Pastur edge; empty if the edge is undefined."""
    if not row.mp_edge > 0:
        return []
    x = math.log10(row.mp_edge)
    return [{"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dash"}}]


def _finite(rows: Sequence[ModuleSpectrum], metric: str) -> list[float | None]:
    """Return a metric of rows, with None for values that are not finite."""
    values = (getattr(row, metric) for row in rows)
    return [float(value) if value is not None and math.isfinite(value) else None for value in values]


def _skipped_list(skipped: Sequence[Skipped]) -> str:
    if not skipped:
        return ""
    items = "".join(
        f"<li>{html_name(entry.name)} ({'x'.join(map(str, entry.shape))}): {html_text(entry.reason)}</li>"
        for entry in skipped
    )
    summary = f"{counted(len(skipped), 'tensor')} skipped"
    return f"<details><summary>{summary}</summary><ul>{items}</ul></details>"
