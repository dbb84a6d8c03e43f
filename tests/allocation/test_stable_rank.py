"""The method stable-rank against norms from NumPy, and its ranks under a budget."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lorank

SHAPES = {"first": (24, 16), "second": (16, 40), "third": (8, 8)}


def model(seed: int = 0) -> dict[str, NDArray[Any]]:
    """Return weights whose singular values decay at different rates."""
    random = np.random.default_rng(seed)
    weights = {}
    for index, (name, shape) in enumerate(SHAPES.items()):
        left, _, right = np.linalg.svd(random.standard_normal(shape), full_matrices=False)
        values = np.exp(-0.3 * index * np.arange(min(shape)))
        weights[f"{name}.weight"] = (left * values) @ right
    return weights


def stable_rank(weight: NDArray[Any]) -> float:
    return float(np.linalg.norm(weight) ** 2 / np.linalg.norm(weight, 2) ** 2)


def allocated(weights: Any, **options: Any) -> lorank.RankAllocation:
    options = {"r_min": 1, "r_max": 8, "avg_rank": 4, "targets": r".*"} | options
    return lorank.allocate(lorank.analyze(weights, progress=False), "stable-rank", progress=False, **options)


def test_scores_are_the_ratios_of_the_squared_norms() -> None:
    weights = model()
    found = allocated(weights)
    for name, score in found.scores.items():
        assert score == pytest.approx(stable_rank(weights[f"{name}.weight"]), rel=1e-9)
    assert found.method == "stable-rank"
    assert not found.flags


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_scale_of_a_weight_changes_no_rank(factor: float) -> None:
    weights = model()
    scaled = weights | {"second.weight": weights["second.weight"] * factor}
    assert allocated(scaled).ranks == allocated(weights).ranks


def test_rank_grows_with_the_stable_rank_at_equal_cost() -> None:
    weights = {f"m{k}.weight": np.diag([1.0] * k + [1e-3] * (16 - k)) for k in (1, 4, 8, 16)}
    found = allocated(weights)
    assert sorted(found.scores.values()) == list(found.scores.values())
    assert sorted(found.ranks.values()) == list(found.ranks.values())
    assert sum(found.ranks.values()) == 4 * len(weights)


def test_budget_in_parameters_is_kept() -> None:
    found = allocated(model(), avg_rank=None, budget=400)
    assert 0 <= 400 - found.num_parameters < max(sum(shape) for shape in SHAPES.values())


def test_stack_of_experts_has_the_mean_of_its_experts() -> None:
    random = np.random.default_rng(1)
    stack = random.standard_normal((3, 12, 10)) * np.exp(-0.2 * np.arange(10))
    found = allocated({"mlp.experts.down_proj": stack, "proj.weight": random.standard_normal((12, 10))})
    expected = np.mean([stable_rank(expert) for expert in stack])
    assert found.scores["mlp.experts.down_proj"] == pytest.approx(expected, rel=1e-9)


def test_matrix_without_a_stable_rank_is_flagged_and_gets_the_lowest_rank() -> None:
    weights = model() | {"zero.weight": np.zeros((8, 8)), "broken.weight": np.full((8, 8), np.nan)}
    found = allocated(weights)
    for name in ("zero", "broken"):
        assert found.scores[name] == 0
        assert found.ranks[name] == 1
        assert found.flags[name] == "no stable rank for 1 of 1 matrices"


def test_without_a_budget_it_raises() -> None:
    with pytest.raises(ValueError, match="'stable-rank' needs a budget or avg_rank"):
        allocated(model(), avg_rank=None)
