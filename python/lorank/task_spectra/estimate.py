"""Estimates of a task's rank from sums over its samples [KSTAR]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from lorank.task_spectra.curve import TargetMoments, held_out_errors, predicted_r2, rank_from_curve
from lorank.task_spectra.decay import PiecewiseDecay, count_above, decay, piecewise_decay
from lorank.task_spectra.least_squares import Array
from lorank.task_spectra.moments import InputMoments

Space = Literal["weights", "prediction"]

AT_ROUNDING = "the residuals are at the rounding level: the noise is an upper bound"

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskEstimate:
    """The spectrum of a task, and the ranks that follow from it.

    Attributes
    ----------
    k_star
        Rank at which the decay reaches the noise, ``ceil(ln(C / tau) / ln rho)``, at least 1 and at most
        `num_above`.
    predicted_rank
        Smallest rank, at least 1, with 95 % of the full rank's predicted R^2.
    predicted_r2
        R^2 of each rank on held-out samples, entry `r` for rank `r`, shape ``(p + 1,)``; the uniform average
        over outputs, as in scikit-learn. NaN if undefined.
    piecewise
        The decay with up to three rates, and the rank at which its last piece reaches the noise.
    singular_values
        Singular values of the least-squares weights, in units of `Y` over units of `X`; in prediction space
        those of ``Q^T Y``, in units of `Y`. Descending, shape ``(p,)``, ``p = min(d_in, d_out)``.
    rho
        Decay rate of the values above `tau`; ``nan`` with fewer than two such values.
    tau
        Noise threshold, in the unit of the singular values.
    noise
        Standard deviation of the noise in an entry of `Y`, in units of `Y`, given or estimated.
    leading
        The constant `C`: the given value, or else the largest singular value.
    num_above
        Number of singular values above `tau`.
    num_samples
        Number of rows of `X` and `Y`.
    space
        Space of the singular values, ``"weights"`` or ``"prediction"``.
    flags
        Descriptions of exceptional cases.
    """

    k_star: int
    predicted_rank: int
    predicted_r2: Array
    piecewise: PiecewiseDecay
    singular_values: Array
    rho: float
    tau: float
    noise: float
    leading: float
    num_above: int
    num_samples: int
    space: Space
    flags: tuple[str, ...]


def check_options(noise: float | None, leading: float | None, space: str) -> None:
    """Raise ValueError for options of `task_spectrum` that are out of range."""
    for name, value in (("noise", noise), ("leading", leading)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {value!r}")
    if space not in get_args(Space):
        raise ValueError(f"space must be 'weights' or 'prediction', not {space!r}")


def estimate(
    inputs: InputMoments,
    targets: TargetMoments,
    *,
    noise: float | None,
    leading: float | None,
    space: Space,
) -> TaskEstimate:
    """Compute the estimate from sums; options are those of `task_spectrum`, checked by `check_options`."""
    n, (_, d_in, d_out) = inputs.num_samples, targets.cross.shape
    whole = inputs.factor()
    cross = np.sum(targets.cross, axis=0)
    projected = whole.projected(cross)
    errors = held_out_errors(inputs, targets)
    curve, curve_flags = predicted_r2(errors, targets, n)
    predicted = rank_from_curve(curve)
    flags = _sample_flags(n, d_in, whole.rank)
    if noise is None:
        noise, noise_flags = _noise(targets, projected, errors, n)
        flags += noise_flags
    if space == "prediction":
        # Q^T Y has as many rows with noise as the rank of X, which may be less than d_in.
        values = _singular_values(projected, min(d_in, d_out))
        tau = noise * (math.sqrt(whole.rank) + math.sqrt(d_out))
    else:
        values = _singular_values(whole.solve(cross), min(d_in, d_out))
        tau = noise * (1 + math.sqrt(d_in / n))
    above = count_above(values, tau, _EPS * max(d_in, d_out))
    leading = float(values[0]) if leading is None else float(leading)
    plain = decay(values, above, tau, leading)
    for array in (values, curve):
        array.flags.writeable = False
    return TaskEstimate(
        k_star=plain.k_star,
        predicted_rank=predicted.rank,
        predicted_r2=curve,
        piecewise=piecewise_decay(values, above, tau),
        singular_values=values,
        rho=plain.rho,
        tau=tau,
        noise=float(noise),
        leading=leading,
        num_above=above,
        num_samples=n,
        space=space,
        flags=flags + plain.flags + curve_flags + predicted.flags,
    )


def _sample_flags(n: int, d_in: int, rank: int) -> tuple[str, ...]:
    """Return a flag if the least-squares weights are not unique."""
    if n <= d_in:
        return (f"{n} samples for {d_in} inputs: least squares of smallest norm",)
    if rank < d_in:
        return (f"inputs of rank {rank} of {d_in}: least squares of smallest norm",)
    return ()


def _noise(targets: TargetMoments, projected: Array, errors: Array, n: int) -> tuple[float, tuple[str, ...]]:
    """Return the standard deviation of the noise, and flags.

    The estimate comes from the residuals. If the rank of `X` equals the number of samples, there are no
    residuals, and the estimate comes from the held-out errors of the best rank. These include the error of
    the weights, so that the noise is overestimated rather than underestimated.
    """
    rank, d_out = projected.shape
    energy = float(np.sum(targets.squares))
    if n <= rank:
        mean = float(np.min(np.sum(errors, axis=1))) / (n * d_out) if n > 1 else energy / d_out
        basis = "the errors on held-out samples" if n > 1 else "Y"
        return math.sqrt(mean), (f"no residuals: the noise is estimated from {basis}; pass it if known",)
    residual = energy - float(np.sum(np.square(projected)))
    # The rounding error of a difference of nearly equal sums.
    finest = 4 * _EPS * (rank + 1) * energy
    noise = math.sqrt(max(residual, finest) / ((n - rank) * d_out))
    return noise, () if residual > finest or energy == 0 else (AT_ROUNDING,)


def _singular_values(matrix: Array, count: int) -> Array:
    """Return `count` singular values, descending, with zeros for those beyond the matrix's shape."""
    values = np.zeros(count)
    found = np.linalg.svd(matrix, compute_uv=False)
    values[: len(found)] = found
    return values
