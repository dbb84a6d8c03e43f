"""Whether factors are what a file's flag says: singular vectors, each as long as its value wants it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# The cosines that rounding to a type gives two vectors that were orthogonal: twice its relative error.
# Energies err by the product of the two sides' cosines, a ten-thousandth at the very most.
_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_COMPUTED = 2.0**-12


def are_orthogonal(vectors: npt.NDArray[Any], dtype: str) -> bool:
    """Whether vectors are finite, and orthogonal up to the rounding of the type that they were stored in.

    Parameters
    ----------
    vectors
        ``(k, n)``, one a row. Vectors of zeros are orthogonal to all.
    dtype
        The stored element type by NumPy's name.
    """
    wide = vectors.astype(np.float64)
    if not np.all(np.isfinite(wide)):
        return False
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    units = np.divide(wide, lengths, out=np.zeros_like(wide), where=lengths > 0)
    cosines = np.abs(units @ units.T)
    np.fill_diagonal(cosines, 0.0)
    return float(cosines.max(initial=0.0)) <= _ROUNDING.get(dtype, _COMPUTED)
