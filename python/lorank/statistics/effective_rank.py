"""The effective rank of gradients: the number of eigenvalues that hold a share of the energy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def effective_rank(eigenvalues: npt.ArrayLike, energy: float) -> int:
    """Return the smallest number of eigenvalues that hold a share of their sum; 0 if all are zero.

    Parameters
    ----------
    eigenvalues
        Eigenvalues of a positive semidefinite matrix, in any order; negative ones count as zero.
    energy
        Share of the sum, above 0 and at most 1.

    Raises
    ------
    ValueError
        If the share is out of range, or an eigenvalue is not finite.

    Notes
    -----
    Source: [GARD], the energy-based effective rank. Sums that differ by less than 1e-12 of the total count
    as equal.

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
    # Division by the largest value keeps the sums of huge values finite.
    sums = np.cumsum(values / values[0])
    return int(np.searchsorted(sums, energy * (1 - 1e-12) * sums[-1])) + 1
