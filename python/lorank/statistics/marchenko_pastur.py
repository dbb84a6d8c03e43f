"""The Marchenko-Pastur edge of a spectrum, and the eigenvalues above it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lorank import _core


class MarchenkoPastur(NamedTuple):
    """The Marchenko-Pastur edge of a spectrum.

    Attributes
    ----------
    edge
        Upper edge of the bulk, in the unit of the eigenvalues.
    spikes
        Number of eigenvalues above the edge.
    """

    edge: float
    spikes: int


def marchenko_pastur(
    eigenvalues: npt.ArrayLike, shape: tuple[int, int], *, scale: Literal["mean", "median"] = "mean"
) -> MarchenkoPastur:
    """Compute the Marchenko-Pastur edge of a spectrum and the number of eigenvalues above it.

    ``edge = sigma^2 (1 + 1/sqrt(Q))^2`` with ``Q = max(out, in) / min(out, in)``.

    Parameters
    ----------
    eigenvalues
        All ``p = min(out, in)`` eigenvalues of ``W^T W``, in any order.
    shape
        ``(out, in)`` of the weight, in any order.
    scale
        Estimate of ``sigma^2``. ``"mean"``: the mean eigenvalue. ``"median"``: the median eigenvalue divided
        by the median of the law for ``sigma = 1``; spikes do not inflate this estimate.

    Returns
    -------
    MarchenkoPastur
        The edge, and the number of spikes above it.

    Raises
    ------
    ValueError
        If the number of eigenvalues does not fit the shape, or an eigenvalue is negative or not finite.

    Notes
    -----
    Source: [HTSR-LORA], equations 3 and 4; the law is that of [MP].

    Examples
    --------
    >>> import lorank
    >>> lorank.marchenko_pastur([1.0, 1.0, 1.0, 1.0, 6.0], (5, 20))
    MarchenkoPastur(edge=4.5, spikes=1)
    """
    out, fan_in = shape
    if out < 0 or fan_in < 0:
        raise ValueError(f"no weight has the shape {out}x{fan_in}")
    return MarchenkoPastur(*_core.marchenko_pastur(np.ravel(eigenvalues), (int(out), int(fan_in)), scale))
