"""Allocations from a source to ranks under a budget, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorank
from lorank.modules.roles import Roles
from tests.support import tiny_models

RNG = np.random.default_rng(0)
SHAPES = {"q_proj": (32, 32), "k_proj": (8, 32), "up_proj": (96, 32), "down_proj": (32, 96)}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    named = {
        f"model.layers.{i}.{name}.weight": RNG.standard_t(2 + i, shape).astype(np.float32)
        for i in range(3)
        for name, shape in SHAPES.items()
    }
    named["model.embed_tokens.weight"] = RNG.standard_normal((50, 32)).astype(np.float32)
    named["lm_head.weight"] = RNG.standard_normal((50, 32)).astype(np.float32)
    return named


@pytest.fixture(scope="module")
def report(weights: dict[str, np.ndarray]) -> lorank.SpectralReport:
    return lorank.analyze(weights)


def price(allocation: lorank.RankAllocation) -> int:
    return sum(rank * sum(SHAPES[name.rpartition(".")[2]]) for name, rank in allocation.ranks.items())


def test_budget_is_a_number_of_parameters_or_a_share(report: lorank.SpectralReport) -> None:
    base = 3 * sum(out * fan_in for out, fan_in in SHAPES.values()) + 2 * 50 * 32
    assert report.num_parameters == base
    for budget, limit in ((9_000, 9_000), ("9k", 9_000), ("20%", base // 5)):
        allocation = lorank.allocate(report, r_min=2, r_max=30, budget=budget)
        left = limit - price(allocation)
        assert allocation.num_parameters == price(allocation)
        assert 0 <= left < max(map(sum, SHAPES.values()))
        assert allocation.base_parameters == base
        assert len(set(allocation.ranks.values())) > 1


def test_average_rank_is_reached_exactly(report: lorank.SpectralReport) -> None:
    allocation = lorank.allocate(report, r_min=1, r_max=30, avg_rank=7.5)
    assert sum(allocation.ranks.values()) == 90
    assert allocation.average_rank == 7.5


def test_heads_embeddings_and_routers_are_excluded_unless_named(report: lorank.SpectralReport) -> None:
    allocation = lorank.allocate(report)
    assert len(allocation.ranks) == 12
    assert sorted(allocation.other_modules) == ["lm_head", "model.embed_tokens"]
    assert list(lorank.allocate(report, targets=["lm_head"]).ranks) == ["lm_head"]
    assert lorank.allocate(report, targets="all-linear").ranks == allocation.ranks
    some = lorank.allocate(report, targets=r".*layers\.1\.(q|k)_proj")
    assert list(some.ranks) == ["model.layers.1.k_proj", "model.layers.1.q_proj"] or list(some.ranks) == [
        "model.layers.1.q_proj",
        "model.layers.1.k_proj",
    ]


def test_source_and_its_report_give_equal_ranks(
    weights: dict[str, np.ndarray], report: lorank.SpectralReport
) -> None:
    direct = lorank.allocate(weights, budget=9_000, r_min=2, progress=False)
    assert direct.ranks == lorank.allocate(report, budget=9_000, r_min=2).ranks


def test_uniform_needs_no_spectra(weights: dict[str, np.ndarray]) -> None:
    broken = {name: np.full_like(weight, np.nan) for name, weight in weights.items()}
    assert set(lorank.allocate(broken, "uniform", r_max=8).ranks.values()) == {8}
    assert set(lorank.allocate(broken, "uniform", r_max=8, r_base=6).ranks.values()) == {6}
    under = lorank.allocate(broken, "uniform", r_min=1, r_max=8, budget=5_000)
    assert max(under.ranks.values()) - min(under.ranks.values()) <= 1


def test_placement_adapts_its_modules_only(report: lorank.SpectralReport) -> None:
    parts = {
        "attention": ["q_proj", "k_proj"],
        "feed-forward": ["up_proj", "down_proj"],
        "all": ["q_proj", "k_proj", "up_proj", "down_proj"],
    }
    for placement, names in parts.items():
        wanted = {f"model.layers.{i}.{name}" for i in range(3) for name in names}
        found = lorank.allocate(report, r_min=1, avg_rank=6, placement=placement)
        assert set(found.ranks) == set(found.scores) == wanted
        # Modules keep the order of the model; the budget covers the adapted modules.
        assert list(found.ranks) == [row.name for row in report if row.name in wanted]
        assert sum(found.ranks.values()) == 6 * len(wanted)
        assert set(found.other_modules) == {row.name for row in report} - wanted
        assert found.num_parameters == price(found)
        budget = price(found) + 5
        spent = lorank.allocate(report, r_min=1, budget=budget, placement=placement)
        assert 0 <= budget - spent.num_parameters < max(sum(SHAPES[name]) for name in names)
    assert lorank.allocate(report, placement="all").ranks == lorank.allocate(report).ranks
    # Scores are normalised over adapted modules only, as if the others were excluded by name.
    attention = lorank.allocate(report, placement="attention")
    assert attention == lorank.allocate(report, targets=["q_proj", "k_proj"])


def test_placements_select_from_the_targets(report: lorank.SpectralReport) -> None:
    found = lorank.allocate(report, targets=["q_proj", "up_proj", "lm_head"], placement="attention")
    assert list(found.ranks) == [f"model.layers.{i}.q_proj" for i in range(3)]
    with pytest.raises(ValueError, match="placement 'feed-forward' selects none of the 3 modules"):
        lorank.allocate(report, targets=["q_proj"], placement="feed-forward")
    with pytest.raises(
        ValueError, match="placement must be one of 'attention', 'feed-forward', 'all', not 'mlp'"
    ):
        lorank.allocate(report, placement="mlp")


def test_unusual_names_need_roles_only_if_roles_are_used() -> None:
    weights = {
        f"model.layers.{i}.mixer.{name}.weight": RNG.standard_normal((16, 16)).astype(np.float32)
        for i in range(2)
        for name in ("mix_in", "widen", "other")
    }
    roles: Roles = {"mix_in": "attention", "widen": "feed-forward", "other": None}
    assert len(lorank.allocate(weights, "uniform").ranks) == 6
    with pytest.raises(ValueError, match=r"the role of 'model\.layers\.0\.mixer\.mix_in' cannot be read"):
        lorank.allocate(weights, "uniform", placement="attention")
    for placement, name in (("attention", "mix_in"), ("feed-forward", "widen")):
        found = lorank.allocate(weights, "uniform", placement=placement, roles=roles)
        assert list(found.ranks) == [f"model.layers.{i}.mixer.{name}" for i in range(2)]
    # The method uses the same roles.
    heavy = lorank.allocate(
        weights, "attention-heavy", r_min=1, r_max=8, targets=["mix_in", "widen"], roles=roles
    )
    assert {name.rpartition(".")[2]: rank for name, rank in heavy.ranks.items()} == {"mix_in": 8, "widen": 4}
    bad: Any = {"mix_in": "head"}
    with pytest.raises(ValueError, match="roles: 'mix_in' must be 'attention', 'feed-forward' or None"):
        lorank.allocate(weights, "uniform", placement="attention", roles=bad)


def test_allocations_survive_saving(report: lorank.SpectralReport, tmp_path: Path) -> None:
    allocation = lorank.allocate(report, budget=9_000, r_min=2)
    allocation.save(tmp_path / "a.json")
    loaded = lorank.RankAllocation.load(tmp_path / "a.json")
    assert loaded == allocation
    assert loaded.lora_settings() == allocation.lora_settings()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "other"}', '{"format": null, "modules": 3}'])
def test_other_files_raise(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(lorank.FormatError, match=r"a\.json: is not a rank allocation"):
        lorank.RankAllocation.load(path)


@pytest.mark.parametrize("options", [{}, {"avg_rank": 5}, {"budget": 9000}])
@pytest.mark.parametrize("method", ["uniform", "htsr"])
@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ((-1, 8), "0 <= r_min <= r_max, got -1 and 8"),
        ((9, 8), "0 <= r_min <= r_max, got 9 and 8"),
        (("4", 8), "r_min must be an integer, not '4'"),
        ((4, 8.5), r"r_max must be an integer, not 8\.5"),
        ((True, 8), "r_min must be an integer, not True"),
    ],
)
def test_invalid_bounds_raise(
    report: lorank.SpectralReport, method: str, options: dict[str, Any], bounds: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lorank.allocate(report, method, r_min=bounds[0], r_max=bounds[1], **options)


def test_numpy_integers_are_accepted_as_bounds(report: lorank.SpectralReport) -> None:
    low: Any = np.int64(2)
    found = lorank.allocate(report, "uniform", r_min=low, r_max=np.int32(6), r_base=np.int64(5))
    assert set(found.ranks.values()) == {5}
    assert all(type(rank) is int for rank in found.ranks.values())
    narrow: dict[str, Any] = {"r_min": np.uint8(3), "r_max": np.uint8(8), "r_base": np.uint8(1)}
    for method in ("linear-decay", "empirical", "attention-heavy"):
        assert set(lorank.allocate(report, method, **narrow).ranks.values()) == {3}


def test_no_rank_exceeds_a_side_of_its_matrix(report: lorank.SpectralReport) -> None:
    costs = {name: sum(shape) for name, shape in SHAPES.items()}
    most = 3 * sum(costs[name] * min(20, *SHAPES[name]) for name in SHAPES)
    for options in ({}, {"avg_rank": 20}, {"budget": most}):
        found = lorank.allocate(report, "uniform", r_min=1, r_max=20, **options)
        for name, rank in found.ranks.items():
            assert rank == (8 if name.endswith("k_proj") else 20)
            assert (name in found.flags) == name.endswith("k_proj")
        assert found.flags["model.layers.0.k_proj"] == "a 8x32 matrix has no larger rank"
    with pytest.raises(ValueError, match=f"cost {3 * sum(costs.values()):,} to {most:,}"):
        lorank.allocate(report, "uniform", r_min=1, r_max=20, budget=most + 1)


def test_side_below_r_min_bounds_the_rank(report: lorank.SpectralReport) -> None:
    for options in ({}, {"avg_rank": 12}, {"budget": "50%"}):
        found = lorank.allocate(report, r_min=12, r_max=20, **options)
        narrow = {name: rank for name, rank in found.ranks.items() if name.endswith("k_proj")}
        assert set(narrow.values()) == {8}
        assert set(narrow) <= set(found.flags)
        assert min(rank for name, rank in found.ranks.items() if name not in narrow) >= 12


def test_schedules_without_blocks_and_roles_without_modules_raise() -> None:
    plain = {f"{name}.weight": np.ones((8, 8), dtype=np.float32) for name in ("first", "second")}
    for method, message in (
        ("linear-decay", r"none of 2 modules \(first, \.\.\.\) is in a numbered block: give blocks"),
        ("empirical", "is in a numbered block: give blocks"),
        ("attention-heavy", "is attention or feed-forward: give roles"),
    ):
        with pytest.raises(ValueError, match=message):
            lorank.allocate(plain, method, r_min=1, r_max=4)
    with pytest.raises(ValueError, match=r"roles: 'mixer' matches none of 2 modules \(first"):
        lorank.allocate(plain, "attention-heavy", roles={"first": "attention", "mixer": "feed-forward"})
    with pytest.raises(ValueError, match="roles: 'mixer', 'pool' match none of 2 modules"):
        lorank.allocate(plain, "uniform", roles={"mixer": "attention", "first": None, "pool": None})
    with pytest.raises(ValueError, match=r"blocks must be a regular expression, not \['first'\]"):
        lorank.allocate(plain, "linear-decay", blocks=["first"])


def test_errors_state_what_to_do(report: lorank.SpectralReport) -> None:
    with pytest.raises(ValueError, match="budget or avg_rank, not both"):
        lorank.allocate(report, budget=100, avg_rank=3)
    with pytest.raises(ValueError, match=r"unknown method 'magic': choose one of .*htsr.*uniform"):
        lorank.allocate(report, "magic")
    with pytest.raises(ValueError, match="select none of the 14 modules that were read"):
        lorank.allocate(report, targets="nothing")
    with pytest.raises(ValueError, match="no module is named 'nothing'"):
        lorank.allocate(report, targets=["q_proj", "nothing"])
    with pytest.raises(ValueError, match="not feasible"):
        lorank.allocate(report, budget=10)
    with pytest.raises(FileNotFoundError, match="no such file"):
        lorank.allocate(Path("nowhere"))


def test_placement_adapts_one_role_only() -> None:
    model = tiny_models.llama()
    attention = lorank.allocate(model, "uniform", placement="attention", r_max=8)
    forward = lorank.allocate(model, "uniform", placement="feed-forward", r_max=8)
    assert {name.split(".")[-2] for name in attention.ranks} == {"self_attn"}
    assert {name.split(".")[-2] for name in forward.ranks} == {"mlp"}
    assert set(forward.ranks) <= set(attention.other_modules)
    everything = lorank.allocate(model, "uniform", r_max=8)
    assert set(everything.ranks) == {*attention.ranks, *forward.ranks}
    own = lorank.allocate(model, "uniform", placement="attention", roles={"mlp": "attention"}, r_max=8)
    assert set(own.ranks) == set(everything.ranks)
    heavy = lorank.allocate(model, "attention-heavy", roles={"mlp": "attention"}, r_max=8)
    assert set(heavy.ranks.values()) == {8}
    with pytest.raises(ValueError, match="placement must be one of"):
        lorank.allocate(model, "uniform", placement="elsewhere")
    with pytest.raises(ValueError, match="selects none of the 2 modules"):
        lorank.allocate(model, "uniform", placement="attention", targets=["up_proj"])
