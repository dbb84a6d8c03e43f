"""Comparisons of two models: numbers against NumPy and SciPy, names, vocabularies, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from scipy.linalg import subspace_angles

import lorank
from lorank import _core
from lorank.sources import open_source
from lorank.statistics.leading_subspaces import leading_subspaces
from lorank.statistics.principal_angles import principal_angles

Array = npt.NDArray[Any]

NAME = "layers.0.mlp"
ANGLES = ("left_angle_max", "left_angle_mean", "right_angle_max", "right_angle_mean")
SHAPES = [(1, 1), (1, 9), (9, 1), (30, 30), (40, 70), (70, 40), (300, 260), (260, 310), (900, 220)]


def compared(a: Array, b: Array, **options: Any) -> Any:
    report = lorank.compare({f"{NAME}.weight": a}, {f"{NAME}.weight": b}, progress=False, **options)
    return report[NAME]


def orthogonal(size: int, rng: np.random.Generator) -> Array:
    return np.linalg.qr(rng.standard_normal((size, size)))[0]


def with_decay(shape: tuple[int, int], rng: np.random.Generator, decay: float = 0.8) -> Array:
    """Return a matrix with singular values in geometric progression."""
    p = min(shape)
    return (
        orthogonal(shape[0], rng)[:, :p]
        * np.maximum(decay ** np.arange(p), 1e-3)
        @ orthogonal(shape[1], rng)[:, :p].T
    )


def oracle(a: Array, b: Array, rank: int) -> list[float]:
    """Return the relative change and the angles, from the full decompositions."""
    one, other = (np.linalg.svd(x.astype(np.float64), full_matrices=False) for x in (a, b))
    rank = min(rank, *a.shape)
    left = np.degrees(subspace_angles(one[0][:, :rank], other[0][:, :rank]))
    right = np.degrees(subspace_angles(one[2][:rank].T, other[2][:rank].T))
    change = np.linalg.norm(b.astype(np.float64) - a) / np.linalg.norm(a.astype(np.float64))
    return [change, left.max(), left.mean(), right.max(), right.mean()]


def numbers(row: Any) -> list[float]:
    return [row.relative_change, *(getattr(row, name) for name in ANGLES)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_numbers_equal_those_of_full_decompositions(shape: tuple[int, int], dtype: Any) -> None:
    rng = np.random.default_rng(sum(shape))
    a = with_decay(shape, rng).astype(dtype)
    b = (a + 0.05 * with_decay(shape, rng)).astype(dtype)
    for rank in (1, 3, 8):
        row = compared(a, b, rank=rank)
        np.testing.assert_allclose(numbers(row), oracle(a, b, rank), rtol=1e-6, atol=1e-5)
        assert row.subspace_rank == min(rank, *shape)
        assert not row.flags


def test_spectra_equal_those_of_analyze() -> None:
    rng = np.random.default_rng(0)
    a, b = ({f"{NAME}.weight": rng.standard_normal((40, 60))} for _ in range(2))
    row = lorank.compare(a, b)[NAME]
    for side, weights in (("a", a), ("b", b)):
        analyzed = lorank.analyze(weights)[NAME]
        for metric in ("alpha_hill", "mp_spikes", "stable_rank"):
            assert getattr(row, f"{metric}_{side}") == getattr(analyzed, metric)
    assert row.alpha_hill_change == row.alpha_hill_b - row.alpha_hill_a
    assert row.stable_rank_change == row.stable_rank_b - row.stable_rank_a
    assert row.mp_spikes_change == row.mp_spikes_b - row.mp_spikes_a


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_matrices_have_no_change(shape: tuple[int, int]) -> None:
    row = compared(*[np.random.default_rng(0).standard_normal(shape)] * 2)
    changes = [
        getattr(row, f"{name}_change") for name in ("relative", "alpha_hill", "mp_spikes", "stable_rank")
    ]
    assert changes == [0, 0, 0, 0] or shape[0] == 1 or shape[1] == 1  # One eigenvalue has no exponent.
    assert numbers(row) == [0.0] * 5
    assert not row.flags


@given(st.integers(0, 2**32), st.floats(0.01, 89), st.integers(1, 6), st.sampled_from(["left", "right"]))
@settings(max_examples=40, deadline=None)
def test_planted_rotation_is_found(seed: int, degrees: float, rank: int, side: str) -> None:
    """One leading vector turns towards a vector outside the leading subspace."""
    rng = np.random.default_rng(seed)
    u, v = orthogonal(30, rng), orthogonal(20, rng)
    values = np.r_[np.linspace(9, 5, rank), np.linspace(1, 0.1, 20 - rank)]
    a = u[:, :20] * values @ v.T
    basis = {"left": u, "right": v}[side].copy()
    angle = np.radians(degrees)
    basis[:, [0, 19]] = basis[:, [0, 19]] @ [
        [np.cos(angle), -np.sin(angle)],
        [np.sin(angle), np.cos(angle)],
    ]
    b = basis[:, :20] * values @ v.T if side == "left" else u[:, :20] * values @ basis.T
    row = compared(a, b, rank=rank)
    other = "right" if side == "left" else "left"
    assert getattr(row, f"{side}_angle_max") == pytest.approx(degrees, abs=1e-6)
    assert getattr(row, f"{side}_angle_mean") == pytest.approx(degrees / rank, abs=1e-6)
    assert getattr(row, f"{other}_angle_max") == pytest.approx(0, abs=1e-6)
    assert row.stable_rank_change == pytest.approx(0, abs=1e-9)


@given(st.integers(0, 2**32), st.sampled_from(SHAPES[3:6]))
@settings(max_examples=15, deadline=None)
def test_orthogonal_changes_of_both_bases_change_nothing(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    a, b = with_decay(shape, rng), with_decay(shape, rng)
    left, right = orthogonal(shape[0], rng), orthogonal(shape[1], rng)
    one, other = compared(a, b, rank=4), compared(left @ a @ right, left @ b @ right, rank=4)
    np.testing.assert_allclose(numbers(other), numbers(one), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e-30, 1.0, 1e30, 1e150, 1e300])
def test_scale_of_both_matrices_does_not_matter(scale: float) -> None:
    rng = np.random.default_rng(1)
    a, b = with_decay((300, 250), rng), with_decay((300, 250), rng)
    with np.errstate(under="ignore"):
        row = compared(a * scale, b * scale, rank=4)
    if row.has_numbers:  # The core refuses squares beyond float64.
        np.testing.assert_allclose(numbers(row), numbers(compared(a, b, rank=4)), rtol=1e-5)


def test_rank_of_subspaces_is_at_most_that_of_the_matrices() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 40))
    b = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 40))
    row = compared(a, b)
    assert row.subspace_rank == 3
    np.testing.assert_allclose(numbers(row), oracle(a, b, 3), atol=1e-6)
    large = rng.standard_normal((500, 4)) @ rng.standard_normal((4, 400))
    row = compared(large, large + large[::-1], rank=4)
    np.testing.assert_allclose(numbers(row), oracle(large, large + large[::-1], 4), atol=1e-6)


def test_zero_matrices() -> None:
    zero, one = np.zeros((4, 5)), np.eye(4, 5)
    row = compared(zero, zero)
    assert (row.relative_change, row.subspace_rank, row.flags) == (0, 0, ("A: zero matrix", "B: zero matrix"))
    row = compared(zero, one)
    assert (row.relative_change, row.flags) == (np.inf, ("A: zero matrix",))
    assert np.isnan(row.left_angle_max)
    row = compared(one, zero)
    assert (row.relative_change, row.flags) == (1, ("B: zero matrix",))


def test_values_that_are_not_finite_give_a_row_without_numbers() -> None:
    good = np.eye(4, 5)
    for value in (np.nan, np.inf):
        bad = np.where(good > 0, value, 1.0)
        for a, b, side in ((bad, good, "A"), (good, bad, "B")):
            row = compared(a, b)
            assert not row.has_numbers
            assert row.flags[0].startswith(f"{side}: ")
            assert row.number("mp_spikes_change") is None


def test_equal_singular_values_are_flagged() -> None:
    rng = np.random.default_rng(3)
    for size in (30, 300):
        row = compared(orthogonal(size, rng), orthogonal(size, rng))
        assert row.subspace_gap < 1e-9
        assert "singular values 8 and 9 of" in row.flags[0]


@pytest.mark.parametrize("decay", [0.5, 0.1, 0.05])
@pytest.mark.parametrize("size", [50, 300])
def test_small_singular_values(size: int, decay: float) -> None:
    """The vectors of values far below the largest one are accurate."""
    rng = np.random.default_rng(16)
    bases = orthogonal(size, rng), orthogonal(size, rng)
    a = bases[0] * np.maximum(decay ** np.arange(size), 1e-12) @ bases[1]
    found = leading_subspaces(a, 5)
    assert found.error < 1e-3
    assert principal_angles(found.left, bases[0][:, :5]).max() <= found.error + 1e-9
    assert principal_angles(found.right, bases[1][:5].T).max() <= found.error + 1e-9


@pytest.mark.parametrize("shape", [(700, 400), (400, 700), (2000, 300)])
@pytest.mark.parametrize("kind", ["gauss", "heavy", "step"])
def test_iteration_bounds_its_error(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(4)
    a = rng.standard_normal(shape).astype(np.float32)
    if kind == "heavy":
        a = (a * rng.pareto(2, shape[1])).astype(np.float32)
    if kind == "step":
        a += (5 * rng.standard_normal((shape[0], 8)) @ rng.standard_normal((8, shape[1]))).astype(np.float32)
    found = leading_subspaces(a, 8)
    u, s, vt = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    assert found.error < 1e-3
    assert principal_angles(found.right, vt[:8].T).max() <= found.error + 1e-6
    assert principal_angles(found.left, u[:, :8]).max() <= found.error + 1e-6
    assert found.gap == pytest.approx(1 - s[8] / s[7], abs=2e-3)


def test_matrices_that_are_not_held_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    a = np.random.default_rng(5).standard_normal((900, 300)).astype(np.float32)
    whole = leading_subspaces(a, 3)
    monkeypatch.setattr("lorank.statistics.leading_subspaces._HELD", 100)
    monkeypatch.setattr("lorank.statistics.leading_subspaces._BLOCK", 50 * 300)
    parts = leading_subspaces(a, 3)
    assert principal_angles(whole.right, parts.right).max() < 1e-4
    assert principal_angles(whole.left, parts.left).max() < 1e-4


@given(st.integers(0, 2**32), st.integers(1, 5), st.floats(-9, 0))
@settings(max_examples=40, deadline=None)
def test_principal_angles_equal_those_of_scipy(seed: int, rank: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    a = np.linalg.qr(rng.standard_normal((12, rank)))[0]
    b = np.linalg.qr(a + 10**exponent * rng.standard_normal((12, rank)))[0]
    np.testing.assert_allclose(
        principal_angles(a, b), np.degrees(subspace_angles(a, b))[::-1], rtol=1e-7, atol=1e-12
    )


def test_grown_vocabulary_compares_the_common_rows() -> None:
    rng = np.random.default_rng(6)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    small = {name: rng.standard_normal((50, 8)) for name in names}
    large = {name: np.r_[x + 0.01, rng.standard_normal((3, 8))] for name, x in small.items()}
    cut = {name: x[:50] for name, x in large.items()}
    for a, b, other in ((small, large, "B"), (large, small, "A")):
        report = lorank.compare(a, b, progress=False)
        plain = lorank.compare(*((small, cut) if other == "B" else (cut, small)), progress=False)
        for row, expected in zip(report, plain, strict=True):
            assert row.flags == ("mapping has 3 more rows: the first 50 are compared",)
            assert row.shape == (50, 8)
            assert numbers(row) == numbers(expected)
            assert row.stable_rank_a == expected.stable_rank_a


def test_other_shapes_raise() -> None:
    for a, b in (((4, 5), (4, 6)), ((4, 5), (5, 5))):
        with pytest.raises(ValueError, match=r"layers.0.mlp: \(4, 5\) in mapping, .* exclude this module"):
            compared(np.ones(a), np.ones(b))
    with pytest.raises(ValueError, match="exclude this module"):
        lorank.compare({"lm_head.weight": np.ones((4, 5))}, {"lm_head.weight": np.ones((4, 6))})
    more = {f"{NAME}.weight": np.ones((2, 2)), "x.weight": np.ones((2, 2))}
    other = {f"{NAME}.weight": np.ones((3, 2)), "x.weight": np.ones((2, 2))}
    assert [row.name for row in lorank.compare(more, other, exclude=["mlp"])] == ["x"]


def test_modules_of_one_model_are_skipped(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    a = {f"layers.{i}.w.weight": rng.standard_normal((4, 4)) for i in range(3)}
    b = {f"layers.{i}.w.weight": rng.standard_normal((4, 4)) for i in range(1, 4)}
    norms = {"norm.weight": np.ones(4), "same.weight": np.ones(4)}
    save_file(a | norms | {"only_a.bias": np.ones(4)}, tmp_path / "a.safetensors")
    save_file(b | norms | {"norm.weight": np.zeros(4), "only_b.bias": np.ones(4)}, tmp_path / "b.safetensors")
    report = lorank.compare(tmp_path / "a.safetensors", str(tmp_path / "b.safetensors"))
    assert [row.name for row in report] == ["layers.1.w", "layers.2.w"]
    reasons = {entry.name: entry.reason.replace(str(tmp_path), "") for entry in report.skipped}
    assert reasons == {
        "layers.0.w": "only in /a.safetensors",
        "layers.3.w": "only in /b.safetensors",
        "norm.weight": "1-D tensor, changed",
        "same.weight": "1-D tensor, equal",
        "only_a.bias": "1-D tensor, only in /a.safetensors",
        "only_b.bias": "1-D tensor, only in /b.safetensors",
    }


@pytest.mark.parametrize("swap", [False, True])
def test_prefix_of_one_model_is_dropped(swap: bool) -> None:
    rng = np.random.default_rng(8)
    short = {f"encoder.layer.{i}.query.weight": rng.standard_normal((4, 4)) for i in range(3)}
    long = {f"bert.{name}": x for name, x in short.items()} | {
        "classifier.weight": rng.standard_normal((2, 4))
    }
    report = lorank.compare(*((long, short) if swap else (short, long)), exclude=["layer.1.query"])
    assert (report.prefix_a, report.prefix_b) == (("bert", "") if swap else ("", "bert"))
    prefix = "bert." if swap else ""
    assert [row.name for row in report] == [f"{prefix}encoder.layer.{i}.query" for i in (0, 2)]
    assert [row.relative_change for row in report] == [0, 0]
    assert [entry.name for entry in report.skipped] == ["classifier"]


def test_models_without_a_common_matrix_raise() -> None:
    a, b = {"a.weight": np.ones((2, 2))}, {"b.weight": np.ones((2, 2))}
    with pytest.raises(ValueError, match="no selected matrix in common"):
        lorank.compare(a, b)
    with pytest.raises(ValueError, match="no selected matrix in common"):
        lorank.compare(a, a, exclude=["a"])
    with pytest.raises(ValueError, match="no module is named 'x'"):
        lorank.compare(a, a, include=["x"])


@pytest.mark.parametrize("rank", [0, -1, 257])
def test_wrong_ranks_raise(rank: int) -> None:
    with pytest.raises(ValueError, match="rank must be from 1 to 256"):
        compared(np.eye(2), np.eye(2), rank=rank)


def test_experts_are_compared_one_by_one() -> None:
    rng = np.random.default_rng(9)
    name = "layers.4.mlp.experts.gate_up_proj"
    a = rng.standard_normal((3, 8, 6))
    b = a + np.array([0.0, 0.1, 0.2])[:, None, None]
    rows = lorank.compare({name: a}, {name: b}).modules
    assert [row.name for row in rows] == [f"{name}[{i}]" for i in range(3)]
    for row, one, other in zip(rows, a, b, strict=True):
        np.testing.assert_allclose(numbers(row)[:1], oracle(one, other, 6)[:1])


def test_orientation_follows_the_module() -> None:
    """Conv1D layers are stored transposed; the left side is that of the outputs."""
    torch = pytest.importorskip("torch")
    from transformers.pytorch_utils import Conv1D

    rng = np.random.default_rng(10)
    a, b = (rng.standard_normal((12, 7)).astype(np.float32) for _ in range(2))
    models = []
    for weight in (a, b):
        model = torch.nn.ModuleDict({"c": Conv1D(12, 7)})
        model["c"].weight.data = torch.tensor(weight.T.copy())
        models.append(model)
    np.testing.assert_allclose(numbers(lorank.compare(*models, rank=2)["c"]), oracle(a, b, 2), rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_accuracy(threads: int) -> None:
    rng = np.random.default_rng(11)
    a, b = ({f"layers.{i}.w.weight": rng.standard_normal((20, 30)) for i in range(70)} for _ in range(2))
    one = lorank.compare(a, b, threads=threads)
    assert one == lorank.compare(a, b, threads=2)
    fast = lorank.compare(a, b, accuracy="fast")
    assert [numbers(row) for row in fast] == [numbers(row) for row in one]


def test_matrices_that_are_computed_on_loading() -> None:
    rng = np.random.default_rng(12)
    a, b = ({f"layers.{i}.w.weight": rng.standard_normal((20, 30)) for i in range(7)} for _ in range(2))
    lazy = []
    for weights in (a, b):
        source = open_source(weights)
        lazy.append(replace(source, matrices=[replace(matrix, lazy=True) for matrix in source.matrices]))
    assert lorank.compare(*lazy, threads=2).modules == lorank.compare(a, b).modules


@pytest.mark.parametrize("rank", [64, 256])
def test_large_ranks(rank: int) -> None:
    rng = np.random.default_rng(13)
    a = (rng.standard_normal((1100, 1060)) * np.linspace(0.2, 3, 1060)).astype(np.float32)
    found = leading_subspaces(a, rank)
    u, _, vt = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    assert found.error < 1e-3
    assert principal_angles(found.right, vt[:rank].T).max() <= found.error + 1e-6
    assert principal_angles(found.left, u[:, :rank]).max() <= found.error + 1e-6


def test_errors_name_the_module() -> None:
    source = open_source({"a.weight": np.eye(3), "b.weight": np.eye(3)})

    def broken(load: Any) -> Any:
        return replace(source, matrices=[source.matrices[0], replace(source.matrices[1], load=load)])

    def without_memory() -> Any:
        raise MemoryError("no memory")

    with pytest.raises(lorank.LorankError, match="module 'b': "):
        lorank.compare(source, broken(lambda: _core._panicking_matrix(3, 3)))
    with pytest.raises(MemoryError, match="module 'b': no memory"):
        lorank.compare(broken(without_memory), source)
