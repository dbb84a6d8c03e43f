"""The Marchenko-Pastur edge of a spectrum, and the eigenvalues above it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from lorank import _core


class MarchenkoPastur(NamedTuple):
    """The bulk edge in units of the eigenvalues, and the number of eigenvalues above it."""

    edge: float
    spikes: int


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
