"""The base of all reports: rows about modules, from which a method can choose ranks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

from lorank._internal.equality import ByValue
from lorank._internal.printable import printable, printable_name
from lorank._internal.short_text import counted, listing
from lorank.modules import naming
from lorank.report.rows import Row
from lorank.sources.base import Skipped

Evidence = Literal["spectra", "gradients", "tasks", "changes"]
"""The content of a report: spectra of weights, gradients, tasks of modules, or changes between models."""

R = TypeVar("R", bound=Row, covariant=True)

# Largest number of metrics of a row in a `repr`.
_NUMBERS = 3


class Report(ByValue, Generic[R]):
    """Rows in the order of the model; ``report[name]`` is one row.

    Reports can be pickled, copied and compared. Loading a pickle can run any code in it: load reports from
    elsewhere with `load`, which reads JSON, parquet and CSV.
    """

    __slots__ = ()

    provides: ClassVar[Evidence]
    columns: ClassVar[Sequence[str]]
    """Names of a row's numbers, in the order of tables."""
    leading: ClassVar[Sequence[str]]
    """Names of the numbers that short tables show."""
    noun: ClassVar[tuple[str, str]] = ("module", "modules")
    """The noun for the rows, singular and plural."""

    @property
    def shown_columns(self) -> Sequence[str]:
        """Names of the numbers that this report has; more than `columns` if optional ones were computed."""
        return self.columns

    @property
    def shown_leading(self) -> Sequence[str]:
        """Names of the numbers that short tables of this report show."""
        return self.leading

    modules: Sequence[R]
    skipped: Sequence[Skipped]
    source: str
    num_parameters: int | None
    unknown_parameters: str

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Return the settings of the measurement as JSON values, by name."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values: NaN becomes null, infinity the string "inf"."""

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[R]:
        return iter(self.modules)

    def __getitem__(self, name: str) -> R:
        """Return the row with a name, or the only row whose name has it as a dotted suffix.

        Raises
        ------
        KeyError
            If no row or several rows match.
        """
        exact = [row for row in self.modules if row.name == name]
        found = exact or [row for row in self.modules if naming.is_suffix(name, row.name)]
        if len(found) == 1:
            return found[0]
        reason = f"{len(found)} modules end with" if found else "no module is named"
        raise KeyError(f"{reason} {name!r}")

    def __repr__(self) -> str:
        return listing(self._title(), map(_line, self), len(self), "report.modules or report.to_pandas()")

    def _repr_html_(self) -> str:
        """Return the first rows as a table, for notebooks."""
        # Imported here because `html` of the standard library slows down the import of lorank.
        from lorank.report.html_table import notebook_table

        return notebook_table(self._title(), self.modules, self.leading)

    def _title(self) -> str:
        facts = [counted(len(self), *self.noun)]
        if self.skipped:
            facts.append(f"{counted(len(self.skipped), 'tensor')} skipped")
        if self.num_parameters is not None:
            facts.append(counted(self.num_parameters, "parameter"))
        facts += [f"{name}={value!r}" for name, value in self.settings().items()]
        source = printable_name(self.source or "an unnamed model")
        return f"{type(self).__name__} of {source}: {', '.join(facts)}"


def _line(row: Row) -> str:
    known = [column for column in row.leading[:_NUMBERS] if row.number(column) is not None]
    facts = [f"{column} {row.text(column)}" for column in known]
    shown = map(printable, [*facts, *row.flags])
    return f"{printable_name(row.name)} ({row.shape[0]}x{row.shape[1]}): {', '.join(shown)}"
