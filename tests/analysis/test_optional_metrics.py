"""Optional metrics against quadrature, SciPy, Monte Carlo and independent formulas; files that hold them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from scipy import stats
from scipy.integrate import quad
from scipy.optimize import minimize
from scipy.spatial.distance import jensenshannon

import lorank
from lorank.report.loading import load_report
from lorank.report.optional_metrics import GROUPS, OPTIONAL_COLUMNS
from lorank.statistics.marchenko_pastur_distance import (
    bulk_scale,
    marchenko_pastur_cdf,
    marchenko_pastur_distance,
)
from lorank.statistics.randomized import permuted
from lorank.statistics.tail_fits import tail_fits
from lorank.statistics.tracy_widom import tracy_widom
from tests.support.command_line import ok, run

Array = npt.NDArray[Any]

ALL = tuple(GROUPS)
SHAPES = [(1, 1), (1, 7), (2, 2), (40, 40), (60, 90), (90, 30)]


def analyzed(matrix: Array, metrics: tuple[str, ...] = ALL) -> lorank.ModuleSpectrum:
    return lorank.analyze({"w.weight": matrix}, metrics=metrics, progress=False)["w"]


def spectrum(matrix: Array) -> Array:
    return np.sort(np.linalg.svd(matrix, compute_uv=False)) ** 2


@pytest.mark.parametrize("ratio", [1.0, 0.9, 0.5, 0.1, 0.001])
def test_marchenko_pastur_law_is_the_integral_of_its_density(ratio: float) -> None:
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def density(x: float) -> float:
        return math.sqrt((high - x) * (x - low)) / (2 * math.pi * ratio * x)

    for x in np.linspace(low, high, 9)[1:-1]:
        expected = quad(density, low, x, epsabs=1e-12)[0]
        assert marchenko_pastur_cdf(np.array([x]), ratio)[0] == pytest.approx(expected, abs=1e-8)
    np.testing.assert_array_equal(
        marchenko_pastur_cdf(np.array([low / 2, low, high, 9.0]), ratio), [0, 0, 1, 1]
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_distance_equals_that_of_scipy(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    row = analyzed(matrix, ("mp-distance",))
    values, ratio = spectrum(matrix), min(shape) / max(shape)
    for found, scale in ((row.mp_distance, "mean"), (row.mp_distance_median, "median")):
        unit = bulk_scale(values, shape, scale)  # type: ignore[arg-type]  # A literal.
        expected = stats.kstest(values / unit, lambda x: marchenko_pastur_cdf(x, ratio)).statistic
        assert found == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES[2:])
def test_scales_are_those_of_the_edges(shape: tuple[int, int]) -> None:
    row = analyzed(np.random.default_rng(1).standard_normal(shape) ** 3, ())
    kept = lorank.analyze(
        {"w.weight": np.random.default_rng(1).standard_normal(shape) ** 3}, keep_eigenvalues=True
    )
    values = kept["w"].eigenvalues
    assert values is not None
    factor = (1 + math.sqrt(min(shape) / max(shape))) ** 2
    assert bulk_scale(values, shape, "mean") * factor == pytest.approx(row.mp_edge, rel=1e-12)
    assert bulk_scale(values, shape, "median") * factor == pytest.approx(row.mp_edge_median, rel=1e-12)


def test_distance_is_small_for_random_matrices_only() -> None:
    rng = np.random.default_rng(2)
    for shape in ((300, 300), (200, 800)):
        noise = rng.standard_normal(shape)
        assert marchenko_pastur_distance(spectrum(noise), shape) < 0.03
        assert marchenko_pastur_distance(spectrum(noise * np.linspace(0.1, 3, shape[1])), shape) > 0.1


@pytest.mark.parametrize("shape", [(20, 20), (15, 60), (80, 25)])
def test_threshold_is_exceeded_by_five_per_cent_of_random_matrices(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    draws = 3000
    values = np.linalg.svd(rng.standard_normal((draws, *shape)), compute_uv=False) ** 2
    # With the true scale; that of a single matrix is itself random.
    unit = np.full(min(shape), float(max(shape)))
    edge = tracy_widom(unit, shape).edge
    assert 0.035 < np.mean(values.max(1) > edge) < 0.065


@pytest.mark.parametrize("count", [0, 3, 10])
def test_planted_spikes_are_counted(count: int) -> None:
    rng = np.random.default_rng(4)
    matrix = rng.standard_normal((200, 300))
    matrix += 6 * rng.standard_normal((200, count)) @ rng.standard_normal((count, 300)) / 10
    assert analyzed(matrix, ("tracy-widom",)).tw_spikes_median == count


def test_norms_equal_their_definitions() -> None:
    matrix = np.random.default_rng(5).standard_normal((30, 50)) ** 3
    row = analyzed(matrix, ("norms",))
    assert row.nuclear_norm == pytest.approx(np.linalg.norm(matrix, "nuc"))
    assert row.log_frobenius_norm == pytest.approx(np.log10(np.linalg.norm(matrix) ** 2))
    assert row.log_spectral_norm == pytest.approx(np.log10(np.linalg.norm(matrix, 2) ** 2))
    assert row.log_alpha_norm == pytest.approx(np.log10(np.sum(spectrum(matrix) ** row.powerlaw_alpha)))


def test_entropies_equal_those_of_scipy() -> None:
    matrix = np.random.default_rng(6).standard_normal((30, 50)) ** 3
    row = analyzed(matrix, ("entropy",))
    assert row.eigenvalue_entropy == pytest.approx(stats.entropy(spectrum(matrix)))
    assert row.singular_value_entropy == pytest.approx(stats.entropy(np.sqrt(spectrum(matrix))))
    assert row.eigenvalue_entropy is not None
    assert row.effective_rank == pytest.approx(math.exp(row.eigenvalue_entropy))


TAILS = {
    "power law": lambda rng: 1 + rng.pareto(0.8, 400),
    "steep power law": lambda rng: 1 + rng.pareto(4, 300),
    "exponential": lambda rng: 1 + rng.exponential(2, 400),
    "gamma": lambda rng: 1 + rng.gamma(3, 2, 300),
    "narrow": lambda rng: 1 + 0.01 * rng.exponential(1, 200),
    "few": lambda rng: 1 + rng.exponential(2, 4),
}


def truncated_oracle(x: Array) -> float:
    """Return the largest log-likelihood of a truncated power law from 1 on, by a direct search."""

    def loss(point: Array) -> float:
        alpha, rate = point[0], math.exp(min(point[1], 50))
        largest = max(0.0, max(-(alpha - 1) * u - rate * (math.exp(u) - 1) for u in np.linspace(0, 12, 200)))

        def density(u: float) -> float:
            return math.exp(-(alpha - 1) * u - rate * (math.exp(u) - 1) - largest)

        area = sum(quad(density, a, b, limit=200)[0] for a, b in ((0, 0.05), (0.05, 1), (1, 5), (5, 40)))
        mean = alpha * np.log(x).mean() + rate * (x.mean() - 1)
        return float(mean + largest + math.log(area)) if area > 0 else math.inf

    alpha = 1 + 1 / np.log(x).mean()
    starts = [(alpha, -8.0), (alpha / 2, math.log(1 / x.mean())), (0.0, math.log(1 / (x.mean() - 1)))]
    options = {"xatol": 1e-8, "fatol": 1e-13, "maxiter": 1500}
    return -len(x) * min(minimize(loss, s, method="Nelder-Mead", options=options).fun for s in starts)


@pytest.mark.parametrize("kind", TAILS)
def test_tail_fits_have_the_largest_likelihood(kind: str) -> None:
    unit = 7.0
    x = TAILS[kind](np.random.default_rng(7))
    x /= x.min()
    found = tail_fits(np.r_[0.1, 0.5, x] * unit, unit * x.min())
    alpha = 1 + 1 / np.log(x).mean()
    power = np.log(alpha - 1) - alpha * np.log(x)
    location, scale = stats.expon.fit(x, floc=1.0)
    exponential = stats.expon.logpdf(x, location, scale)
    assert found.exponential_rate * unit == pytest.approx(1 / scale)
    ratios = power - exponential
    assert found.exponential_ratio == pytest.approx(ratios.sum(), rel=1e-9)
    normal = ratios.sum() / (ratios.std() * math.sqrt(len(x)))
    assert found.exponential_p == pytest.approx(2 * stats.norm.sf(abs(normal)), rel=1e-6)
    expected = min(0.0, power.sum() - truncated_oracle(x))
    assert found.truncated_ratio == pytest.approx(expected, abs=2e-4 * len(x) ** 0.5)
    assert found.truncated_p == pytest.approx(
        stats.chi2.sf(-2 * found.truncated_ratio, 1), rel=1e-9, abs=1e-12
    )
    assert found.truncated_rate >= 0


def test_likelihood_ratios_find_the_law() -> None:
    rng = np.random.default_rng(8)
    power = tail_fits(1 + rng.pareto(1.5, 2000), 1.0)
    assert power.exponential_ratio > 0
    assert power.exponential_p < 0.01
    assert power.truncated_p > 0.05
    exponential = tail_fits(1 + rng.exponential(1, 2000), 1.0)
    assert exponential.exponential_ratio < 0
    assert exponential.exponential_p < 0.01
    assert exponential.truncated_p < 0.01
    cut = rng.pareto(0.5, 100000) + 1
    cut = cut[rng.random(len(cut)) < np.exp(-0.05 * (cut - 1))][:5000]
    found = tail_fits(cut, 1.0)
    assert found.truncated_alpha == pytest.approx(1.5, abs=0.1)
    assert found.truncated_rate == pytest.approx(0.05, abs=0.01)


def test_tail_starts_at_the_threshold_of_the_power_law() -> None:
    matrix = np.random.default_rng(9).standard_normal((60, 80)) ** 3
    row = lorank.analyze({"w.weight": matrix}, metrics=["tail-fits"], keep_eigenvalues=True)["w"]
    assert row.eigenvalues is not None
    tail = row.eigenvalues[row.eigenvalues >= row.powerlaw_xmin]
    assert 1 + 1 / np.log(tail / row.powerlaw_xmin).mean() == pytest.approx(row.powerlaw_alpha, rel=1e-9)
    assert row.exponential_rate == pytest.approx(1 / (tail.mean() - row.powerlaw_xmin), rel=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_randomized_metrics_equal_those_of_the_permuted_matrix(dtype: Any) -> None:
    matrix = (np.random.default_rng(10).standard_normal((30, 50)) ** 3).astype(dtype)
    other = permuted(matrix)
    assert not np.array_equal(matrix, other)
    np.testing.assert_array_equal(np.sort(matrix, axis=None), np.sort(other, axis=None))
    row = analyzed(matrix, ("randomized",))
    values, random = spectrum(matrix.astype(float)), spectrum(other.astype(float))
    assert row.randomized_distance == pytest.approx(jensenshannon(values, random), rel=1e-6)
    assert row.correlation_traps == tracy_widom(random, matrix.shape).spikes  # type: ignore[arg-type]


def test_correlation_traps_are_large_entries() -> None:
    matrix = np.random.default_rng(11).standard_normal((100, 200))
    assert analyzed(matrix, ("randomized",)).correlation_traps == 0
    matrix[3, 5], matrix[70, 90] = 60, -80
    assert analyzed(matrix, ("randomized",)).correlation_traps == 2
    low_rank = np.outer(np.random.default_rng(12).standard_normal(100), np.ones(200))
    row = analyzed(low_rank, ("randomized",))
    assert row.correlation_traps == 0
    assert row.randomized_distance is not None
    assert row.randomized_distance > 0.5


@pytest.mark.parametrize("shape", SHAPES)
def test_degenerate_matrices_raise_no_error(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(13)
    for matrix in (
        np.zeros(shape),
        np.ones(shape),
        np.eye(*shape),
        np.full(shape, np.nan),
        rng.standard_normal(shape) * 1e-150,
        rng.standard_normal(shape) * 1e-200,
        rng.standard_normal(shape) * 1e100,
    ):
        row = analyzed(matrix)
        for column in OPTIONAL_COLUMNS:
            assert (getattr(row, column) is None) == (not row.has_spectrum), column
            row.text(column)


def report_of(metrics: tuple[str, ...]) -> lorank.SpectralReport:
    weights = {
        f"layers.{i}.w.weight": np.random.default_rng(i).standard_normal((12, 20)) ** 3 for i in range(4)
    }
    weights |= {"layers.4.w.weight": np.full((3, 4), np.inf), "layers.5.w.weight": np.zeros((3, 4))}
    return lorank.analyze(weights, metrics=metrics, progress=False)


@pytest.mark.parametrize("metrics", [ALL, ("entropy",), ("norms", "randomized"), ()])
@pytest.mark.parametrize("ending", ["json", "csv", "parquet"])
def test_files_hold_the_metrics_that_were_asked_for(
    metrics: tuple[str, ...], ending: str, tmp_path: Path
) -> None:
    report = report_of(metrics)
    report.save(tmp_path / f"r.{ending}")
    again = load_report(tmp_path / f"r.{ending}")
    assert isinstance(again, lorank.SpectralReport)
    assert list(again.modules) == list(report.modules)
    assert again.metrics == metrics
    assert (again == report) == (ending != "csv")
    asked = {column for group in metrics for column in GROUPS[group]}
    assert asked == set(OPTIONAL_COLUMNS) & set(again.to_pandas().columns)
    assert set(again.shown_columns) - set(again.columns) == asked


def test_other_metrics_do_not_depend_on_the_optional_ones() -> None:
    plain, full = report_of(()), report_of(ALL)
    for row, other in zip(plain, full, strict=True):
        assert all(row.number(column) == other.number(column) for column in plain.columns)
        assert other.eigenvalues is None
    for group in ALL:
        for row, other in zip(report_of((group,)), full, strict=True):
            assert all(row.number(column) == other.number(column) for column in GROUPS[group])


def test_pages_show_the_metrics_that_were_asked_for(tmp_path: Path) -> None:
    for metrics in ((), ("norms",)):
        report_of(metrics).to_html(tmp_path / "r.html")
        assert ("nuclear_norm" in (tmp_path / "r.html").read_text()) == bool(metrics)


def test_unknown_metrics_raise() -> None:
    for metrics in (["alpha"], "norms", ["norms", "x"]):
        with pytest.raises(ValueError, match="metrics must be"):
            lorank.analyze({"w.weight": np.eye(3)}, metrics=metrics)


def test_journals_keep_optional_metrics(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    rng = np.random.default_rng(14)
    save_file({f"layers.{i}.w.weight": rng.standard_normal((8, 9)) for i in range(5)}, path)
    journal = tmp_path / "journal.jsonl"
    options: dict[str, Any] = {"resume": journal, "metrics": ["entropy", "norms"]}
    whole = lorank.analyze(path, **options)
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))
    assert lorank.analyze(path, **options) == whole
    with pytest.raises(ValueError, match="different metrics"):
        lorank.analyze(path, resume=journal, metrics=["entropy"])


def test_command_prints_metrics_that_were_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"layers.0.w.weight": np.random.default_rng(15).standard_normal((8, 9))}, path)
    assert "entropy" not in ok("analyze", path)
    shown = " ".join(ok("analyze", path, "--metrics", "entropy,norms", "-o", tmp_path / "r.csv").split())
    assert "nuclear" in shown
    assert "entropy" in shown
    assert "nuclear" in ok("report", tmp_path / "r.csv", "--sort", "nuclear_norm")
    assert "traps" in ok("analyze", path, "--metrics", "all", "--columns", "correlation_traps")
    for arguments in (("--metrics", "x"), ("--columns", "nuclear_norm")):
        assert run("analyze", path, *arguments).returncode == 2
