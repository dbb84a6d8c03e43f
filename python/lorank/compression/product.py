"""The singular value decomposition of a product of two factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal import core_calls
from lorank.sources import arrays

Array = npt.NDArray[np.float64]


class ProductSvd(NamedTuple):
    """``U @ diag(s) @ Vt``: ``U (out, k)``, ``s (k,)`` descending, ``Vt (k, in)``."""

    U: Array
    s: Array
    Vt: Array


def product_svd(B: Any, A: Any) -> ProductSvd:
    """The thin SVD of ``B @ A``, which is never formed.

    Parameters
    ----------
    B, A
        NumPy arrays or CPU torch tensors, ``(out, r)`` and ``(r, in)``, of any floating-point type.

    Returns
    -------
    ProductSvd
        In float64, of the `k` singular values that are not zero up to rounding.

    Raises
    ------
    NumericalError
        If a factor holds NaN or infinite values.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: PARA, equations 2 to 5: QR of both factors, SVD of the small core.
    """
    left, right = (arrays.matrix(x).to_array().astype(np.float64) for x in (B, A))
    terms = [(arrays.matrix(left), arrays.matrix(right), 1.0)]
    (decomposition,) = core_calls.collect(lambda receive: _core.decompose([terms], 1, receive))
    values = decomposition.singular_values
    kept = values > 0
    ((b, a),) = core_calls.collect(
        lambda receive: _core.rebuild([(decomposition, kept.tolist())], 1, receive)
    )
    columns, rows = b.to_array(), a.to_array()
    # Balanced columns and rows are as long as the root of their value.
    roots = np.sqrt(values[kept])
    return ProductSvd(columns / roots, values[kept], rows / roots[:, None])
