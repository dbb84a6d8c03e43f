"""Depth schedules against their closed forms, on GPT-2-medium's shapes and on models as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorank
from lorank.allocation import signals
from lorank.allocation.signals.registry import Signal
from lorank.modules.targets import AdaptedModule
from tests.support import tiny_models

SCHEDULES = ("uniform", "linear-decay", "attention-heavy", "empirical")
D = 1024
GPT2_LAYERS = {
    "attn.c_attn": (3 * D, D),
    "attn.c_proj": (D, D),
    "mlp.c_fc": (4 * D, D),
    "mlp.c_proj": (D, 4 * D),
}
# The settings of the paper's section 3.2.4.
PAPER = {"r_min": 4, "r_max": 32, "r_base": 16}


def stack_of(
    count: int, layers: Mapping[str, tuple[int, int]] = GPT2_LAYERS, name: str = "transformer.h"
) -> list[AdaptedModule]:
    return [
        AdaptedModule(f"{name}.{i}.{layer}", "linear", shape)
        for i in range(count)
        for layer, shape in layers.items()
    ]


GPT2_MEDIUM = stack_of(24)


def signal_of(
    method: str, modules: list[AdaptedModule], r_min: int = 4, r_max: int = 32, **options: Any
) -> Signal:
    found = signals.find(method)
    found.check_options(method, options)
    return found.function(None, modules, r_min, r_max, **options)


def ranks_of(method: str, modules: list[AdaptedModule], **options: Any) -> dict[str, int]:
    ranks = signal_of(method, modules, **options).ranks
    assert ranks is not None
    return {module.name: int(rank) for module, rank in zip(modules, ranks, strict=True)}


def by_block(ranks: Mapping[str, int]) -> list[int]:
    """Return the rank of every block of GPT-2, checking that its four layers have equal ranks."""
    blocks: dict[int, set[int]] = {}
    for name, rank in ranks.items():
        blocks.setdefault(int(name.split(".")[2]), set()).add(rank)
    assert all(len(found) == 1 for found in blocks.values())
    return [min(blocks[i]) for i in sorted(blocks)]


def num_parameters(ranks: Mapping[str, int]) -> int:
    return sum(rank * sum(GPT2_LAYERS[name.split(".", 3)[3]]) for name, rank in ranks.items())


def test_uniform_baselines_of_the_paper_are_reproduced() -> None:
    for rank, parameters in ((8, 3_145_728), (16, 6_291_456)):
        assert num_parameters(ranks_of("uniform", GPT2_MEDIUM, r_base=rank)) == parameters


def test_linear_decay_of_gpt2_medium_follows_the_formula() -> None:
    ranks = ranks_of("linear-decay", GPT2_MEDIUM, **PAPER)
    # 16 - 12 i / 23, rounded half up.
    assert by_block(ranks) == (
        [16, 15, 15, 14, 14, 13, 13, 12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4]
    )
    # The four layers have 240 ranks in sum; the table of the paper has 384, the count of uniform 16.
    assert num_parameters(ranks) == 240 * 16 * D


def test_empirical_schedule_of_gpt2_medium_follows_the_paper() -> None:
    ranks = ranks_of("empirical", GPT2_MEDIUM, **PAPER)
    # 0.3 L = 7.2 and 0.7 L = 16.8; 9.6, 19.2 and 16.
    assert by_block(ranks) == [10] * 8 + [19] * 9 + [16] * 7
    assert num_parameters(ranks) == (80 + 171 + 112) * 16 * D


def test_attention_heavy_schedule_of_gpt2_medium_follows_the_paper() -> None:
    ranks = ranks_of("attention-heavy", GPT2_MEDIUM, **PAPER)
    assert {rank for name, rank in ranks.items() if ".attn." in name} == {16}
    assert {rank for name, rank in ranks.items() if ".mlp." in name} == {8}
    assert num_parameters(ranks) == 24 * (16 * 6 * D + 8 * 10 * D)


def test_rounding_and_thresholds_are_exact() -> None:
    # The next part begins at 0.3 L = 3 and at 0.7 L = 7.
    assert by_block(ranks_of("empirical", stack_of(10), r_base=10)) == [6] * 3 + [12] * 4 + [10] * 3
    # 5 - i / 2 at r_min 4, and 9 / 2: rounded up, not to even.
    assert by_block(ranks_of("linear-decay", stack_of(3), r_base=5)) == [5, 5, 4]
    halves = ranks_of("attention-heavy", stack_of(1), r_min=1, r_base=9)
    assert halves["transformer.h.0.mlp.c_fc"] == 5


def test_single_block_gets_r_base() -> None:
    for method in ("linear-decay", "empirical"):
        assert by_block(ranks_of(method, stack_of(1), r_base=16)) == [16]


def test_bounds_hold_and_r_base_defaults_to_r_max() -> None:
    assert by_block(ranks_of("linear-decay", stack_of(5), r_min=8, r_max=32)) == [32, 26, 20, 14, 8]
    assert by_block(ranks_of("linear-decay", stack_of(5), r_min=8, r_max=24, r_base=32)) == (
        [24, 24, 20, 14, 8]
    )
    assert by_block(ranks_of("empirical", stack_of(5), r_min=8, r_max=10)) == [8, 8, 10, 10, 10]
    for method in SCHEDULES:
        assert set(ranks_of(method, stack_of(3), r_min=6, r_max=9, r_base=2).values()) == {6}


def test_ranks_cut_by_r_max_are_flagged() -> None:
    cut = "the schedule gives more than r_max"
    flags = signal_of("empirical", stack_of(10, {"attn": (8, 8)}), r_max=10).flags
    assert flags == {f"transformer.h.{i}.attn": cut for i in (3, 4, 5, 6)}
    assert not signal_of("empirical", stack_of(10), r_max=12, r_base=10).flags
    pooler = AdaptedModule("pooler.dense", "linear", (8, 8))
    decay = signal_of("linear-decay", [*stack_of(2, {"attn": (8, 8)}), pooler], r_max=8, r_base=9)
    assert decay.flags == {
        "transformer.h.0.attn": cut,
        "pooler.dense": f"gets r_base, because it is in no numbered block; {cut}",
    }


def test_encoder_and_decoder_have_separate_depths() -> None:
    layers = {"self_attn.q_proj": (8, 8), "fc1": (8, 8)}
    modules = stack_of(2, layers, "encoder.layers") + stack_of(4, layers, "decoder.layers")
    ranks = ranks_of("linear-decay", modules, r_min=1, r_max=10)
    assert [ranks[f"encoder.layers.{i}.fc1"] for i in range(2)] == [10, 1]
    assert [ranks[f"decoder.layers.{i}.fc1"] for i in range(4)] == [10, 7, 4, 1]


def test_depth_counts_all_blocks_of_the_model() -> None:
    layers = ("self_attn.q_proj", "mlp.up_proj")
    names = [f"layers.{i}.{layer}" for i in range(24) for layer in layers]
    # Unreadable names of modules that are not adapted are ignored, and a head is not a block.
    names += ["x.7.y", "head"]
    model = {f"model.{name}.weight": np.ones((24, 24), dtype=np.float32) for name in names}
    every = {"r_min": 1, "r_max": 24}
    for source in (model, lorank.analyze(model)):
        late = lorank.allocate(source, "linear-decay", targets=r"model\.layers\.2[0-3]\..*", **every)
        assert list(late.ranks.values()) == [4, 4, 3, 3, 2, 2, 1, 1]
        middle = lorank.allocate(source, "empirical", targets=["layers.8.mlp.up_proj"], r_base=10, **every)
        assert list(middle.ranks.values()) == [12]
        # Attention is in every fourth block only, as in hybrid models.
        few = lorank.allocate(
            source, "linear-decay", targets=r"model\.layers\.(3|7|11|15|19|23)\.self_attn.*", **every
        )
        assert list(few.ranks.values()) == [21, 17, 13, 9, 5, 1]
    with pytest.raises(ValueError, match=r"block of 'model\.x\.7\.y'.*blocks="):
        lorank.allocate(model, "linear-decay", targets=["y", "mlp.up_proj"], **every)


def test_depth_without_a_source_counts_the_given_blocks() -> None:
    late = stack_of(24)[12 * 4 :]
    assert by_block(ranks_of("linear-decay", late, r_min=1, r_max=12)) == list(range(12, 0, -1))


def test_modules_outside_blocks_get_r_base_and_are_flagged() -> None:
    pooler = AdaptedModule("bert.pooler.dense", "linear", (8, 8))
    for method in ("linear-decay", "empirical", "attention-heavy"):
        signal = signal_of(method, [*stack_of(3), pooler], r_base=16)
        assert signal.ranks is not None
        assert signal.ranks[-1] == 16
        assert list(signal.flags) == ["bert.pooler.dense"]
        without = signal_of(method, stack_of(3), r_base=16).ranks
        assert np.array_equal(signal.ranks[:-1], without), "a pooler is no block"
    assert not signal_of("uniform", [pooler]).flags


def test_unreadable_names_raise_only_if_they_are_used() -> None:
    mixer = [AdaptedModule(f"layers.{i}.mixer.in_proj", "linear", (8, 8)) for i in range(2)]
    unit = [AdaptedModule(f"units.{i}.attn.q_proj", "linear", (8, 8)) for i in range(2)]
    assert list(ranks_of("linear-decay", mixer).values()) == [32, 4]
    assert list(ranks_of("attention-heavy", unit).values()) == [32, 32]
    assert list(ranks_of("uniform", mixer + unit).values()) == [32] * 4
    with pytest.raises(ValueError, match=r"role of 'layers.0.mixer.in_proj'.*roles="):
        signal_of("attention-heavy", mixer)
    for method in ("linear-decay", "empirical"):
        with pytest.raises(ValueError, match=r"block of 'units.0.attn.q_proj'.*blocks="):
            signal_of(method, unit)


def test_blocks_and_roles_are_options() -> None:
    model = {f"units.{i}.mixer.in_proj.weight": np.ones((4, 4), dtype=np.float32) for i in range(3)}
    deep = lorank.allocate(model, "linear-decay", r_min=1, r_max=3, blocks=r"units\.(\d+)")
    assert list(deep.ranks.values()) == [3, 2, 1]
    wide = lorank.allocate(model, "attention-heavy", r_min=1, r_max=4, roles={"mixer": "feed-forward"})
    assert set(wide.ranks.values()) == {2}


@pytest.mark.parametrize("method", SCHEDULES)
@pytest.mark.parametrize("r_base", [-1, 2.5, "8", True])
def test_invalid_r_base_raises(method: str, r_base: Any) -> None:
    with pytest.raises(ValueError, match="r_base must be a rank"):
        signal_of(method, stack_of(2), r_base=r_base)


@pytest.mark.parametrize(
    "build", [tiny_models.bert_classifier, tiny_models.t5, tiny_models.gpt_oss, tiny_models.vit]
)
@pytest.mark.parametrize("method", SCHEDULES)
def test_real_models_need_no_options(method: str, build: Any) -> None:
    allocation = lorank.allocate(build(), method, r_min=2, r_max=9, r_base=6)
    assert set(allocation.ranks.values()) <= set(range(2, 10))
    placed = {rank for name, rank in allocation.ranks.items() if name not in allocation.flags}
    assert len(placed) == (1 if method == "uniform" else 2), "two blocks, two roles"
    assert set(allocation.flags) <= {"bert.pooler.dense"}


LAYERS = {"attn.q_proj": (8, 8), "attn.v_proj": (2, 8), "mlp.up_proj": (24, 8), "mlp.down_proj": (8, 24)}


@st.composite
def bounds(draw: st.DrawFn) -> dict[str, int]:
    r_min = draw(st.integers(0, 12))
    return {
        "r_min": r_min,
        "r_max": draw(st.integers(r_min, r_min + 40)),
        "r_base": draw(st.integers(0, 64)),
    }


@given(st.sampled_from(SCHEDULES), st.integers(1, 40), bounds())
def test_ranks_are_bounded_and_scores_equal_the_excess_over_r_min(
    method: str, count: int, given_bounds: dict[str, int]
) -> None:
    signal = signal_of(method, stack_of(count, LAYERS), **given_bounds)
    assert signal.ranks is not None
    assert signal.ranks.dtype == np.int64
    assert np.all((signal.ranks >= given_bounds["r_min"]) & (signal.ranks <= given_bounds["r_max"]))
    if method == "uniform":
        assert len(set(signal.scores)) == 1
    else:
        assert np.array_equal(signal.scores, signal.ranks - given_bounds["r_min"])


@given(st.integers(2, 40), bounds())
def test_linear_decay_never_rises_and_ends_at_r_min(count: int, given_bounds: dict[str, int]) -> None:
    ranks = by_block(ranks_of("linear-decay", stack_of(count, name="model.layers"), **given_bounds))
    assert np.all(np.diff(ranks) <= 0)
    assert ranks[-1] == given_bounds["r_min"]
    assert ranks[0] == min(max(given_bounds["r_base"], given_bounds["r_min"]), given_bounds["r_max"])


@given(st.sampled_from(SCHEDULES), st.integers(1, 6), bounds(), st.floats(0, 1))
def test_budgets_are_kept_and_used_up(
    method: str, count: int, given_bounds: dict[str, int], share: float
) -> None:
    model = {
        f"layers.{i}.{name}.weight": np.zeros(shape, dtype=np.float32)
        for i in range(count)
        for name, shape in LAYERS.items()
    }
    r_min, r_max = given_bounds["r_min"], given_bounds["r_max"]
    caps = {name: min(r_max, *shape) for name, shape in LAYERS.items()}
    least = count * sum(min(r_min, caps[name]) * sum(shape) for name, shape in LAYERS.items())
    most = count * sum(caps[name] * sum(shape) for name, shape in LAYERS.items())
    budget = least + int(share * (most - least))
    allocation = lorank.allocate(model, method, budget=budget, **given_bounds)
    left = budget - allocation.num_parameters
    assert left >= 0
    assert all(
        m.cost > left for m in allocation.modules if allocation.ranks[m.name] < caps[m.name.split(".", 2)[2]]
    )
    if method == "linear-decay":
        for name in LAYERS:
            assert np.all(np.diff([allocation.ranks[f"layers.{i}.{name}"] for i in range(count)]) <= 0)


def test_constant_schedule_is_uniform_under_a_budget() -> None:
    model = {f"layers.{i}.q_proj.weight": np.zeros((8, 8), dtype=np.float32) for i in range(4)}
    flat = lorank.allocate(model, "linear-decay", r_min=2, r_max=9, r_base=2, budget=5 * 4 * 16 + 16)
    assert list(flat.scores.values()) == [0.0] * 4
    assert list(flat.ranks.values()) == [6, 5, 5, 5]
    assert list(lorank.allocate(model, "empirical", r_min=3, r_max=3, budget=192).ranks.values()) == [3] * 4
