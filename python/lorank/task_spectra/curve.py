"""The error of weights of every rank on held-out samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lorank.task_spectra.least_squares import Array
from lorank.task_spectra.moments import InputMoments, others

# Ratio of an output's variation to its sum of squares, up to which the variation may be a rounding error.
_STEADY = 1e-12
# Share of the full rank's R^2 that the predicted rank reaches: the criterion of [KSTAR].
_ENOUGH = 0.95

NO_FOLDS = "too few samples for cross-validation: no predicted R2"
STEADY_OUTPUTS = "outputs that do not vary are left out of the predicted R2"
NO_VARIATION = "no output varies: no predicted R2"
FULL_RANK_FAILS = (
    "the full rank predicts no better than the mean: predicted_rank is the smallest rank that predicts better"
)
NOTHING_PREDICTED = "no rank predicts better than the mean: predicted_rank is 1"


@dataclass(frozen=True, slots=True, eq=False)
class TargetMoments:
    """Sums over targets `Y`, for each fold.

    Attributes
    ----------
    cross
        ``X^T Y``, shape ``(folds, d_in, d_out)``.
    squares
        Sums of squares of `Y`, the diagonal of ``Y^T Y``, shape ``(folds, d_out)``.
    sums
        Sums of `Y`, shape ``(folds, d_out)``.
    """

    cross: Array
    squares: Array
    sums: Array


class PredictedRank(NamedTuple):
    """A rank, and flags for exceptional cases."""

    rank: int
    flags: tuple[str, ...]


def held_out_errors(inputs: InputMoments, targets: TargetMoments) -> Array:
    """Compute squared errors of weights of every rank on held-out folds, summed over all folds.

    The weights for a fold are the least-squares weights of the other folds, truncated to each rank by their
    singular value decomposition. All errors follow from sums, without the samples.

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
    # Exact predictions may have negative errors by rounding.
    return np.maximum(errors, 0.0)


def _gains(weights: Array, gram: Array, cross: Array) -> Array:
    """Compute the change of one fold's squared errors by each singular direction, shape ``(p, d_out)``.

    With ``W_r = P[:, :r] V[:r]`` and ``Z = P^T X^T X P``, direction `r` adds to the error of output `j` the
    terms of ``||X W_r - Y||^2`` that contain `r`: ``-2 (P^T X^T Y)_rj V_rj``, ``Z_rr V_rj^2``, and
    ``2 Z_sr V_sj V_rj`` for every direction `s` before it.
    """
    left, right = _directions(weights)
    mixed = left.T @ gram @ left
    earlier = np.triu(mixed, 1).T @ right
    own = np.diagonal(mixed)[:, None] * right
    gains: Array = right * (2 * (earlier - left.T @ cross) + own)
    return gains


def _directions(weights: Array) -> tuple[Array, Array]:
    """Return ``P, V`` with ``W = P V``, where ``P[:, :r] V[:r]`` is the best approximation of rank `r`.

    The eigendecomposition of the smaller Gram matrix is several times faster than a singular value
    decomposition. Directions with singular values below ``sqrt(eps)`` times the largest one may be mixed;
    their contribution is below the rounding error of a squared error.
    """
    largest = float(np.max(np.abs(weights)))
    scaled = weights / largest if largest > 0 else weights
    if weights.shape[0] < weights.shape[1]:
        basis = np.linalg.eigh(scaled @ scaled.T)[1][:, ::-1]
        return basis, basis.T @ weights
    basis = np.linalg.eigh(scaled.T @ scaled)[1][:, ::-1]
    return weights @ basis, basis.T


def predicted_r2(errors: Array, targets: TargetMoments, num_samples: int) -> tuple[Array, tuple[str, ...]]:
    """Compute the mean R^2 on held-out samples over all outputs that vary.

    Returns
    -------
    numpy.ndarray
        R^2 of rank `r` in entry `r`, shape ``(p + 1,)``; all ``nan`` if no output varies or there is only one
        sample.
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
    """Return the smallest rank, at least 1, that reaches 95 % of the full rank's R^2.

    If the full rank's R^2 is not positive, return the smallest rank with a positive R^2, which is the limit
    of the rule for R^2 toward zero. If no R^2 is positive, return 1.
    """
    full = float(curve[-1])
    if np.isnan(full):
        return PredictedRank(1, ())
    if full > 0:
        return PredictedRank(1 + int(np.argmax(curve[1:] >= _ENOUGH * full)), ())
    if not np.any(curve[1:] > 0):
        return PredictedRank(1, (NOTHING_PREDICTED,))
    return PredictedRank(1 + int(np.argmax(curve[1:] > 0)), (FULL_RANK_FAILS,))
