"""The result of comparing two models, and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np

from lorank._internal.json_fields import LARGEST_SIDE, Fields, check_unique, reading
from lorank.modules.weight import Kind
from lorank.report import flat_files
from lorank.report.base import Evidence
from lorank.report.json_report import JsonReport
from lorank.report.rows import Row
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ModuleComparison(Row):
    """The change of one matrix from model A to model B. Undefined numbers are NaN.

    Attributes
    ----------
    name
        Dotted name of the module in A; for an expert, the name of the parameter with the expert's number in
        brackets.
    module
        Name by which PEFT adapts the matrix.
    kind
        Role of the weight: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"expert"``.
    shape
        Shape of the compared matrices, as in `ModuleSpectrum`.
    dtype_a, dtype_b
        Stored element types.
    relative_change
        ``||B - A||_F / ||A||_F``; infinite if only A is zero.
    alpha_hill_a, alpha_hill_b
        Hill estimates of the exponents.
    mp_spikes_a, mp_spikes_b
        Numbers of eigenvalues above the Marchenko-Pastur edge.
    stable_rank_a, stable_rank_b
        Stable ranks.
    subspace_rank
        Dimension `k` of the compared subspaces: the requested one, or the smaller rank of A and B if that is
        lower.
    subspace_gap
        Smaller value of ``(s_k - s_{k+1}) / s_k`` in A and B. If it is near 0, the `k` leading vectors of the
        matrix are nearly exchangeable with the next ones, and small changes cause large angles. NaN for equal
        matrices.
    left_angle_max, left_angle_mean
        Largest and mean principal angle, in degrees, between the spaces of the `k` leading left singular
        vectors (the side of the outputs).
    right_angle_max, right_angle_mean
        The same for the right singular vectors (the side of the inputs).
    flags
        Remarks on the pair.
    """

    leading: ClassVar[Sequence[str]] = (
        "relative_change",
        "alpha_hill_change",
        "mp_spikes_change",
        "stable_rank_change",
        "left_angle_max",
        "right_angle_max",
        "left_angle_mean",
        "right_angle_mean",
    )

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    dtype_a: str
    dtype_b: str
    relative_change: float = np.nan
    alpha_hill_a: float = np.nan
    alpha_hill_b: float = np.nan
    mp_spikes_a: int = 0
    mp_spikes_b: int = 0
    stable_rank_a: float = np.nan
    stable_rank_b: float = np.nan
    subspace_rank: int = 0
    subspace_gap: float = np.nan
    left_angle_max: float = np.nan
    left_angle_mean: float = np.nan
    right_angle_max: float = np.nan
    right_angle_mean: float = np.nan
    flags: tuple[str, ...] = ()

    @property
    def has_numbers(self) -> bool:
        """True unless a matrix holds values that are not finite."""
        return not np.isnan(self.relative_change)

    @property
    def alpha_hill_change(self) -> float:
        """``alpha_hill_b - alpha_hill_a``."""
        # Two infinite exponents have no difference.
        return 0.0 if self.alpha_hill_a == self.alpha_hill_b else self.alpha_hill_b - self.alpha_hill_a

    @property
    def mp_spikes_change(self) -> int:
        """``mp_spikes_b - mp_spikes_a``."""
        return self.mp_spikes_b - self.mp_spikes_a

    @property
    def stable_rank_change(self) -> float:
        """``stable_rank_b - stable_rank_a``."""
        return self.stable_rank_b - self.stable_rank_a

    def number(self, column: str) -> float | int | None:
        """Return a number of the row by its name; None for NaN and for a count without numbers."""
        if column in _COUNTS and not self.has_numbers:
            return None
        return Row.number(self, column)


_COUNTS = ("mp_spikes_a", "mp_spikes_b", "mp_spikes_change", "subspace_rank")
_DERIVED = ("alpha_hill_change", "mp_spikes_change", "stable_rank_change")
COMPARED: tuple[str, ...] = (
    "relative_change",
    "alpha_hill_a",
    "alpha_hill_b",
    "alpha_hill_change",
    "mp_spikes_a",
    "mp_spikes_b",
    "mp_spikes_change",
    "stable_rank_a",
    "stable_rank_b",
    "stable_rank_change",
    "subspace_rank",
    "subspace_gap",
    "left_angle_max",
    "left_angle_mean",
    "right_angle_max",
    "right_angle_mean",
)
"""Names of the numbers of a `ModuleComparison`, in order."""

_REPORT = "a comparison report of lorank"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ComparisonReport(JsonReport[ModuleComparison]):
    """The changes of a model's matrices from model A to model B, one row each.

    A report is data: it can be iterated, pickled, copied and compared.

    Attributes
    ----------
    modules
        Row of each matrix that both models have, in the order of A.
    skipped
        Matrices and tensors without a row, each with the reason.
    source
        Name of model A.
    compared_with
        Name of model B.
    prefix_a, prefix_b
        Prefixes by which only the names of A or B begin, as ``"bert"``; empty if the names are equal.
    accuracy
        Requested accuracy of the spectra.
    rank
        Requested dimension of the compared subspaces.
    num_parameters
        Number of parameters of A, tied ones counted once; None if unknown.
    unknown_parameters
        The reason why `num_parameters` is None.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> a, b = np.diag([3.0, 2.0, 1.0]), np.diag([3.0, 2.0, 0.0])
    >>> report = lorank.compare({"mlp.weight": a}, {"mlp.weight": b}, rank=2)
    >>> report
    ComparisonReport of mapping: 1 matrix, 9 parameters, compared_with='mapping', accuracy='exact', rank=2
      mlp (3x3): relative_change 0.2673, alpha_hill_change 0.675, mp_spikes_change 0
    >>> report["mlp"].left_angle_max
    0.0
    """

    provides: ClassVar[Evidence] = "changes"
    format: ClassVar[str] = "lorank.ComparisonReport"
    columns: ClassVar[Sequence[str]] = COMPARED
    leading: ClassVar[Sequence[str]] = ModuleComparison.leading
    noun: ClassVar[tuple[str, str]] = ("matrix", "matrices")

    modules: Sequence[ModuleComparison]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    compared_with: str = ""
    prefix_a: str = ""
    prefix_b: str = ""
    accuracy: str = "exact"
    rank: int = 0
    num_parameters: int | None = None
    unknown_parameters: str = ""

    def settings(self) -> dict[str, Any]:
        """Return the settings of the comparison as JSON values, by name."""
        prefixes = {"prefix_a": self.prefix_a, "prefix_b": self.prefix_b}
        return {
            "compared_with": self.compared_with,
            **{name: prefix for name, prefix in prefixes.items() if prefix},
            "accuracy": self.accuracy,
            "rank": self.rank,
        }

    def save(self, path: str | Path) -> None:
        """Write the report to a file, which appears complete or not at all.

        Parameters
        ----------
        path
            A name that ends with ``.json``, ``.parquet`` (extra ``report``) or ``.csv``. CSV holds the rows
            only.

        Raises
        ------
        ValueError
            If the name has another ending.
        """
        path = Path(path)
        _check_ending(path)
        if path.suffix == ".csv":
            flat_files.save_csv(path, self._flat())
        elif path.suffix == ".parquet":
            header = {k: v for k, v in replace(self, modules=()).to_json().items() if k != "modules"}
            flat_files.save_parquet(path, self._flat(), _TYPES, self.format, header)
        else:
            JsonReport.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote.

        Raises
        ------
        FormatError
            If the file is not a report of this class.
        ValueError
            If the name has an ending that `save` does not write.
        """
        path = Path(path)
        _check_ending(path)
        if path.suffix == ".json":
            return super(ComparisonReport, cls).load(path)
        with reading(path, _REPORT):
            if path.suffix == ".csv":
                entries = flat_files.load_csv(path, _TYPES.keys(), _NUMBERS)
                unknown = "the report was read from CSV, which keeps rows only, unlike JSON and parquet"
                return cls(_flat_rows(entries), source=str(path), unknown_parameters=unknown)
            _, (header, entries) = flat_files.load_parquet(path, [cls.format])
            return cls.from_header(_flat_rows(entries), header)

    @classmethod
    def assembled(cls, rows: Sequence[ModuleComparison], skipped: Sequence[Skipped], header: Fields) -> Self:
        """Build a report from rows and the header of a file."""
        return cls(
            rows,
            skipped,
            header.text("source"),
            header.text("compared_with"),
            header.text("prefix_a", ""),
            header.text("prefix_b", ""),
            header.text("accuracy"),
            header.integer("rank"),
            header.optional_integer("num_parameters"),
            header.text("unknown_parameters", ""),
        )

    @staticmethod
    def row_to_json(row: ModuleComparison) -> dict[str, Any]:
        """Return the fields of a row except its identity."""
        return {"dtype_a": row.dtype_a, "dtype_b": row.dtype_b} | {c: _value(row, c) for c in COMPARED}

    @staticmethod
    def row_from_json(identity: Mapping[str, Any], entry: Fields) -> ModuleComparison:
        """Build a row from its identity and the result of `row_to_json`."""
        has_numbers = not np.isnan(entry.measure("relative_change", 0))
        stored = [name for name in COMPARED if name not in _DERIVED]
        numbers: dict[str, Any] = {name: entry.measure(name, 0) for name in stored if name not in _COUNTS}
        numbers |= {name: entry.integer(name) if has_numbers else 0 for name in stored if name in _COUNTS}
        return ModuleComparison(
            **identity, dtype_a=entry.text("dtype_a"), dtype_b=entry.text("dtype_b"), **numbers
        )

    def _flat(self) -> dict[str, list[Any]]:
        """Return the rows as columns; flags are joined by "; "."""
        rows = self.modules
        table: dict[str, list[Any]] = {name: [getattr(row, name) for row in rows] for name in _IDENTITY}
        table |= {"out": [row.shape[0] for row in rows], "in": [row.shape[1] for row in rows]}
        table |= {column: [_value(row, column) for row in rows] for column in COMPARED}
        return table | {"flags": ["; ".join(row.flags) for row in rows]}


_IDENTITY = ("name", "module", "kind", "dtype_a", "dtype_b")
_TYPES: Mapping[str, flat_files.ColumnType] = {
    **dict.fromkeys((*_IDENTITY, "flags"), "text"),
    **dict.fromkeys(("out", "in"), "integer"),
    **{column: "integer" if column in _COUNTS else "number" for column in COMPARED},
}
_NUMBERS = frozenset(name for name, kind in _TYPES.items() if kind != "text")


def _check_ending(path: Path) -> None:
    if path.suffix not in (endings := (".json", ".parquet", ".csv")):
        raise ValueError(f"{path}: the name of a report must end with {', '.join(endings)}")


def _value(row: ModuleComparison, column: str) -> Any:
    """Return a number of a row; None for a count in a row without numbers."""
    return row.number(column) if column in _COUNTS else getattr(row, column)


def _flat_rows(entries: Sequence[Fields]) -> list[ModuleComparison]:
    rows = []
    for entry in entries:
        flags = entry.text("flags")
        shape = entry.integer("out", 1, LARGEST_SIDE), entry.integer("in", 1, LARGEST_SIDE)
        identity = {
            "name": entry.text("name"),
            "module": entry.text("module"),
            "kind": entry.choice("kind", get_args(Kind)),
            "shape": shape,
            "flags": tuple(flags.split("; ")) if flags else (),
        }
        rows.append(ComparisonReport.row_from_json(identity, entry))
    check_unique([row.name for row in rows])
    return rows
