"""The distance of a spectrum to the Marchenko-Pastur law."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from lorank import _core


def marchenko_pastur_distance(
    eigenvalues: npt.NDArray[np.float64], shape: tuple[int, int], scale: Literal["mean", "median"] = "mean"
) -> float:
    """Compute the Kolmogorov-Smirnov distance of a spectrum to the Marchenko-Pastur law.

    ``max |F_p(x) - F(x / sigma^2)|``, with `F_p` the distribution of the `p` eigenvalues and `F` the law for
    variance 1 and ratio ``1 / Q = min(out, in) / max(out, in)``.

    Parameters
    ----------
    eigenvalues
        All ``p = min(out, in)`` eigenvalues of ``W^T W``, ascending.
    shape
        ``(out, in)`` of the weight, in any order.
    scale
        Estimate of ``sigma^2``, as in `marchenko_pastur`.

    Returns
    -------
    float
        The distance, from 0 to 1; nan for a spectrum of zeros.

    Notes
    -----
    Source: the law is that of [MP].

    Examples
    --------
    >>> import numpy as np, lorank
    >>> W = np.random.default_rng(0).standard_normal((100, 400))
    >>> marchenko_pastur_distance(lorank.spectrum(W), W.shape) < 0.03
    True
    """
    variance = bulk_scale(eigenvalues, shape, scale)
    if not variance > 0:
        return math.nan
    law = marchenko_pastur_cdf(eigenvalues / variance, min(shape) / max(shape))
    steps = np.arange(len(eigenvalues) + 1) / len(eigenvalues)
    return float(max((steps[1:] - law).max(), (law - steps[:-1]).max()))


def bulk_scale(
    eigenvalues: npt.NDArray[np.float64], shape: tuple[int, int], scale: Literal["mean", "median"]
) -> float:
    """Return the scale ``sigma^2`` of the bulk of a spectrum, as in `marchenko_pastur`."""
    if scale == "mean":
        return float(eigenvalues.mean())
    return float(np.median(eigenvalues)) / _core.marchenko_pastur_median(min(shape) / max(shape))


def marchenko_pastur_cdf(x: npt.NDArray[np.float64], ratio: float) -> npt.NDArray[np.float64]:
    """Return the distribution function of the Marchenko-Pastur law with variance 1.

    Parameters
    ----------
    x
        The arguments.
    ratio
        Ratio of the smaller side to the larger one, above 0 and at most 1.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    inside = (x > low) & (x < high)
    part = x[inside]
    root = np.sqrt((high - part) / (part - low))
    area = np.sqrt((high - part) * (part - low)) + math.pi * ratio
    area -= (1 + ratio) * np.arctan((root**2 - 1) / (2 * root))
    if ratio < 1:
        area += (1 - ratio) * np.arctan((low * root**2 - high) / (2 * (1 - ratio) * root))
    result = np.where(x >= high, 1.0, 0.0)
    result[inside] = np.clip(area / (2 * math.pi * ratio), 0.0, 1.0)
    return result
