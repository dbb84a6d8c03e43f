"""The subspaces of the leading left and right singular vectors of a matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Largest smaller side of matrices that are decomposed in full.
_DENSE = 192
# Largest number of entries that are held in float64; larger matrices are converted in blocks of rows.
_HELD = 1 << 24
_BLOCK = 1 << 20
# Columns of a block beyond the rank, and largest number of columns of the Krylov space between two restarts.
_EXTRA, _SPACE = 8, 512
# The iteration ends if the bound on the sine of the error angle is below this, or after this many columns.
_TOLERANCE, _MOST_COLUMNS = 1e-6, 4096
# Rounding errors of a decomposition, relative to the largest value.
_ROUNDING = 8 * float(np.finfo(np.float64).eps)
# If the iteration reaches a bound above this, a matrix whose smaller side is at most this is decomposed.
_POOR, _DENSE_IF_POOR = 1e-5, 1024


class LeadingSubspaces(NamedTuple):
    """Orthonormal bases of the leading singular subspaces of a matrix.

    Attributes
    ----------
    left, right
        Bases of the leading left and right singular vectors, shapes ``(out, k)`` and ``(in, k)``.
    gap
        ``(s_k - s_{k+1}) / s_k``, to three digits. The subspaces of a matrix with gap 0 are not unique.
    error
        Bound on the angle in degrees between the computed and the exact subspaces, provided that the
        iteration found the ``k + 1`` leading directions; 90 if it is unknown.
    """

    left: Array
    right: Array
    gap: float
    error: float


def leading_subspaces(matrix: npt.NDArray[Any], rank: int) -> LeadingSubspaces:
    """Compute the subspaces of the `rank` leading singular vectors of a matrix in float64 arithmetic.

    A small matrix is decomposed in full. For a larger one, block Lanczos iteration with full
    reorthogonalisation and thick restarts computes the leading eigenvectors of ``W^T W`` or ``W W^T``,
    whichever is smaller. By the sin-theta theorem [DK], ``||residual|| / (lambda_k - lambda_{k+1})`` bounds
    the sine of the error angle.

    Parameters
    ----------
    matrix
        Finite float32 or float64 array that is not zero, shape ``(out, in)``.
    rank
        Dimension of the subspaces, from 1 to the rank of the matrix.

    Returns
    -------
    LeadingSubspaces
        The bases, with the gap to the next singular value and the bound on their error.
    """
    if matrix.shape[0] < matrix.shape[1]:
        left, right, *rest = leading_subspaces(np.ascontiguousarray(matrix.T), rank)
        return LeadingSubspaces(right, left, *rest)
    scale, is_held = power_of_two_scale(matrix), matrix.size <= _HELD
    step = len(matrix) if is_held else max(1, _BLOCK // matrix.shape[1])
    held = np.multiply(matrix, scale, dtype=np.float64) if is_held else matrix

    def blocks() -> Iterator[Array]:
        """Yield the matrix in blocks of rows, as float64 with a largest entry near 1."""
        for first in range(0, len(held), step):
            block = held[first : first + step]
            yield block if is_held else np.multiply(block, scale, dtype=np.float64)

    width, sine = matrix.shape[1], 1.0
    is_small = width <= max(_DENSE, 4 * rank + 2 * _EXTRA)
    if not is_small:
        values, right, sine = _iterated(
            lambda x: sum(block.T @ (block @ x) for block in blocks()), width, rank
        )
        sine += _rounding(values[0] ** 2, values[rank - 1] ** 2 - values[rank] ** 2)
    if is_small or (sine > _POOR and width <= _DENSE_IF_POOR):
        values, right = _decomposed(blocks(), width)
        sine = _rounding(values[0], values[rank - 1] - (values[rank] if rank < width else 0.0))
    following = float(values[rank]) if rank < width else 0.0
    error = math.degrees(math.asin(min(1.0, sine)))
    image = np.concatenate([block @ right[:, :rank] for block in blocks()])
    left = np.linalg.qr(image)[0]
    smallest = float(values[rank - 1])
    gap = max(0.0, 1.0 - following / smallest) if smallest > 0.0 else 0.0
    return LeadingSubspaces(left, right[:, :rank], gap, error)


def _rounding(largest: float, gap: float) -> float:
    """Return the sine of the angle by which rounding errors turn the vectors of values above a gap."""
    return _ROUNDING * float(largest) / float(gap) if gap > 0 else 1.0


def power_of_two_scale(*matrices: npt.NDArray[Any]) -> float:
    """Return the power of two that brings the largest entry of some matrices near 1; NaN if one is NaN.

    The entries times this scale have squares within the range of float64.
    """
    largest = float(np.max([extreme for matrix in matrices for extreme in (matrix.max(), -matrix.min())]))
    if not math.isfinite(largest):
        return math.nan
    return math.ldexp(1.0, min(1000, -math.frexp(largest)[1]))


def _decomposed(blocks: Iterator[Array], width: int) -> tuple[Array, Array]:
    """Return all singular values and right vectors, from the triangle of a QR decomposition."""
    triangle = np.zeros((0, width))
    for block in blocks:
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, block]), mode="r"))
    _, values, rows = np.linalg.svd(triangle, full_matrices=False)
    return values, rows.T


def _iterated(apply: Callable[[Array], Any], width: int, rank: int) -> tuple[Array, Array, float]:
    """Return singular values, leading right vectors, and the bound on the sine of their error angle.

    The first ``rank + 1`` values are accurate.

    Parameters
    ----------
    apply
        Function that multiplies a matrix by ``W^T W``.
    width
        Order of ``W^T W``.
    rank
        Number of vectors to compute.
    """
    size = rank + _EXTRA
    most = min(width - size, max(_SPACE, 4 * size))
    space, projected = np.zeros((width, most + size)), np.zeros((most + size, most + size))
    space[:, :size] = np.linalg.qr(np.random.default_rng(0).standard_normal((width, size)))[0]
    used, done, next_check = 0, 0, 2 * size
    while True:
        image = apply(space[:, used : used + size])
        known = space[:, : used + size]
        columns = known.T @ image
        projected[: used + size, used : used + size] = columns
        projected[used : used + size, : used + size] = columns.T
        image = image - known @ columns
        image -= known @ (known.T @ image)
        following, coupling = np.linalg.qr(image)
        used, done = used + size, done + size
        is_full = used + size > most
        if is_full or done >= next_check:
            next_check = done + max(size, used // 4)
            values, vectors = np.linalg.eigh(projected[:used, :used])
            values, vectors = values[::-1], vectors[:, ::-1]
            sine = _sine_of_error(values, coupling @ vectors[used - size :, : rank + 1], rank)
            if sine <= _TOLERANCE or done >= _MOST_COLUMNS:
                return np.sqrt(np.maximum(values, 0.0)), known @ vectors[:, :rank], sine
        if is_full:
            kept = 2 * size
            space[:, :kept] = known @ vectors[:, :kept]
            projected[:] = 0.0
            projected[range(kept), range(kept)] = values[:kept]
            used = kept
        # The columns beyond an invariant space are rounding errors, which are not orthogonal to it.
        following -= space[:, :used] @ (space[:, :used].T @ following)
        space[:, used : used + size] = np.linalg.qr(following)[0]


def _sine_of_error(values: Array, residuals: Array, rank: int) -> float:
    """Return the bound on the sine of the error angle of the leading eigenvectors.

    The residuals are those of the leading eigenvectors and of the next one.
    """
    residual = float(np.linalg.norm(residuals[:, :rank], 2))
    gap = float(values[rank - 1] - values[rank]) - residual - float(np.linalg.norm(residuals[:, rank]))
    return min(1.0, residual / gap) if gap > 0 else 1.0
