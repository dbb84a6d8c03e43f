"""Budgets, and the conversion of scores to integer ranks under a budget."""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from fractions import Fraction
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Budget: TypeAlias = "int | str"
"""A number of parameters (``500_000``, ``"500k"``, ``"1.5M"``), or a percentage (``"0.5%"``)."""

_COUNT = re.compile(r"([0-9][0-9_,]{0,30}(?:\.[0-9]{1,30})?(?:[eE][0-9]{1,2})?)\s*([kKmMbB]?)")
# Sums of products of ranks and costs must fit into 64 bits.
_LARGEST_COST = 2**48
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_budget(budget: Budget, num_parameters: int | None, unknown: str = "") -> int:
    """Convert a budget to a number of parameters.

    Parameters
    ----------
    budget
        An integer, or a string: a count with an optional unit, or a percentage.
    num_parameters
        Number of parameters of the base model, for percentages; None if unknown.
    unknown
        The reason why `num_parameters` is None.

    Raises
    ------
    ValueError
        If the budget is malformed, negative or not whole, or a percentage of an unknown number of parameters.

    Examples
    --------
    >>> parse_budget("1.5k", None)
    1500
    >>> parse_budget("0.5%", 1_000_000)
    5000
    """
    if is_integer(budget):
        parameters = Fraction(int(budget))
    elif isinstance(budget, str) and budget.strip().endswith("%"):
        parameters = Fraction(math.floor(_share(budget.strip(), num_parameters, unknown)))
    elif isinstance(budget, str) and (found := _COUNT.fullmatch(budget.strip())):
        parameters = Fraction(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2].lower()]
    else:
        raise ValueError(
            f"a budget is a number of parameters (500000, '500k') or a percentage ('0.5%'), not {budget!r}"
        )
    if parameters < 0:
        raise ValueError(f"a budget cannot be negative: {budget!r}")
    if parameters.denominator > 1:
        raise ValueError(f"a budget is a whole number of parameters, not {budget!r}")
    return int(parameters)


def _share(budget: str, num_parameters: int | None, unknown: str) -> float:
    """Return the number of parameters that a percentage stands for."""
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
    # Rounding must not turn an exact product (0.5 % of 10,000) into the next smaller integer.
    share = percent * num_parameters / 100 * (1 + 4 * np.finfo(float).eps)
    if share == math.inf:
        raise ValueError(f"not a percentage: {budget!r}")
    return share


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
    """Choose integer ranks within a budget, in proportion to scores.

    ``r_l = r_min + c * score_l``, rounded half up and clipped to ``[r_min, r_max]``, with the largest ``c``
    that keeps the total cost within the budget. The rest of the budget is spent on single ranks in the order
    of the remainders, largest first, until no module can take another rank.

    Parameters
    ----------
    scores
        Score of each module, finite and >= 0, in any unit.
    costs
        Parameters of one rank in each module (``out + in``), positive integers.
    r_min, r_max
        Bounds of every rank, ``0 <= r_min <= r_max``.
    budget
        Upper bound of ``sum(ranks * costs)``, an integer.
    at_least, at_most
        Bounds of each module, within ``[r_min, r_max]``, for ranks that may change only by a limited number.
        `at_most` may be below `r_min` for a matrix of lower rank.

    Returns
    -------
    numpy.ndarray
        Ranks, int64, in the order of the scores. They are deterministic: at equal remainders the higher
        score comes first, then the earlier module. At equal costs and bounds a higher score never gets a
        lower rank, and the ranks of equal scores differ by one at most.

    Raises
    ------
    ValueError
        If an argument is malformed, or the budget is below the cost of the lowest ranks or above the cost of
        the highest; the message states the feasible range.

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
    # Ranks are counted from r_min, because adding r_min would round the remainders.
    high = _bounds("at_most", r_max if at_most is None else at_most, (0, r_max), len(score)) - r_min
    low = np.minimum(0, high)
    if at_least is not None:
        low = _bounds("at_least", at_least, (r_min, r_max), len(score)) - r_min
    if np.any(low > high):
        raise ValueError(f"at_least is above at_most for module {int(np.argmax(low > high))}")
    fixed = r_min * int(cost.sum())
    least, most = fixed + int(low @ cost), fixed + int(high @ cost)
    if not least <= budget <= most:
        advice = "lower r_min or choose fewer" if budget < least else "raise r_max or choose more"
        raise ValueError(
            f"budget {budget:,} is not feasible: ranks from {r_min} to {r_max} of {len(score)} modules "
            f"cost {least:,} to {most:,}; {advice} modules"
        )
    largest = score.max()
    # Only ratios of scores matter. Scores that are all zero count as equal.
    relative = score / largest if largest > 0 else np.ones_like(score)
    left = int(budget) - fixed
    gains, exact = _proportional(relative, cost, low, high, left)
    _hand_out(gains, exact, relative, cost, high, left - int(gains @ cost))
    return r_min + gains


def rank_bounds(r_min: int, r_max: int) -> tuple[int, int]:
    """Return the bounds of ranks as Python integers, which do not overflow.

    Raises
    ------
    ValueError
        If they are not integers with ``0 <= r_min <= r_max``.
    """
    for name, bound in (("r_min", r_min), ("r_max", r_max)):
        if not is_integer(bound):
            raise ValueError(f"{name} must be an integer, not {bound!r}")
    if not 0 <= r_min <= r_max:
        raise ValueError(f"ranks need 0 <= r_min <= r_max, got {r_min} and {r_max}")
    return int(r_min), int(r_max)


def is_integer(value: object) -> bool:
    """Return True for a Python or NumPy integer; False for a bool."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _bounds(name: str, bounds: npt.ArrayLike, within: tuple[int, int], count: int) -> npt.NDArray[np.int64]:
    """Return the checked bounds of every module."""
    given: npt.NDArray[Any] = np.asarray(bounds)
    if given.shape not in ((), (count,)) or not np.issubdtype(given.dtype, np.integer):
        raise ValueError(f"{name} must hold one integer per module")
    if np.any(given < within[0]) or np.any(given > within[1]):
        raise ValueError(f"{name} must lie within {within[0]} and {within[1]}")
    return np.broadcast_to(given, count).astype(np.int64)


def _checked(
    scores: npt.ArrayLike, costs: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the checked scores and costs as arrays."""
    score = np.asarray(scores, dtype=np.float64)
    cost: npt.NDArray[Any] = np.asarray(costs)
    if score.ndim != 1 or cost.shape != score.shape:
        raise ValueError(
            f"every module needs one score and one cost, got shapes {score.shape} and {cost.shape}"
        )
    if not np.all(np.isfinite(score)) or np.any(score < 0):
        raise ValueError("scores must be finite and not negative")
    is_number = np.issubdtype(cost.dtype, np.integer) or np.issubdtype(cost.dtype, np.floating)
    if cost.size and (
        not is_number or np.any(cost != np.floor(cost)) or np.any(cost < 1) or np.any(cost > _LARGEST_COST)
    ):
        raise ValueError(f"costs must be positive integers up to {_LARGEST_COST:,}")
    return score, cost.astype(np.int64)


def _rounded(
    exact: npt.NDArray[np.float64], low: npt.NDArray[np.int64], high: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Round half up and clip to bounds."""
    whole = np.floor(exact)
    # floor(x + 0.5) would be wrong: the sum of 0.5 and the number just below 0.5 rounds to 1.
    rounded: npt.NDArray[np.int64] = np.clip(whole + (exact - whole >= 0.5), low, high).astype(np.int64)
    return rounded


def _proportional(
    score: npt.NDArray[np.float64],
    cost: npt.NDArray[np.int64],
    low: npt.NDArray[np.int64],
    high: npt.NDArray[np.int64],
    budget: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return ``c * score``: rounded for the largest `c` within the budget, and exact for the limit of `c`.

    The limit is the smallest float64 `c` that exceeds the budget. Remainders that are equal in exact
    arithmetic are equal at the limit, but may differ at the next smaller float64.

    Positive float64 numbers sort like their bit patterns, so bisection over the patterns reaches the limit
    in 63 steps for scores of any scale.
    """

    def exact(pattern: int) -> npt.NDArray[np.float64]:
        c = np.array(pattern, dtype=np.int64).view(np.float64)
        # Products far above the bound would lose the digits of the remainder.
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
    """Add single ranks to the modules with the largest remainders, in place, while the budget lasts."""
    queue: list[tuple[float, float, int]] = [
        (float(gains[i] - exact[i]), -float(score[i]), i)
        for i in range(len(gains))
        if gains[i] < high[i] and cost[i] <= left
    ]
    heapq.heapify(queue)
    while queue:
        negative_remainder, negative_score, i = heapq.heappop(queue)
        # A module that costs too much now costs too much later: the rest of the budget only shrinks.
        if cost[i] > left:
            continue
        gains[i] += 1
        left -= int(cost[i])
        if gains[i] < high[i]:
            heapq.heappush(queue, (negative_remainder + 1.0, negative_score, i))


def average_rank_budget(avg_rank: float, modules: Sequence[object], r_min: int, r_max: int) -> int:
    """Return the number of ranks that an average allows, for `fit_ranks` with costs of one.

    Parameters
    ----------
    avg_rank
        Average rank over the modules.
    modules
        The modules that get a rank.
    r_min, r_max
        Bounds of every rank.

    Raises
    ------
    ValueError
        If `avg_rank` is not a number within the bounds.
    """
    if isinstance(avg_rank, bool) or not isinstance(avg_rank, Real):
        raise ValueError(f"avg_rank must be a number, not {avg_rank!r}")
    if not r_min <= avg_rank <= r_max:
        raise ValueError(f"avg_rank {avg_rank} is not feasible: ranks go from {r_min} to {r_max}")
    return math.floor(avg_rank * len(modules) + 1e-9)
