"""The decay rate of a spectrum, and the rank at which the spectrum reaches the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorank.task_spectra.least_squares import Array

_EPS = float(np.finfo(np.float64).eps)

TOO_FEW = "fewer than two values above the noise: rho is undefined"
NO_DECAY = "no decay above the noise: k_star counts every value above the noise"

# Fewest values of a piece: a line fits any two values exactly.
_FEWEST = 3
_MOST_PIECES = 3
# Floor of the standard deviation of logarithms from a line, about one per cent of a value: smaller deviations
# do not justify another piece.
_FINEST = 0.01


@dataclass(frozen=True, slots=True)
class Decay:
    """Geometric decay ``C rho^-k`` of the values above a threshold.

    Attributes
    ----------
    rho
        Decay rate; ``nan`` with fewer than two values above the threshold.
    k_star
        Rank ``ceil(ln(C / tau) / ln rho)``, at least 1 and at most the number of values above `tau`.
    flags
        Exceptional cases.
    """

    rho: float
    k_star: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PiecewiseDecay:
    """Geometric decay in up to three pieces: the logarithms of each piece follow a line.

    Attributes
    ----------
    k_star
        Rank at which the last piece falls to `tau`, at least 1 and at most the number of values above `tau`.
    breakpoints
        Index of the first value of each piece after the first; empty for one piece.
    rhos
        Decay rate of each piece; 1 on a plateau. Empty with fewer than two values above `tau`.
    """

    k_star: int
    breakpoints: tuple[int, ...]
    rhos: tuple[float, ...]


def count_above(values: Array, tau: float, resolution: float) -> int:
    """Count values above the threshold and above rounding errors.

    Parameters
    ----------
    values
        Singular values, descending.
    tau
        Threshold, in the unit of the values.
    resolution
        Share of the largest value up to which a value may be a rounding error.

    Examples
    --------
    >>> count_above(np.array([4.0, 2.0, 1.0, 1e-17]), tau=0.0, resolution=1e-15)
    3
    """
    if not len(values):
        return 0
    return int(np.sum(values > max(tau, resolution * values[0])))


def decay(values: Array, above: int, tau: float, leading: float) -> Decay:
    """Compute decay rate and K*: [KSTAR], equations 4 and 6.

    Parameters
    ----------
    values
        Singular values, descending.
    above
        Number of values above the threshold.
    tau
        Threshold, in the unit of the values.
    leading
        The constant `C`, in the unit of the values.

    Examples
    --------
    >>> decay(np.array([8.0, 4.0, 2.0, 1.0]), above=3, tau=1.5, leading=8.0).k_star
    3
    """
    if above < 2:
        return Decay(math.nan, 1, (TOO_FEW,))
    slope, _ = _line(np.log(values[:above]))
    if slope >= -above * _EPS:
        return Decay(math.exp(-slope), above, (NO_DECAY,))
    return Decay(math.exp(-slope), _crossing(math.log(leading / tau), slope, above), ())


def piecewise_decay(values: Array, above: int, tau: float) -> PiecewiseDecay:
    """Fit a decay in up to three pieces; the information criterion [BIC] selects the number of pieces.

    A piece is a least-squares line through at least three logarithms. Pieces need not meet, so that a step
    between two plateaus is a breakpoint. For `m` values, `s` pieces and the residual sum of squares `S`, the
    criterion is ``m ln(S / m) + 3 s ln m``: three parameters for each piece, slope, height and start.

    Parameters
    ----------
    values
        Singular values, descending.
    above
        Number of values above the threshold.
    tau
        Threshold, in the unit of the values.

    Examples
    --------
    >>> values = np.concatenate([100 * 0.99 ** np.arange(5), 10 * 0.5 ** np.arange(5)])
    >>> piecewise_decay(values, above=10, tau=0.1).breakpoints
    (5,)
    """
    if above < 2:
        return PiecewiseDecay(1, (), ())
    logs = np.log(values[:above])
    starts = _best_starts(logs)
    slopes = [_line(logs[start:stop])[0] for start, stop in _pieces(starts, above)]
    last = starts[-1]
    slope, top = _line(logs[last:])
    left = above - last
    k_star = above if slope >= -above * _EPS else last + _crossing(top - math.log(tau), slope, left)
    return PiecewiseDecay(k_star, starts[1:], tuple(max(math.exp(-s), 1.0) for s in slopes))


def _crossing(height: float, slope: float, most: int) -> int:
    """Return the number of steps in which a line falls by `height`, at least 1 and at most `most`."""
    steps = min(height / -slope, float(most))
    # A rounding error is subtracted, so that a quotient that should be an integer is not rounded up.
    return max(math.ceil(steps - 1e-9), 1)


def _line(logs: Array) -> tuple[float, float]:
    """Return slope and value at index 0 of the least-squares line through ``(k, logs[k])``."""
    k = np.arange(len(logs)) - (len(logs) - 1) / 2
    slope = float(k @ logs / (k @ k)) if len(logs) > 1 else 0.0
    return slope, float(np.mean(logs)) + slope * float(k[0])


def _pieces(starts: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    """Return start and stop of each piece."""
    return list(zip(starts, (*starts[1:], count), strict=True))


def _best_starts(logs: Array) -> tuple[int, ...]:
    """Return the starts of the best pieces, by dynamic programming over their ends."""
    count = len(logs)
    sums = _running_sums(logs - np.mean(logs))
    # costs[s][stop]: smallest misfit of s + 1 pieces that cover the values before `stop`.
    costs = np.full((_MOST_PIECES, count + 1), np.inf)
    origin = np.zeros((_MOST_PIECES, count + 1), dtype=np.int64)
    for stop in range(min(_FEWEST, count), count + 1):
        misfits = _misfits(sums, stop)
        costs[0, stop] = misfits[0]
        for pieces in range(1, _MOST_PIECES):
            joined = costs[pieces - 1, : len(misfits)] + misfits
            origin[pieces, stop] = start = int(np.argmin(joined))
            costs[pieces, stop] = joined[start]
    variances = np.maximum(costs[:, count] / count, _FINEST**2)
    scores = count * np.log(variances) + 3 * math.log(count) * np.arange(1, _MOST_PIECES + 1)
    starts = [count]
    for pieces in range(int(np.argmin(scores)), -1, -1):
        starts.insert(0, int(origin[pieces, starts[0]]))
    return tuple(starts[:-1])


def _running_sums(logs: Array) -> Array:
    """Return running sums of ``y``, ``k y`` and ``y^2``; row `i` sums the values before `i`."""
    terms = np.stack([logs, np.arange(len(logs)) * logs, np.square(logs)], axis=1)
    return np.concatenate([np.zeros((1, 3)), np.cumsum(terms, axis=0)])


def _misfits(sums: Array, stop: int) -> Array:
    """Return the residual sum of squares of the line from each allowed start to `stop`."""
    starts = np.arange(max(stop - _FEWEST, 0) + 1)
    length = stop - starts
    y, ky, yy = (sums[stop] - sums[starts]).T
    moment = ky - (starts + (length - 1) / 2) * y
    spread = np.maximum(length * (np.square(length) - 1) / 12, 1.0)
    misfits: Array = np.maximum(yy - np.square(y) / length - np.square(moment) / spread, 0.0)
    return misfits
