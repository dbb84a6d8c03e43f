"""Draw the ranks that lorank allocates to a model as a heat map: ``make picture``.

Usage: ``python docs/pictures/ranks.py MODEL TITLE OUT.svg``. A row is a kind of module, a column a block;
the bars on the right are the average rank of a row, the bars on top that of a column.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from xml.sax.saxutils import escape

import lorank

AVERAGE = 8
CELL, GAP, LEFT, TOP, BARS = 28, 2, 92, 132, 166
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
# Colours of the card, its border, text, quiet text, bars, and the ramp from the lowest rank to the highest.
LIGHT = ("#ffffff", "#d9e0e6", "#1c2733", "#5d6b79", "#aab8c4", ("#eaf3f6", "#93cbdc", "#2f86b8", "#173a75"))
DARK = ("#10161d", "#2b3641", "#e6edf3", "#93a1af", "#51616f", ("#1a2731", "#1f5873", "#36a0bd", "#c6f5dd"))

Ranks = Mapping[tuple[str, int], int]


def ranks_by_place(ranks: Mapping[str, int]) -> Ranks:
    """Key ranks by a module's name within its block and the block's number; skip modules outside blocks."""
    found = {}
    for name, rank in ranks.items():
        if match := re.search(r"\.(\d+)\.", name):
            found[name[match.end() :], int(match[1])] = rank
    return found


def ordered(kinds: Iterable[str]) -> list[str]:
    """Order kinds of modules as a block applies them."""
    usual = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return sorted(kinds, key=lambda kind: ([*usual, last(kind)].index(last(kind)), kind))


def last(kind: str) -> str:
    """Return the last part of a dotted name."""
    return kind.rpartition(".")[2]


def mixed(ramp: Sequence[str], share: float) -> str:
    """Interpolate a ramp of colours at a share between 0 and 1."""
    steps = list(pairwise([tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5)) for colour in ramp]))
    at = min(int(share * len(steps)), len(steps) - 1)
    inner = share * len(steps) - at
    return "#" + "".join(f"{round(a + (b - a) * inner):02x}" for a, b in zip(*steps[at], strict=True))


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, 1 to 21, by the formula of WCAG 2."""
    lights = []
    for colour in (one, other):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def style(ranks: Sequence[int], colours: tuple[str, str, str, str, str, Sequence[str]]) -> str:
    """Return the rules of one colour scheme: a class for each rank, and those of the card."""
    card, border, text, quiet, bar, ramp = colours
    low, high = min(ranks), max(ranks)
    rules = [
        f".card{{fill:{card};stroke:{border}}}",
        f"text{{fill:{text}}}.quiet{{fill:{quiet}}}.bar{{fill:{bar}}}.line{{stroke:{quiet}}}",
    ]
    for rank in sorted(set(ranks)):
        cell = mixed(ramp, (rank - low) / max(high - low, 1))
        on_cell = max(("#0d1b24", "#ffffff"), key=lambda colour: contrast(colour, cell))
        rules.append(f".r{rank}{{fill:{cell}}}.t{rank}{{fill:{on_cell}}}")
    return "".join(rules)


def label(x: float, y: float, text: str, *, size: int = 13, anchor: str = "start", kind: str = "") -> str:
    """Return a line of text."""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}"{name}>{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """Return a rectangle with rounded corners."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" class="{kind}"/>'


def cells(ranks: Ranks, kinds: Sequence[str]) -> Iterator[str]:
    """Draw a cell with its rank for each module."""
    for (kind, block), rank in ranks.items():
        x, y = LEFT + block * CELL, TOP + kinds.index(kind) * CELL
        yield box(x, y, CELL - GAP, CELL - GAP, f"r{rank}")
        yield label(x + CELL / 2 - 1, y + CELL / 2 + 3, str(rank), size=11, anchor="middle", kind=f"t{rank}")


def margins(ranks: Ranks, kinds: Sequence[str], blocks: Sequence[int]) -> Iterator[str]:
    """Draw names, block numbers and the bars of averages; a dashed line marks the uniform rank."""
    right, bottom = LEFT + len(blocks) * CELL + 14, TOP + len(kinds) * CELL
    across = 7.0
    for i, kind in enumerate(kinds):
        average = mean(rank for (name, _), rank in ranks.items() if name == kind)
        y = TOP + i * CELL
        yield label(LEFT - 12, y + CELL / 2 + 4, last(kind).removesuffix("_proj"), anchor="end")
        yield box(right, y + 5, average * across, CELL - GAP - 10, "bar")
        yield label(
            right + BARS - 42, y + CELL / 2 + 4, f"{average:.1f}", size=12, anchor="end", kind="quiet"
        )
    up = 3.0
    for block in blocks:
        average = mean(rank for (_, number), rank in ranks.items() if number == block)
        yield box(LEFT + block * CELL + 5, TOP - 12 - average * up, CELL - GAP - 10, average * up, "bar")
        if block % 5 == 0 or block == blocks[-1]:
            middle = LEFT + block * CELL + CELL / 2 - 1
            yield label(middle, bottom + 18, str(block), size=12, anchor="middle", kind="quiet")
    dashes = 'class="line" stroke-dasharray="3 3"'
    yield f'<path d="M{right + AVERAGE * across:g} {TOP - 4}V{bottom + 2}" {dashes}/>'
    yield f'<path d="M{LEFT} {TOP - 12 - AVERAGE * up:g}H{right - 14 - GAP:g}" {dashes}/>'
    yield label(
        right + AVERAGE * across, TOP - 10, f"uniform: {AVERAGE}", size=12, anchor="middle", kind="quiet"
    )
    yield label(LEFT - 12, bottom + 18, "block", size=12, anchor="end", kind="quiet")


def legend(ranks: Ranks, right: float) -> Iterator[str]:
    """Draw the scale of colours, right-aligned."""
    values = range(min(ranks.values()), max(ranks.values()) + 1)
    present = [value for value in values if value in ranks.values()]
    start = right - len(present) * 11
    yield label(start - 8, 47, f"rank {present[0]}", size=12, anchor="end", kind="quiet")
    for i, value in enumerate(present):
        yield f'<rect x="{start + i * 11:g}" y="36" width="11" height="14" class="r{value}"/>'
    yield label(right + 6, 47, str(present[-1]), size=12, kind="quiet")


def picture(allocation: lorank.RankAllocation, title: str) -> str:
    """Return the SVG of an allocation."""
    ranks = ranks_by_place(allocation.ranks)
    kinds = ordered({kind for kind, _ in ranks})
    blocks = sorted({block for _, block in ranks})
    width, height = LEFT + len(blocks) * CELL + BARS, TOP + len(kinds) * CELL + 40
    values = sorted(ranks.values())
    summary = (
        f"{len(values)} modules, ranks {values[0]} to {values[-1]}, average {allocation.average_rank:.0f}: "
        f"{allocation.num_parameters:,} adapter parameters, chosen from the weights alone"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-family="{FONT}" role="img">',
        f"<title>{escape(title)}: {escape(summary)}</title>",
        f"<style>{style(values, LIGHT)}@media(prefers-color-scheme:dark){{{style(values, DARK)}}}</style>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="10" class="card"/>',
        label(28, 40, title, size=19).replace("<text", '<text font-weight="600"'),
        label(28, 64, summary, kind="quiet"),
        *legend(ranks, width - 48),
        *margins(ranks, kinds, blocks),
        *cells(ranks, kinds),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Allocate for a model and write the picture."""
    model, title, out = sys.argv[1:]
    allocation = lorank.allocate(model, r_min=1, avg_rank=AVERAGE, progress=False)
    Path(out).write_text(picture(allocation, title), encoding="utf-8")


if __name__ == "__main__":
    main()
