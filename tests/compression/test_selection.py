"""Selected values: every knob against its definition, over modules of mixed shapes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lorank
from lorank import _core
from lorank.adapters.module import LoraModule
from lorank.compression.knobs import KnobArguments, Knobs, checked_knobs
from lorank.compression.selection import select
from lorank.compression.spectral_form import SpectralForm, Triplets


def form(
    values: list[float],
    shape: tuple[int, int] = (20, 30),
    name: str = "m",
    unseen: float = 0.0,
    dense: bool = False,
) -> SpectralForm:
    k = len(values)
    module = LoraModule(name, "linear", shape, k, 1.0, "float32", list)
    part = Triplets(np.zeros((k, shape[0])), np.array(values, dtype=np.float64), np.zeros((k, shape[1])))
    return SpectralForm(module, [part], unseen, is_dense=dense)


def ranks(forms: list[SpectralForm], **knobs: Any) -> list[int]:
    return [int(mask.sum()) for mask in select(forms, Knobs(**knobs))]


spectra = st.lists(
    st.tuples(
        st.lists(st.one_of(st.just(0.0), st.just(1.0), st.floats(1e-3, 10)), min_size=1, max_size=6),
        st.integers(2, 40),
        st.integers(2, 40),
    ),
    min_size=1,
    max_size=6,
).map(lambda parts: [form(sorted(v, reverse=True), (o, i), f"m{k}") for k, (v, o, i) in enumerate(parts)])


@given(spectra, st.floats(0, 1))
def test_ratio_keeps_exactly_its_count_of_largest_values(forms: list[SpectralForm], ratio: float) -> None:
    masks = select(forms, Knobs(rank_ratio=ratio))
    everything = np.concatenate([f.values for f in forms])
    kept = np.concatenate([f.values[m] for f, m in zip(forms, masks, strict=True)])
    count = min(math.floor(ratio * len(everything) + 0.5), int((everything > 0).sum()))
    assert len(kept) == count
    assert np.array_equal(np.sort(kept), np.sort(everything)[len(everything) - count :])


@given(spectra, st.floats(0, 1, allow_subnormal=False))
def test_energy_keeps_the_fewest_values_that_reach_it(forms: list[SpectralForm], energy: float) -> None:
    everything = np.sort(np.concatenate([f.values for f in forms]))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(everything**2)])
    count = sum(ranks(forms, energy=energy))
    target = energy * (1 - 1e-12) * sums[-1]
    assert sums[count] >= target * (1 - 1e-14)
    assert count == 0 or sums[count - 1] < target * (1 + 1e-14)


@given(spectra, st.floats(0, 1))
def test_budget_retains_at_least_the_energy_of_a_ratio_of_its_cost(
    forms: list[SpectralForm], ratio: float
) -> None:
    def energy(masks: list[Any]) -> float:
        return sum(float(np.square(f.values[m]).sum()) for f, m in zip(forms, masks, strict=True))

    def price(masks: list[Any]) -> int:
        return sum(f.module.cost * int(m.sum()) for f, m in zip(forms, masks, strict=True))

    para = select(forms, Knobs(rank_ratio=ratio))
    ours = select(forms, Knobs(budget=price(para)))
    assert price(ours) <= price(para)
    assert energy(ours) >= energy(para) * (1 - 1e-14)
    for f, mask in zip(forms, ours, strict=True):
        assert not np.any(np.diff(mask.astype(int)) > 0), "within a module the smallest leave first"
        assert not np.any(mask & (f.values == 0))


@given(spectra, st.floats(0, 6), st.integers(0, 4), st.sampled_from(["largest", "smallest"]))
def test_no_module_exceeds_max_rank(forms: list[SpectralForm], average: float, most: int, keep: Any) -> None:
    found = ranks(forms, avg_rank=average, max_rank=most, keep=keep)
    assert max(found) <= most
    available = sum(min(most, int((f.values > 0).sum())) for f in forms)
    assert sum(found) == min(math.floor(average * len(forms) + 0.5), available)


def test_global_and_module_scopes_differ() -> None:
    forms = [form([9.0, 8.0, 7.0, 6.0]), form([4.0, 3.0, 2.0, 1.0])]
    assert ranks(forms, rank_ratio=0.5) == [4, 0]
    assert ranks(forms, rank_ratio=0.5, scope="module") == [2, 2]
    assert ranks(forms, energy=0.5) == [2, 0]
    assert ranks(forms, energy=0.5, scope="module") == [2, 1]
    assert ranks(forms, avg_rank=1.0, keep="smallest") == [0, 2]
    kept = select(forms, Knobs(avg_rank=1, keep="smallest"))
    assert kept[1].tolist() == [False, False, True, True]


def test_scores_replace_values() -> None:
    forms = [form([9.0, 8.0, 7.0], name="a"), form([4.0, 3.0, 0.0], name="b")]
    scores = {"a": [0.0, 0.0, 5.0], "b": [7.0, 6.0, 9.0]}
    masks = select(forms, Knobs(avg_rank=1.5, scores=scores))
    assert [m.tolist() for m in masks] == [[False, False, True], [True, True, False]]
    # A score of zero may be kept; a value of zero is never kept.
    assert ranks(forms, rank_ratio=1.0, scores={"a": [0.0] * 3, "b": [0.0] * 3}) == [3, 2]
    with pytest.raises(ValueError, match="no scores for module 'b'"):
        ranks(forms, avg_rank=1, scores={"a": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match=r"'b' has 3 singular values, its scores have shape \(2,\)"):
        ranks(forms, avg_rank=1, scores={"a": [1.0] * 3, "b": [1.0] * 2})


def test_automatic_threshold_of_an_adapter_finds_the_signal() -> None:
    values = [10.0, 9.0, 1.2, 1.1, 1.0, 0.9, 0.8]
    assert ranks([form(values), form([0.0, 0.0])], auto=True) == [2, 0]
    assert 2.858 * np.median(values) < 9


def test_automatic_threshold_of_a_difference_is_the_noise_edge() -> None:
    rng = np.random.default_rng(0)
    out, fan_in, planted = 300, 200, 3
    noise = rng.standard_normal((out, fan_in))
    signal = (
        np.linalg.qr(rng.standard_normal((out, planted)))[0]
        @ np.linalg.qr(rng.standard_normal((fan_in, planted)))[0].T
    )
    values = np.linalg.svd(noise + 80 * signal, compute_uv=False)
    unseen = float(np.square(values[40:]).sum())
    assert ranks([form(values[:40].tolist(), (out, fan_in), unseen=unseen, dense=True)], auto=True) == [
        planted
    ]


def test_energy_beyond_the_computed_values_raises() -> None:
    forms = [form([3.0, 1.0], unseen=10.0, dense=True)]
    assert ranks(forms, energy=0.45) == [1]
    assert ranks(forms, energy=0.499) == [2]
    with pytest.raises(ValueError, match=r"energy=0\.6 is out of reach: .* hold 0\.5000"):
        ranks(forms, energy=0.6)


def test_max_rank_does_not_lower_the_required_energy() -> None:
    forms = [form([3.0] + [1.0] * 9)]
    assert ranks(forms, energy=0.6) == [3]
    assert ranks(forms, energy=0.6, max_rank=5) == [3]
    assert ranks(forms, energy=0.6, max_rank=5, scope="module") == [3]
    assert ranks(forms, energy=13 / 18, max_rank=5) == [5]
    with pytest.raises(ValueError, match=r"energy=0\.8 is out of reach: .* hold 0\.7222 .* max_rank"):
        ranks(forms, energy=0.8, max_rank=5)


@given(spectra, st.floats(0, 1, allow_subnormal=False), st.integers(1, 6))
def test_energy_under_max_rank_keeps_the_fewest_values_or_raises(
    forms: list[SpectralForm], energy: float, most: int
) -> None:
    everything = np.concatenate([f.values for f in forms])
    allowed = np.sort(np.concatenate([f.values[:most] for f in forms]))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(allowed**2)])
    target = energy * np.square(everything).sum()
    if sums[-1] < target * (1 - 1e-11):
        with pytest.raises(ValueError, match="out of reach"):
            ranks(forms, energy=energy, max_rank=most)
    elif sums[-1] > target * (1 + 1e-11):
        found = ranks(forms, energy=energy, max_rank=most)
        assert max(found) <= most
        assert sums[sum(found)] >= target * (1 - 1e-11)
        assert sum(found) == 0 or sums[sum(found) - 1] < target * (1 + 1e-11)


@pytest.mark.parametrize("score", [-1.0, math.nan, math.inf])
def test_invalid_scores_raise_with_their_module(score: float) -> None:
    with pytest.raises(ValueError, match=rf"module 'b': score 1 is {score}: .* finite .* 0 or above"):
        ranks(
            [form([2.0], name="a"), form([2.0, 1.0], name="b")],
            avg_rank=1,
            scores={"a": [1], "b": [1, score]},
        )


def test_automatic_threshold_keeps_modules_of_two_values() -> None:
    forms = [form([5.0]), form([5.0, 4.0]), form([5.0, 4.0, 0.0, 0.0]), form([5.0, 1.0, 1.0])]
    assert ranks(forms, auto=True) == [1, 2, 2, 1]
    assert ranks(forms, auto=True, max_rank=1) == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "exactly one of"),
        ({"rank_ratio": 0.5, "energy": 0.9}, "not rank_ratio and energy"),
        ({"rank_ratio": 0.5, "auto": True}, "not rank_ratio and auto"),
        ({"rank_ratio": 1.5}, "rank_ratio=1.5 is not between 0 and 1"),
        ({"rank_ratio": float("nan")}, "rank_ratio=nan is not"),
        ({"energy": -0.1}, "energy=-0.1 is not"),
        ({"avg_rank": float("inf")}, "avg_rank=inf is not 0 or a finite"),
        ({"avg_rank": 2, "max_rank": -1}, "max_rank=-1 cannot be negative"),
        ({"avg_rank": 2, "scope": "layer"}, "scope must be"),
        ({"avg_rank": 2, "keep": "some"}, "keep must be"),
        ({"budget": 100, "scope": "module"}, "contradicts"),
        ({"budget": "abc"}, "budget=abc is not a number of parameters"),
        ({"budget": "-5"}, "budget=-5 is not a number"),
        ({"budget": -5}, "budget=-5 is not a number"),
        ({"budget": "50%"}, "does not store the size of its base model"),
        ({"energy": 0.9, "keep": "smallest"}, "need rank_ratio or avg_rank"),
        ({"budget": 9, "scores": {}}, "need rank_ratio or avg_rank"),
    ],
)
def test_invalid_knobs_raise(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Knobs(**knobs)


def test_signatures_list_all_knobs() -> None:
    arguments = {name: hint.__forward_arg__ for name, hint in KnobArguments.__annotations__.items()}
    assert arguments == Knobs.__annotations__
    for function in (lorank.compress, lorank.merge, lorank.extract, lorank.LoraAdapter.load):
        assert "KnobArguments" in str(inspect.signature(function))


def test_unknown_knob_raises() -> None:
    with pytest.raises(TypeError, match=r"unknown option 'rank': choose among rank_ratio, avg_rank"):
        checked_knobs({"rank": 3})


NAN = np.array([1.0, np.nan])


@pytest.mark.parametrize(
    "choose",
    [
        lambda: _core.select_largest(NAN, 1),
        lambda: _core.select_smallest(NAN, 1),
        lambda: _core.select_energy(NAN, 0.5),
        lambda: _core.select_budget(NAN, [2], [1], 1),
        lambda: _core.select_largest(np.array([-1.0]), 1),
        lambda: _core.select_budget(np.array([1.0, 2.0]), [2], [1], 1),
    ],
)
def test_invalid_values_raise(choose: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"value 1|value 0|descending"):
        choose()


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.01, 0.9999))
def test_millions_of_tied_values_are_selected_exactly(seed: int, share: float) -> None:
    values = np.random.default_rng(seed).integers(0, 50_000, 1_000_000).astype(np.float64)
    order = np.argsort(-values, kind="stable")
    count = int(share * len(values))
    expected = np.zeros(len(values), dtype=bool)
    expected[order[:count]] = values[order[:count]] > 0
    assert np.array_equal(_core.select_largest(values, count), expected)
    sums = np.cumsum(values[order].astype(object).astype(np.int64) ** 2)  # exact in 64 bits
    needed = int(np.searchsorted(sums, share * (1 - 1e-12) * float(sums[-1]))) + 1
    assert int(_core.select_energy(values, share).sum()) == needed


def test_strided_and_unaligned_values_are_selected() -> None:
    values = np.array([3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0])
    shifted = np.frombuffer(b"\0" + values.tobytes(), dtype=np.uint8)[1:].view(np.float64)
    for placed in (values, np.repeat(values, 3)[::3], values[::-1].copy()[::-1], shifted):
        assert _core.select_largest(placed, 3).tolist() == [v > 4 for v in values]
        assert _core.select_energy(placed, 0.5).tolist() == [v > 5 for v in values]
