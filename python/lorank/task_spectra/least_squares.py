"""Least squares from ``X^T X`` and ``X^T Y`` alone, whatever the rank and the units of `X`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """``X = Q R``, as far as ``X^T X`` tells: `Q` has orthonormal columns and is never formed.

    Attributes
    ----------
    whiten
        Shape ``(d_in, rank)``, with ``X @ whiten = Q``.
    unseen
        Orthonormal basis of the directions on which no sample has a component, ``(d_in, d_in - rank)``.
    """

    whiten: Array
    unseen: Array

    @property
    def rank(self) -> int:
        """Of `X`, numerically."""
        return int(self.whiten.shape[1])

    def projected(self, cross: Array) -> Array:
        """``Q^T Y`` from ``X^T Y``, shape ``(rank, d_out)``."""
        projected: Array = self.whiten.T @ cross
        return projected

    def solve(self, cross: Array) -> Array:
        """The least-squares weights from ``X^T Y``, of smallest norm, shape ``(d_in, d_out)``."""
        weights = self.whiten @ self.projected(cross)
        smallest: Array = weights - self.unseen @ (self.unseen.T @ weights)
        return smallest


def factor(gram: Array) -> Factor:
    """Factor ``X^T X``.

    Columns are brought to one norm first, so that their units do not decide which of them count.
    By Cholesky, several times faster, where that is certain to lose no direction; else by
    eigendecomposition, which drops those below the resolution of ``X^T X``: eigenvalues under
    ``d_in eps`` times the largest.

    Parameters
    ----------
    gram
        ``X^T X``, shape ``(d_in, d_in)``.
    """
    norms = np.sqrt(np.diagonal(gram))
    norms = np.where(norms > 0, norms, 1.0)
    scaled = gram / norms[:, None] / norms[None, :]
    whiten = _by_cholesky(scaled)
    if whiten is not None:
        return Factor(whiten / norms[:, None], np.zeros((len(gram), 0)))
    values, vectors = np.linalg.eigh(scaled)
    kept = values > max(len(gram) * _EPS * values[-1], 0.0)
    whiten = vectors[:, kept] / np.sqrt(values[kept])
    # Directions without samples are such in any units, but orthogonal in one system of units only:
    # the smallest norm is meant in the caller's.
    unseen = np.linalg.qr(vectors[:, ~kept] / norms[:, None])[0]
    return Factor(whiten / norms[:, None], unseen)


def _by_cholesky(scaled: Array) -> Array | None:
    """``L^{-T}`` of a matrix of unit diagonal, or None if its rank is in doubt."""
    size = len(scaled)
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(scaled))
    except np.linalg.LinAlgError:
        return None
    # The trace of the inverse bounds 1 / smallest eigenvalue, that of the matrix the largest.
    sure: bool = np.sum(np.square(inverse)) * size * size * _EPS < 1.0
    return inverse.T if sure else None
