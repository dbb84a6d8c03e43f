"""HT-SR scores and ranks against a plain transcription of equations 5 to 8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorank
from lorank.allocation.signals.htsr import htsr
from lorank.modules.targets import AdaptedModule
from lorank.report import ModuleSpectrum, SpectralReport
from lorank.sources.base import MatrixInfo


def report_of(alphas: list[float], spikes: list[int], names: list[str] | None = None) -> SpectralReport:
    names = names or [f"layers.{i}.proj" for i in range(len(alphas))]
    rows = [
        ModuleSpectrum(
            name=name,
            module=name,
            kind="linear",
            shape=(64, 64),
            dtype="float32",
            alpha_hill=alpha,
            alpha_hill_xmin_mid=alpha + 1,
            mp_spikes=count,
            mp_spikes_median=2 * count,
            frobenius_norm=1.0,
        )
        for name, alpha, count in zip(names, alphas, spikes, strict=True)
    ]
    return SpectralReport(rows, num_parameters=64 * 64 * len(rows))


def modules_of(report: SpectralReport) -> list[AdaptedModule]:
    names = list(dict.fromkeys(row.module for row in report))
    return [AdaptedModule(name, "linear", (64, 64)) for name in names]


def by_hand(alphas: list[float], spikes: list[int], r_min: int, r_max: int) -> list[int]:
    a_low, a_high = min(alphas), max(alphas)
    n_low, n_high = min(spikes), max(spikes)
    score = [
        0.7 * (a - a_low) / (a_high - a_low + 1e-8) + 0.3 * (1 - (n - n_low) / (n_high - n_low + 1e-8))
        for a, n in zip(alphas, spikes, strict=True)
    ]
    low, high = min(score), max(score)
    exact = [r_min + (r_max - r_min) * (s - low) / (high - low + 1e-8) for s in score]
    return [int(np.floor(r + 0.5)) for r in exact]


@given(
    st.lists(st.tuples(st.floats(1.01, 12), st.integers(0, 60)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(0, 60),
)
def test_ranks_follow_the_equations(values: list[tuple[float, int]], r_min: int, width: int) -> None:
    alphas, spikes = [a for a, _ in values], [n for _, n in values]
    report = report_of(alphas, spikes)
    signal = htsr(report, modules_of(report), r_min, r_min + width)
    assert signal.ranks is not None
    assert signal.ranks.tolist() == by_hand(alphas, spikes, r_min, r_min + width)
    assert np.all((signal.scores >= 0) & (signal.scores <= 1))


def test_larger_alpha_and_fewer_spikes_raise_the_rank() -> None:
    ranks = lorank.allocate(report_of([2.0, 3.0, 4.0], [5, 5, 5]), r_min=2, r_max=10).ranks
    assert list(ranks.values()) == [2, 6, 10]
    ranks = lorank.allocate(report_of([2.0, 2.0, 2.0], [9, 5, 1]), r_min=2, r_max=10).ranks
    assert list(ranks.values()) == [2, 6, 10]


def test_direction_and_weights_are_options() -> None:
    report = report_of([2.0, 3.0, 4.0], [5, 5, 5])
    lower = lorank.allocate(report, r_min=2, r_max=10, more_for="lower")
    assert list(lower.ranks.values()) == [10, 6, 2]
    opposed = report_of([2.0, 4.0], [0, 10])
    spikes_only = lorank.allocate(opposed, r_min=2, r_max=10, weight_alpha=0.0, weight_spikes=1.0)
    assert list(spikes_only.ranks.values()) == [10, 2]


def test_blocks_share_a_rank() -> None:
    names = ["layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "layers.10.q", "layers.10.v"]
    report = report_of([1.0, 3.0, 2.0, 4.0, 3.0, 5.0], [4] * 6, names)
    ranks = lorank.allocate(report, r_min=2, r_max=10, granularity="block").ranks
    assert list(ranks.values()) == [2, 2, 6, 6, 10, 10]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_infinite_exponent_is_clipped_and_flagged(bad: float) -> None:
    allocation = lorank.allocate(report_of([2.0, bad, 4.0], [5, 5, 5]), r_min=2, r_max=10)
    assert list(allocation.ranks.values()) == [2, 10, 10]
    assert list(allocation.flags) == ["layers.1.proj"]
    assert "not finite" in allocation.flags["layers.1.proj"]


def test_modules_without_spike_counts_do_not_affect_others() -> None:
    whole = report_of([2.0, 3.0, 4.0, 4.0], [5, 9, 7, 5])
    rows = list(whole)
    info = MatrixInfo("layers.3.proj", "layers.3.proj", "linear", (64, 64), "float32")
    broken = SpectralReport([*rows[:3], ModuleSpectrum.failed(info, "holds NaN or infinite values")])
    names = modules_of(whole)
    for scale in ("mean", "median"):
        expected = htsr(whole, names, 2, 10, scale=scale)
        found = htsr(broken, names, 2, 10, scale=scale)
        assert found.scores.tolist() == expected.scores.tolist()
        assert list(found.flags) == ["layers.3.proj"]
    # The analysed experts of a stack are averaged.
    stack = [replace(row, module="experts") for row in rows[:2]]
    failed = replace(ModuleSpectrum.failed(info, "holds NaN or infinite values"), module="experts")
    names = [AdaptedModule("experts", "expert", (64, 64)), *names[2:3]]
    with_and_without = [
        htsr(SpectralReport([*some, rows[2]]), names, 2, 10).scores.tolist()
        for some in (stack, [*stack, failed])
    ]
    assert with_and_without[0] == with_and_without[1]


def test_report_without_exponents_gives_r_min() -> None:
    allocation = lorank.allocate(report_of([np.nan] * 2, [5, 5]), r_min=2, r_max=10)
    assert list(allocation.ranks.values()) == [2, 2]
    assert len(allocation.flags) == 2


def test_experts_are_averaged() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "layers.0.mlp.experts.gate_up_proj": rng.standard_normal((4, 16, 32)),
        "layers.0.self_attn.q_proj.weight": rng.standard_normal((16, 32)),
        "layers.0.self_attn.k_proj.weight": rng.standard_t(1.5, (16, 32)),
    }
    report = lorank.analyze(weights)
    stack = [row for row in report if row.expert is not None]
    assert len(stack) == 4
    modules = [AdaptedModule(stack[0].module, "expert", (16, 32), 4)] + [
        AdaptedModule(row.module, "linear", (16, 32)) for row in report if row.expert is None
    ]
    got = htsr(report, modules, 1, 100)
    alphas = [float(np.mean([row.alpha_hill for row in stack]))]
    alphas += [row.alpha_hill for row in report if row.expert is None]
    spikes = [float(np.mean([row.mp_spikes for row in stack]))]
    spikes += [row.mp_spikes for row in report if row.expert is None]
    assert got.ranks is not None
    assert got.ranks.tolist() == by_hand(alphas, spikes, 1, 100)


@pytest.mark.parametrize(
    "option", [{"more_for": "most"}, {"granularity": "row"}, {"convention": "x"}, {"scale": "x"}]
)
def test_unknown_choices_raise(option: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be one of"):
        lorank.allocate(report_of([1.0, 2.0], [1, 1]), **option)


def test_invalid_weights_raise() -> None:
    narrow: dict[str, Any] = {"weight_alpha": np.float32(0.7), "weight_spikes": np.int64(1)}
    assert lorank.allocate(report_of([1.0, 2.0], [1, 1]), **narrow).ranks
    for bad in (-1, np.nan, np.inf, "1", True, None):
        with pytest.raises(ValueError, match="weight_alpha must be a number that is not negative"):
            lorank.allocate(report_of([1.0, 2.0], [1, 1]), weight_alpha=bad)
