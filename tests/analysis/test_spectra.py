"""Spectra and their statistics, from Python, against NumPy and SciPy in float64.

The oracles follow the formulas and share no code with the package.
"""

from __future__ import annotations

import math
import multiprocessing
import signal
import subprocess
import sys
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.optimize import brentq

import lorank
from lorank import _core
from lorank.report.spectral import METRICS

EPS = np.finfo(np.float64).eps
SHAPES = [(1, 1), (1, 7), (7, 1), (3, 3), (5, 200), (200, 5), (64, 64), (130, 257)]
NARROW = {
    "float16": (np.float16, torch.float16),
    "bfloat16": (ml_dtypes.bfloat16, torch.bfloat16),
    "float8_e4m3fn": (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
    "float8_e5m2": (ml_dtypes.float8_e5m2, torch.float8_e5m2),
}
DTYPES = {"float64": (np.float64, torch.float64), "float32": (np.float32, torch.float32)} | NARROW
ASPECTS = [1, 2, 4, 16, 64]

# Six significant digits: two numbers are equal or differ by far more than rounding.
numbers = st.floats(1e-3, 1e3).map(lambda x: float(f"{x:.6g}"))
spectra = st.lists(numbers | st.sampled_from([0.5, 1.0, 2.0]), min_size=2, max_size=200).map(np.array)
quick = settings(deadline=None, max_examples=150)


def gaussian(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols))


sizes = st.integers(2, 24)
matrices = st.builds(gaussian, sizes, sizes, st.integers(0, 2**32 - 1))


def check_spectrum(W, reference=None):
    """Compare eigenvalues with the SVD; return both."""
    reference = np.asarray(W if reference is None else reference, np.float64)
    wanted = np.linalg.svd(reference, compute_uv=False)[::-1] ** 2
    found = lorank.spectrum(W)
    assert (found.dtype, found.shape) == (np.float64, wanted.shape)
    assert np.all(np.diff(found, prepend=0) >= 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-12 * wanted[-1])
    return found, wanted


# Eigenvalues


@pytest.mark.parametrize("norm", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", SHAPES)
def test_spectrum_is_the_squared_singular_values(shape, norm):
    W = gaussian(*shape)
    W *= norm / np.linalg.norm(W)
    before = W.copy()
    found, wanted = check_spectrum(W)
    upper = len(wanted) // 2
    np.testing.assert_allclose(found[upper:], wanted[upper:], rtol=1e-9, atol=0)
    np.testing.assert_array_equal(W, before)


@pytest.mark.parametrize("shape", SHAPES)
def test_spectra_of_zero_constant_deficient_and_identity_matrices(shape):
    np.testing.assert_array_equal(lorank.spectrum(np.zeros(shape)), np.zeros(min(shape)))
    check_spectrum(np.full(shape, -0.3))
    rank = max(1, min(shape) // 3)
    W = gaussian(shape[0], rank, 1) @ gaussian(rank, shape[1], 2)
    found, wanted = check_spectrum(W)
    np.testing.assert_allclose(found[-rank:], wanted[-rank:], rtol=1e-9)
    check_spectrum(np.eye(*shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 7), (5, 200), (130, 257)])
def test_element_types_are_read_exactly(shape, dtype):
    W = gaussian(*shape).astype(DTYPES[dtype][0])
    check_spectrum(W, W.astype(np.float64))
    tensor = torch.from_numpy(gaussian(*shape)).to(DTYPES[dtype][1])
    check_spectrum(tensor, tensor.double().numpy())
    check_spectrum(tensor.t(), tensor.double().numpy())


@pytest.mark.parametrize("dtype", NARROW)
def test_all_16_and_8_bit_numbers_are_converted_exactly(dtype):
    """Read every number, also subnormal and infinite, as a 1x1 matrix: its spectrum is the square."""
    bits = np.dtype(NARROW[dtype][0]).itemsize * 8
    step = 1 if bits == 8 else 61
    values = np.arange(0, 2**bits, step).astype(f"uint{bits}").view(NARROW[dtype][0])
    with np.errstate(invalid="ignore"):  # ml_dtypes warns about signalling NaNs
        finite = np.isfinite(values)
    for value in values[finite]:
        assert lorank.spectrum(np.array([[value]]))[0] == value.astype(np.float64) ** 2, value
    for value in values[~finite]:
        with pytest.raises(lorank.NumericalError, match="NaN or infinite"):
            lorank.spectrum(np.array([[value]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layouts_are_read(dtype):
    base = gaussian(24, 40).astype(DTYPES[dtype][0])
    unaligned = np.frombuffer(b"x" + base.tobytes(), dtype=base.dtype, offset=1).reshape(base.shape)
    records = np.zeros(base.shape, [("pad", "u1"), ("w", base.dtype)])
    records["w"] = base
    frozen = base.copy()
    frozen.flags.writeable = False
    views = [base.T, np.asfortranarray(base), base[::2, 1::3], base[::-1, ::-1], base[:, :1], unaligned]
    for view in [*views, records["w"], frozen, np.broadcast_to(base[:1], (6, 40))]:
        check_spectrum(view, view.astype(np.float64))
    check_spectrum(base.astype(np.float64).tolist())
    check_spectrum(torch.nn.Parameter(torch.eye(3, dtype=torch.float32).to(DTYPES[dtype][1])), np.eye(3))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_other_byte_order_is_read(dtype):
    W = gaussian(6, 9).astype(dtype)
    check_spectrum(W.astype(W.dtype.newbyteorder()), W)


# Inputs without a spectrum


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2"])
def test_nan_and_infinite_values_raise(dtype, bad):
    W = gaussian(12, 20)
    W[7, 13] = bad
    for value in (W.astype(DTYPES[dtype][0]), torch.from_numpy(W).to(DTYPES[dtype][1])):
        with pytest.raises(lorank.NumericalError, match="NaN or infinite"):
            lorank.spectrum(value)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_squares_outside_float64_raise(size):
    with pytest.raises(lorank.NumericalError, match="leave the range of float64"):
        lorank.spectrum(np.full((3, 3), size))


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty_matrix_has_no_eigenvalues(shape):
    for W in (np.zeros(shape), torch.zeros(shape)):
        assert lorank.spectrum(W).shape == (0,)


@pytest.mark.parametrize(
    ("W", "error", "message"),
    [
        (np.zeros(3), ValueError, r"2 dimensions.*\[3\]"),
        (np.zeros((2, 3, 4)), ValueError, r"2 dimensions.*\[2, 3, 4\]"),
        (torch.zeros(2, 3, 4), ValueError, r"2 dimensions.*\[2, 3, 4\]"),
        (np.float64(3), ValueError, "2 dimensions"),
        (np.ones((2, 2), np.int64), TypeError, "int64"),
        (torch.ones(2, 2, dtype=torch.int8), TypeError, "int8"),
        (np.ones((2, 2), bool), TypeError, "bool"),
        (np.ones((2, 2), complex), TypeError, "complex"),
        (np.array([[1.0, None]], object), TypeError, "object"),
        (torch.ones(2, 2, device="meta"), TypeError, "meta"),
        ("weight", ValueError, "weight"),
        ([[1.0], [2.0, 3.0]], ValueError, "inhomogeneous"),
    ],
)
def test_other_objects_raise(W, error, message):
    with pytest.raises(error, match=message):
        lorank.spectrum(W)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lorank.spectrum(np.eye(2), accuracy="sloppy"), r"accuracy.*'sloppy'"),
        (lambda: lorank.spectrum(np.eye(2), threads=0), r"threads.*0"),
        (lambda: lorank.alpha_hill([1.0, 2.0], convention="mean"), r"convention.*'median'.*'xmin_mid'.*mean"),
        (lambda: lorank.marchenko_pastur([1.0], (1, 1), scale="mode"), r"scale.*'mean'.*'median'.*mode"),
    ],
)
def test_unknown_options_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_invalid_eigenvalues_raise(bad):
    for values in ([1.0, bad], [bad, 1.0]):
        with pytest.raises(ValueError, match="eigenvalue"):
            lorank.alpha_hill(values)
        with pytest.raises(ValueError, match="eigenvalue"):
            lorank.marchenko_pastur(values, (2, 2))


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (3, 0), (-3, 3)])
def test_shape_that_contradicts_the_eigenvalues_raises(shape):
    with pytest.raises(ValueError, match=r"matrix|shape"):
        lorank.marchenko_pastur([1.0, 2.0, 3.0], shape)


# The Hill estimate


def nonzero(values):
    values = np.sort(values)
    return values[values > len(values) * EPS * values[-1]]


def hill(values, convention):
    x = nonzero(values)
    n = len(x)
    if n < (2 if convention == "median" else 3):
        return math.nan
    k = math.ceil(n / 2)
    threshold, tail = (x[n - k - 1], x[n - k :]) if convention == "median" else (x[n // 2], x[n // 2 :])
    logarithms = np.log(tail / threshold).sum()
    return 1 + len(tail) / logarithms if logarithms > 0 else math.inf


@pytest.mark.parametrize("convention", ["median", "xmin_mid"])
@quick
@given(values=spectra, unit=st.sampled_from([1e-60, 1.0, 1e60]), zeros=st.integers(0, 3))
def test_alpha_hill_equals_the_formula(convention, values, unit, zeros):
    padded = np.concatenate([values * unit, np.zeros(zeros), [values.max() * unit * 1e-17][:zeros]])
    found = lorank.alpha_hill(padded, convention=convention)
    assert found == pytest.approx(hill(padded, convention), rel=1e-8, nan_ok=True)
    assert found == lorank.alpha_hill(padded[::-1], convention=convention) or math.isnan(found)


@pytest.mark.parametrize("convention", ["median", "xmin_mid"])
def test_alpha_hill_of_equal_and_few_values(convention):
    for equal in ([2.0] * 5, [1e-3, 1e-2, 7.0, 7.0, 7.0, 7.0, 7.0], [0.0, 3.0, 3.0, 3.0]):
        assert lorank.alpha_hill(equal, convention=convention) == math.inf
    for few in ([], [1.0], [0.0, 0.0], [0.0, 1.0]):
        assert math.isnan(lorank.alpha_hill(few, convention=convention))


# The Marchenko-Pastur law


@cache
def unit_median(aspect):
    """Return the median of the law of mean 1 from its cumulative distribution in u = sqrt(x)."""
    y = 1 / aspect
    low, high = 1 - math.sqrt(y), 1 + math.sqrt(y)

    def density(u):
        inside = max(0.0, (high**2 - u**2) * (u**2 - low**2))
        return math.sqrt(inside) / (math.pi * y * u) if u else 2 / math.pi

    def excess(u):
        return quad(density, low, u, epsabs=1e-12, epsrel=1e-12, limit=200)[0] - 0.5

    return brentq(excess, low, high, xtol=1e-14) ** 2


@pytest.mark.parametrize("aspect", [*ASPECTS, 1.37, 1000])
def test_median_of_the_law_equals_its_distribution(aspect):
    assert _core.marchenko_pastur_median(1 / aspect) == pytest.approx(unit_median(aspect), rel=1e-8)


@pytest.mark.parametrize("scale", ["mean", "median"])
@quick
@given(values=spectra, aspect=st.sampled_from([1, 2, 3, 16]), tall=st.booleans())
def test_edge_and_spikes_equal_the_formulas(scale, values, aspect, tall):
    p = len(values)
    variance = values.mean() if scale == "mean" else np.median(values) / unit_median(aspect)
    edge = variance * (1 + 1 / math.sqrt(aspect)) ** 2
    found = lorank.marchenko_pastur(values, (p * aspect, p) if tall else (p, p * aspect), scale=scale)
    assert found.edge == pytest.approx(edge, rel=1e-8)
    assert np.sum(values > edge * (1 + 1e-7)) <= found.spikes <= np.sum(values > edge * (1 - 1e-7))
    assert found.spikes == np.sum(values > found.edge)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_planted_spikes_exceed_the_gaussian_bulk(aspect):
    p = 256
    shape = (p * aspect, p)
    W = gaussian(*shape, seed=aspect).astype(np.float32)
    left, right = (np.linalg.qr(gaussian(n, 5, seed=n))[0] for n in shape)
    for planted in (0, 1, 5):
        value = 2 * (shape[0] * shape[1]) ** 0.25
        eigenvalues = lorank.spectrum(W + value * left[:, :planted] @ right[:, :planted].T)
        for scale in ("mean", "median"):
            spikes = lorank.marchenko_pastur(eigenvalues, shape, scale=scale).spikes
            assert planted <= spikes <= planted + max(2, p // 100), scale


# All metrics


def power_laws(values):
    """Return (distance, alpha, xmin) for every xmin, the best first."""
    x = nonzero(values)
    fits = []
    for xmin in np.unique(x)[:-1]:
        tail = x[x >= xmin]
        alpha = 1 + len(tail) / np.log(tail / xmin).sum()
        fitted = 1 - (tail / xmin) ** (1 - alpha)
        fits.append((np.abs(fitted - np.arange(len(tail)) / len(tail)).max(), alpha, xmin))
    return sorted(fits)


def oracle(values, shape):
    x, p = nonzero(values), len(values)
    q = x / x.sum()
    y = p / max(shape)
    edges = np.array([np.mean(values), np.median(values) / unit_median(1 / y)]) * (1 + math.sqrt(y)) ** 2
    return {
        "num_nonzero": len(x),
        "num_unresolved": 0,
        "alpha_hill": hill(values, "median"),
        "alpha_hill_xmin_mid": hill(values, "xmin_mid"),
        "mp_edge": edges[0],
        "mp_edge_median": edges[1],
        "mp_soft_rank": edges[0] / x.max(),
        "frobenius_norm": math.sqrt(x.sum()),
        "spectral_norm": math.sqrt(x.max()),
        "stable_rank": x.sum() / x.max(),
        "effective_rank": math.exp(-(q * np.log(q)).sum()),
        "participation_ratio": x.sum() ** 2 / (x**2).sum(),
    }


def check_metrics(found, values, shape):
    for name, value in oracle(values, shape).items():
        assert found[name] == pytest.approx(value, rel=1e-8, abs=1e-300, nan_ok=True), name
    # Tolerance of float64 arithmetic; float32 has its own tests.
    assert 0 <= found["eigenvalue_error"] <= (8 + max(shape)) * EPS * values.max(), found["eigenvalue_error"]
    assert np.isfinite(found["alpha_hill_error"]) == np.isfinite(found["alpha_hill"])
    assert found["mp_spikes"] == np.sum(nonzero(values) > found["mp_edge"])
    assert found["mp_spikes_median"] == np.sum(nonzero(values) > found["mp_edge_median"])
    power_law = [found[f"powerlaw_{name}"] for name in ("distance", "alpha", "xmin")]
    fits = power_laws(values)
    if not fits:
        assert np.isnan([*power_law, found["alpha_weighted"]]).all()
        return
    assert power_law[0] == pytest.approx(fits[0][0], abs=1e-9)
    # Several tails may have equal distances up to rounding: any of them is correct.
    close = [fit for fit in fits if fit[0] < fits[0][0] + 1e-8 and fit[2] == power_law[2]]
    assert power_law == pytest.approx(close[0], rel=1e-7, abs=1e-9)
    assert found["alpha_weighted"] == pytest.approx(power_law[1] * math.log10(values.max()), rel=1e-12)


@quick
@given(values=spectra, aspect=st.sampled_from([1, 3, 16]), zeros=st.integers(0, 3))
def test_metrics_of_any_spectrum_equal_the_formulas(values, aspect, zeros):
    values = np.concatenate([values, np.zeros(zeros)])
    shape = (len(values), len(values) * aspect)
    check_metrics(_core.spectral_metrics(values, shape), values, shape)


@pytest.mark.parametrize("unit", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("shape", SHAPES)
def test_report_has_the_metrics_of_its_spectra(shape, unit):
    heavy = gaussian(*shape) * np.random.default_rng(3).pareto(2.5, shape[1]) * unit
    low_rank = gaussian(shape[0], 2, 1) @ gaussian(2, shape[1], 2) * unit
    weights = {"heavy": heavy, "low_rank": low_rank}
    report = lorank.analyze(weights, threads=2, keep_eigenvalues=True, progress=False)
    assert [row.name for row in report] == list(weights)
    for row in report:
        np.testing.assert_array_equal(row.eigenvalues, lorank.spectrum(weights[row.name]))
        assert row.shape == shape
        check_metrics({name: getattr(row, name) for name in METRICS}, row.eigenvalues, shape)


def test_fast_rows_are_near_exact_ones_or_exact():
    weights = {
        "square": gaussian(300, 300),
        "wide": gaussian(200, 500, 1).astype(np.float16),
        "small": gaussian(40, 60, 2),
        "deficient": gaussian(300, 150, 3) @ gaussian(150, 300, 4),
        "zero": np.zeros((200, 200)),
    }
    exact = lorank.analyze(weights, keep_eigenvalues=True, progress=False)
    fast = lorank.analyze(weights, accuracy="fast", keep_eigenvalues=True, progress=False)
    assert (exact.accuracy, fast.accuracy) == ("exact", "fast")
    assert {row.name for row in fast if row.accuracy == "fast"} == {"square", "wide"}
    assert all(row.accuracy == "exact" for row in exact)
    for a, b in zip(exact, fast, strict=True):
        np.testing.assert_allclose(a.eigenvalues, b.eigenvalues, rtol=0, atol=b.eigenvalue_error)
        assert abs(a.mp_spikes - b.mp_spikes) <= b.mp_spikes_error
        if np.isfinite(a.alpha_hill):
            assert abs(a.alpha_hill - b.alpha_hill) <= min(b.alpha_hill_error, 1e-3)
    np.testing.assert_array_equal(
        lorank.spectrum(weights["square"], accuracy="fast"), fast["square"].eigenvalues
    )


def test_only_large_matrices_are_sampled():
    weights = {"large": gaussian(2048, 2100).astype(np.float32), "middle": gaussian(300, 300)}
    exact = lorank.analyze(weights, progress=False)
    report = lorank.analyze(weights, accuracy="sampled", progress=False)
    assert [row.accuracy for row in report] == ["sampled", "fast"]
    one, other = exact["large"], report["large"]
    # Useful error bars are a few per cent of alpha; the random vectors determine their exact size.
    assert 0 < abs(one.alpha_hill - other.alpha_hill) <= other.alpha_hill_error < 0.1
    assert abs(one.mp_spikes - other.mp_spikes) <= other.mp_spikes_error
    assert other.frobenius_norm == pytest.approx(one.frobenius_norm, rel=1e-12)
    assert np.isnan(other.eigenvalue_error)
    with pytest.raises(ValueError, match="'sampled' does not compute single eigenvalues"):
        lorank.spectrum(weights["middle"], accuracy="sampled")


def test_nan_and_zero_matrices_are_flagged():
    bad = gaussian(4, 5)
    bad[0, 0] = np.nan
    weights = {"bad": bad, "zero": np.zeros((4, 5)), "good": gaussian(4, 5)}
    report = lorank.analyze(weights, progress=False)
    assert not report["bad"].has_spectrum
    assert "NaN or infinite values" in report["bad"].flags[0]
    zero = report["zero"]
    assert zero.flags == ("zero matrix",)
    assert (zero.frobenius_norm, zero.spectral_norm, zero.mp_spikes, zero.num_nonzero) == (0, 0, 0, 0)
    assert np.isnan([zero.alpha_hill, zero.stable_rank, zero.effective_rank, zero.powerlaw_alpha]).all()
    assert report["good"].flags == ()


# Invariances


@quick
@given(W=matrices, exponent=st.integers(-150, 150), factor=st.floats(0.1, 10))
def test_spectra_and_metrics_scale_with_the_matrix(W, exponent, factor):
    eigenvalues = lorank.spectrum(W)
    np.testing.assert_array_equal(lorank.spectrum(W * 2.0**exponent), eigenvalues * 4.0**exponent)
    scaled = lorank.spectrum(-factor * W)
    np.testing.assert_allclose(scaled, eigenvalues * factor**2, rtol=0, atol=1e-13 * scaled[-1])
    before = _core.spectral_metrics(eigenvalues, W.shape)
    after = _core.spectral_metrics(eigenvalues * 10.0**exponent, W.shape)
    for name in METRICS:
        unit = {"frobenius_norm": 0.5, "spectral_norm": 0.5, "mp_edge": 1, "mp_edge_median": 1}.get(name, 0)
        # Rounding chooses among tails with equal distances.
        if name not in ("powerlaw_alpha", "powerlaw_xmin", "alpha_weighted"):
            wanted = before[name] * 10.0 ** (exponent * unit)
            assert after[name] == pytest.approx(wanted, rel=1e-8, abs=0, nan_ok=True), name


@quick
@given(W=matrices)
def test_transposition_keeps_spectra_and_metrics(W):
    eigenvalues, transposed = lorank.spectrum(W), lorank.spectrum(W.T)
    np.testing.assert_allclose(transposed, eigenvalues, rtol=0, atol=1e-13 * eigenvalues[-1])
    rows = [lorank.analyze({"w": m}, progress=False)["w"] for m in (W, W.T)]
    for name in ("alpha_hill", "mp_edge", "mp_edge_median", "stable_rank", "effective_rank"):
        a, b = (getattr(row, name) for row in rows)
        assert a == pytest.approx(b, rel=1e-6, nan_ok=True), name


# Threads and processes

# Large enough for all threads.
TOGETHER = (500, 32000)


def test_number_of_threads_does_not_change_bits():
    shapes = [*SHAPES, (300, 700), (700, 300), TOGETHER, (2000, 2000)]
    weights = {f"layer{i}": gaussian(*s, seed=i).astype(np.float32) for i, s in enumerate(shapes)}
    one, *others = (
        lorank.analyze(weights, threads=n, keep_eigenvalues=True, progress=False) for n in (1, 2, 3)
    )
    for other in others:
        for a, b in zip(one, other, strict=True):
            assert a.name == b.name
            assert a.eigenvalues.tobytes() == b.eigenvalues.tobytes(), a.shape
            for name in METRICS:
                assert np.float64(getattr(a, name)).tobytes() == np.float64(getattr(b, name)).tobytes(), name


def _send_spectrum(connection, W):
    connection.send(lorank.spectrum(W, threads=2))


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.parametrize("shape", [(40, 60), TOGETHER])
def test_forked_child_computes(shape):
    W = gaussian(*shape).astype(np.float32)
    wanted = lorank.spectrum(W, threads=2)
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_spectrum, args=(sender, W))
    child.start()
    sender.close()
    try:
        assert receiver.poll(30), "the child hangs"
        assert receiver.recv().tobytes() == wanted.tobytes()
        child.join(10)
        assert child.exitcode == 0
    finally:
        child.kill()
        child.join()


INTERRUPTED = """
import signal, numpy as np, lorank
signal.signal(signal.SIGINT, signal.default_int_handler)
rng = np.random.default_rng(0)
weights = {f"w{i}": rng.standard_normal((3000, 3000), dtype=np.float32) for i in range(6)}
print("ready", flush=True)
lorank.analyze(weights, progress=False)
print("finished", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals as on POSIX")
def test_ctrl_c_interrupts_the_computation():
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)  # The child is computing by then.
        child.send_signal(signal.SIGINT)
        output, errors = child.communicate(timeout=5)
    finally:
        child.kill()
        child.wait()
    assert "finished" not in output
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert child.returncode == -signal.SIGINT
