"""Metrics of a spectrum that are computed only if asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from lorank._core import Matrix
from lorank.report import ModuleSpectrum
from lorank.report.optional_metrics import GROUPS
from lorank.statistics.entropy import spectral_entropy
from lorank.statistics.marchenko_pastur_distance import marchenko_pastur_distance
from lorank.statistics.randomized import jensen_shannon_distance, permuted
from lorank.statistics.tail_fits import tail_fits
from lorank.statistics.tracy_widom import tracy_widom

Eigenvalues = npt.NDArray[np.float64]

RANDOMIZED = "randomized"
"""The group that needs the spectrum of the matrix with permuted entries."""


def with_metrics(
    row: ModuleSpectrum, eigenvalues: Eigenvalues, groups: Sequence[str], randomized: Eigenvalues | None
) -> ModuleSpectrum:
    """Return a row with groups of optional metrics.

    Parameters
    ----------
    row
        The row of a matrix with a spectrum.
    eigenvalues
        The spectrum, ascending.
    groups
        Names of groups in `GROUPS`.
    randomized
        Spectrum of the matrix with permuted entries, ascending; None if its group is not asked for.
    """
    found: dict[str, Any] = {}
    for group in groups:
        if group == RANDOMIZED:
            assert randomized is not None
            values = _randomized(row, eigenvalues, randomized)
        else:
            values = _FUNCTIONS[group](row, eigenvalues)
        found |= zip(GROUPS[group], values, strict=True)
    return replace(row, **found)


def permuted_matrix(matrix: Matrix) -> Matrix:
    """Return a matrix with its entries in random order."""
    return Matrix.from_array(permuted(matrix.to_array()))


def _mp_distance(row: ModuleSpectrum, eigenvalues: Eigenvalues) -> tuple[Any, ...]:
    return tuple(marchenko_pastur_distance(eigenvalues, row.shape, scale) for scale in ("mean", "median"))


def _tracy_widom(row: ModuleSpectrum, eigenvalues: Eigenvalues) -> tuple[Any, ...]:
    return (*tracy_widom(eigenvalues, row.shape, "mean"), *tracy_widom(eigenvalues, row.shape, "median"))


def _norms(row: ModuleSpectrum, eigenvalues: Eigenvalues) -> tuple[Any, ...]:
    if row.spectral_norm == 0.0:
        return 0.0, -math.inf, -math.inf, math.nan
    largest = 2 * math.log10(row.spectral_norm)
    relative = eigenvalues / eigenvalues[-1]
    power = np.sum(relative**row.powerlaw_alpha) if math.isfinite(row.powerlaw_alpha) else math.nan
    return (
        float(np.sqrt(eigenvalues).sum()),
        2 * math.log10(row.frobenius_norm),
        largest,
        row.powerlaw_alpha * largest + float(np.log10(power)),
    )


def _tail_fits(row: ModuleSpectrum, eigenvalues: Eigenvalues) -> tuple[Any, ...]:
    return tail_fits(eigenvalues[len(eigenvalues) - row.num_nonzero :], row.powerlaw_xmin)


def _entropy(_row: ModuleSpectrum, eigenvalues: Eigenvalues) -> tuple[Any, ...]:
    return spectral_entropy(eigenvalues), spectral_entropy(np.sqrt(eigenvalues))


def _randomized(row: ModuleSpectrum, eigenvalues: Eigenvalues, randomized: Eigenvalues) -> tuple[Any, ...]:
    return (
        jensen_shannon_distance(eigenvalues, randomized),
        tracy_widom(randomized, row.shape, "mean").spikes,
    )


_FUNCTIONS: Mapping[str, Callable[[ModuleSpectrum, Eigenvalues], tuple[Any, ...]]] = {
    "mp-distance": _mp_distance,
    "tracy-widom": _tracy_widom,
    "norms": _norms,
    "tail-fits": _tail_fits,
    "entropy": _entropy,
}
