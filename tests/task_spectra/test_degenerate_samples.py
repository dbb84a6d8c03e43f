"""Task spectra of few samples, rank-deficient inputs, constant or noiseless targets, and extreme units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorank.task_spectra import task_spectrum
from tests.support.task_samples import Array, refitted_r2, sampled


@settings(deadline=None, max_examples=30)
@given(st.floats(-30, 30), st.floats(-30, 30), st.sampled_from(["weights", "prediction"]))
def test_results_scale_with_units(of_x: float, of_y: float, space: Any) -> None:
    X, Y, _ = sampled(1.4 ** -np.arange(6), 80, 0.05, 7, 8, 6)
    plain = task_spectrum(X, Y, space=space)
    scaled = task_spectrum(X * 10**of_x, Y * 10**of_y, space=space)
    # Weights scale by Y / X. Q^T Y does not depend on the unit of X; tau has the unit of Y by definition.
    factor = 10 ** (of_y - of_x) if space == "weights" else 10**of_y
    np.testing.assert_allclose(scaled.singular_values, factor * plain.singular_values, rtol=1e-9)
    assert scaled.tau == pytest.approx(10**of_y * plain.tau, rel=1e-9)
    np.testing.assert_allclose(scaled.predicted_r2, plain.predicted_r2, rtol=1e-9)
    assert scaled.predicted_rank == plain.predicted_rank
    if space == "prediction":
        assert scaled.k_star == plain.k_star


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_unit_of_targets_does_not_change_k_star(scale: float) -> None:
    X, Y, _ = sampled(1.4 ** -np.arange(6), 80, 0.05, 7, 8, 6)
    plain, scaled = task_spectrum(X, Y), task_spectrum(X, scale * Y)
    assert scaled.k_star == plain.k_star
    assert scaled.piecewise.k_star == plain.piecewise.k_star
    assert scaled.piecewise.breakpoints == plain.piecewise.breakpoints
    np.testing.assert_allclose(scaled.piecewise.rhos, plain.piecewise.rhos, rtol=1e-9)
    assert scaled.rho == pytest.approx(plain.rho, rel=1e-9)


def test_columns_in_different_units_are_used() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 100, 0.1, 5, 6, 3)
    units = np.array([1e-30, 1e-12, 1.0, 1e3, 1e12, 1e30])
    plain, mixed = task_spectrum(X, Y), task_spectrum(X * units, Y)
    assert not any("rank" in flag for flag in mixed.flags)
    assert mixed.noise == pytest.approx(plain.noise, rel=1e-9)
    # The fit of full rank does not depend on units; fits of lower ranks do.
    assert mixed.predicted_r2[-1] == pytest.approx(plain.predicted_r2[-1], rel=1e-9)


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_fewer_samples_than_inputs_give_the_smallest_norm(n: int) -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], n, 0.1, 2, 12, 4)
    X = X * np.geomspace(1, 30, 12)
    found = task_spectrum(X, Y)
    values = np.linalg.svd(np.linalg.lstsq(X, Y)[0], compute_uv=False)
    np.testing.assert_allclose(found.singular_values, values, rtol=1e-6, atol=1e-7 * values[0])
    assert any("smallest norm" in flag for flag in found.flags)
    assert any("noise is estimated from" in flag for flag in found.flags)
    assert not any("noise is estimated from" in flag for flag in task_spectrum(X, Y, noise=0.1).flags)
    assert found.noise > 0
    assert 1 <= found.k_star <= 4
    if n == 1:
        assert np.all(np.isnan(found.predicted_r2))
        assert found.noise == pytest.approx(math.sqrt(np.mean(Y**2)))
    else:
        predictions = {r: task_error(X, Y, r) for r in range(5)}
        assert found.noise == pytest.approx(math.sqrt(min(predictions.values())), rel=1e-6)


def task_error(X: Array, Y: Array, rank: int) -> float:
    """Return the mean squared error of held-out predictions at one rank over ten folds."""
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
def test_rank_deficient_inputs_are_flagged(kind: str) -> None:
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


def test_column_nonzero_in_one_fold_is_handled() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    X[:, 3] = 0.0
    X[10, 3] = 5.0
    found = task_spectrum(X, Y)
    np.testing.assert_allclose(found.predicted_r2, refitted_r2(X, Y, 10), rtol=1e-9)


def test_constant_targets_are_flagged() -> None:
    X, Y, _ = sampled([2.0, 1.0], 40, 0.1, 8, 4, 3)
    zero = task_spectrum(X, np.zeros((40, 3)))
    assert (zero.k_star, zero.predicted_rank, zero.noise, zero.tau) == (1, 1, 0.0, 0.0)
    assert np.all(zero.singular_values == 0)
    assert np.all(np.isnan(zero.predicted_r2))
    assert any("no output varies" in flag for flag in zero.flags)
    Y[:, 1] = 0.1
    partly = task_spectrum(X, Y)
    # The fit includes the constant output; the mean over outputs excludes it.
    assert any("left out" in flag for flag in partly.flags)
    assert partly.predicted_r2[-1] == pytest.approx(task_spectrum(X, Y[:, [0, 2]]).predicted_r2[-1])


def test_noiseless_targets_are_flagged() -> None:
    X, Y, _ = sampled([2.0, 1.0, 0.5], 90, 0.0, 8, 7, 5)
    found = task_spectrum(X, Y)
    assert any("rounding level" in flag for flag in found.flags)
    assert 0 < found.noise < 1e-6
    assert found.num_above == 3
    assert found.predicted_r2[3] == pytest.approx(1.0, abs=1e-12)
    # Values at the rounding level are not counted, even if the given noise is below that level.
    assert task_spectrum(X, Y, noise=1e-200).num_above == 3


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_single_sample_is_flagged(scale: float) -> None:
    found = task_spectrum([[2.0 * scale]], [3.0 * scale])
    assert found.singular_values == pytest.approx([1.5])
    assert (found.k_star, found.predicted_rank, found.num_samples) == (1, 1, 1)
    assert any("too few samples" in flag for flag in found.flags)
