"""How well weights of every rank predict samples that they were not fitted to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorank.task_spectra.least_squares import Array
from lorank.task_spectra.moments import InputMoments, others

# An output that varies less than this, relative to its size, is constant as far as sums of squares tell.
_STEADY = 1e-12
# The share of the full-rank R^2 that the predicted rank must reach: the paper's criterion.
_ENOUGH = 0.95

NO_FOLDS = "too few samples for cross-validation: no predicted R2"
STEADY_OUTPUTS = "outputs that do not vary are left out of the predicted R2"
NO_VARIATION = "no output varies: no predicted R2"
FULL_RANK_FAILS = "the full rank predicts no better than the mean: predicted_rank is the smallest that does"
NOTHING_PREDICTED = "no rank predicts better than the mean: predicted_rank is 1"


@dataclass(frozen=True, slots=True, eq=False)
class TargetMoments:
    """Sums with `Y`, by fold.

    Attributes
    ----------
    cross
        ``X^T Y``, shape ``(folds, d_in, d_out)``.
    squares
        Diagonal of ``Y^T Y``, shape ``(folds, d_out)``.
    sums
        Column sums of `Y`, shape ``(folds, d_out)``.
    """

    cross: Array
    squares: Array
    sums: Array


class PredictedRank(NamedTuple):
    """A rank, and what was out of the ordinary."""

    rank: int
    flags: tuple[str, ...]


def held_out_errors(inputs: InputMoments, targets: TargetMoments) -> Array:
    """Squared errors of weights of every rank on the fold left out, summed over all folds.

    For every fold: least squares on the others, truncated to each rank in turn by its singular value
    decomposition; all from the sums, no sample is needed.

    Returns
    -------
    numpy.ndarray
        Shape ``(p + 1, d_out)``, ``p = min(d_in, d_out)``; row `r` for rank `r`.
    """
    _, d_in, d_out = targets.cross.shape
    errors = np.zeros((min(d_in, d_out) + 1, d_out))
    for fold in range(min(inputs.folds, inputs.num_samples)):
        weights = inputs.factor(without=fold).solve(others(targets.cross, fold))
        errors += targets.squares[fold]
        errors[1:] += np.cumsum(_gains(weights, inputs.gram(fold), targets.cross[fold]), axis=0)
    # Rounding of sums of squares, where a prediction is exact.
    return np.maximum(errors, 0.0)


def _gains(weights: Array, gram: Array, cross: Array) -> Array:
    """What every singular direction adds to the squared errors of one fold, shape ``(p, d_out)``.

    With ``W_r = P[:, :r] V[:r]`` and ``Z = P^T X^T X P``, rank `r` adds to output `j` the terms of
    ``||X W_r - Y||^2`` in which its index occurs: ``-2 (P^T X^T Y) V``, ``Z V V`` with itself and twice
    that with every rank before it.
    """
    left, right = _directions(weights)
    mixed = left.T @ gram @ left
    earlier = np.triu(mixed, 1).T @ right
    own = np.diagonal(mixed)[:, None] * right
    gains: Array = right * (2 * (earlier - left.T @ cross) + own)
    return gains


def _directions(weights: Array) -> tuple[Array, Array]:
    """``P, V`` with ``W = P V``, whose first `r` columns and rows are the best rank `r`.

    By eigendecomposition of the smaller Gram matrix, several times faster than a singular value
    decomposition. Only directions of less than ``sqrt(eps)`` times the largest value may mix, and
    what they explain is below the rounding of a squared error.
    """
    largest = float(np.max(np.abs(weights)))
    scaled = weights / largest if largest > 0 else weights
    if weights.shape[0] < weights.shape[1]:
        basis = np.linalg.eigh(scaled @ scaled.T)[1][:, ::-1]
        return basis, basis.T @ weights
    basis = np.linalg.eigh(scaled.T @ scaled)[1][:, ::-1]
    return weights @ basis, basis.T


def predicted_r2(errors: Array, targets: TargetMoments, num_samples: int) -> tuple[Array, tuple[str, ...]]:
    """R^2 on held-out samples, the mean over all outputs that vary, and flags.

    Returns
    -------
    numpy.ndarray
        Shape ``(p + 1,)``, entry `r` for rank `r`; all ``nan`` if no output varies or there is one
        sample only.
    tuple of str
        Flags.
    """
    curve = np.full(len(errors), np.nan)
    if num_samples < 2:
        return curve, (NO_FOLDS,)
    squares, sums = np.sum(targets.squares, axis=0), np.sum(targets.sums, axis=0)
    spread = squares - np.square(sums) / num_samples
    varies: npt.NDArray[np.bool_] = spread > _STEADY * squares
    if not np.any(varies):
        return curve, (NO_VARIATION,)
    curve = 1.0 - np.mean(errors[:, varies] / spread[varies], axis=1)
    return curve, () if np.all(varies) else (STEADY_OUTPUTS,)


def rank_from_curve(curve: Array) -> PredictedRank:
    """The smallest rank, at least 1, that reaches 95 % of the R^2 of the full rank.

    Where that is not positive, the smallest rank whose R^2 is: what the rule tends to as it falls to
    zero. Where none is, 1.
    """
    full = float(curve[-1])
    if np.isnan(full):
        return PredictedRank(1, ())
    if full > 0:
        return PredictedRank(1 + int(np.argmax(curve[1:] >= _ENOUGH * full)), ())
    if not np.any(curve[1:] > 0):
        return PredictedRank(1, (NOTHING_PREDICTED,))
    return PredictedRank(1 + int(np.argmax(curve[1:] > 0)), (FULL_RANK_FAILS,))
