"""Least squares from ``X^T X`` and ``X^T Y`` alone, for any rank and any units of `X`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """The factorisation ``X = Q R`` from ``X^T X``; `Q` has orthonormal columns and is never formed.

    Attributes
    ----------
    whiten
        The matrix with ``X @ whiten = Q``, shape ``(d_in, rank)``.
    unseen
        Orthonormal basis of the directions in which all samples are zero, shape ``(d_in, d_in - rank)``.
    """

    whiten: Array
    unseen: Array

    @property
    def rank(self) -> int:
        """Numerical rank of `X`."""
        return int(self.whiten.shape[1])

    def projected(self, cross: Array) -> Array:
        """Return ``Q^T Y`` from ``X^T Y``, shape ``(rank, d_out)``."""
        projected: Array = self.whiten.T @ cross
        return projected

    def solve(self, cross: Array) -> Array:
        """Return the least-squares weights of smallest norm from ``X^T Y``, shape ``(d_in, d_out)``."""
        weights = self.whiten @ self.projected(cross)
        smallest: Array = weights - self.unseen @ (self.unseen.T @ weights)
        return smallest


def factor(gram: Array) -> Factor:
    """Factor ``X^T X``.

    Columns are scaled to norm 1 first, so that the numerical rank does not depend on their units. If `X` has
    full rank beyond doubt, the factor comes from the Cholesky decomposition, which is several times faster.
    Otherwise it comes from the eigendecomposition, without directions below the resolution of ``X^T X``:
    eigenvalues of at most ``d_in eps`` times the largest.

    Parameters
    ----------
    gram
        The matrix ``X^T X``, shape ``(d_in, d_in)``.

    Examples
    --------
    >>> X = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]])
    >>> found = factor(X.T @ X)
    >>> found.rank
    2
    >>> np.round(found.solve(X.T @ np.array([[1.0], [3.0], [5.0]])).ravel(), 12).tolist()
    [1.0, 2.0]
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
    # The norm is measured in the caller's units, so the basis is made orthogonal in these units.
    unseen = np.linalg.qr(vectors[:, ~kept] / norms[:, None])[0]
    return Factor(whiten / norms[:, None], unseen)


def _by_cholesky(scaled: Array) -> Array | None:
    """Return ``L^{-T}`` of a matrix ``L L^T`` of unit diagonal; None if its full rank is in doubt."""
    size = len(scaled)
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(scaled))
    except np.linalg.LinAlgError:
        return None
    # Upper bounds: the trace of the inverse for 1 / smallest eigenvalue, `size` for the largest eigenvalue.
    is_sure: bool = np.sum(np.square(inverse)) * size * size * _EPS < 1.0
    return inverse.T if is_sure else None
