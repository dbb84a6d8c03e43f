"""The estimate of a task for a terminal: numbers, a plot of the spectrum, and the predicted R^2."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table
from rich.text import Text

from lorank.cli.tables.layout import titled_table
from lorank.report.json_values import plain
from lorank.task_spectra import TaskEstimate

# Size of the plot: largest width and width of the labels, in characters; smallest number of values; rows
# above the threshold, and in total.
_WIDEST = 78
_LABELS = 12
_FEWEST_VALUES = 24
_ROWS_ABOVE = 8
_ROWS = 12
# Smallest and largest logarithm of the factor between two rows.
_FINEST, _COARSEST = 0.1, math.log(10)

_CURVE_WIDTH = 24
_UPWARDS = " ▁▂▃▄▅▆▇█"
_RIGHTWARDS = " ▏▎▍▌▋▊▉█"

_ABOVE, _BELOW, _LINE = "green", "bright_black", "yellow"


def estimate_json(found: TaskEstimate) -> dict[str, Any]:
    """Return an estimate as JSON values: nan is null, infinity is the string "inf"."""
    return {
        "k_star": found.k_star,
        "predicted_rank": found.predicted_rank,
        "piecewise": {
            "k_star": found.piecewise.k_star,
            "breakpoints": list(found.piecewise.breakpoints),
            "rhos": [plain(rho) for rho in found.piecewise.rhos],
        },
        **{name: plain(getattr(found, name)) for name in ("rho", "tau", "noise", "leading")},
        "num_above": found.num_above,
        "num_samples": found.num_samples,
        "space": found.space,
        "flags": list(found.flags),
        "singular_values": [plain(value) for value in found.singular_values.tolist()],
        "predicted_r2": [plain(value) for value in found.predicted_r2.tolist()],
    }


def estimate_table(found: TaskEstimate, title: str) -> Table:
    """Return a table of the ranks and the numbers that determine them."""
    table = titled_table(title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    unit = "Y over X" if found.space == "weights" else "Y"
    for name, value, remark in (
        ("predicted rank", str(found.predicted_rank), "smallest with 95 % of the full rank's predicted R2"),
        ("K*", str(found.k_star), "rank at which the decay reaches the threshold tau"),
        ("piecewise K*", str(found.piecewise.k_star), _pieces(found)),
        ("above tau", str(found.num_above), f"of {len(found.singular_values)} singular values"),
        ("rho", _number(found.rho), "decay from one value to the next, above tau"),
        ("tau", _number(found.tau), f"threshold, in units of {unit}"),
        ("C", _number(found.leading), f"start of the decay, in units of {unit}"),
        ("noise", _number(found.noise), "standard deviation, in units of Y"),
        ("samples", f"{found.num_samples:,}", ""),
    ):
        table.add_row(name, value, remark)
    return table


def _pieces(found: TaskEstimate) -> str:
    """Return the decay rates of the pieces with the values at which they start."""
    rates = [f"{rate:.4g}" for rate in found.piecewise.rhos]
    rates[1:] = [
        f"{rate} from value {start + 1}"
        for rate, start in zip(rates[1:], found.piecewise.breakpoints, strict=True)
    ]
    return f"decay {', '.join(rates)}" if rates else ""


def spectrum_picture(found: TaskEstimate, width: int, ascii_only: bool) -> Text:
    """Return a bar plot of the first singular values on a logarithmic scale, with a line at the threshold.

    Parameters
    ----------
    found
        The estimate.
    width
        Width of the terminal, in characters.
    ascii_only
        True if the terminal shows ASCII characters only.
    """
    values, tau = found.singular_values, found.tau
    if not (tau > 0 and values[0] > 0):
        return Text("every singular value is zero")
    columns = max(min(width, _WIDEST) - _LABELS - 2, 20)
    count = min(len(values), max(3 * found.num_above, _FEWEST_VALUES))
    each = -(-count // columns)
    pitch = 2 if 2 * count <= columns else 1
    bars = values[:count:each]
    with np.errstate(divide="ignore"):
        logs = np.log(bars) - math.log(tau)
    step, above, below = _scale(logs)

    labels = [""] * (above + 1 + below)
    if below:
        labels[-1] = f"{tau * math.exp(-step * below):.3g}"
    if above:
        labels[0] = f"{bars[0]:.3g}"
    labels[above] = f"tau {tau:.3g}"
    rows = _rows(logs / step, above, below, pitch, ascii_only)
    coloured = pitch * int(np.sum(logs > 0))
    picture = Text()
    picture.append("singular values, log scale", style="italic")
    for index, (label, cells) in enumerate(zip(labels, rows, strict=True)):
        picture.append(f"\n{label:>{_LABELS}} {'|' if ascii_only else '│'}")
        picture.append(cells[:coloured], style=_ABOVE)
        picture.append(cells[coloured:], style=_LINE if index == above else _BELOW)
    picture.append("\n" + " " * (_LABELS + 2) + _ticks(len(bars), each, pitch))
    if each > 1:
        picture.append(f"\na bar shows the largest of {each} values", style="dim")
    if count < len(values):
        rest = f"\n{len(values) - count:,} more values, down to {_number(float(values[-1]))}"
        picture.append(rest, style="dim")
    return picture


def _scale(logs: npt.NDArray[np.float64]) -> tuple[float, int, int]:
    """Return the logarithm of the factor between rows, and the numbers of rows above and below tau."""
    highest, lowest = float(logs[0]), float(np.min(logs[np.isfinite(logs)]))
    if highest > 0:
        step = max(highest / _ROWS_ABOVE, _FINEST)
        above = math.ceil(highest / step - 1e-9)
    else:
        step = min(max(-lowest / (_ROWS_ABOVE - 1), _FINEST), _COARSEST)
        above = 0
    below = math.floor(-lowest / step) + 1 if lowest <= 0 else 0
    return step, above, min(below, _ROWS - above)


def _rows(
    heights: npt.NDArray[np.float64], above: int, below: int, pitch: int, ascii_only: bool
) -> list[str]:
    """Return the rows of the plot from the top down, with the line at the threshold between them.

    Parameters
    ----------
    heights
        Heights of the bars over the threshold, in rows.
    above, below
        Numbers of rows above and below the threshold.
    pitch
        Distance between two bars, in characters.
    ascii_only
        True to use ASCII characters only.
    """
    rows = [
        "".join(_block(height - row, _UPWARDS, ascii_only).ljust(pitch) for height in heights).rstrip()
        for row in range(above - 1, -below - 1, -1)
    ]
    dash, block = ("-", "#") if ascii_only else ("─", "█")
    line = "".join((block if height > 0 else dash).ljust(pitch, dash) for height in heights)
    return [*rows[:above], line, *rows[above:]]


def _block(share: float, blocks: str, ascii_only: bool) -> str:
    """Return one character that is filled to a share."""
    filled = min(max(share, 0.0), 1.0)
    if ascii_only:
        return "#" if filled >= 0.5 else " "
    # Positive shares get at least the smallest visible block.
    return blocks[max(round(filled * (len(blocks) - 1)), int(filled > 0))]


def _ticks(bars: int, each: int, pitch: int) -> str:
    """Return the line of value numbers under the bars, from 1, without overlaps."""
    line = ""
    for bar in range(bars):
        value = 1 + bar * each
        # If each bar shows one value, label multiples of 5.
        is_round = bar == 0 or each > 1 or value % 5 == 0
        if is_round and len(line) <= bar * pitch - (2 if line else 0):
            line = line.ljust(bar * pitch) + str(value)
    return line


def curve_table(found: TaskEstimate, ascii_only: bool) -> Table | None:
    """Return a table of the predicted R^2 at selected ranks; None if it is undefined."""
    curve = found.predicted_r2
    if np.isnan(curve[-1]):
        return None
    table = titled_table("predicted R2 by rank")
    table.add_column("rank", justify="right", no_wrap=True)
    table.add_column("R2", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True, min_width=_CURVE_WIDTH)
    table.add_column("")
    names = _named_ranks(found)
    for rank in _shown_ranks(found):
        r2 = float(curve[rank])
        bar = "".join(_block(r2 * _CURVE_WIDTH - i, _RIGHTWARDS, ascii_only) for i in range(_CURVE_WIDTH))
        table.add_row(
            str(rank),
            f"{r2:.4f}" if abs(r2) < 100 else f"{r2:.4g}",
            Text(bar.rstrip(), style=_ABOVE if rank >= found.predicted_rank else _BELOW),
            ", ".join(name for name, named in names.items() if named == rank),
        )
    return table


def _named_ranks(found: TaskEstimate) -> dict[str, int]:
    return {
        "predicted rank": found.predicted_rank,
        "K*": found.k_star,
        "piecewise K*": found.piecewise.k_star,
        "full rank": len(found.predicted_r2) - 1,
    }


def _shown_ranks(found: TaskEstimate) -> list[int]:
    """Return zero, the powers of two, the ranks with a name, and the neighbours of the predicted rank."""
    full = len(found.predicted_r2) - 1
    powers = {1 << exponent for exponent in range(full.bit_length())}
    knee = {found.predicted_rank - 1, found.predicted_rank + 1}
    ranks = {0, *powers, *knee, *_named_ranks(found).values()}
    return sorted(rank for rank in ranks if rank <= full)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"
