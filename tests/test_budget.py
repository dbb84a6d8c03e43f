"""`fit_ranks` against its properties and a slow reference; budgets as users write them."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorank
from lorank.budget import average_rank_budget, parse_budget


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], list[int], int, int, int]:
    count = draw(st.integers(1, 12))
    few = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    any_score = st.floats(0, 1e30, allow_subnormal=True)
    scores = draw(st.lists(st.one_of(few, any_score), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(1, 60), min_size=count, max_size=count))
    r_min = draw(st.integers(0, 5))
    r_max = draw(st.integers(r_min, r_min + 20))
    budget = draw(st.integers(r_min * sum(costs), r_max * sum(costs)))
    return scores, costs, r_min, r_max, budget


@given(problems())
def test_ranks_are_bounded_affordable_and_maximal(
    problem: tuple[list[float], list[int], int, int, int],
) -> None:
    scores, costs, r_min, r_max, budget = problem
    ranks = lorank.fit_ranks(scores, costs, r_min, r_max, budget)
    assert ranks.dtype == np.int64
    assert np.all((ranks >= r_min) & (ranks <= r_max))
    left = budget - int(ranks @ np.array(costs))
    assert left >= 0
    assert all(cost > left for cost, rank in zip(costs, ranks, strict=True) if rank < r_max)
    assert np.array_equal(ranks, lorank.fit_ranks(scores, costs, r_min, r_max, budget))


@given(problems())
def test_at_equal_cost_the_score_decides(problem: tuple[list[float], list[int], int, int, int]) -> None:
    scores, costs, r_min, r_max, budget = problem
    ranks = lorank.fit_ranks(scores, costs, r_min, r_max, budget)
    for i in range(len(scores)):
        for j in range(len(scores)):
            if costs[i] != costs[j]:
                continue
            if scores[i] == scores[j]:
                assert abs(ranks[i] - ranks[j]) <= 1
                assert i > j or ranks[i] >= ranks[j], "ties go to the earlier module"
            elif scores[i] > scores[j]:
                assert ranks[i] >= ranks[j]


@given(problems(), st.integers(-80, 80))
def test_the_unit_of_the_scores_does_not_matter(
    problem: tuple[list[float], list[int], int, int, int], exponent: int
) -> None:
    scores, costs, r_min, r_max, budget = problem
    scores = [score if score > 1e-200 else 0.0 for score in scores]
    scaled = np.ldexp(scores, exponent)
    expected = lorank.fit_ranks(scores, costs, r_min, r_max, budget)
    assert np.array_equal(lorank.fit_ranks(scaled, costs, r_min, r_max, budget), expected)


def reference(scores: list[int], costs: list[int], r_min: int, r_max: int, budget: int) -> list[int]:
    """The definition in exact fractions: the largest `c` is one of those at which a rank steps up."""

    def ranks_at(c: Fraction) -> list[int]:
        return [min(int(r_min + c * s + Fraction(1, 2)), r_max) for s in scores]

    def price(ranks: list[int]) -> int:
        return sum(r * cost for r, cost in zip(ranks, costs, strict=True))

    steps = {Fraction(0)} | {
        (Fraction(r) - r_min - Fraction(1, 2)) / s for s in scores if s for r in range(r_min + 1, r_max + 1)
    }
    # Between two steps nothing changes, so the largest c lies just below the first step that is too
    # dear: its remainders are those of that step.
    too_dear = [c for c in sorted(steps) if price(ranks_at(c)) > budget]
    limit = too_dear[0] if too_dear else 2 * max(steps) + 1
    ranks = ranks_at(max(c for c in steps if c < limit))
    remainder = [r_min + limit * s - r for s, r in zip(scores, ranks, strict=True)]
    left = budget - price(ranks)
    while True:
        able = [i for i in range(len(scores)) if ranks[i] < r_max and costs[i] <= left]
        if not able:
            return ranks
        i = max(able, key=lambda i: (remainder[i], scores[i], -i))
        ranks[i] += 1
        remainder[i] -= 1
        left -= costs[i]


@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, 4, 8, 16]), st.integers(1, 30)), min_size=1, max_size=8),
    st.integers(0, 3),
    st.integers(0, 9),
    st.floats(0, 1),
)
def test_ranks_equal_the_definition(
    modules: list[tuple[int, int]], r_min: int, width: int, share: float
) -> None:
    scores, costs = [score for score, _ in modules], [cost for _, cost in modules]
    r_max = r_min + width
    least, most = r_min * sum(costs), r_max * sum(costs)
    budget = least + int(share * (most - least))
    if not any(scores):
        scores = [1] * len(scores)
    # Scores are powers of two, so that float64 products and remainders are those of the fractions.
    got = lorank.fit_ranks(scores, costs, r_min, r_max, budget).tolist()
    want = reference(scores, costs, r_min, r_max, budget)
    assert got == want


def test_proportional_to_the_score() -> None:
    ranks = lorank.fit_ranks([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], 0, 100, 100)
    assert ranks.tolist() == [10, 20, 30, 40]


def test_scores_of_zero_share_alike() -> None:
    assert lorank.fit_ranks([0.0] * 3, [5, 5, 5], 1, 8, 70).tolist() == [5, 5, 4]


def test_no_modules() -> None:
    assert lorank.fit_ranks([], [], 1, 8, 0).tolist() == []


@pytest.mark.parametrize("budget", [29, 241])
def test_an_infeasible_budget_states_the_range(budget: int) -> None:
    with pytest.raises(ValueError, match=f"budget {budget} is not feasible.*cost 30 to 240"):
        lorank.fit_ranks([1.0, 2.0, 3.0], [10, 10, 10], 1, 8, budget)


@pytest.mark.parametrize(
    ("scores", "costs", "r_min", "r_max", "message"),
    [
        ([1.0, np.nan], [1, 1], 1, 2, "finite"),
        ([1.0, np.inf], [1, 1], 1, 2, "finite"),
        ([1.0, -1.0], [1, 1], 1, 2, "not negative"),
        ([1.0], [1, 1], 1, 2, "one score and one cost"),
        ([1.0], [0], 1, 2, "positive integers"),
        ([1.0], [1.5], 1, 2, "positive integers"),
        ([1.0], [1], 3, 2, "r_min <= r_max"),
        ([1.0], [1], -1, 2, "0 <= r_min"),
    ],
)
def test_malformed_arguments(
    scores: list[float], costs: list[float], r_min: int, r_max: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.fit_ranks(scores, costs, r_min, r_max, 2)


@pytest.mark.parametrize(
    ("budget", "parameters"),
    [
        (500, 500),
        (np.int64(7), 7),
        ("500k", 500_000),
        ("1.5M", 1_500_000),
        ("1.5e5", 150_000),
        ("2b", 2_000_000_000),
        ("12_345", 12_345),
        ("12,345", 12_345),
        ("0.5%", 50),
        ("0.07%", 7),
        (" 100 % ", 10_000),
    ],
)
def test_budgets(budget: int | str, parameters: int) -> None:
    assert parse_budget(budget, 10_000) == parameters


@pytest.mark.parametrize("budget", [-1, "-3", "many", "5x", "%", "-1%", "nan%", "inf%", 0.5, True, ""])
def test_no_budgets(budget: object) -> None:
    with pytest.raises(ValueError, match=r"budget|percentage"):
        parse_budget(budget, 10_000)  # type: ignore[arg-type]


def test_a_share_of_the_unknown() -> None:
    with pytest.raises(ValueError, match="unknown number of parameters"):
        parse_budget("1%", None)


def test_average_ranks() -> None:
    assert average_rank_budget(0.1, [0] * 30, 0, 4) == 3
    assert average_rank_budget(4.5, [0] * 3, 4, 32) == 13
    for bad in (-1.0, 3.9, 32.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"avg_rank .* is not feasible: ranks go from 4 to 32"):
            average_rank_budget(bad, [0], 4, 32)


@st.composite
def bounded_problems(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], list[int], int]:
    """Modules with ranks of their own, how far they may move, and a budget that holds the ranks."""
    count = draw(st.integers(1, 8))
    scores = draw(st.lists(st.floats(0, 100), min_size=count, max_size=count))
    costs = draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    now = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    reach = draw(st.integers(0, 5))
    low = [max(rank - reach, 1) for rank in now]
    high = [min(rank + reach, 12) for rank in now]
    least = sum(rank * cost for rank, cost in zip(now, costs, strict=True))
    most = sum(rank * cost for rank, cost in zip(high, costs, strict=True))
    return scores, costs, low, high, draw(st.integers(least, most))


@given(bounded_problems())
def test_bounds_of_single_modules(
    problem: tuple[list[float], list[int], list[int], list[int], int],
) -> None:
    scores, costs, low, high, budget = problem
    ranks = lorank.fit_ranks(scores, costs, 1, 12, budget, at_least=low, at_most=high)
    assert np.all(ranks >= low)
    assert np.all(ranks <= high)
    left = budget - int(ranks @ np.array(costs))
    assert left >= 0
    assert all(cost > left for rank, top, cost in zip(ranks, high, costs, strict=True) if rank < top)


@given(bounded_problems())
def test_bounds_that_say_nothing_change_nothing(
    problem: tuple[list[float], list[int], list[int], list[int], int],
) -> None:
    scores, costs, _, _, budget = problem
    wide = [1] * len(scores), [12] * len(scores)
    bounded = lorank.fit_ranks(scores, costs, 1, 12, budget, at_least=wide[0], at_most=wide[1])
    assert bounded.tolist() == lorank.fit_ranks(scores, costs, 1, 12, budget).tolist()


def test_bounds_that_cannot_be() -> None:
    for options, reason in (
        ({"at_least": [1]}, "one integer per module"),
        ({"at_most": [1.5, 2.0]}, "one integer per module"),
        ({"at_least": [0, 1]}, "within r_min 1 and r_max 8"),
        ({"at_most": [9, 8]}, "within r_min 1 and r_max 8"),
        ({"at_least": [3, 1], "at_most": [2, 2]}, "above at_most for module 0"),
        ({"at_most": [2, 2]}, "cost 20 to 40"),
    ):
        with pytest.raises(ValueError, match=reason):
            lorank.fit_ranks([1.0, 2.0], [10, 10], 1, 8, 100, **options)
