"""The effective rank: the fewest eigenvalues that hold a share of the energy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorank.report.gradients import effective_rank


@given(
    st.lists(st.one_of(st.floats(0, 1e300), st.sampled_from([0.0, 1.0, 2.0])), max_size=30),
    st.floats(1e-3, 1),
)
def test_effective_rank_is_the_fewest_eigenvalues_that_hold_the_energy(
    values: list[float], energy: float
) -> None:
    found = effective_rank(values, energy)
    if not any(values):
        assert found == 0
        return
    ordered = np.sort(np.array(values) / max(values))[::-1]
    held = [float(np.sum(ordered[:k])) for k in range(len(values) + 1)]
    # Sums within rounding errors of the threshold may fall on either side.
    assert held[found] >= energy * held[-1] * (1 - 2e-12)
    assert held[found - 1] < energy * held[-1] * (1 + 1e-13)
    assert 1 <= found <= len(values)


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
    st.integers(-200, 200),
    st.floats(0.01, 1),
    st.floats(0.01, 1),
    st.randoms(),
)
def test_effective_rank_ignores_scale_and_order_and_grows_with_energy(
    values: list[int], exponent: int, one: float, other: float, random: Any
) -> None:
    shuffled = random.sample(values, len(values))
    scaled = np.ldexp(np.array(shuffled, dtype=np.float64), exponent)
    assert effective_rank(scaled, one) == effective_rank(values, one)
    low, high = sorted((one, other))
    assert effective_rank(values, low) <= effective_rank(values, high)
    assert effective_rank([*values, 0, 0], one) == effective_rank(values, one)


@pytest.mark.parametrize(
    ("values", "energy", "expected"),
    [
        ([], 0.9, 0),
        ([0.0, 0.0], 0.9, 0),
        ([-1e-17, 0.0], 1.0, 0),
        ([3.0], 1e-300, 1),
        ([1.0] * 10, 0.9, 9),
        ([1.0] * 10, 0.7, 7),
        ([0.1] * 10, 0.3, 3),
        ([1.0] * 10, 1.0, 10),
        ([1.0] * 10, 0.9000001, 10),
        ([1.0, -5.0, 1.0], 1.0, 2),
        ([9.0, 1.0], 0.9, 1),
        ([1.0, 9.0], 0.900001, 2),
        ([1e308] * 4, 1.0, 4),
        ([5e-324] * 4, 0.5, 2),
        ([1.0, 1e-14], 1.0, 1),
        (np.array([4, 3, 2, 1], dtype=np.float32), 0.7, 2),
        ((4, 3, 2, 1), 0.7, 2),
    ],
)
def test_effective_rank_of_edge_cases(values: Any, energy: float, expected: int) -> None:
    assert effective_rank(values, energy) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinite_eigenvalues_raise(bad: float) -> None:
    with pytest.raises(ValueError, match="eigenvalues must be finite"):
        effective_rank([1.0, bad], 0.5)


@pytest.mark.parametrize("energy", [0, -0.5, 1.0000001, float("nan"), float("inf")])
def test_energy_out_of_range_raises(energy: float) -> None:
    with pytest.raises(ValueError, match="energy must be above 0 and at most 1"):
        effective_rank([1.0], energy)
