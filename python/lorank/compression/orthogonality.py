"""Checks that factors are singular vectors, as the flag of a file states."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# Largest cosines between vectors that were orthogonal before they were rounded to a type: twice the type's
# relative error. The relative error of energies is the product of the cosines of both sides, below 1e-4.
_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_COMPUTED = 2.0**-12


def are_orthogonal(vectors: npt.NDArray[Any], dtype: str) -> bool:
    """Return True if vectors are finite, and orthogonal up to the rounding of their stored type.

    Parameters
    ----------
    vectors
        Vectors ``(k, n)``, one per row. A vector of zeros is orthogonal to all others.
    dtype
        Stored element type by NumPy's name.
    """
    wide = vectors.astype(np.float64)
    if not np.all(np.isfinite(wide)):
        return False
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    units = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    cosines = np.abs(units @ units.T)
    np.fill_diagonal(cosines, 0.0)
    return float(cosines.max(initial=0.0)) <= _ROUNDING.get(dtype, _COMPUTED)
