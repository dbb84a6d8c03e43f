"""Task spectra against refits in NumPy and scikit-learn: values, noise, predicted curves, published tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from lorank.task_spectra import task_spectrum
from tests.support.task_samples import refitted_r2, sampled


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1), (1, 1)])
def test_estimates_equal_those_of_least_squares(d_in: int, d_out: int) -> None:
    X, Y, _ = sampled(1.5 ** -np.arange(min(d_in, d_out)), 90, 0.02, 3, d_in, d_out)
    found = task_spectrum(X, Y)
    W = LinearRegression(fit_intercept=False).fit(X, Y).coef_.T.reshape(d_in, d_out)
    values = np.linalg.svd(W, compute_uv=False)
    noise = math.sqrt(np.sum((Y - X @ W) ** 2) / ((90 - d_in) * d_out))
    tau = noise * (1 + math.sqrt(d_in / 90))
    above = values[values > tau]
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-11)
    assert found.noise == pytest.approx(noise, rel=1e-10)
    assert found.tau == pytest.approx(tau, rel=1e-10)
    assert found.num_above == len(above)
    if len(above) > 1:
        rho = math.exp(-np.polyfit(np.arange(len(above)), np.log(above), 1)[0])
        assert found.rho == pytest.approx(rho, rel=1e-9)
        exact = math.ceil(math.log(values[0] / tau) / math.log(rho))
        assert found.k_star == min(max(exact, 1), len(above))
    else:
        assert math.isnan(found.rho)
        assert found.k_star == 1


@pytest.mark.parametrize(
    ("n", "d_in", "d_out", "folds"),
    [
        (60, 8, 5, 10),
        (61, 5, 8, 7),
        (40, 3, 1, 2),
        (30, 1, 4, 3),
        (15, 20, 6, 5),
        (4, 6, 3, 10),
        (2, 1, 1, 10),
    ],
)
def test_predicted_curve_equals_refits_fold_by_fold(n: int, d_in: int, d_out: int, folds: int) -> None:
    X, Y, _ = sampled(0.6 ** np.arange(min(d_in, d_out)), n, 0.1, 1, d_in, d_out)
    Y = Y + np.linspace(0, 3, d_out)  # Targets with a mean, as no intercept is fitted.
    found = task_spectrum(X, Y, folds=folds)
    expected = refitted_r2(X, Y, folds)
    np.testing.assert_allclose(found.predicted_r2, expected, rtol=1e-8, atol=1e-8)
    if expected[-1] > 0:
        smallest = next(r for r in range(1, len(expected)) if expected[r] >= 0.95 * expected[-1])
        assert found.predicted_rank == smallest


def test_useless_full_rank_fit_is_flagged() -> None:
    X, Y, _ = sampled([1.0], 80, 1.0, 0)
    found = task_spectrum(X, Y)
    assert found.predicted_r2[-1] < 0
    assert any("full rank predicts no better" in flag or "no rank predicts" in flag for flag in found.flags)
    above = np.flatnonzero(found.predicted_r2[1:] > 0)
    assert found.predicted_rank == (1 + above[0] if len(above) else 1)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12)])
def test_prediction_space_has_the_spectrum_of_projected_targets(d_in: int, d_out: int) -> None:
    X, Y, _ = sampled(2.0 ** -np.arange(7), 200, 0.05, 4, d_in, d_out)
    X = X @ np.diag(np.geomspace(1, 1e-3, d_in))
    found = task_spectrum(X, Y, space="prediction", noise=0.05)
    values = np.linalg.svd(np.linalg.qr(X)[0].T @ Y, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-8)
    assert found.tau == pytest.approx(0.05 * (math.sqrt(d_in) + math.sqrt(d_out)))
    assert found.num_above == int(np.sum(values > found.tau))


def test_pure_noise_stays_below_the_edge_of_prediction_space() -> None:
    counts = []
    for seed in range(20):
        X, Y, _ = sampled([0.0], 300, 0.7, seed)
        X = X @ np.diag(np.geomspace(1, 1e-3, 64))
        counts.append(task_spectrum(X, Y, space="prediction").num_above)
    # The edge is asymptotic: the largest value fluctuates about it, mostly below.
    assert np.mean(counts) <= 0.3


def test_no_intercept_is_fitted() -> None:
    X, Y, _ = sampled([2.0, 1.0], 200, 0.1, 5, 4, 3)
    moved = task_spectrum(X, Y + 10)
    assert moved.noise > 5
    assert task_spectrum(X - X.mean(0), Y + 10 - (Y + 10).mean(0)).noise < 0.2
    assert task_spectrum(np.column_stack([X, np.ones(len(X))]), Y + 10).noise < 0.2


# Median K* of twenty seeds. In eight groups of five other seeds it is the same, but for 'moderate' (5 or
# 6) and 'small' (8 or 9: 9 by the formula, 8 capped at the number of values above tau).
PAPER_TASKS = [
    ("weak", 1.2, 500, 0.1, 12, 0),
    ("moderate", 1.5, 500, 0.1, 6, 1),
    ("strong", 2.0, 500, 0.1, 3, 0),
    ("very strong", 3.0, 500, 0.1, 2, 0),
    ("domain", 5.0, 500, 0.1, 2, 0),
    ("narrow", 10.0, 500, 0.1, 1, 0),
    ("small", 2.0, 100, 0.1, 9, 1),
    ("large", 2.0, 2000, 0.1, 4, 0),
    ("noisy", 2.0, 500, 0.5, 1, 0),
    ("clean", 2.0, 500, 0.01, 7, 0),
]


@pytest.mark.parametrize(("name", "rho", "n", "noise", "k_star", "tolerance"), PAPER_TASKS)
def test_k_star_of_the_ten_tasks_of_the_paper(
    name: str, rho: float, n: int, noise: float, k_star: int, tolerance: int
) -> None:
    found = []
    for seed in range(5):
        X, Y, _ = sampled(rho ** -np.arange(32.0), n, noise, seed)
        found.append(task_spectrum(X, Y, leading=1.0))
    assert abs(np.median([estimate.k_star for estimate in found]) - k_star) <= tolerance, name
    # 36 degrees of freedom times 32 outputs at the least: 2 % standard deviation.
    assert np.median([estimate.noise for estimate in found]) == pytest.approx(noise, rel=0.04)


SHAPED = {
    "plateau": [*[1.0] * 6, *(0.5 * 0.5 ** np.arange(26))],
    "two plateaus": [*[3.0] * 6, *[0.25] * 8],
    "far plateaus": [*[20.0] * 4, *[0.25] * 10],
    "slow, then fast": [*(1.05 ** -np.arange(9.0)), *(0.3 * 3.0 ** -np.arange(23.0))],
    "fast, then slow": [*(3.0 * 3.0 ** -np.arange(3.0)), *(0.3 * 1.05 ** -np.arange(29.0))],
    "slow, step, slow": [*(10 * 1.2 ** -np.arange(3.0)), *(0.5 * 1.1 ** -np.arange(12.0))],
}


@pytest.mark.parametrize("name", SHAPED)
def test_estimators_on_spectra_with_plateaus_and_bends(name: str) -> None:
    """The predicted rank is near the best rank on fresh samples, the pieces near the values above noise."""
    plain_misses, predicted_misses, plain_counts, piecewise_counts = [], [], [], []
    for seed in range(3):
        X, Y, W = sampled(SHAPED[name], 500, 0.1, seed)
        rng = np.random.default_rng(1000 + seed)
        fresh_X = rng.standard_normal((2000, 64))
        fresh_Y = fresh_X @ W + 0.1 * rng.standard_normal((2000, 32))
        left, values, right = np.linalg.svd(np.linalg.lstsq(X, Y)[0], full_matrices=False)
        curve = np.array(
            [r2_score(fresh_Y, fresh_X @ (left[:, :r] * values[:r]) @ right[:r]) for r in range(1, 33)]
        )
        best = 1 + int(np.argmax(curve >= 0.95 * curve[-1]))
        found = task_spectrum(X, Y)
        above = int(np.sum(np.array(SHAPED[name]) > found.tau))
        plain_misses.append(abs(found.k_star - best))
        predicted_misses.append(abs(found.predicted_rank - best))
        plain_counts.append(abs(found.k_star - above))
        piecewise_counts.append(abs(found.piecewise.k_star - above))
    # The error is at most one, where the curve is flat (a fast decay that turns slow, in three draws of ten).
    assert max(predicted_misses) <= 1
    assert np.mean(predicted_misses) <= 0.4
    assert np.mean(predicted_misses) < np.mean(plain_misses)
    assert np.mean(piecewise_counts) <= 0.4
    assert np.mean(piecewise_counts) <= np.mean(plain_counts)
    if "plateaus" in name:
        assert np.mean(piecewise_counts) < np.mean(plain_counts)


def test_whole_quotient_is_not_rounded_up() -> None:
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((80, 8)))[0]
    Y = X @ np.diag(0.5 ** np.arange(8.0))
    noise = 2.0**-5 / (1 + math.sqrt(8 / 80))
    # ln(1 / 2^-5) / ln 2 = 5.
    assert task_spectrum(X, Y, noise=noise * (1 + 1e-12)).k_star == 5
    assert task_spectrum(X, Y, noise=noise, leading=0.25).k_star == 3
    assert task_spectrum(X, Y, noise=noise, leading=1e-9).k_star == 1
