"""The result of profiling gradients, and its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal.json_fields import Fields
from lorank.modules.weight import Kind
from lorank.report.base import Evidence
from lorank.report.json_report import JsonReport
from lorank.report.json_values import plain
from lorank.report.rows import Row
from lorank.sources.base import Skipped
from lorank.statistics.effective_rank import effective_rank

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ModuleGradients(Row):
    """The gradients of one module.

    Attributes
    ----------
    name
        Dotted name of the module.
    module
        Name by which PEFT adapts the module.
    kind
        Role of the weight: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"expert"``.
    shape
        ``(out, in)``.
    effective_rank
        Smallest number of eigenvalues that hold the share `energy` of their sum; fractional if smoothed over
        windows. 0 if no gradient reached the module.
    eigenvalues
        Eigenvalues of ``C_ab = <G_a, G_b> / M`` for the gradients `G_a` of `M` batches, descending, float64,
        shape ``(M,)``, in the unit of a squared gradient.
    flags
        Remarks on the module, such as ``"no gradient reached it"``.
    """

    leading: ClassVar[Sequence[str]] = ("effective_rank", "mean_square")

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    effective_rank: float
    eigenvalues: npt.NDArray[np.float64]
    flags: tuple[str, ...] = ()

    @property
    def mean_square(self) -> float:
        """Mean squared Frobenius norm of the gradient, ``trace(C)``."""
        return float(self.eigenvalues.sum())


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GradientReport(JsonReport[ModuleGradients]):
    """The gradient spectra of a model's modules, one row each, as `profile_gradients` returns them.

    A report is data: it can be iterated, pickled, copied and compared.

    Attributes
    ----------
    modules
        Row of each module, in the order of the model.
    skipped
        Modules without a row, each with the reason.
    source
        Name of the model.
    num_parameters
        Number of parameters of the base model, tied ones counted once; None if unknown.
    energy
        Share of the spectrum that the effective ranks hold.
    sketch
        Size of the random projections; None without projections.
    num_batches
        Number of batches, `M`.
    unknown_parameters
        The reason why `num_parameters` is None.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> from lorank.report.gradients import ModuleGradients
    >>> row = ModuleGradients(
    ...     name="layers.0.q_proj",
    ...     module="layers.0.q_proj",
    ...     kind="linear",
    ...     shape=(8, 8),
    ...     effective_rank=2.0,
    ...     eigenvalues=np.array([3.0, 1.0, 0.0]),
    ... )
    >>> report = lorank.GradientReport([row], source="model", energy=0.9, num_batches=3)
    >>> report
    GradientReport of model: 1 module, energy=0.9, sketch=None, num_batches=3
      layers.0.q_proj (8x8): effective_rank 2, mean_square 4
    >>> report.with_energy(0.7)["q_proj"].effective_rank
    1.0
    """

    provides: ClassVar[Evidence] = "gradients"
    format: ClassVar[str] = "lorank.GradientReport"
    columns: ClassVar[Sequence[str]] = ModuleGradients.leading
    leading: ClassVar[Sequence[str]] = ModuleGradients.leading

    modules: Sequence[ModuleGradients]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    num_parameters: int | None = None
    energy: float = 0.9
    sketch: int | None = None
    num_batches: int = 0
    unknown_parameters: str = ""

    def with_energy(self, energy: float) -> GradientReport:
        """Return the report of the same spectra, with effective ranks for another share of the energy.

        Parameters
        ----------
        energy
            The share, above 0 and at most 1.
        """
        rows = [
            replace(row, effective_rank=float(effective_rank(row.eigenvalues, energy)))
            for row in self.modules
        ]
        return replace(self, modules=rows, energy=energy)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the profile as JSON values, by name."""
        return {"energy": self.energy, "sketch": self.sketch, "num_batches": self.num_batches}

    @classmethod
    def assembled(cls, rows: Sequence[ModuleGradients], skipped: Sequence[Skipped], header: Fields) -> Self:
        """Build a report from rows and the header of a file."""
        return cls(
            rows,
            skipped,
            header.text("source"),
            header.optional_integer("num_parameters"),
            header.number("energy", 0, 1),
            header.optional_integer("sketch", 1),
            header.integer("num_batches"),
            header.text("unknown_parameters", ""),
        )

    @staticmethod
    def row_to_json(row: ModuleGradients) -> dict[str, Any]:
        """Return the fields of a row except its identity."""
        eigenvalues = [plain(value) for value in row.eigenvalues.tolist()]
        return {"effective_rank": row.effective_rank, "eigenvalues": eigenvalues}

    @staticmethod
    def row_from_json(identity: Mapping[str, Any], entry: Fields) -> ModuleGradients:
        """Build a row from its identity and the result of `row_to_json`."""
        return ModuleGradients(
            **identity,
            effective_rank=entry.measure("effective_rank", 0),
            eigenvalues=entry.measures("eigenvalues"),
        )
