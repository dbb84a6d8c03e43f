"""The spectrum of one matrix."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from lorank import _core
from lorank._internal.threads import thread_count
from lorank.sources import arrays

Accuracy = Literal["exact", "fast", "sampled"]


def check_accuracy(accuracy: str) -> None:
    """Raise ValueError unless `accuracy` is a known accuracy."""
    if accuracy not in get_args(Accuracy):
        raise ValueError(
            f"accuracy must be 'exact' (float64), 'fast' (float32) or 'sampled' (estimates), not {accuracy!r}"
        )


def spectrum(
    W: Any, *, accuracy: Literal["exact", "fast"] = "exact", threads: int | None = None
) -> npt.NDArray[np.float64]:
    """Compute the eigenvalues of ``W^T W``: the squared singular values of a weight.

    Parameters
    ----------
    W
        NumPy array or CPU torch tensor, shape ``(out, in)``, of float64, float32, float16, bfloat16 or float8
        numbers. It is read in place if its layout allows, and is not modified.
        NumPy refuses to resize it during the call. If another thread writes to it, the result is unspecified.
    accuracy
        ``"exact"``: float64 arithmetic for every input type. ``"fast"``: float32 for the Gram matrix and its
        reduction; eigenvalues below about ``1e-6`` of the largest one are noise.
    threads
        Largest number of threads; by default all processors that the process may use. The result does not
        depend on the number of threads.

    Returns
    -------
    numpy.ndarray
        The ``p = min(out, in)`` eigenvalues, float64, ascending, shape ``(p,)``. The absolute error of each
        is a small multiple of ``eps * lambda_max``, with ``eps`` of float64 or float32.

    Raises
    ------
    NumericalError
        If `W` holds NaN or infinite values, or values whose squares exceed the range of float64.
    TypeError, ValueError
        If `W` is not a 2-D floating-point array.

    Examples
    --------
    >>> import numpy as np, lorank
    >>> lorank.spectrum(np.diag([1.0, 2.0, 3.0])).round(12)
    array([1., 4., 9.])
    """
    check_accuracy(accuracy)
    if accuracy not in ("exact", "fast"):
        raise ValueError("accuracy='sampled' does not compute single eigenvalues: use lorank.analyze")
    array = W if arrays.is_array(W) else np.asarray(W, dtype=np.float64)
    return _core.spectrum(arrays.matrix(array), accuracy, thread_count(threads))
