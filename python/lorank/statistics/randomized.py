"""The comparison of a spectrum with that of the same matrix after a permutation of its entries."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

SEED = 0
"""Seed of the permutation; every matrix has its own generator."""


def permuted(matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a copy of a matrix with its entries in random order."""
    entries = matrix.flatten()
    np.random.default_rng(SEED).shuffle(entries)
    return entries.reshape(matrix.shape)


def jensen_shannon_distance(
    eigenvalues: npt.NDArray[np.float64], randomized: npt.NDArray[np.float64]
) -> float:
    """Return the Jensen-Shannon distance of two spectra, each in ascending order and divided by its sum.

    ``sqrt((KL(p, m) + KL(q, m)) / 2)`` with ``m = (p + q) / 2``, in nats, as in [WEIGHTWATCHER]; nan if a
    spectrum is zero.

    Examples
    --------
    >>> import numpy as np
    >>> jensen_shannon_distance(np.array([1.0, 3.0]), np.array([2.0, 6.0]))
    0.0
    """
    sums = float(eigenvalues.sum()), float(randomized.sum())
    if not min(sums) > 0:
        return math.nan
    p, q = eigenvalues / sums[0], randomized / sums[1]
    mean = (p + q) / 2
    return math.sqrt(max(0.0, (_divergence(p, mean) + _divergence(q, mean)) / 2))


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Return the Kullback-Leibler divergence of `p` from `q`."""
    known = (p > 0) & (q > 0)
    return float((p[known] * np.log(p[known] / q[known])).sum())
