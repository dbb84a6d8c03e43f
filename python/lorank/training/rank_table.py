"""The table of all changes of ranks, ``lora_ranks.csv`` in the output folder of a training."""

from __future__ import annotations

import csv
from pathlib import Path

from lorank._internal.atomic import atomic_path
from lorank._internal.csv_cells import to_cell
from lorank.training.dynamic_ranks import RankUpdate

_COLUMNS = ["step", "module", "rank", "effective_rank", "error"]


class RankTable:
    """A CSV file with one row for each module and change of ranks.

    Parameters
    ----------
    folder
        The output folder of the training.
    """

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / "lora_ranks.csv"

    def drop_rows_after(self, step: int) -> None:
        """Remove rows of steps after `step`, which another run or an interrupted run wrote."""
        if not self._path.exists():
            return
        with self._path.open(newline="", encoding="utf-8") as file:
            header, *rows = [*csv.reader(file)] or [_COLUMNS]
        kept = [row for row in rows if row and row[0].isdecimal() and int(row[0]) <= step]
        with atomic_path(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *kept])

    def append(self, update: RankUpdate) -> None:
        """Append a row for each module; if there is no file, create it with a header first."""
        is_new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(_COLUMNS)
            for row in update.report:
                change = update.changes.get(row.name)
                error = change.error if change is not None else 0.0
                writer.writerow(
                    [update.step, to_cell(row.name), update.ranks[row.name], row.effective_rank, error]
                )
