"""From a source to ranks under a budget, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import lorank
import tiny_models

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


def test_a_budget_in_parameters_and_as_a_share(report: lorank.SpectralReport) -> None:
    base = 3 * sum(out * fan_in for out, fan_in in SHAPES.values()) + 2 * 50 * 32
    assert report.num_parameters == base
    for budget, limit in ((9_000, 9_000), ("9k", 9_000), ("20%", base // 5)):
        allocation = lorank.allocate(report, r_min=2, r_max=30, budget=budget)
        left = limit - price(allocation)
        assert allocation.num_parameters == price(allocation)
        assert 0 <= left < max(map(sum, SHAPES.values()))
        assert allocation.base_parameters == base
        assert len(set(allocation.ranks.values())) > 1


def test_an_average_rank(report: lorank.SpectralReport) -> None:
    allocation = lorank.allocate(report, r_min=1, r_max=30, avg_rank=7.5)
    assert sum(allocation.ranks.values()) == 90
    assert allocation.average_rank == 7.5


def test_heads_embeddings_and_routers_are_left_out_unless_named(report: lorank.SpectralReport) -> None:
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


def test_a_source_gives_what_its_report_gives(
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


def test_save_and_load(report: lorank.SpectralReport, tmp_path: Path) -> None:
    allocation = lorank.allocate(report, budget=9_000, r_min=2)
    allocation.save(tmp_path / "a.json")
    loaded = lorank.RankAllocation.load(tmp_path / "a.json")
    assert loaded == allocation
    assert loaded.lora_settings() == allocation.lora_settings()


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": "other"}', '{"format": null, "modules": 3}'])
def test_files_that_are_no_allocation(content: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(lorank.FormatError, match=r"a\.json: is no rank allocation"):
        lorank.RankAllocation.load(path)


def test_errors_say_what_to_do(report: lorank.SpectralReport) -> None:
    with pytest.raises(ValueError, match="either budget or avg_rank"):
        lorank.allocate(report, budget=100, avg_rank=3)
    with pytest.raises(ValueError, match=r"no method 'magic': choose one of .*htsr.*uniform"):
        lorank.allocate(report, "magic")
    with pytest.raises(ValueError, match="select none of the 14 modules"):
        lorank.allocate(report, targets="nothing")
    with pytest.raises(ValueError, match="no module is named 'nothing'"):
        lorank.allocate(report, targets=["q_proj", "nothing"])
    with pytest.raises(ValueError, match="not feasible"):
        lorank.allocate(report, budget=10)
    with pytest.raises(FileNotFoundError, match="no such file"):
        lorank.allocate(Path("nowhere"))


def test_placement_adapts_one_role_alone() -> None:
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
