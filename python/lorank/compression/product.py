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
    """``U @ diag(s) @ Vt``: ``U (out, k)``, ``s (k,)`` descending, ``Vt (k, in)``, all float64."""

    U: Array
    s: Array
    Vt: Array


def product_svd(B: Any, A: Any) -> ProductSvd:
    """Compute the thin SVD of ``B @ A`` without forming the product.

    Parameters
    ----------
    B, A
        Factors ``(out, r)`` and ``(r, in)``: NumPy arrays or CPU torch tensors of any floating-point type.

    Returns
    -------
    ProductSvd
        The `k` singular values that are not zero up to rounding, and their vectors.

    Raises
    ------
    NumericalError
        If a factor holds NaN or infinite values.
    ValueError
        If the shapes do not fit.

    Notes
    -----
    Source: [PARA], equations 2 to 5: QR of both factors, SVD of the small core.

    Examples
    --------
    >>> import numpy as np
    >>> import lorank
    >>> B, A = np.array([[3.0], [4.0]]), np.array([[2.0, 0.0]])
    >>> lorank.product_svd(B, A).s
    array([10.])
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
    # The length of balanced columns and rows is the root of their singular value.
    roots = np.sqrt(values[kept])
    return ProductSvd(columns / roots, values[kept], rows / roots[:, None])
