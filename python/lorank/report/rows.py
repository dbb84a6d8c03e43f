"""The rows of reports, and the spectrum of a matrix as a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lorank._internal.equality import ByValue
from lorank.modules.weight import Kind
from lorank.report.optional_metrics import OPTIONAL_COLUMNS
from lorank.sources.base import MatrixInfo


class Row(ByValue):
    """A row of any report. Rows are equal if all their values are equal; NaN equals NaN."""

    __slots__ = ()

    leading: ClassVar[Sequence[str]]
    """Names of the numbers that short tables show."""

    name: str
    module: str
    kind: Kind
    shape: tuple[int, int]
    flags: tuple[str, ...]

    def number(self, column: str) -> float | int | None:
        """Return a number of the row by its name; None for NaN, and for a number that was not computed."""
        found: float | int | None = getattr(self, column)
        return None if found is None or math.isnan(found) else found

    def text(self, column: str) -> str:
        """Return a number of the row as text: "-" for None, four significant digits for a float."""
        value = self.number(column)
        if value is None:
            return "-"
        return str(value) if isinstance(value, int) else f"{value:.4g}"

    def __repr__(self) -> str:
        known = [column for column in self.leading if self.number(column) is not None]
        numbers = "".join(f", {column}={self.text(column)}" for column in known)
        flags = f", flags={self.flags!r}" if self.flags else ""
        return f"{type(self).__name__}({self.name!r}, shape={self.shape}{numbers}{flags}, ...)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, repr=False)
class ModuleSpectrum(Row):
    """Metrics of the spectrum of one matrix.

    Eigenvalues are those of ``W^T W``: the squares of the singular values. Undefined numbers are NaN.

    Attributes
    ----------
    name
        Dotted name of the module; for an expert, the name of the parameter with the expert's number in
        brackets.
    module
        Name by which PEFT adapts the matrix: the module, or the parameter that stacks experts.
    kind
        Role of the weight: ``"linear"``, ``"embedding"``, ``"conv"`` or ``"expert"``.
    shape
        ``(out, in)``; kernels of convolutions are flattened to ``(out, in * kh * kw)``.
    dtype
        Stored element type.
    expert
        Number of the expert in its stack; None for other matrices.
    accuracy
        ``"exact"`` (float64 arithmetic), ``"fast"`` (float32) or ``"sampled"`` (an estimate).
    num_nonzero
        Number of eigenvalues above ``p * eps(float64) * lambda_max`` with ``p = min(out, in)``, including
        those that float32 arithmetic cannot distinguish from zero.
    eigenvalue_error
        A-priori bound on the error of an eigenvalue, in the unit of the eigenvalues; nan for estimates.
    num_unresolved
        Number of eigenvalues in `num_nonzero` that are below `eigenvalue_error`, so that they may be zero.
    alpha_hill, alpha_hill_xmin_mid
        Hill estimate of the power-law exponent (PL_Alpha_Hill) in the conventions of `alpha_hill`.
    alpha_hill_error
        Bound on the error of `alpha_hill` due to `eigenvalue_error`, valid with and without the unresolved
        eigenvalues; an error bar for estimates.
    mp_edge, mp_spikes
        Marchenko-Pastur edge from the mean eigenvalue, and the number of eigenvalues above it.
    mp_spikes_error
        Bound on the error of `mp_spikes`; an error bar for estimates.
    mp_edge_median, mp_spikes_median
        Marchenko-Pastur edge from the median eigenvalue, and the number of eigenvalues above it.
    mp_soft_rank
        ``mp_edge / lambda_max``.
    powerlaw_alpha, powerlaw_xmin, powerlaw_distance
        Exponent, threshold and Kolmogorov-Smirnov distance of the continuous power-law fit of [CSN].
    alpha_weighted
        ``powerlaw_alpha * log10(lambda_max)``.
    frobenius_norm, spectral_norm
        Norms of the matrix, in the unit of the weights.
    stable_rank
        ``sum lambda / lambda_max``.
    effective_rank
        Exponential of the entropy of the normalised eigenvalues [ERANK].
    participation_ratio
        ``(sum lambda)^2 / sum lambda^2``.
    flags
        Remarks on the matrix, such as ``"zero matrix"``.
    eigenvalues
        The spectrum, ascending; None unless it was kept.
    mp_distance, mp_distance_median
        Kolmogorov-Smirnov distance of the spectrum to the Marchenko-Pastur law with the scale of `mp_edge` or
        `mp_edge_median`. This metric and the following ones are None unless `analyze` was asked for them.
    tw_edge, tw_edge_median
        Threshold that the largest eigenvalue of a random matrix with the scale of `mp_edge` or
        `mp_edge_median` exceeds with probability 5 % [TW].
    tw_spikes, tw_spikes_median
        Number of eigenvalues above the threshold.
    nuclear_norm
        Sum of the singular values.
    log_frobenius_norm, log_spectral_norm
        ``log10(sum lambda)`` and ``log10(lambda_max)``: the logarithms of the squared norms [WEIGHTWATCHER].
    log_alpha_norm
        ``log10(sum lambda^powerlaw_alpha)`` [WEIGHTWATCHER].
    exponential_rate, truncated_alpha, truncated_rate
        Parameters of the laws ``exp(-rate x)`` and ``x^-alpha exp(-rate x)``, fitted to the eigenvalues from
        `powerlaw_xmin` on by maximum likelihood [CSN].
    exponential_ratio, truncated_ratio
        Log-likelihood ratio of the power law to each of these laws; above 0 if the power law fits better.
    exponential_p, truncated_p
        Probability of such a ratio if both laws fit equally, or if the power law is true.
    eigenvalue_entropy, singular_value_entropy
        ``-sum p ln p``, with the shares `p` of the eigenvalues in their sum, or of the singular values in
        theirs. `effective_rank` is the exponential of the first; that of [ERANK] is that of the second.
    randomized_distance
        Jensen-Shannon distance of the spectrum to that of the matrix with permuted entries [WEIGHTWATCHER].
    correlation_traps
        Number of eigenvalues of the matrix with permuted entries above its `tw_edge`.
    """

    leading: ClassVar[Sequence[str]] = (
        "alpha_hill",
        "mp_spikes",
        "powerlaw_alpha",
        "powerlaw_distance",
        "stable_rank",
        "effective_rank",
        "spectral_norm",
    )

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
    mp_distance: float | None = None
    mp_distance_median: float | None = None
    tw_edge: float | None = None
    tw_spikes: int | None = None
    tw_edge_median: float | None = None
    tw_spikes_median: int | None = None
    nuclear_norm: float | None = None
    log_frobenius_norm: float | None = None
    log_spectral_norm: float | None = None
    log_alpha_norm: float | None = None
    exponential_rate: float | None = None
    exponential_ratio: float | None = None
    exponential_p: float | None = None
    truncated_alpha: float | None = None
    truncated_rate: float | None = None
    truncated_ratio: float | None = None
    truncated_p: float | None = None
    eigenvalue_entropy: float | None = None
    singular_value_entropy: float | None = None
    randomized_distance: float | None = None
    correlation_traps: int | None = None

    @property
    def num_parameters(self) -> int:
        """Number of entries of the matrix."""
        return self.shape[0] * self.shape[1]

    @property
    def has_spectrum(self) -> bool:
        """True unless the matrix holds values that cannot be analysed; a zero matrix has a spectrum."""
        return not np.isnan(self.frobenius_norm)

    def number(self, column: str) -> float | int | None:
        """Return a number of the row by its name; None for NaN and for a count without a spectrum."""
        if column in COUNTS and not self.has_spectrum:
            return None
        return Row.number(self, column)

    @classmethod
    def of(
        cls,
        info: MatrixInfo,
        accuracy: str,
        metrics: dict[str, Any],
        eigenvalues: npt.NDArray[np.float64] | None = None,
    ) -> ModuleSpectrum:
        """Build the row of a matrix from its identity and the metrics that the core computed."""
        flags: tuple[str, ...] = ()
        if metrics["num_nonzero"] == 0:
            flags = ("zero matrix",)
        elif metrics["num_nonzero"] == 1:
            flags = ("rank 1: alpha is undefined",)
        elif np.isinf(metrics["alpha_hill"]):
            flags = ("equal eigenvalues: alpha is infinite",)
        return cls(
            **identity(info), accuracy=accuracy, **_shared(metrics), flags=flags, eigenvalues=eigenvalues
        )

    @classmethod
    def failed(cls, info: MatrixInfo, reason: str) -> ModuleSpectrum:
        """Return the row of a matrix without a spectrum, with the reason as its flag."""
        return cls(**identity(info), flags=(reason,))


METRICS: tuple[str, ...] = tuple(
    field.name
    for field in fields(ModuleSpectrum)
    if field.name
    not in {"name", "module", "kind", "shape", "dtype", "expert", "accuracy", "flags", "eigenvalues"}
    and field.name not in OPTIONAL_COLUMNS
)
"""Names of the numbers of a `ModuleSpectrum`, in order."""

COUNTS = frozenset({"num_nonzero", "num_unresolved", "mp_spikes", "mp_spikes_error", "mp_spikes_median"})
"""Names of the metrics that are integers."""


def _shared(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return metrics that hold equal floats as one object, because a float takes three times its size."""
    known: dict[float, float] = {}
    return {
        name: value if type(value) is not float or value == 0 else _shared_float(value, known)
        for name, value in metrics.items()
    }


def _shared_float(value: float, known: dict[float, float]) -> float:
    return np.nan if math.isnan(value) else known.setdefault(value, value)


def identity(matrix: MatrixInfo | ModuleSpectrum) -> dict[str, Any]:
    """Return the fields that identify a matrix, from its identity or its row."""
    return {field.name: getattr(matrix, field.name) for field in fields(MatrixInfo)}
