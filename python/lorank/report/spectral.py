"""The result of an analysis: one row a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal import extras
from lorank._internal.equality import ByValue
from lorank.modules import naming
from lorank.modules.facts import ModelFacts
from lorank.modules.weight import Kind
from lorank.report.base import Evidence, Report
from lorank.sources.base import MatrixInfo, Skipped

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleSpectrum(ByValue):
    """What is known of one matrix. Numbers are float64; what is undefined is nan.

    Attributes
    ----------
    name, module, kind, shape, dtype, expert
        As in `MatrixInfo`; `shape` is ``(out, in)``.
    accuracy
        ``"exact"`` (float64 arithmetic), ``"fast"`` (float32) or ``"sampled"`` (an estimate).
    num_nonzero
        Eigenvalues above ``p * eps(float64) * lambda_max``; those that float32 cannot tell from zero
        count.
    eigenvalue_error
        What an eigenvalue may be off by, an a-priori bound in their unit; nan of an estimate.
    num_unresolved
        Eigenvalues that count and may be zero: they are below `eigenvalue_error`.
    alpha_hill, alpha_hill_error, alpha_hill_xmin_mid
        PL_Alpha_Hill in both conventions; what the first may be off by, given `eigenvalue_error`, and
        whether or not those unresolved count.
    mp_edge, mp_spikes, mp_spikes_error, mp_edge_median, mp_spikes_median
        Marchenko-Pastur edge and eigenvalues above it, by the mean and by the median scale; what the
        number by the mean may be off by.
    mp_soft_rank
        ``mp_edge / lambda_max``.
    powerlaw_alpha, powerlaw_xmin, powerlaw_distance
        The continuous power-law fit of Clauset, Shalizi and Newman.
    alpha_weighted
        ``powerlaw_alpha * log10(lambda_max)``.
    frobenius_norm, spectral_norm
        In units of the weight.
    stable_rank, effective_rank, participation_ratio
        ``sum lambda / lambda_max``; exp of the entropy of the normalised eigenvalues;
        ``(sum lambda)^2 / sum lambda^2``.
    flags
        What a reader of the row should know ("NaN or infinite values", "zero matrix", ...).
    eigenvalues
        The spectrum, ascending, if it was asked for.
    """

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    dtype: str
    expert: int | None = None
    accuracy: str = "exact"
    num_nonzero: int = 0
    eigenvalue_error: float = np.nan
    num_unresolved: int = 0
    alpha_hill: float = np.nan
    alpha_hill_error: float = np.nan
    alpha_hill_xmin_mid: float = np.nan
    mp_edge: float = np.nan
    mp_spikes: int = 0
    mp_spikes_error: int = 0
    mp_edge_median: float = np.nan
    mp_spikes_median: int = 0
    mp_soft_rank: float = np.nan
    powerlaw_alpha: float = np.nan
    powerlaw_xmin: float = np.nan
    powerlaw_distance: float = np.nan
    alpha_weighted: float = np.nan
    frobenius_norm: float = np.nan
    spectral_norm: float = np.nan
    stable_rank: float = np.nan
    effective_rank: float = np.nan
    participation_ratio: float = np.nan
    flags: tuple[str, ...] = ()
    eigenvalues: npt.NDArray[np.float64] | None = None

    @property
    def num_parameters(self) -> int:
        """Entries of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def has_spectrum(self) -> bool:
        """Whether the matrix could be analysed; a zero matrix can."""
        return not np.isnan(self.frobenius_norm)

    @classmethod
    def of(
        cls,
        info: MatrixInfo,
        accuracy: str,
        metrics: dict[str, Any],
        eigenvalues: npt.NDArray[np.float64] | None = None,
    ) -> ModuleSpectrum:
        """A row from what a source and the core say of a matrix."""
        flags: tuple[str, ...] = ()
        if metrics["num_nonzero"] == 0:
            flags = ("zero matrix",)
        elif metrics["num_nonzero"] == 1:
            flags = ("rank 1: alpha is undefined",)
        elif np.isinf(metrics["alpha_hill"]):
            flags = ("equal eigenvalues: alpha is infinite",)
        return cls(**_identity(info), accuracy=accuracy, **metrics, flags=flags, eigenvalues=eigenvalues)

    @classmethod
    def failed(cls, info: MatrixInfo, reason: str) -> ModuleSpectrum:
        """A row for a matrix without a spectrum."""
        return cls(**_identity(info), flags=(reason,))


METRICS: tuple[str, ...] = tuple(
    field.name
    for field in fields(ModuleSpectrum)
    if field.name
    not in {"name", "module", "kind", "shape", "dtype", "expert", "accuracy", "flags", "eigenvalues"}
)
"""The names of a row's numbers, in order."""


def _identity(info: MatrixInfo) -> dict[str, Any]:
    return {field.name: getattr(info, field.name) for field in fields(MatrixInfo)}


@dataclass(frozen=True, slots=True, eq=False)
class SpectralReport(Report[ModuleSpectrum]):
    """Spectra of the matrices of a model.

    Attributes
    ----------
    modules
        One row a matrix, in the source's order.
    skipped
        Tensors without a row, with reasons.
    source
        What was analysed.
    accuracy
        What was asked for: ``"exact"``, ``"fast"`` or ``"sampled"``.
    num_parameters
        Parameters of the whole model, tied ones once; None if unknown.
    unknown_parameters
        The reason why `num_parameters` is None: the report is from CSV, or a weight is packed in an unknown
        way.
    facts
        Facts about the model beside its matrices; not kept in CSV.
    """

    provides: ClassVar[Evidence] = "spectra"

    modules: Sequence[ModuleSpectrum]
    skipped: Sequence[Skipped] = ()
    source: str = ""
    accuracy: str = "exact"
    num_parameters: int | None = None
    unknown_parameters: str = ""
    facts: ModelFacts = field(default_factory=ModelFacts)

    def select(self, include: naming.Targets = None, exclude: naming.Targets = None) -> SpectralReport:
        """The report of the modules that are included and not excluded."""
        names = set(naming.filtered({row.module for row in self.modules}, include, exclude))
        rows = [row for row in self.modules if row.module in names]
        return replace(self, modules=rows)

    def to_pandas(self) -> pd.DataFrame:
        """A data frame, one row a matrix: identity, metrics, flags joined by "; ".

        Metrics of a matrix without a spectrum are NaN, counts too.
        """
        from lorank.report.files import columns

        pandas = extras.require("pandas", "report", "for data frames")
        frame: pd.DataFrame = pandas.DataFrame(columns(self))
        return frame

    def save(self, path: str | Path) -> None:
        """Write the report by its ending: ``.json``, ``.parquet`` (extra ``report``) or ``.csv``.

        JSON and parquet keep everything, kept eigenvalues included. CSV keeps the rows' numbers.
        The file appears whole or not at all.

        Raises
        ------
        ValueError
            For another ending.
        """
        from lorank.report.files import save

        save(self, Path(path))

    def to_html(self, path: str | Path) -> None:
        """Write a self-contained page with interactive pictures and the table (extra ``report``).

        Metrics by block for every module type; the spectra themselves if they were kept.
        """
        from lorank.report.html import write_html

        write_html(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SpectralReport:
        """Read what `save` wrote.

        Raises
        ------
        FormatError
            If the file is not a report.
        """
        from lorank.report.files import load

        return load(Path(path))
