"""The spectrum of one matrix, and the two statistics that ranks are allocated by."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal.threads import thread_count
from lorank.sources import arrays

Accuracy = Literal["exact", "fast", "sampled"]


class MarchenkoPastur(NamedTuple):
    """The bulk edge in units of the eigenvalues, and the number of eigenvalues above it."""

    edge: float
    spikes: int


def check_accuracy(accuracy: str) -> None:
    """Raise ValueError for what is no accuracy."""
    if accuracy not in get_args(Accuracy):
        raise ValueError(
            f"accuracy must be 'exact' (float64), 'fast' (float32) or 'sampled' (estimates), not {accuracy!r}"
        )


def spectrum(
    W: Any, *, accuracy: Literal["exact", "fast"] = "exact", threads: int | None = None
) -> npt.NDArray[np.float64]:
    """Eigenvalues of ``W^T W``: the squared singular values of a weight.

    Parameters
    ----------
    W
        NumPy array or CPU torch tensor, shape ``(out, in)``: float64, float32, float16, bfloat16
        or float8. Read in place where layout allows, never modified.
    accuracy
        ``"exact"``: float64 arithmetic whatever the input type. ``"fast"``: float32 for the Gram matrix
        and its reduction; what lies below about ``1e-6`` of the largest eigenvalue is noise.
    threads
        At most so many (default: all that the process may use). The result does not depend on it.

    Returns
    -------
    numpy.ndarray
        The ``p = min(out, in)`` eigenvalues, float64, ascending. The absolute error of each is a
        small multiple of ``eps`` times the largest, ``eps`` that of float64 or float32.

    Raises
    ------
    NumericalError
        If `W` holds NaN or infinite values, or values whose squares leave the range of float64.
    TypeError, ValueError
        If `W` is no 2-D floating-point array.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> lorank.spectrum(np.diag([1.0, 2.0, 3.0])).round(12)
    array([1., 4., 9.])
    """
    check_accuracy(accuracy)
    if accuracy not in ("exact", "fast"):
        raise ValueError("accuracy='sampled' has no single eigenvalues: see lorank.analyze")
    array = W if arrays.is_array(W) else np.asarray(W, dtype=np.float64)
    return _core.spectrum(arrays.matrix(array), accuracy, thread_count(threads))


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


def marchenko_pastur(
    eigenvalues: npt.ArrayLike, shape: tuple[int, int], *, scale: Literal["mean", "median"] = "mean"
) -> MarchenkoPastur:
    """The Marchenko-Pastur bulk edge and the spikes beyond it.

    ``edge = sigma^2 (1 + 1/sqrt(Q))^2`` with ``Q = max(out, in) / min(out, in)``.

    Parameters
    ----------
    eigenvalues
        All ``p = min(out, in)`` eigenvalues of ``W^T W``, in any order.
    shape
        ``(out, in)`` of the weight; the order does not matter.
    scale
        Where ``sigma^2`` comes from. ``"mean"``: the mean eigenvalue. ``"median"``: the median
        eigenvalue over the median of the unit law, which spikes do not inflate.

    Returns
    -------
    MarchenkoPastur
        ``edge`` in units of the eigenvalues, ``spikes`` a count.

    Raises
    ------
    ValueError
        If the number of eigenvalues does not fit the shape, or one is not finite or negative.

    Notes
    -----
    Source: Fine-Tuning Large Language Models using LoRA with Adaptive Rank Allocation Based on
    Spectral Analysis, equations 3 and 4.
    """
    out, fan_in = shape
    if out < 0 or fan_in < 0:
        raise ValueError(f"no weight has the shape {out}x{fan_in}")
    return MarchenkoPastur(*_core.marchenko_pastur(np.ravel(eigenvalues), (int(out), int(fan_in)), scale))
