"""Pieces of a spectrum with their own rates of decay."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorank.task_spectra import task_spectrum
from lorank.task_spectra.decay import piecewise_decay
from tests.support.task_samples import Array


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
            # Scores are equal below the smallest relevant deviation; the smaller misfit is then chosen.
            scores[starts] = (m * math.log(max(total / m, 1e-4)) + 3 * pieces * math.log(m), total)
    return min(scores, key=lambda starts: scores[starts])


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 16), st.integers(0, 2**32 - 1), st.sampled_from([1e-30, 1.0, 1e30]))
def test_breakpoints_have_the_best_score(count: int, seed: int, unit: float) -> None:
    rng = np.random.default_rng(seed)
    steps = np.where(rng.random(count) < 0.2, 2.0, 0.1) * rng.random(count)
    values = np.exp(-np.cumsum(steps))
    found = piecewise_decay(unit * values, count, unit * 0.9 * values[-1])
    assert (0, *found.breakpoints) == brute_force_starts(np.log(values))
    assert len(found.rhos) == 1 + len(found.breakpoints)
    assert 1 <= found.k_star <= count


def test_pieces_of_exact_spectra_are_found() -> None:
    values = np.concatenate([np.full(5, 8.0), 0.5 ** np.arange(6.0)])
    found = piecewise_decay(values, len(values), 0.02)
    assert found.breakpoints == (5,)
    np.testing.assert_allclose(found.rhos, [1.0, 2.0])
    # 0.5^k reaches 0.02 after six steps: all eleven values count.
    assert found.k_star == 11
    assert piecewise_decay(values, 8, 0.2).k_star == 8
    assert piecewise_decay(values, 1, 6.0).k_star == 1
    assert piecewise_decay(np.full(4, 2.0), 4, 1.0).k_star == 4


def test_equal_values_are_flagged_and_counted() -> None:
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((50, 4)))[0]
    found = task_spectrum(X, X, noise=1e-3)
    assert found.k_star == 4
    assert any("no decay" in flag for flag in found.flags)
