"""Ranks by block and module, and the summary of an allocation."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from lorank._internal.printable import printable_name
from lorank._internal.short_text import counted, spanned
from lorank.allocation.rank_allocation import RankAllocation
from lorank.cli.tables.layout import stacked, titled_table
from lorank.modules import naming

# The column of modules outside the numbered blocks.
_ITSELF = "(itself)"

_EXPERT_NUMBER = re.compile(r"\bexperts\.\d+")
# Narrower columns fold the names of blocks into too many lines.
_NARROWEST_BLOCK = 20

# Characters of a module's name at either end that are shown.
_ENDS = 100

# Colours from the smallest rank to the largest.
_PALETTE = ("bright_black", "blue", "cyan", "green", "yellow", "red")


def rank_map(ranks: Mapping[str, int], title: str, width: int) -> Table:
    """Return a table of ranks by block (rows) and by module within the block (columns).

    If the columns do not fit the width, each row lists the ranks of its block. Experts that are separate
    modules share a column, which shows their smallest and largest rank.

    Parameters
    ----------
    ranks
        Rank by module name.
    title
        Title of the table.
    width
        Width of the terminal, in characters.
    """
    cells: dict[str, dict[str, list[int]]] = {}
    columns: dict[str, None] = {}
    for name, rank in ranks.items():
        block, inner = _place_of(name)
        inner = _EXPERT_NUMBER.sub("experts.*", inner)
        columns.setdefault(inner)
        cells.setdefault(block, {}).setdefault(inner, []).append(rank)
    suffixes = _shortest_unique_suffixes(columns)
    headings = {inner: printable_name(suffix, _ENDS) for inner, suffix in suffixes.items()}
    low, high = min(ranks.values()), max(ranks.values())
    texts = {
        block: {inner: _coloured(of_one, low, high) for inner, of_one in found.items()}
        for block, found in cells.items()
    }
    table = titled_table(title)
    table.add_column("block", overflow="fold")
    if _NARROWEST_BLOCK + sum(map(_heading_width, headings.values())) > width:
        table.add_column("ranks")
        for block, found in texts.items():
            listed = (Text(f"{headings[inner]} ") + text for inner, text in found.items())
            table.add_row(printable_name(block), Text(", ").join(listed))
        return table
    for heading in headings.values():
        table.add_column(stacked(heading.split(".")), justify="right", no_wrap=True)
    for block, found in texts.items():
        table.add_row(printable_name(block), *(found.get(inner, Text("")) for inner in columns))
    return table


def _heading_width(heading: str) -> int:
    """Return the width of a column with its padding."""
    return 3 + max(map(cell_len, heading.split(".")))


def _place_of(name: str) -> tuple[str, str]:
    """Return a module's block, and the module's name within the block."""
    # Image adapters write underscores instead of dots in names.
    dotted = name if "." in name else name.replace("_", ".")
    block = naming.block_of(dotted)
    return name[: len(block)], dotted[len(block) + 1 :] or _ITSELF


def _shortest_unique_suffixes(names: Iterable[str]) -> dict[str, str]:
    """Return the shortest dotted suffix of each name that no other name ends with."""
    suffixes = {name: list(naming.suffixes(name)) for name in names}
    counts = Counter(chain.from_iterable(suffixes.values()))
    return {
        # The suffix "weight" alone does not identify a module.
        name: next((s for s in reversed(found) if counts[s] == 1 and s != "weight"), name)
        for name, found in suffixes.items()
    }


def allocation_summary(allocation: RankAllocation) -> str:
    """Return a line with the numbers of modules and parameters, and the range of ranks."""
    ranks = allocation.ranks.values()
    base = allocation.base_parameters
    share = f" ({100 * allocation.num_parameters / base:.3g} % of the base model)" if base else ""
    return (
        f"{counted(len(ranks), 'module')}, {spanned(ranks, 'rank')}, "
        f"average {allocation.average_rank:.2f}: {counted(allocation.num_parameters, 'parameter')}{share}"
    )


def _coloured(ranks: Sequence[int], low: int, high: int) -> Text:
    """Return the ranks of a cell; the largest, on a scale from `low` to `high`, sets the colour."""
    least, most = min(ranks), max(ranks)
    step = 0 if high == low else (most - low) * (len(_PALETTE) - 1) // (high - low)
    return Text(str(most) if least == most else f"{least}-{most}", style=_PALETTE[step])


def flags_by_text(flags: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each flag with its module, or with the number of its modules."""
    modules: dict[str, list[str]] = {}
    for name, flag in flags.items():
        modules.setdefault(flag, []).append(name)
    for flag, names in modules.items():
        subject = names[0] if len(names) == 1 else f"{len(names)} modules, such as {names[0]}"
        yield f"{subject}: {flag}"
