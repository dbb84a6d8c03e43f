"""The Hill estimator of a spectrum's power-law exponent."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from lorank import _core


def alpha_hill(eigenvalues: npt.ArrayLike, *, convention: Literal["median", "xmin_mid"] = "median") -> float:
    """PL_Alpha_Hill, the Hill estimate of a spectrum's power-law exponent.

    ``alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k})`` with ``k = ceil(n/2)``, over
    the ``n`` numerically non-zero eigenvalues (above ``p * eps * lambda_max``).

    Parameters
    ----------
    eigenvalues
        The ``p`` eigenvalues of ``W^T W``, in any order and unit.
    convention
        ``"median"``: the paper's. ``"xmin_mid"``: threshold ``lambda[n // 2]``, itself part of the
        tail, as in the published AlphaPruning and TempBalance code.

    Returns
    -------
    float
        The exponent. ``nan`` with fewer than two non-zero eigenvalues (three for "xmin_mid"),
        ``inf`` if the tail is all equal.

    Raises
    ------
    ValueError
        If an eigenvalue is not finite, or negative beyond rounding.

    Notes
    -----
    Source: Fine-Tuning Large Language Models using LoRA with Adaptive Rank Allocation Based on
    Spectral Analysis, equation 2.
    """
    return _core.alpha_hill(np.ravel(eigenvalues), convention)
