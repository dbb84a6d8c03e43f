"""The table of all changes of ranks, ``lora_ranks.csv`` in the output folder of a training."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from lorank._internal.atomic import atomic_path
from lorank._internal.csv_cells import to_cell
from lorank._internal.folders import errors_name
from lorank._internal.json_fields import reading
from lorank._internal.short_text import shown
from lorank.training.dynamic_ranks import RankUpdate

_STEP = re.compile("[0-9]{1,18}")
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
        """Remove rows of steps after `step`, which another run or an interrupted run wrote.

        Raises
        ------
        FormatError
            If another program wrote the file. It is not changed.
        """
        if not self._path.exists():
            return
        with reading(self._path, "a table of ranks"):
            kept = [row for row in self._rows() if int(row[0]) <= step]
        with atomic_path(self._path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([_COLUMNS, *kept])

    def _rows(self) -> list[list[str]]:
        """Return the rows of the file, except an incomplete last row of an interrupted run.

        Raises
        ------
        ValueError
            If another program wrote the file.
        """
        try:
            with self._path.open(newline="", encoding="utf-8") as file:
                header, *rows = [*csv.reader(file)] or [_COLUMNS]
        except csv.Error as error:
            raise ValueError(str(error)) from error
        if header != _COLUMNS:
            raise ValueError(f"its columns are {shown(header)}: it should have {', '.join(_COLUMNS)}")
        if rows and not _is_complete(rows[-1]):
            del rows[-1]
        for number, row in enumerate(rows, 2):
            if not _is_complete(row):
                raise ValueError(f"line {number} is {shown(row)}")
        return rows

    def append(self, update: RankUpdate) -> None:
        """Append a row for each module; if there is no file, create it with a header first."""
        is_new = not self._path.exists()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with errors_name(self._path), self._path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if is_new:
                writer.writerow(_COLUMNS)
            for row in update.report:
                change = update.changes.get(row.name)
                error = change.error if change is not None else 0.0
                writer.writerow(
                    [update.step, to_cell(row.name), update.ranks[row.name], row.effective_rank, error]
                )


def _is_complete(row: list[str]) -> bool:
    return len(row) == len(_COLUMNS) and _STEP.fullmatch(row[0]) is not None
