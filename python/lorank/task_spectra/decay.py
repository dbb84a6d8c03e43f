"""How fast a spectrum decays to its noise, and the rank at which it gets there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lorank.task_spectra.least_squares import Array

_EPS = float(np.finfo(np.float64).eps)

TOO_FEW = "fewer than two values above the noise: rho is undefined"
NO_DECAY = "no decay above the noise: every value above it counts"

# Points that a segment needs: a line through two fits anything.
_FEWEST = 3
_MOST_SEGMENTS = 3
# Deviations of less than one per cent from a line are no structure.
_FINEST = 0.01


@dataclass(frozen=True, slots=True)
class Decay:
    """Geometric decay ``C rho^-k`` of the values above a threshold.

    Attributes
    ----------
    rho
        Decay rate; ``nan`` with fewer than two values above the threshold.
    k_star
        ``ceil(ln(C / tau) / ln rho)``, at least 1 and at most the number of values above `tau`.
    flags
        What was out of the ordinary.
    """

    rho: float
    k_star: int
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PiecewiseDecay:
    """Decay whose rate changes: up to three straight pieces of the logarithms.

    Attributes
    ----------
    k_star
        The rank at which the last piece falls to `tau`, at least 1 and at most the number of values
        above `tau`.
    breakpoints
        Index of the first value of every piece but the first; empty if one piece does.
    rhos
        Decay rate of every piece; 1 on a plateau. Empty with fewer than two values above `tau`.
    """

    k_star: int
    breakpoints: tuple[int, ...]
    rhos: tuple[float, ...]


def count_above(values: Array, tau: float, resolution: float) -> int:
    """The number of values above the threshold and above what rounding leaves of zeros.

    Parameters
    ----------
    values
        Descending.
    tau
        The threshold, in the unit of the values.
    resolution
        Share of the largest value under which a value may be rounding only.
    """
    if not len(values):
        return 0
    return int(np.sum(values > max(tau, resolution * values[0])))


def decay(values: Array, above: int, tau: float, leading: float) -> Decay:
    """Decay rate and K*, equations 4 and 6 of the paper.

    Parameters
    ----------
    values
        Singular values, descending.
    above
        How many of them count.
    tau
        Threshold, in the unit of the values.
    leading
        `C`, in the unit of the values.
    """
    if above < 2:
        return Decay(math.nan, 1, (TOO_FEW,))
    slope, _ = _line(np.log(values[:above]))
    if slope >= -above * _EPS:
        return Decay(math.exp(-slope), above, (NO_DECAY,))
    return Decay(math.exp(-slope), _crossing(math.log(leading / tau), slope, above), ())


def piecewise_decay(values: Array, above: int, tau: float) -> PiecewiseDecay:
    """Decay in up to three pieces, as many as the Bayesian information criterion pays for.

    A piece is a least-squares line through at least three logarithms; the pieces need not meet, so
    that a step between two plateaus is a breakpoint. With `m` values, `s` pieces and the residual sum
    of squares `S`, the choice minimises ``m ln(S / m) + 3 s ln m``: two parameters and a start each.

    Parameters
    ----------
    values
        Singular values, descending.
    above
        How many of them count.
    tau
        Threshold, in the unit of the values.
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
    """Steps down a line, from `height` over the threshold, until it is reached."""
    steps = min(height / -slope, float(most))
    # A quotient that is an integer but for rounding is that integer.
    return max(math.ceil(steps - 1e-9), 1)


def _line(logs: Array) -> tuple[float, float]:
    """Slope and value at index 0 of the least-squares line through ``(k, logs[k])``."""
    k = np.arange(len(logs)) - (len(logs) - 1) / 2
    slope = float(k @ logs / (k @ k)) if len(logs) > 1 else 0.0
    return slope, float(np.mean(logs)) + slope * float(k[0])


def _pieces(starts: tuple[int, ...], count: int) -> list[tuple[int, int]]:
    return list(zip(starts, (*starts[1:], count), strict=True))


def _best_starts(logs: Array) -> tuple[int, ...]:
    """Where the pieces start, first 0: dynamic programming over the ends of pieces."""
    count = len(logs)
    sums = _running_sums(logs - np.mean(logs))
    # costs[s][stop]: least misfit of s + 1 pieces that cover the values before `stop`.
    costs = np.full((_MOST_SEGMENTS, count + 1), np.inf)
    origin = np.zeros((_MOST_SEGMENTS, count + 1), dtype=np.int64)
    for stop in range(min(_FEWEST, count), count + 1):
        misfits = _misfits(sums, stop)
        costs[0, stop] = misfits[0]
        for pieces in range(1, _MOST_SEGMENTS):
            joined = costs[pieces - 1, : len(misfits)] + misfits
            origin[pieces, stop] = start = int(np.argmin(joined))
            costs[pieces, stop] = joined[start]
    variances = np.maximum(costs[:, count] / count, _FINEST**2)
    scores = count * np.log(variances) + 3 * math.log(count) * np.arange(1, _MOST_SEGMENTS + 1)
    starts = [count]
    for pieces in range(int(np.argmin(scores)), -1, -1):
        starts.insert(0, int(origin[pieces, starts[0]]))
    return tuple(starts[:-1])


def _running_sums(logs: Array) -> Array:
    """Of ``y``, ``k y`` and ``y^2``: row `i` over the values before `i`."""
    terms = np.stack([logs, np.arange(len(logs)) * logs, np.square(logs)], axis=1)
    return np.concatenate([np.zeros((1, 3)), np.cumsum(terms, axis=0)])


def _misfits(sums: Array, stop: int) -> Array:
    """Residual sum of squares of the line through the values from every allowed start to `stop`."""
    starts = np.arange(max(stop - _FEWEST, 0) + 1)
    length = stop - starts
    y, ky, yy = (sums[stop] - sums[starts]).T
    moment = ky - (starts + (length - 1) / 2) * y
    spread = np.maximum(length * (np.square(length) - 1) / 12, 1.0)
    misfits: Array = np.maximum(yy - np.square(y) / length - np.square(moment) / spread, 0.0)
    return misfits
