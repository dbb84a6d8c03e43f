"""A report as one self-contained page: pictures that answer to the mouse, and the table."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorank._internal import extras
from lorank._internal.atomic import write_text
from lorank.modules import naming
from lorank.report.spectral import METRICS, ModuleSpectrum, SpectralReport

_FIRST_METRIC = "alpha_hill"
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px }
body { margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .2em .7em; text-align: right }
th { position: sticky; top: 0; background: #eee } tr:nth-child(even) { background: #f7f7f7 }
th:first-child, td:first-child, td:last-child { text-align: left } .flagged { color: #a40 }
.scroll { overflow: auto; max-height: 40em }
"""


def write_html(report: SpectralReport, path: Path) -> None:
    """Write the page: needs no network and no other file to be read."""
    graph_objects = extras.require("plotly.graph_objects", "report", "for HTML reports")
    figures = [_by_block(graph_objects, report.modules)]
    if kept := [row for row in report.modules if row.eigenvalues is not None]:
        figures.append(_spectra(graph_objects, kept))
    pictures = "\n".join(
        figure.to_html(full_html=False, include_plotlyjs=position == 0)
        for position, figure in enumerate(figures)
    )
    parameters = "" if report.num_parameters is None else f", {report.num_parameters:,} parameters"
    title = html.escape(report.source)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>"
        f"<p>{len(report)} matrices{parameters}; accuracy: {html.escape(report.accuracy)}.</p>"
        f"{pictures}<h2>Matrices</h2>{_table(report.modules)}{_skipped(report)}</body></html>\n"
    )
    write_text(path, page)


def _by_block(graph_objects: Any, rows: Sequence[ModuleSpectrum]) -> Any:
    """One line per module type over the blocks of the model; a menu chooses the metric."""
    blocks: dict[str, list[ModuleSpectrum]] = {}
    for row in rows:
        block = naming.block_of(row.module)
        blocks.setdefault(row.module[len(block) + 1 :] or "outside the blocks", []).append(row)
    figure = graph_objects.Figure()
    for role, members in blocks.items():
        figure.add_scatter(
            x=[naming.block_of(row.module) for row in members],
            y=_finite(members, _FIRST_METRIC),
            text=[f"{row.name}, {row.shape[0]}x{row.shape[1]}" for row in members],
            mode="lines+markers" if len(members) > 1 else "markers",
            name=role,
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
        for metric in METRICS
    ]
    figure.update_layout(
        title="Metrics by block",
        # All blocks in the report's order, whichever of them the first module type is in.
        xaxis={"categoryorder": "array", "categoryarray": [naming.block_of(row.module) for row in rows]},
        yaxis_title=_FIRST_METRIC,
        height=560,
        updatemenus=[
            {
                "buttons": buttons,
                "x": 1,
                "xanchor": "right",
                "y": 1.12,
                "active": METRICS.index(_FIRST_METRIC),
            }
        ],
    )
    return figure


def _spectra(graph_objects: Any, rows: Sequence[ModuleSpectrum]) -> Any:
    """The eigenvalue density of one matrix at a time, with its bulk edge; a menu chooses the matrix."""
    figure = graph_objects.Figure()
    for position, row in enumerate(rows):
        assert row.eigenvalues is not None
        positive = row.eigenvalues[row.eigenvalues > 0]
        figure.add_histogram(x=np.log10(positive), nbinsx=100, visible=position == 0, name=row.name)
    buttons = [
        {
            "label": row.name,
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
    if not row.mp_edge > 0:
        return []
    x = math.log10(row.mp_edge)
    return [{"type": "line", "x0": x, "x1": x, "yref": "paper", "y0": 0, "y1": 1, "line": {"dash": "dash"}}]


def _finite(rows: Sequence[ModuleSpectrum], metric: str) -> list[float | None]:
    values = (float(getattr(row, metric)) for row in rows)
    return [value if math.isfinite(value) else None for value in values]


def _table(rows: Sequence[ModuleSpectrum]) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("module", "shape", *METRICS, "note"))
    body = []
    for row in rows:
        cells = [row.name, f"{row.shape[0]}x{row.shape[1]}"]
        cells += [f"{getattr(row, metric):.4g}" for metric in METRICS]
        cells.append("; ".join(row.flags))
        flagged = ' class="flagged"' if row.flags else ""
        body.append(f"<tr{flagged}>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def _skipped(report: SpectralReport) -> str:
    if not report.skipped:
        return ""
    items = "".join(
        f"<li>{html.escape(entry.name)} ({'x'.join(map(str, entry.shape))}): {html.escape(entry.reason)}</li>"
        for entry in report.skipped
    )
    return f"<details><summary>{len(report.skipped)} tensors skipped</summary><ul>{items}</ul></details>"
