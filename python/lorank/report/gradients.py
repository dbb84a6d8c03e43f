"""The result of profiling gradients: one row a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal.equality import ByValue
from lorank.modules.weight import Kind
from lorank.report.base import Evidence
from lorank.report.json_report import JsonReport
from lorank.sources.base import Skipped

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleGradients(ByValue):
    """What is known of one module's gradients.

    Attributes
    ----------
    name, module, kind, shape
        As in `MatrixInfo`; `shape` is ``(out, in)``.
    effective_rank
        Fewest eigenvalues that hold the report's `energy` of their sum; a fraction once it has been
        smoothed over time. 0 if no gradient reached the module.
    eigenvalues
        Of ``C_ab = <G_a, G_b> / M``, descending, float64, one per batch; in units of the loss per
        weight, squared.
    flags
        What a reader of the row should know.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    effective_rank: float
    eigenvalues: npt.NDArray[np.float64]
    flags: tuple[str, ...] = ()

    @property
    def mean_square(self) -> float:
        """The mean squared Frobenius norm of the gradient, ``trace(C)``."""
        return float(self.eigenvalues.sum())


@dataclass(frozen=True, slots=True, eq=False)
class GradientReport(JsonReport[ModuleGradients]):
    """Gradient spectra of the modules of a model.

    Attributes
    ----------
    modules
        One row a module, in the model's order.
    skipped
        Modules without a row, with reasons.
    source
        The model.
    num_parameters
        Parameters of the base model, tied ones once; None if unknown.
    energy
        The share of the spectrum that effective ranks hold.
    sketch
        The size of the random projections, None for none.
    num_batches
        Batches that were seen: `M`.
    unknown_parameters
        The reason why `num_parameters` is None.
    """

    provides: ClassVar[Evidence] = "gradients"
    format: ClassVar[str] = "lorank.GradientReport"
    columns: ClassVar[Sequence[str]] = ("effective_rank", "mean_square")

    modules: Sequence[ModuleGradients]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    num_parameters: int | None = None
    energy: float = 0.9
    sketch: int | None = None
    num_batches: int = 0
    unknown_parameters: str = ""

    def with_energy(self, energy: float) -> GradientReport:
        """The same spectra, with effective ranks for another share of them."""
        rows = [
            replace(row, effective_rank=float(effective_rank(row.eigenvalues, energy)))
            for row in self.modules
        ]
        return replace(self, modules=rows, energy=energy)

    def settings(self) -> dict[str, Any]:
        """What the file's header says beside what every report's does."""
        return {"energy": self.energy, "sketch": self.sketch, "num_batches": self.num_batches}

    @classmethod
    def assembled(
        cls, rows: Sequence[ModuleGradients], skipped: Sequence[Skipped], header: Mapping[str, Any]
    ) -> Self:
        """The report of what a file holds."""
        sketch = header["sketch"]
        return cls(
            rows,
            skipped,
            header["source"],
            header["num_parameters"],
            float(header["energy"]),
            None if sketch is None else int(sketch),
            int(header["num_batches"]),
            header.get("unknown_parameters", ""),
        )

    @staticmethod
    def row_to_json(row: ModuleGradients) -> dict[str, Any]:
        """What a row holds beside its identity."""
        return {"effective_rank": row.effective_rank, "eigenvalues": row.eigenvalues.tolist()}

    @staticmethod
    def row_from_json(identity: Mapping[str, Any], entry: Mapping[str, Any]) -> ModuleGradients:
        """The inverse."""
        eigenvalues = np.asarray(entry["eigenvalues"], dtype=np.float64)
        return ModuleGradients(
            **identity, effective_rank=float(entry["effective_rank"]), eigenvalues=eigenvalues
        )


def effective_rank(eigenvalues: npt.ArrayLike, energy: float) -> int:
    """Fewest eigenvalues, largest first, that hold a share of their sum; 0 if all are zero.

    Parameters
    ----------
    eigenvalues
        Not negative, in any order; rounding below zero counts as zero.
    energy
        The share, above 0 and at most 1.

    Raises
    ------
    ValueError
        If the share is out of range, or an eigenvalue is not finite.

    Notes
    -----
    Source: GARD, the energy-based effective rank. Sums count as equal within 1e-12 of the total.

    Examples
    --------
    >>> effective_rank([4.0, 3.0, 2.0, 1.0], energy=0.7)
    2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, not {energy!r}")
    given = np.asarray(eigenvalues, dtype=np.float64)
    if not np.all(np.isfinite(given)):
        raise ValueError("eigenvalues must be finite")
    values = np.sort(np.clip(given, 0, None))[::-1]
    if not len(values) or values[0] == 0:
        return 0
    # Relative to the largest: the sum of 1e300s is finite then.
    sums = np.cumsum(values / values[0])
    return int(np.searchsorted(sums, energy * (1 - 1e-12) * sums[-1])) + 1
