"""The Tracy-Widom threshold of a spectrum, and the eigenvalues above it."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorank.statistics.marchenko_pastur import MarchenkoPastur
from lorank.statistics.marchenko_pastur_distance import bulk_scale

# The 95 % quantile of the Tracy-Widom law of order 1.
_QUANTILE = 0.9793


def tracy_widom(
    eigenvalues: npt.NDArray[np.float64], shape: tuple[int, int], scale: Literal["mean", "median"] = "mean"
) -> MarchenkoPastur:
    """Compute the threshold that the largest eigenvalue of a random matrix exceeds with probability 5 %.

    With ``n = max(out, in) - 1/2``, ``p = min(out, in) - 1/2`` and ``s = sqrt(n) + sqrt(p)``,
    ``edge = sigma^2 / max(out, in) * (s^2 + 0.9793 s (1 / sqrt(n) + 1 / sqrt(p))^(1/3))``.

    Parameters
    ----------
    eigenvalues
        All ``min(out, in)`` eigenvalues of ``W^T W``, ascending.
    shape
        ``(out, in)`` of the weight, in any order.
    scale
        Estimate of ``sigma^2``, as in `marchenko_pastur`.

    Returns
    -------
    MarchenkoPastur
        The threshold, and the number of eigenvalues above it.

    Notes
    -----
    Source: [TW] for Gaussian entries, with the centring and scaling of [MA].
    """
    n, p = (math.sqrt(side - 0.5) for side in (max(shape), min(shape)))
    unit = bulk_scale(eigenvalues, shape, scale) / max(shape)
    edge = unit * ((n + p) ** 2 + _QUANTILE * (n + p) * (1 / n + 1 / p) ** (1 / 3))
    return MarchenkoPastur(edge, int(np.count_nonzero(eigenvalues > edge)))
