"""Budgets, and the one way in which scores become integer ranks under them."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Budget: TypeAlias = "int | str"
"""Parameters (``500_000``, ``"500k"``, ``"1.5M"``) or a share of the base model's (``"0.5%"``)."""

_COUNT = re.compile(r"(\d[\d_,]*(?:\.\d+)?(?:[eE]\d+)?)\s*([kKmMbB]?)")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_budget(budget: Budget, num_parameters: int | None, unknown: str = "") -> int:
    """Return a budget as a number of parameters.

    Parameters
    ----------
    budget
        An integer, or a string: a count with an optional unit, or a percentage.
    num_parameters
        Parameters of the whole base model, for percentages; None if unknown.
    unknown
        The reason why that number is unknown.

    Raises
    ------
    ValueError
        If it is no budget, or a percentage of an unknown number.
    """
    if is_integer(budget):
        parameters = float(budget)
    elif isinstance(budget, str) and budget.strip().endswith("%"):
        parameters = _share(budget.strip(), num_parameters, unknown)
    elif isinstance(budget, str) and (found := _COUNT.fullmatch(budget.strip())):
        parameters = float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2].lower()]
    else:
        raise ValueError(
            f"a budget is a number of parameters (500000, '500k') or a share ('0.5%'), not {budget!r}"
        )
    if parameters < 0:
        raise ValueError(f"a budget cannot be negative: {budget!r}")
    return math.floor(parameters)


def _share(budget: str, num_parameters: int | None, unknown: str) -> float:
    try:
        percent = float(budget[:-1])
    except ValueError:
        raise ValueError(f"not a percentage: {budget!r}") from None
    if not 0 <= percent < math.inf:
        raise ValueError(f"not a percentage: {budget!r}")
    if num_parameters is None:
        raise ValueError(
            f"{budget} of an unknown number of parameters{unknown and ': '}{unknown}; "
            "give the budget as a number of parameters"
        )
    # Rounding must not turn an exact product (0.5 % of 10,000) into one less.
    return percent * num_parameters / 100 * (1 + 4 * np.finfo(float).eps)


def fit_ranks(
    scores: npt.ArrayLike,
    costs: npt.ArrayLike,
    r_min: int,
    r_max: int,
    budget: int,
    *,
    at_least: npt.ArrayLike | None = None,
    at_most: npt.ArrayLike | None = None,
) -> npt.NDArray[np.int64]:
    """Integer ranks, proportional in the score, that use a budget up.

    ``r_l = r_min + c * score_l``, rounded half up and clipped to ``[r_min, r_max]``, with the
    largest ``c`` whose total cost fits; what is left goes out by largest remainder until no module
    below its bound can take one more rank.

    Parameters
    ----------
    scores
        One per module, finite and >= 0, in any unit.
    costs
        Cost of one rank in each module (``out + in`` parameters), positive integers.
    r_min, r_max
        Bounds of every rank, ``0 <= r_min <= r_max``.
    budget
        What ``sum(ranks * costs)`` must not exceed, an integer.
    at_least, at_most
        Narrower bounds of single modules, one per module, within ``[r_min, r_max]``: where ranks may
        only move so far from what they are. `at_most` may be below `r_min`, where a matrix has no room
        for that.

    Returns
    -------
    numpy.ndarray
        Ranks, int64, in the order of the scores. Deterministic: ties go to the higher score, then
        to the earlier module. At equal cost and bounds a higher score never gets a lower rank, and
        equal scores differ by at most one.

    Raises
    ------
    ValueError
        If an argument is malformed, or the budget lies outside what `r_min` and `r_max` can use;
        the message states the feasible range.

    Examples
    --------
    >>> import lorank
    >>> lorank.fit_ranks([3.0, 1.0, 0.0], [10, 10, 10], r_min=1, r_max=8, budget=100).tolist()
    [6, 3, 1]
    """
    r_min, r_max = rank_bounds(r_min, r_max)
    score, cost = _checked(scores, costs)
    if not is_integer(budget):
        raise ValueError(f"budget must be an integer, not {budget!r}")
    if len(score) == 0:
        return np.zeros(0, dtype=np.int64)
    # Ranks above r_min: adding r_min first would round the remainders.
    high = _bounds("at_most", r_max if at_most is None else at_most, (0, r_max), len(score)) - r_min
    low = np.minimum(0, high)
    if at_least is not None:
        low = _bounds("at_least", at_least, (r_min, r_max), len(score)) - r_min
    if np.any(low > high):
        raise ValueError(f"at_least is above at_most for module {int(np.argmax(low > high))}")
    fixed = r_min * int(cost.sum())
    least, most = fixed + int(low @ cost), fixed + int(high @ cost)
    if not least <= budget <= most:
        what = "lower r_min or choose fewer" if budget < least else "raise r_max or choose more"
        raise ValueError(
            f"budget {budget:,} is not feasible: ranks from {r_min} to {r_max} of {len(score)} modules "
            f"cost {least:,} to {most:,}; {what} modules"
        )
    largest = score.max()
    # Scores count relative to each other; all zero means all equal.
    relative = score / largest if largest > 0 else np.ones_like(score)
    left = int(budget) - fixed
    gains, exact = _proportional(relative, cost, low, high, left)
    _hand_out(gains, exact, relative, cost, high, left - int(gains @ cost))
    return r_min + gains


def rank_bounds(r_min: int, r_max: int) -> tuple[int, int]:
    """The bounds as Python's integers, which no arithmetic overflows.

    Raises
    ------
    ValueError
        Unless they are integers and ``0 <= r_min <= r_max``.
    """
    for name, bound in (("r_min", r_min), ("r_max", r_max)):
        if not is_integer(bound):
            raise ValueError(f"{name} must be an integer, not {bound!r}")
    if not 0 <= r_min <= r_max:
        raise ValueError(f"ranks need 0 <= r_min <= r_max, got {r_min} and {r_max}")
    return int(r_min), int(r_max)


def is_integer(value: object) -> bool:
    """Whether a value is an integer of Python's or NumPy's; a bool is none."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _bounds(name: str, bounds: npt.ArrayLike, within: tuple[int, int], count: int) -> npt.NDArray[np.int64]:
    given: npt.NDArray[Any] = np.asarray(bounds)
    if given.shape not in ((), (count,)) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"{name} must hold one integer per module")
    if np.any(given < within[0]) or np.any(given > within[1]):
        raise ValueError(f"{name} must lie within {within[0]} and {within[1]}")
    return np.broadcast_to(given, count).astype(np.int64)


def _checked(
    scores: npt.ArrayLike, costs: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    score = np.asarray(scores, dtype=np.float64)
    cost: npt.NDArray[Any] = np.asarray(costs)
    if score.ndim != 1 or cost.shape != score.shape:
        raise ValueError(f"one score and one cost per module, got shapes {score.shape} and {cost.shape}")
    if not np.all(np.isfinite(score)) or np.any(score < 0):
        raise ValueError("scores must be finite and not negative")
    if cost.dtype == bool or (cost.size and (np.any(cost != np.floor(cost)) or np.any(cost < 1))):
        raise ValueError("costs must be positive integers")
    return score, cost.astype(np.int64)


def _rounded(
    exact: npt.NDArray[np.float64], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    whole = np.floor(exact)
    # Not floor(x + 0.5): that sum rounds up to 1 for the number just below 0.5.
    rounded: npt.NDArray[np.int64] = np.clip(whole + (exact - whole >= 0.5), low, high).astype(np.int64)
    return rounded


def _proportional(
    score: npt.NDArray[np.float64],
    cost: npt.NDArray[np.int64],
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    budget: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """``c * score``, rounded for the largest `c` that fits the budget, and exact at its limit.

    The limit is the smallest float64 `c` that does not fit: there, not one bit below, remainders are
    what they are in exact arithmetic, and ties among them are ties.

    Positive float64 numbers have the order of their bit patterns, so bisection over the patterns
    ends at that very number after 63 steps, whatever the scale of the scores.
    """

    def exact(pattern: int) -> npt.NDArray[np.float64]:
        c = np.array(pattern, dtype=np.int64).view(np.float64)
        # Clipped, as a larger product says no more and would lose the remainder's digits.
        product: npt.NDArray[np.float64] = np.minimum(c * score, high + 1.0)
        return product

    fits, too_much = 0, int(np.array(np.finfo(np.float64).max).view(np.int64))
    if int(_rounded(exact(too_much), low, high) @ cost) <= budget:
        fits = too_much
    while too_much - fits > 1:
        middle = (fits + too_much) // 2
        if int(_rounded(exact(middle), low, high) @ cost) <= budget:
            fits = middle
        else:
            too_much = middle
    return _rounded(exact(fits), low, high), exact(too_much)


def _hand_out(
    gains: npt.NDArray[np.int64],
    exact: npt.NDArray[np.float64],
    score: npt.NDArray[np.float64],
    cost: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    left: int,
) -> None:
    """Give single ranks to the largest remainders, in place, while any module can take one."""
    queue: list[tuple[float, float, int]] = [
        (float(gains[i] - exact[i]), -float(score[i]), i)
        for i in range(len(gains))
        if gains[i] < high[i] and cost[i] <= left
    ]
    heapq.heapify(queue)
    while queue:
        negative_remainder, negative_score, i = heapq.heappop(queue)
        # A module that has become too dear stays so: what is left only shrinks.
        if cost[i] > left:
            continue
        gains[i] += 1
        left -= int(cost[i])
        if gains[i] < high[i]:
            heapq.heappush(queue, (negative_remainder + 1.0, negative_score, i))


def average_rank_budget(avg_rank: float, modules: Sequence[object], r_min: int, r_max: int) -> int:
    """The number of ranks that an average allows, for `fit_ranks` with costs of one.

    Raises
    ------
    ValueError
        If it is no number, or lies outside the bounds of every rank.
    """
    if isinstance(avg_rank, bool) or not isinstance(avg_rank, Real):
        raise ValueError(f"avg_rank must be a number, not {avg_rank!r}")
    if not r_min <= avg_rank <= r_max:
        raise ValueError(f"avg_rank {avg_rank} is not feasible: ranks go from {r_min} to {r_max}")
    return math.floor(avg_rank * len(modules) + 1e-9)
