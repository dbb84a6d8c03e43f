"""What every report is: rows about modules, from which a method can choose ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Generic, Literal, Protocol, TypeVar

from lorank._internal.equality import ByValue
from lorank.modules import naming
from lorank.modules.weight import Kind
from lorank.sources.base import Skipped

Evidence = Literal["spectra", "gradients", "tasks"]
"""What a report knows of its modules: of their weights, of their gradients, of their data."""


class Row(Protocol):
    """What identifies a row of any report; as in `MatrixInfo`."""

    @property
    def name(self) -> str:
        """The matrix's or module's name."""

    @property
    def module(self) -> str:
        """What an adapter would name."""

    @property
    def kind(self) -> Kind:
        """What it does with its weight."""

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""


R = TypeVar("R", bound=Row, covariant=True)


class Report(ByValue, Generic[R]):
    """Rows in the model's order, by position and by name."""

    __slots__ = ()

    provides: ClassVar[Evidence]
    modules: Sequence[R]
    skipped: Sequence[Skipped]
    source: str
    num_parameters: int | None
    unknown_parameters: str

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[R]:
        return iter(self.modules)

    def __getitem__(self, name: str) -> R:
        """The row of that name, or the only row whose name ends with it.

        Raises
        ------
        KeyError
            If no row, or more than one, fits.
        """
        exact = [row for row in self.modules if row.name == name]
        found = exact or [row for row in self.modules if naming.is_suffix(name, row.name)]
        if len(found) == 1:
            return found[0]
        what = f"{len(found)} modules end with" if found else "no module is named"
        raise KeyError(f"{what} {name!r}")
