"""The effective rank of gradients: the number of eigenvalues that hold a share of the energy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lorank import _core


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
    return _core.energy_rank(np.ravel(eigenvalues), energy)
