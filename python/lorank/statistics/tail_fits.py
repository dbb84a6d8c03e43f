"""Alternatives to a power law in the tail of a spectrum, and their likelihood ratios against it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

_LEAST_TAIL = 3
_PANELS, _MOST_STEPS = 32, 100
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(10)
# Exponent below its smallest value at which an integrand ends.
_END = 45.0


class TailFits(NamedTuple):
    """Fits to the eigenvalues of the tail. Ratios above 0 favour the power law, ratios below 0 the other law.

    Attributes
    ----------
    exponential_rate
        Rate of the exponential law, in the inverse unit of the eigenvalues.
    exponential_ratio, exponential_p
        Log-likelihood ratio of the power law to the exponential law, and the probability of a ratio at least
        as large if both laws fit equally.
    truncated_alpha, truncated_rate
        Exponent and rate of the truncated power law ``x^-alpha exp(-rate x)``.
    truncated_ratio, truncated_p
        Log-likelihood ratio of the power law to the truncated one, at most 0, and the probability of a ratio
        at least as far from 0 if the power law is true.
    """

    exponential_rate: float = math.nan
    exponential_ratio: float = math.nan
    exponential_p: float = math.nan
    truncated_alpha: float = math.nan
    truncated_rate: float = math.nan
    truncated_ratio: float = math.nan
    truncated_p: float = math.nan


def tail_fits(eigenvalues: Array, threshold: float) -> TailFits:
    """Fit an exponential law and a truncated power law to the tail of a spectrum by maximum likelihood.

    Parameters
    ----------
    eigenvalues
        Eigenvalues, in any order.
    threshold
        The smallest eigenvalue of the tail, `powerlaw_xmin`.

    Returns
    -------
    TailFits
        The fits; nan for a tail of fewer than three eigenvalues or of equal ones.

    Notes
    -----
    Source: [CSN], section 5: for the exponential law the test of Vuong, for the nested truncated law the
    chi-squared test. Both laws are normalised from the threshold on. The exponent of the truncated law may be
    any real number; its rate is at least 0, where the law is the power law and the ratio 0.
    """
    threshold = float(threshold)
    tail = eigenvalues[eigenvalues >= threshold] / threshold if threshold > 0 else eigenvalues[:0]
    if len(tail) < _LEAST_TAIL or not math.isfinite(threshold) or tail.max() <= 1.0:
        return TailFits()
    logs = np.log(tail)
    alpha = 1 + 1 / float(logs.mean())
    power = math.log(alpha - 1) - alpha * logs
    rate = 1 / (float(tail.mean()) - 1)
    differences = power - (math.log(rate) - rate * (tail - 1))
    ratio, deviation = float(differences.sum()), float(differences.std())
    spread = math.sqrt(2 * len(tail)) * deviation
    p_value = math.erfc(abs(ratio) / spread) if spread > 0 else float(ratio == 0)
    cut_alpha, cut_rate, likelihood = _truncated(logs, tail, alpha)
    cut_ratio = min(0.0, float(power.sum()) - len(tail) * likelihood)
    return TailFits(
        rate / threshold,
        ratio,
        p_value,
        cut_alpha,
        cut_rate / threshold,
        cut_ratio,
        math.erfc(math.sqrt(-cut_ratio)),
    )


def _truncated(logs: Array, tail: Array, alpha: float) -> tuple[float, float, float]:
    """Return exponent, rate and mean log-likelihood of the truncated power law of values from 1 on.

    The likelihood is concave in both parameters, so damped Newton steps from any start reach its maximum.
    """
    means = np.array([logs.mean(), tail.mean()])
    pure = alpha, 0.0, math.log(alpha - 1) - alpha * float(means[0])
    if alpha > 2 and means[1] >= (alpha - 1) / (alpha - 2):
        return pure  # The likelihood falls with the rate at rate 0.
    point = np.array([alpha, 1 / means[1]])
    value, gradient, covariance = _likelihood(point, means)
    for _ in range(_MOST_STEPS):
        step = np.linalg.solve(covariance + 1e-13 * np.trace(covariance) * np.eye(2), gradient)
        if not gradient @ step > 1e-14:
            break
        size = 1.0 if step[1] > -0.9 * point[1] else 0.9 * point[1] / -step[1]
        while size > 1e-9:
            found = _likelihood(point + size * step, means)
            if found[0] >= value:
                break
            size /= 2
        else:
            break
        point = point + size * step
        value, gradient, covariance = found
    return (float(point[0]), float(point[1]), value) if value > pure[2] else pure


def _likelihood(point: Array, means: Array) -> tuple[float, Array, Array]:
    """Return the mean log-likelihood, its gradient, and its negative Hessian.

    With ``t = e^u``, the law is ``exp(-(alpha - 1) u - rate t) / I`` for `u` from 0 on. It is an exponential
    family with the statistics ``(u, t)``, whose covariance is the negative Hessian.
    """
    alpha, rate = float(point[0]), float(point[1])
    u, weights = _quadrature(alpha - 1, rate)
    t = np.exp(u)
    exponents = -(alpha - 1) * u - rate * t
    largest = float(exponents.max())
    density = weights * np.exp(exponents - largest)
    total = float(density.sum())
    statistics = np.stack([u, t])
    expected = statistics @ density / total
    centred = statistics - expected[:, None]
    covariance = (centred * density) @ centred.T / total
    value = -alpha * float(means[0]) - rate * float(means[1]) - largest - math.log(total)
    return value, expected - means, covariance


def _quadrature(slope: float, rate: float) -> tuple[Array, Array]:
    """Return nodes and weights of the interval on which ``exp(-slope u - rate e^u)`` is not negligible."""

    def exponent(u: float) -> float:
        return slope * u + rate * math.exp(min(u, 700.0))

    lowest = math.log(-slope / rate) if -slope > rate else 0.0
    low, high = lowest, lowest + 1.0
    while exponent(high) - exponent(lowest) < _END:
        low, high = high, lowest + 2 * (high - lowest)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) - exponent(lowest) < _END else (low, middle)
    half = high / _PANELS / 2
    centres = half * (2 * np.arange(_PANELS) + 1)
    return (centres[:, None] + half * _NODES).ravel(), np.tile(half * _WEIGHTS, _PANELS)
