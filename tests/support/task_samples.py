"""Samples of linear tasks with given spectra, refits fold by fold, and comparisons of estimates."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import r2_score

from lorank.task_spectra import TaskEstimate

Array = npt.NDArray[np.float64]


def sampled(
    values: npt.ArrayLike, n: int, noise: float, seed: int, d_in: int = 64, d_out: int = 32
) -> tuple[Array, Array, Array]:
    """Return `X`, `Y` and their weights, which have the given singular values and random bases."""
    rng = np.random.default_rng(seed)
    spectrum = np.zeros(min(d_in, d_out))
    spectrum[: len(np.atleast_1d(values))] = values
    left = np.linalg.qr(rng.standard_normal((d_in, d_in)))[0][:, : len(spectrum)]
    right = np.linalg.qr(rng.standard_normal((d_out, d_out)))[0][:, : len(spectrum)]
    W = left * spectrum @ right.T
    X = rng.standard_normal((n, d_in))
    return X, X @ W + noise * rng.standard_normal((n, d_out)), W


def refitted_r2(X: Array, Y: Array, folds: int) -> Array:
    """Return R^2 of held-out predictions for ranks 0 to p, refitting every fold."""
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
