"""The default accuracy on real models, against singular values from NumPy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorank
from lorank import _core
from lorank.sources import arrays

Array = np.ndarray


def hill(eigenvalues: Array) -> float:
    nonzero = eigenvalues[eigenvalues > len(eigenvalues) * np.finfo(float).eps * eigenvalues[-1]]
    k = -(-len(nonzero) // 2)
    return float(1 + k / np.sum(np.log(nonzero[-k:] / nonzero[-k - 1])))


def spikes(eigenvalues: Array, shape: tuple[int, int]) -> int:
    edge = eigenvalues.mean() * (1 + np.sqrt(min(shape) / max(shape))) ** 2
    return int(np.sum(eigenvalues > edge))


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_every_matrix_matches_a_float64_svd(model: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(model)
    report = lorank.analyze(folder, keep_eigenvalues=True, progress=False)
    weights = load_file(folder / "model.safetensors")
    assert {row.name + ".weight" for row in report} == {
        name for name, w in weights.items() if w.ndim == 2 and w.dtype == np.float32
    }
    for row in report:
        weight = weights[row.name + ".weight"].astype(np.float64)
        assert row.shape == weight.shape
        oracle = np.linalg.svd(weight, compute_uv=False)[::-1] ** 2
        assert row.alpha_hill == pytest.approx(hill(oracle), abs=1e-6), row.name
        assert row.mp_spikes == spikes(oracle, row.shape), row.name
        upper = len(oracle) // 2
        np.testing.assert_allclose(row.eigenvalues[upper:], oracle[upper:], rtol=1e-9, err_msg=row.name)
        # A pairwise sum, as BLAS sums 28 million squares with an error of 1e-12 on some machines.
        assert row.frobenius_norm == pytest.approx(np.sqrt(np.sum(weight**2)), rel=1e-12)
    assert report.num_parameters == sum(w.size for w in weights.values() if w.dtype == np.float32)


@pytest.mark.parametrize("model", ["minilm", "smollm2"])
def test_fast_exponents_and_spikes_are_within_their_errors(
    model: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    exact = lorank.analyze(folder, progress=False)
    fast = lorank.analyze(folder, accuracy="fast", progress=False)
    for a, b in zip(exact, fast, strict=True):
        if np.isnan(a.alpha_hill):
            assert np.isnan(b.alpha_hill)
            continue
        assert abs(a.alpha_hill - b.alpha_hill) <= min(1e-3, b.alpha_hill_error), a.name
        assert abs(a.mp_spikes - b.mp_spikes) <= min(1, b.mp_spikes_error), a.name
        assert a.num_nonzero <= b.num_nonzero <= a.num_nonzero + b.num_unresolved, a.name
    # Nearly all matrices are computed in float32, except for embeddings and small matrices.
    usual = [row for row in fast if min(row.shape) >= 128 and max(row.shape) <= 32 * min(row.shape)]
    assert len(usual) >= len(fast) - 3
    assert sum(row.accuracy == "exact" for row in usual) <= 0.05 * len(usual)


def test_error_bars_cover_the_true_values(minilm: Path, smollm2: Path) -> None:
    """Sample matrices that are small enough for exact spectra."""
    exponents, counts, bars = [], [], []
    for folder in (minilm, smollm2):
        exact = lorank.analyze(folder, progress=False)
        weights = load_file(folder / "model.safetensors")
        for row in exact:
            if min(row.shape) < 128:
                continue
            found = _core.sample(arrays.matrix(weights[row.name + ".weight"]))
            off = abs(found["alpha_hill"] - row.alpha_hill)
            exponents.append(off <= found["alpha_hill_error"])
            counts.append(abs(found["mp_spikes"] - row.mp_spikes) <= found["mp_spikes_error"])
            bars.append(found["alpha_hill_error"] / row.alpha_hill)
    assert len(exponents) > 200
    assert np.mean(exponents) >= 0.9
    assert np.mean(counts) >= 0.9
    assert np.median(bars) < 0.05


@pytest.mark.parametrize("ratio", [1, 2, 4, 16, 64])
def test_gaussian_noise_has_almost_no_spikes(ratio: int) -> None:
    rng = np.random.default_rng(ratio)
    for p in (64, 256, 512):
        noise = rng.standard_normal((p, ratio * p))
        eigenvalues = lorank.spectrum(noise)
        for scale in ("mean", "median"):
            found = lorank.marchenko_pastur(eigenvalues, noise.shape, scale=scale)
            assert found.spikes <= max(2, 0.01 * p)


@pytest.mark.parametrize("shape", [(256, 256), (256, 1024), (1024, 256), (512, 2048)])
@pytest.mark.parametrize("planted", [1, 3, 5])
def test_planted_directions_are_counted(shape: tuple[int, int], planted: int) -> None:
    out, fan_in = shape
    rng = np.random.default_rng(planted)
    sigma = 0.02
    left = np.linalg.qr(rng.standard_normal((out, planted)))[0]
    right = np.linalg.qr(rng.standard_normal((fan_in, planted)))[0]
    strength = 2 * sigma * (out * fan_in) ** 0.25
    weight = sigma * rng.standard_normal(shape) + strength * left @ right.T
    found = lorank.marchenko_pastur(lorank.spectrum(weight), shape)
    assert found.spikes >= planted
    assert found.spikes <= planted + max(2, 0.01 * min(shape))
