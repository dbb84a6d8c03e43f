"""The Hill estimator of a spectrum's power-law exponent."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from lorank import _core


def alpha_hill(eigenvalues: npt.ArrayLike, *, convention: Literal["median", "xmin_mid"] = "median") -> float:
    """Estimate the power-law exponent of a spectrum by the Hill estimator (PL_Alpha_Hill).

    ``alpha = 1 + k / sum_{i=1..k} ln(lambda_{n-i+1} / lambda_{n-k})`` with ``k = ceil(n/2)``, over
    the ``n`` eigenvalues above ``p * eps * lambda_max``, in ascending order.

    Parameters
    ----------
    eigenvalues
        The ``p`` eigenvalues of ``W^T W``, in any order and unit.
    convention
        ``"median"``: the equation above. ``"xmin_mid"``: the threshold ``lambda[n // 2]`` is part of the
        tail, as in the published code of [ALPHAPRUNING] and [TEMPBALANCE].

    Returns
    -------
    float
        The exponent: ``nan`` with fewer than two non-zero eigenvalues (three for "xmin_mid"), ``inf`` if the
        eigenvalues of the tail are equal.

    Raises
    ------
    ValueError
        If an eigenvalue is not finite, or negative beyond rounding.

    Notes
    -----
    Source: [HTSR-LORA], equation 2; the estimator is that of [HILL].

    Examples
    --------
    >>> import lorank
    >>> round(lorank.alpha_hill([1.0, 2.0, 4.0, 8.0]), 4)
    1.9618
    """
    return _core.alpha_hill(np.ravel(eigenvalues), convention)
