"""`fit_ranks` against its properties and a slow reference; parsed budgets."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorank
from lorank.allocation.budget import average_rank_budget, parse_budget


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
def test_ranks_follow_scores_at_equal_cost(problem: tuple[list[float], list[int], int, int, int]) -> None:
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
def test_ranks_ignore_the_unit_of_scores(
    problem: tuple[list[float], list[int], int, int, int], exponent: int
) -> None:
    scores, costs, r_min, r_max, budget = problem
    scores = [score if score > 1e-200 else 0.0 for score in scores]
    scaled = np.ldexp(scores, exponent)
    expected = lorank.fit_ranks(scores, costs, r_min, r_max, budget)
    assert np.array_equal(lorank.fit_ranks(scaled, costs, r_min, r_max, budget), expected)


def reference(
    scores: list[int],
    costs: list[int],
    r_min: int,
    r_max: int,
    budget: int,
    bounds: list[tuple[int, int]] | None = None,
) -> list[int]:
    """Return ranks by the definition in exact fractions, where the largest `c` lies at a step of a rank."""
    bounds = bounds or [(r_min, r_max)] * len(scores)

    def ranks_at(c: Fraction) -> list[int]:
        free = [int(r_min + c * s + Fraction(1, 2)) for s in scores]
        return [min(max(rank, low), high) for rank, (low, high) in zip(free, bounds, strict=True)]

    steps = {Fraction(0)} | {
        (Fraction(r) - r_min - Fraction(1, 2)) / s for s in scores if s for r in range(r_min + 1, r_max + 1)
    }
    # Ranks are constant between two steps, so the largest c lies just below the first step that exceeds
    # the budget: its remainders are those of that step.
    too_dear = [c for c in sorted(steps) if price(ranks_at(c), costs) > budget]
    limit = too_dear[0] if too_dear else 2 * max(steps) + 1
    ranks = ranks_at(max(c for c in steps if c < limit))
    remainder = [r_min + limit * s - r for s, r in zip(scores, ranks, strict=True)]
    left = budget - price(ranks, costs)
    while True:
        able = [i for i in range(len(scores)) if ranks[i] < bounds[i][1] and costs[i] <= left]
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
    # Scores are powers of two, so that float64 products and remainders are exact.
    got = lorank.fit_ranks(scores, costs, r_min, r_max, budget).tolist()
    want = reference(scores, costs, r_min, r_max, budget)
    assert got == want


@st.composite
def narrowed_problems(draw: st.DrawFn) -> tuple[list[float], list[int], int, int, int, list[int], list[int]]:
    scores, costs, r_min, r_max, _ = draw(problems())
    ranks = st.integers(r_min, r_max)
    pairs = [sorted((draw(ranks), draw(ranks))) for _ in scores]
    low, high = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    budget = draw(st.integers(price(low, costs), price(high, costs)))
    return scores, costs, r_min, r_max, budget, low, high


def price(ranks: Iterable[int], costs: list[int]) -> int:
    return sum(int(rank) * cost for rank, cost in zip(ranks, costs, strict=True))


@given(narrowed_problems())
def test_narrower_bounds_hold_and_the_budget_is_used_up(
    problem: tuple[list[float], list[int], int, int, int, list[int], list[int]],
) -> None:
    scores, costs, r_min, r_max, budget, low, high = problem
    ranks = lorank.fit_ranks(scores, costs, r_min, r_max, budget, at_least=low, at_most=high)
    assert ranks.dtype == np.int64
    assert np.all((ranks >= low) & (ranks <= high))
    left = budget - price(ranks, costs)
    assert left >= 0
    assert all(cost > left for cost, rank, most in zip(costs, ranks, high, strict=True) if rank < most)
    # Ranks follow scores at equal cost and bounds.
    for i in range(len(scores)):
        for j in range(i + 1, len(scores)):
            if (costs[i], low[i], high[i]) == (costs[j], low[j], high[j]):
                if scores[i] == scores[j]:
                    assert 0 <= ranks[i] - ranks[j] <= 1
                else:
                    assert (scores[i] > scores[j]) == (ranks[i] > ranks[j]) or ranks[i] == ranks[j]


@given(narrowed_problems(), st.integers(0, 4), st.data())
def test_ranks_within_a_step_of_affordable_ranks_are_found(
    problem: tuple[list[float], list[int], int, int, int, list[int], list[int]],
    step: int,
    data: st.DataObject,
) -> None:
    scores, costs, r_min, r_max, _, now, _ = problem
    low = [max(rank - step, r_min) for rank in now]
    high = [min(rank + step, r_max) for rank in now]
    budget = data.draw(st.integers(price(now, costs), price(high, costs)))
    ranks = lorank.fit_ranks(scores, costs, r_min, r_max, budget, at_least=low, at_most=high)
    assert np.all(np.abs(ranks - now) <= step)
    assert price(ranks, costs) <= budget
    if step == 0:
        assert ranks.tolist() == now


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 1, 2, 4, 8, 16]), st.integers(1, 30), st.integers(0, 9), st.integers(0, 9)
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 3),
    st.floats(0, 1),
)
def test_bounded_ranks_equal_the_definition(
    modules: list[tuple[int, int, int, int]], r_min: int, share: float
) -> None:
    scores, costs = [score for score, *_ in modules], [cost for _, cost, *_ in modules]
    bounds = [(r_min + min(a, b), r_min + max(a, b)) for *_, a, b in modules]
    low, high = [least for least, _ in bounds], [most for _, most in bounds]
    budget = price(low, costs) + int(share * (price(high, costs) - price(low, costs)))
    if not any(scores):
        scores = [1] * len(scores)
    got = lorank.fit_ranks(scores, costs, r_min, r_min + 9, budget, at_least=low, at_most=high)
    assert got.tolist() == reference(scores, costs, r_min, r_min + 9, budget, bounds)


@given(
    st.lists(
        st.tuples(st.sampled_from([0, 1, 2, 4, 8, 16]), st.integers(1, 30), st.integers(0, 12)),
        min_size=1,
        max_size=8,
    ),
    st.floats(0, 1),
)
def test_bound_below_r_min_takes_precedence(modules: list[tuple[int, int, int]], share: float) -> None:
    scores, costs, most = ([module[i] for module in modules] for i in range(3))
    bounds = [(min(3, bound), bound) for bound in most]
    least = price([low for low, _ in bounds], costs)
    budget = least + int(share * (price(most, costs) - least))
    if not any(scores):
        scores = [1] * len(scores)
    got = lorank.fit_ranks(scores, costs, 3, 12, budget, at_most=most)
    assert got.tolist() == reference(scores, costs, 3, 12, budget, bounds)
    with pytest.raises(ValueError, match=f"cost {least:,} to {price(most, costs):,}; "):
        lorank.fit_ranks(scores, costs, 3, 12, least - 1, at_most=most)


def test_bounds_limit_single_modules() -> None:
    scores, costs = [1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1]
    assert lorank.fit_ranks(scores, costs, 0, 100, 100, at_most=[100, 100, 100, 10]).tolist() == [
        15,
        30,
        45,
        10,
    ]
    assert lorank.fit_ranks(scores, costs, 0, 100, 100, at_least=[40, 0, 0, 0]).tolist() == [40, 13, 20, 27]
    fixed = lorank.fit_ranks(scores, costs, 0, 9, 20, at_least=[5, 2, 9, 4], at_most=[5, 2, 9, 4])
    assert fixed.tolist() == [5, 2, 9, 4]


@pytest.mark.parametrize(
    ("at_least", "at_most", "message"),
    [
        ([1, 1], None, "at_least must hold one integer per module"),
        (None, [8, 8, 8, 8], "at_most must hold one integer per module"),
        ([[1, 1, 1]], None, "at_least must hold one integer per module"),
        ([1.0, 2.0, 3.0], None, "at_least must hold one integer per module"),
        (None, [8.5, 8, 8], "at_most must hold one integer per module"),
        ([0, 1, 1], None, "at_least must lie within 1 and 8"),
        ([9, 1, 1], None, "at_least must lie within 1 and 8"),
        (None, [8, 9, 8], "at_most must lie within 0 and 8"),
        (None, [8, 8, -1], "at_most must lie within 0 and 8"),
        ([1, 5, 7], [8, 4, 6], "at_least is above at_most for module 1"),
        ([5, 5, 5], None, "budget 100 is not feasible.*cost 150 to 240"),
        (None, [2, 3, 4], "budget 100 is not feasible.*cost 30 to 90"),
    ],
)
def test_malformed_bounds_raise(at_least: Any, at_most: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.fit_ranks([1.0, 2.0, 3.0], [10, 10, 10], 1, 8, 100, at_least=at_least, at_most=at_most)


def test_ranks_are_proportional_to_scores() -> None:
    ranks = lorank.fit_ranks([1.0, 2.0, 3.0, 4.0], [1, 1, 1, 1], 0, 100, 100)
    assert ranks.tolist() == [10, 20, 30, 40]


def test_zero_scores_give_equal_ranks() -> None:
    assert lorank.fit_ranks([0.0] * 3, [5, 5, 5], 1, 8, 70).tolist() == [5, 5, 4]


def test_no_modules_give_no_ranks() -> None:
    assert lorank.fit_ranks([], [], 1, 8, 0).tolist() == []


@pytest.mark.parametrize(("budget", "what"), [(29, "lower r_min .* fewer"), (241, "raise r_max .* more")])
def test_infeasible_budget_raises_with_the_feasible_range(budget: int, what: str) -> None:
    with pytest.raises(ValueError, match=f"budget {budget} is not feasible.*cost 30 to 240; {what} modules"):
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
        ([1.0], [True], 1, 2, "positive integers"),
        ([1.0], [1], 3, 2, "r_min <= r_max"),
        ([1.0], [1], -1, 2, "0 <= r_min"),
    ],
)
def test_malformed_arguments_raise(
    scores: list[float], costs: list[float], r_min: int, r_max: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.fit_ranks(scores, costs, r_min, r_max, 2)


@pytest.mark.parametrize("budget", [2.5, "2", True, None])
def test_non_integer_budget_raises(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget must be an integer"):
        lorank.fit_ranks([1.0], [1], 1, 2, budget)


def test_small_integer_types_do_not_overflow() -> None:
    low: Any = np.int8(1)
    ranks = lorank.fit_ranks([1.0, 2.0], np.array([200, 200], np.uint8), low, np.int8(127), np.int32(50_800))
    assert ranks.tolist() == [127, 127]


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
def test_budgets_are_parsed(budget: int | str, parameters: int) -> None:
    assert parse_budget(budget, 10_000) == parameters


@pytest.mark.parametrize("budget", [-1, "-3", "many", "5x", "%", "-1%", "nan%", "inf%", 0.5, True, ""])
def test_invalid_budgets_raise(budget: object) -> None:
    with pytest.raises(ValueError, match=r"budget|percentage"):
        parse_budget(budget, 10_000)


def test_share_of_an_unknown_size_raises() -> None:
    with pytest.raises(ValueError, match="unknown number of parameters"):
        parse_budget("1%", None)


def test_average_rank_becomes_a_budget() -> None:
    assert average_rank_budget(0.1, [0] * 30, 0, 4) == 3
    assert average_rank_budget(4.5, [0] * 3, 4, 32) == 13
    for bad in (-1.0, 3.9, 32.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"avg_rank .* is not feasible: ranks go from 4 to 32"):
            average_rank_budget(bad, [0], 4, 32)
    none: Any
    for none in ("8", True, [8]):
        with pytest.raises(ValueError, match="avg_rank must be a number"):
            average_rank_budget(none, [0], 1, 32)


@st.composite
def bounded_problems(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], list[int], int]:
    """Generate modules with ranks, bounds around these ranks, and a budget that covers them."""
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
def test_bounds_hold_and_the_budget_is_used_up(
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
def test_widest_bounds_change_nothing(
    problem: tuple[list[float], list[int], list[int], list[int], int],
) -> None:
    scores, costs, _, _, budget = problem
    wide = [1] * len(scores), [12] * len(scores)
    bounded = lorank.fit_ranks(scores, costs, 1, 12, budget, at_least=wide[0], at_most=wide[1])
    assert bounded.tolist() == lorank.fit_ranks(scores, costs, 1, 12, budget).tolist()


def test_impossible_bounds_raise() -> None:
    for options, reason in (
        ({"at_least": [1]}, "one integer per module"),
        ({"at_most": [1.5, 2.0]}, "one integer per module"),
        ({"at_least": [0, 1]}, "within 1 and 8"),
        ({"at_most": [9, 8]}, "within 0 and 8"),
        ({"at_least": [3, 1], "at_most": [2, 2]}, "above at_most for module 0"),
        ({"at_most": [2, 2]}, "cost 20 to 40"),
    ):
        with pytest.raises(ValueError, match=reason):
            lorank.fit_ranks([1.0, 2.0], [10, 10], 1, 8, 100, **options)
