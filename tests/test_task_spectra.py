"""Task spectra against refits in plain NumPy and scikit-learn, and on data that hurt."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score

from lorank.task_spectra import InputMoments, TaskEstimate, TaskSpectrum, task_spectrum
from lorank.task_spectra.decay import piecewise_decay

Array = npt.NDArray[np.float64]


def sampled(
    values: npt.ArrayLike, n: int, noise: float, seed: int, d_in: int = 64, d_out: int = 32
) -> tuple[Array, Array, Array]:
    """`X`, `Y` and the weights behind them: singular values as given, random bases."""
    rng = np.random.default_rng(seed)
    spectrum = np.zeros(min(d_in, d_out))
    spectrum[: len(np.atleast_1d(values))] = values
    left = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0][:, : len(spectrum)]
    right = np.linalg.qr(rng.standard_normal((d_out, d_out)))[0][:, : len(spectrum)]
    W = left * spectrum @ right.T
    X = rng.standard_normal((n, d_in))
    return X, X @ W + noise * rng.standard_normal((n, d_out)), W


def refitted_r2(X: Array, Y: Array, folds: int) -> Array:
    """R^2 of held-out predictions for the ranks 0 to p, every fold refitted from its rows."""
    p = min(X.shape[1], Y.shape[1])
    predictions = np.zeros((p + 1, *Y.shape))
    for fold in range(folds):
        held_out = np.arange(len(X)) % folds == fold
        if not held_out.any():
            continue
        W = np.linalg.lstsq(X[~held_out], Y[~held_out], rcond=1e-10)[0]
        left, values, right = np.linalg.svd(W, full_matrices=False)
        for rank in range(p + 1):
            predictions[rank, held_out] = X[held_out] @ (left[:, :rank] * values[:rank]) @ right[:rank]
    return np.array([r2_score(Y, fitted, multioutput="uniform_average") for fitted in predictions])


def assert_same(found: TaskEstimate, expected: TaskEstimate, rtol: float = 1e-9) -> None:
    np.testing.assert_allclose(
        found.singular_values, expected.singular_values, rtol=rtol, atol=rtol * expected.leading
    )
    np.testing.assert_allclose(found.predicted_r2, expected.predicted_r2, rtol=rtol, atol=rtol)
    for name in ("rho", "tau", "noise", "leading"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol, nan_ok=True)
    for name in ("k_star", "predicted_rank", "num_above", "num_samples", "flags"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.piecewise.breakpoints == expected.piecewise.breakpoints


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1), (1, 1)])
def test_every_number_is_that_of_least_squares_on_the_rows(d_in: int, d_out: int) -> None:
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
def test_the_predicted_curve_is_that_of_refits_fold_by_fold(
    n: int, d_in: int, d_out: int, folds: int
) -> None:
    X, Y, _ = sampled(0.6 ** np.arange(min(d_in, d_out)), n, 0.1, 1, d_in, d_out)
    Y = Y + np.linspace(0, 3, d_out)  # A mean that no intercept takes up.
    found = task_spectrum(X, Y, folds=folds)
    expected = refitted_r2(X, Y, folds)
    np.testing.assert_allclose(found.predicted_r2, expected, rtol=1e-8, atol=1e-8)
    if expected[-1] > 0:
        smallest = next(r for r in range(1, len(expected)) if expected[r] >= 0.95 * expected[-1])
        assert found.predicted_rank == smallest


def test_a_full_rank_that_predicts_nothing_is_flagged() -> None:
    X, Y, _ = sampled([1.0], 80, 1.0, 0)
    found = task_spectrum(X, Y)
    assert found.predicted_r2[-1] < 0
    assert any("full rank predicts no better" in flag or "no rank predicts" in flag for flag in found.flags)
    above = np.flatnonzero(found.predicted_r2[1:] > 0)
    assert found.predicted_rank == (1 + above[0] if len(above) else 1)


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 7), (7, 12)])
def test_prediction_space_is_the_projected_targets_spectrum(d_in: int, d_out: int) -> None:
    X, Y, _ = sampled(2.0 ** -np.arange(7), 200, 0.05, 4, d_in, d_out)
    X = X @ np.diag(np.geomspace(1, 1e-3, d_in))
    found = task_spectrum(X, Y, space="prediction", noise=0.05)
    values = np.linalg.svd(np.linalg.qr(X)[0].T @ Y, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-8)
    assert found.tau == pytest.approx(0.05 * (math.sqrt(d_in) + math.sqrt(d_out)))
    assert found.num_above == int(np.sum(values > found.tau))


def test_noise_alone_stays_below_the_edge_of_prediction_space() -> None:
    counts = []
    for seed in range(20):
        X, Y, _ = sampled([0.0], 300, 0.7, seed)
        X = X @ np.diag(np.geomspace(1, 1e-3, 64))
        counts.append(task_spectrum(X, Y, space="prediction").num_above)
    # The edge is the limit: the largest value fluctuates about it, mostly below.
    assert np.mean(counts) <= 0.3


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 60), max_size=6), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_how_rows_are_cut_into_batches_does_not_matter(cuts: list[int], folds: int, seed: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 60, 0.1, seed, 6, 4)
    stream = TaskSpectrum(folds=folds)
    bounds = sorted({0, 60, *cuts})
    for start, stop in itertools.pairwise(bounds):
        stream.update(X[start:stop], Y[start:stop])
        stream.update(X[:0], Y[:0])
    assert_same(stream.estimate(), task_spectrum(X, Y, folds=folds))


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 50), st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_merging_is_concatenation(cut: int, folds: int, seed: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 50, 0.1, seed, 5, 4)
    first, second = TaskSpectrum(folds=folds), TaskSpectrum(folds=folds)
    if cut:
        first.update(X[:cut], Y[:cut])
    if cut < 50:
        second.update(X[cut:], Y[cut:])
    first.merge(second)
    assert_same(first.estimate(), task_spectrum(X, Y, folds=folds))


def test_more_rows_than_are_converted_at_a_time() -> None:
    X, Y, _ = sampled([2.0, 1.0], 20_000, 0.1, 0, 3, 2)
    found = task_spectrum(X, Y)
    np.testing.assert_allclose(found.predicted_r2, refitted_r2(X, Y, 10), rtol=1e-9)


@settings(deadline=None, max_examples=30)
@given(st.floats(-30, 30), st.floats(-30, 30), st.sampled_from(["weights", "prediction"]))
def test_units_change_units_only(of_x: float, of_y: float, space: Any) -> None:
    X, Y, _ = sampled(1.4 ** -np.arange(6), 80, 0.05, 7, 8, 6)
    plain = task_spectrum(X, Y, space=space)
    scaled = task_spectrum(X * 10**of_x, Y * 10**of_y, space=space)
    # Of the weights; Q^T Y does not know the unit of X. tau has the unit of Y by definition.
    factor = 10 ** (of_y - of_x) if space == "weights" else 10**of_y
    np.testing.assert_allclose(scaled.singular_values, factor * plain.singular_values, rtol=1e-9)
    assert scaled.tau == pytest.approx(10**of_y * plain.tau, rel=1e-9)
    np.testing.assert_allclose(scaled.predicted_r2, plain.predicted_r2, rtol=1e-9)
    assert scaled.predicted_rank == plain.predicted_rank
    if space == "prediction":
        assert scaled.k_star == plain.k_star


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_the_unit_of_the_targets_leaves_k_star_alone(scale: float) -> None:
    X, Y, _ = sampled(1.4 ** -np.arange(6), 80, 0.05, 7, 8, 6)
    plain, scaled = task_spectrum(X, Y), task_spectrum(X, scale * Y)
    assert scaled.k_star == plain.k_star
    assert scaled.piecewise.k_star == plain.piecewise.k_star
    assert scaled.piecewise.breakpoints == plain.piecewise.breakpoints
    np.testing.assert_allclose(scaled.piecewise.rhos, plain.piecewise.rhos, rtol=1e-9)
    assert scaled.rho == pytest.approx(plain.rho, rel=1e-9)


def test_columns_in_different_units_all_count() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 100, 0.1, 5, 6, 3)
    units = np.array([1e-30, 1e-12, 1.0, 1e3, 1e12, 1e30])
    plain, mixed = task_spectrum(X, Y), task_spectrum(X * units, Y)
    assert not any("rank" in flag for flag in mixed.flags)
    assert mixed.noise == pytest.approx(plain.noise, rel=1e-9)
    # The untruncated fit does not depend on units; ranks below do.
    assert mixed.predicted_r2[-1] == pytest.approx(plain.predicted_r2[-1], rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_narrow_types_are_read_exactly(dtype: Any) -> None:
    X, Y, _ = sampled([2.0, 1.0], 70, 0.1, 5, 4, 3)
    X, Y = X.astype(dtype), Y.astype(dtype)
    assert_same(task_spectrum(X, Y), task_spectrum(X.astype(np.float64), Y.astype(np.float64)), 0)


def test_tensors_are_read_whatever_they_hold() -> None:
    X, Y, _ = sampled([2.0, 1.0], 70, 0.1, 5, 4, 3)
    x, y = torch.from_numpy(X).bfloat16(), torch.from_numpy(Y).float().requires_grad_()
    expected = task_spectrum(x.double().numpy(), y.detach().double().numpy())
    assert_same(task_spectrum(x, y), expected, 0)
    shared = InputMoments(folds=10)
    task = TaskSpectrum(inputs=shared)
    task.update(x, y[:, 0] * 2)
    shared.update(x)
    assert_same(task.estimate(), task_spectrum(x.double().numpy(), 2 * y.detach().double().numpy()[:, 0]), 0)


@pytest.mark.parametrize(
    "unreadable",
    [
        torch.ones(4, 2, device="meta"),
        torch.ones(4, 2).to_sparse(),
        [torch.ones(2, dtype=torch.bfloat16)] * 4,
        [[1.0, 2.0], [3.0]],
    ],
    ids=["meta", "sparse", "list of bfloat16", "ragged"],
)
def test_what_holds_no_values_is_refused_by_name(unreadable: Any) -> None:
    for name, pair in (("X", (unreadable, np.ones(4))), ("Y", (np.ones((4, 2)), unreadable))):
        with pytest.raises(ValueError, match=f"^{name} cannot be read as one array of real numbers: "):
            TaskSpectrum().update(*pair)


def test_arrays_need_no_torch() -> None:
    program = (
        "import sys, numpy, lorank; lorank.task_spectrum(numpy.eye(30)[:, :3], numpy.eye(30)[:, :2]); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_no_intercept_is_fitted() -> None:
    X, Y, _ = sampled([2.0, 1.0], 200, 0.1, 5, 4, 3)
    moved = task_spectrum(X, Y + 10)
    assert moved.noise > 5
    assert task_spectrum(X - X.mean(0), Y + 10 - (Y + 10).mean(0)).noise < 0.2
    assert task_spectrum(np.column_stack([X, np.ones(len(X))]), Y + 10).noise < 0.2


def test_tasks_of_shared_inputs_are_those_of_their_own() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 75, 0.1, 9, 6, 5)
    other = Y[:, :2] - 3 * X[:, 2:4] ** 2
    inputs = InputMoments(folds=5)
    tasks = [TaskSpectrum(inputs=inputs), TaskSpectrum(inputs=inputs)]
    for rows in (slice(0, 13), slice(13, 75)):
        inputs.update(X[rows])
        for task, target in zip(tasks, (Y, other), strict=True):
            task.update(X[rows], target[rows])
        tasks[0].estimate()  # What is kept for the next task must not outlive new rows.
    assert_same(tasks[0].estimate(), task_spectrum(X, Y, folds=5))
    assert_same(tasks[1].estimate(), task_spectrum(X, other, folds=5))
    inputs.update(X[:1])
    with pytest.raises(ValueError, match="seen 76 samples and this task 75"):
        tasks[0].estimate()


def test_shared_inputs_merge_once() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 75, 0.1, 9, 6, 5)
    inputs = [InputMoments(), InputMoments()]
    tasks = [TaskSpectrum(inputs=part) for part in inputs]
    for task, part, rows in zip(tasks, inputs, (slice(0, 33), slice(33, 75)), strict=True):
        part.update(X[rows])
        task.update(X[rows], Y[rows])
    inputs[0].merge(inputs[1])
    tasks[0].merge(tasks[1])
    assert_same(tasks[0].estimate(), task_spectrum(X, Y))
    with pytest.raises(ValueError, match="shares its inputs"):
        tasks[0].merge(TaskSpectrum())


# Median K* of twenty seeds. In eight groups of five other seeds it is the same, but for 'moderate' (5 or
# 6) and 'small' (8 or 9: 9 by the formula alone, 8 capped at the number of values above tau).
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
def test_the_ten_tasks_of_the_paper(
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
def test_shaped_spectra(name: str) -> None:
    """Best rank on fresh samples: the predicted one is closer. Values above the noise: the pieces are."""
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
    # One off at most, where the curve is flat: on a fast decay that turns slow in three draws of ten.
    assert max(predicted_misses) <= 1
    assert np.mean(predicted_misses) <= 0.4
    assert np.mean(predicted_misses) < np.mean(plain_misses)
    assert np.mean(piecewise_counts) <= 0.4
    assert np.mean(piecewise_counts) <= np.mean(plain_counts)
    if "plateaus" in name:
        assert np.mean(piecewise_counts) < np.mean(plain_counts)


def brute_force_starts(logs: Array) -> tuple[int, ...]:
    def misfit(start: int, stop: int) -> float:
        k = np.arange(start, stop)
        return float(np.sum((logs[start:stop] - np.polyval(np.polyfit(k, logs[start:stop], 1), k)) ** 2))

    m = len(logs)
    scores = {}
    for pieces in (1, 2, 3):
        for cuts in itertools.combinations(range(3, m - 2), pieces - 1):
            starts = (0, *cuts)
            bounds = [*starts, m]
            if any(b - a < 3 for a, b in itertools.pairwise(bounds)) and pieces > 1:
                continue
            total = sum(misfit(a, b) for a, b in itertools.pairwise(bounds))
            # Below the finest deviation that counts, scores are equal: the smaller misfit then decides.
            scores[starts] = (m * math.log(max(total / m, 1e-4)) + 3 * pieces * math.log(m), total)
    return min(scores, key=lambda starts: scores[starts])


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 16), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_breakpoints_are_those_of_the_best_score(count: int, seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(count) < 0.2, 2.0, 0.1) * rng.random(count)
    values = np.exp(-np.cumsum(steps))
    found = piecewise_decay(unit * values, count, unit * 0.9 * values[-1])
    assert (0, *found.breakpoints) == brute_force_starts(np.log(values))
    assert len(found.rhos) == 1 + len(found.breakpoints)
    assert 1 <= found.k_star <= count


def test_pieces_of_exact_spectra() -> None:
    values = np.concatenate([np.full(5, 8.0), 0.5 ** np.arange(6.0)])
    found = piecewise_decay(values, len(values), 0.02)
    assert found.breakpoints == (5,)
    np.testing.assert_allclose(found.rhos, [1.0, 2.0])
    # 0.5^k reaches 0.02 after six steps: all eleven values count.
    assert found.k_star == 11
    assert piecewise_decay(values, 8, 0.2).k_star == 8
    assert piecewise_decay(values, 1, 6.0).k_star == 1
    assert piecewise_decay(np.full(4, 2.0), 4, 1.0).k_star == 4


def test_equal_values_are_flagged_and_all_count() -> None:
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 4)))[0]
    found = task_spectrum(X, X, noise=1e-3)
    assert found.k_star == 4
    assert any("no decay" in flag for flag in found.flags)


def test_a_quotient_of_whole_steps_is_not_rounded_up() -> None:
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((80, 8)))[0]
    Y = X @ np.diag(0.5 ** np.arange(8.0))
    noise = 2.0**-5 / (1 + math.sqrt(8 / 80))
    # ln(1 / 2^-5) / ln 2 = 5.
    assert task_spectrum(X, Y, noise=noise * (1 + 1e-12)).k_star == 5
    assert task_spectrum(X, Y, noise=noise, leading=0.25).k_star == 3
    assert task_spectrum(X, Y, noise=noise, leading=1e-9).k_star == 1


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_fewer_samples_than_inputs(n: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], n, 0.1, 2, 12, 4)
    X = X * np.geomspace(1, 30, 12)
    found = task_spectrum(X, Y)
    values = np.linalg.svd(np.linalg.lstsq(X, Y)[0], compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6, atol=1e-7 * values[0])
    assert any("smallest norm" in flag for flag in found.flags)
    assert any("noise is assumed" in flag for flag in found.flags)
    assert not any("noise is assumed" in flag for flag in task_spectrum(X, Y, noise=0.1).flags)
    assert found.noise > 0
    assert 1 <= found.k_star <= 4
    if n == 1:
        assert np.all(np.isnan(found.predicted_r2))
        assert found.noise == pytest.approx(math.sqrt(np.mean(Y**2)))
    else:
        predictions = {r: task_error(X, Y, r) for r in range(5)}
        assert found.noise == pytest.approx(math.sqrt(min(predictions.values())), rel=1e-6)


def task_error(X: Array, Y: Array, rank: int) -> float:
    """Mean squared error of refits at one rank, ten folds."""
    total = 0.0
    for fold in range(10):
        held_out = np.arange(len(X)) % 10 == fold
        left, values, right = np.linalg.svd(
            np.linalg.lstsq(X[~held_out], Y[~held_out], rcond=1e-10)[0], full_matrices=False
        )
        fitted = X[held_out] @ (left[:, :rank] * values[:rank]) @ right[:rank]
        total += float(np.sum((Y[held_out] - fitted) ** 2))
    return total / Y.size


def deficient(kind: str) -> Array:
    X = np.random.default_rng(6).standard_normal((60, 5))
    X = X * [1.0, 3.0, 0.2, 1.0, 10.0]
    return {
        "zero column": np.column_stack([X, np.zeros(60)]),
        "duplicates": np.column_stack([X, X[:, :2]]),
        "scaled duplicate": np.column_stack([X, 7 * X[:, 4]]),
        "combination": np.column_stack([X, X @ np.arange(5.0)]),
        "two constants": np.column_stack([X, np.ones(60), np.full(60, 4.0)]),
        "repeated rows": np.repeat(X[:3], 20, axis=0),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["zero column", "duplicates", "scaled duplicate", "combination", "two constants", "repeated rows"],
)
def test_inputs_that_lack_rank(kind: str) -> None:
    X = deficient(kind)
    rng = np.random.default_rng(7)
    Y = X @ rng.standard_normal((X.shape[1], 4)) + 0.1 * rng.standard_normal((60, 4))
    found = task_spectrum(X, Y)
    W, _, rank, _ = np.linalg.lstsq(X, Y)
    values = np.linalg.svd(W, compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6, atol=1e-7 * values[0])
    assert found.noise == pytest.approx(math.sqrt(np.sum((Y - X @ W) ** 2) / ((60 - rank) * 4)), rel=1e-6)
    np.testing.assert_allclose(found.predicted_r2, refitted_r2(X, Y, 10), rtol=1e-6, atol=1e-7)
    assert any(f"rank {rank} of {X.shape[1]}" in flag for flag in found.flags)
    edge = task_spectrum(X, Y, space="prediction")
    assert edge.tau == pytest.approx(edge.noise * (math.sqrt(rank) + 2))
    assert len(edge.singular_values) == min(X.shape[1], 4)


def test_a_column_of_one_fold_only() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    X[:, 3] = 0.0
    X[10, 3] = 5.0
    found = task_spectrum(X, Y)
    np.testing.assert_allclose(found.predicted_r2, refitted_r2(X, Y, 10), rtol=1e-9)


def test_targets_without_variation() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    zero = task_spectrum(X, np.zeros((40, 3)))
    assert (zero.k_star, zero.predicted_rank, zero.noise, zero.tau) == (1, 1, 0.0, 0.0)
    assert np.all(zero.singular_values == 0)
    assert np.all(np.isnan(zero.predicted_r2))
    assert any("no output varies" in flag for flag in zero.flags)
    Y[:, 1] = 0.1
    partly = task_spectrum(X, Y)
    # The fit still has the constant output; the mean over outputs has not.
    assert any("left out" in flag for flag in partly.flags)
    assert partly.predicted_r2[-1] == pytest.approx(task_spectrum(X, Y[:, [0, 2]]).predicted_r2[-1])


def test_targets_without_noise() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 90, 0.0, 8, 7, 5)
    found = task_spectrum(X, Y)
    assert any("rounding level" in flag for flag in found.flags)
    assert 0 < found.noise < 1e-6
    assert found.num_above == 3
    assert found.predicted_r2[3] == pytest.approx(1.0, abs=1e-12)
    # Even a given noise of next to nothing does not make values of rounding.
    assert task_spectrum(X, Y, noise=1e-200).num_above == 3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_single_sample_and_single_numbers(scale: float) -> None:
    found = task_spectrum([[2.0 * scale]], [3.0 * scale])
    assert found.singular_values == pytest.approx([1.5])
    assert (found.k_star, found.predicted_rank, found.num_samples) == (1, 1, 1)
    assert any("too few samples" in flag for flag in found.flags)


def test_results_cannot_be_written_to() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    found = task_spectrum(X, Y)
    with pytest.raises(ValueError, match="read-only"):
        found.singular_values[0] = 1.0
    with pytest.raises(AttributeError):
        found.k_star = 3


GOOD = np.ones((4, 2))


@pytest.mark.parametrize(
    ("X", "Y", "message"),
    [
        (np.full((4, 2), np.nan), GOOD, "X holds NaN or infinite"),
        (GOOD, np.full((4, 2), np.inf), "Y holds NaN or infinite"),
        (GOOD, np.full(4, 1e200), "Y holds values beyond 1e\\+140"),
        (GOOD, np.ones((3, 2)), "X has 4 rows and Y has 3"),
        (np.ones(4), GOOD, r"X must have the shape \(samples, features\), not \(4,\)"),
        (GOOD, np.ones((4, 2, 1)), "Y must have the shape"),
        (GOOD, np.float64(1), "Y must have the shape"),
        (np.ones((4, 0)), GOOD, "X has no columns"),
        (GOOD, np.ones((4, 0)), "Y has no columns"),
        (GOOD, np.full((4, 2), 1j), "Y must hold real numbers, not complex128"),
        (np.full((4, 2), "a"), GOOD, "X must hold real numbers"),
        (GOOD[:0], GOOD[:0], "no samples"),
    ],
)
def test_malformed_arrays_are_refused(X: Any, Y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_spectrum(X, Y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "noise must be positive and finite, not 0.0"),
        ({"noise": math.nan}, "noise must be positive"),
        ({"noise": math.inf}, "noise must be positive"),
        ({"leading": -1.0}, "leading must be positive"),
        ({"space": "log"}, "space must be 'weights' or 'prediction', not 'log'"),
        ({"folds": 1}, "folds must be an integer of at least 2, not 1"),
        ({"folds": 2.5}, "folds must be an integer"),
        ({"folds": True}, "folds must be an integer"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_spectrum(GOOD, GOOD, **options)


def test_a_refused_batch_leaves_no_trace() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    stream = TaskSpectrum()
    stream.update(X, Y)
    before = stream.estimate()
    for bad_X, bad_Y, message in [
        (X[:, :3], Y, "X has 3 columns, the batches before had 4"),
        (X, Y[:, :2], "Y has 2 columns, the batches before had 3"),
        (X, Y * np.nan, "Y holds NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream.update(bad_X, bad_Y)
    assert_same(stream.estimate(), before, 0)
    with pytest.raises(ValueError, match="10 folds cannot be merged with 3"):
        stream.merge(TaskSpectrum(folds=3))
    narrow = TaskSpectrum()
    narrow.update(X[:, :2], Y)
    with pytest.raises(ValueError, match="widths differ"):
        stream.merge(narrow)
    assert_same(stream.estimate(), before, 0)
    with pytest.raises(ValueError, match="contradicts inputs"):
        TaskSpectrum(folds=3, inputs=InputMoments(folds=4))


def test_numpy_is_all_that_is_imported() -> None:
    script = (
        "import sys, lorank.task_spectra; "
        "print([name for name in ('torch', 'scipy', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
