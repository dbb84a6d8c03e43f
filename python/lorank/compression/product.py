"""The singular value decomposition of a product of two factors."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lorank import _core
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
    found: list[Any] = []

    def on_result(_: int, outcome: Any) -> None:
        if isinstance(outcome, Exception):
            raise outcome
        found.append(outcome)

    _core.decompose([[(arrays.matrix(left), arrays.matrix(right), 1.0)]], 1, on_result)
    values = found[0].singular_values
    kept = values > 0
    _core.rebuild([(found[0], kept.tolist())], 1, on_result)
    columns, rows = (factor.to_array() for factor in found[1])
    # Balanced columns and rows are as long as the root of their value.
    roots = np.sqrt(values[kept])
    return ProductSvd(columns / roots, values[kept], rows / roots[:, None])
