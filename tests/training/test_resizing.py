"""Larger and smaller ranks in live PEFT models: comparison with dense updates, kinds of layers, files."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model, inject_adapter_in_model

import lorank
from lorank.training import resize_lora
from tests.support import tiny_models
from tests.support.adapter_files import trained
from tests.support.lora_layers import factors, layers, ranks, scalings, truncated, updates_of
from tests.support.outputs import outputs
from tests.support.resizable_models import LLAMA, MIXED, MIXED_IDS, mixed, saved_and_loaded


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_every_kind_of_layer_grows_and_shrinks_back(rank_stabilized: bool) -> None:
    model = mixed(use_rslora=rank_stabilized)
    before, updates, scales = outputs(model, MIXED_IDS), updates_of(model), scalings(model)
    changes = resize_lora(model, {"table": 7, "kernel": 5, "first": 6, "last": 9})
    assert ranks(model) == {"table": 7, "kernel": 5, "first": 6, "last": 9}
    assert [(c.old_rank, c.error, c.spectral_error) for c in changes.values()] == [(4, 0.0, 0.0)] * 4
    torch.testing.assert_close(outputs(model, MIXED_IDS), before, rtol=0, atol=1e-6)
    for name, update in updates_of(model).items():
        np.testing.assert_array_equal(update, updates[name])
    changes = resize_lora(model, dict.fromkeys(MIXED, 4))
    assert set(ranks(model).values()) == {4}
    assert all(change.error < 1e-6 for change in changes.values())
    torch.testing.assert_close(outputs(model, MIXED_IDS), before, rtol=0, atol=1e-6)
    assert scalings(model) == scales


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_shrinking_is_the_best_approximation_and_reports_its_error(rank_stabilized: bool) -> None:
    model = mixed(use_rslora=rank_stabilized)
    updates, scales = updates_of(model), scalings(model)
    wanted = {"table": 1, "kernel": 2, "first": 3, "last": 2}
    changes = resize_lora(model, wanted)
    assert ranks(model) == wanted
    assert scalings(model) == scales
    for name, update in updates_of(model).items():
        size = np.linalg.norm(updates[name])
        np.testing.assert_allclose(update, truncated(updates[name], wanted[name]), atol=1e-6 * size)
        assert changes[name].error == pytest.approx(np.linalg.norm(update - updates[name]), rel=1e-5)
        expected = np.linalg.svd(updates[name], compute_uv=False)[wanted[name] : 4]
        np.testing.assert_allclose(changes[name].dropped, expected, rtol=1e-6, atol=1e-6 * size)
        assert changes[name].spectral_error == changes[name].dropped[0]


def test_conv1d_layers_of_gpt2_are_resized() -> None:
    model = trained(
        tiny_models.gpt2(), LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    )
    before, updates = outputs(model), updates_of(model)
    resize_lora(model, {"h.0.attn.c_attn": 6, "h.1.mlp.c_fc": 5})
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-6)
    change = resize_lora(model, {"h.0.attn.c_attn": 2})["transformer.h.0.attn.c_attn"]
    name = change.name
    np.testing.assert_allclose(updates_of(model)[name], truncated(updates[name], 2), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_resized_model_is_saved_and_loaded(tmp_path: Path, rank_stabilized: bool) -> None:
    base = tiny_models.llama()
    config = LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA, use_rslora=rank_stabilized)
    model = trained(base, config)
    wanted = {"0.self_attn.q_proj": 7, "0.mlp.up_proj": 1, "1.mlp.up_proj": 7, "1.self_attn.v_proj": 2}
    resize_lora(model, wanted)
    again = saved_and_loaded(model, base, tmp_path)
    assert ranks(again) == ranks(model)
    assert scalings(again) == pytest.approx(scalings(model), rel=1e-15)
    torch.testing.assert_close(outputs(again), outputs(model))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 4  # (4 * 4 + 7 + 7 + 1 + 2) / 8 is 4.125
    assert written["lora_alpha"] == 6
    assert len(written["rank_pattern"]) == 3
    assert written["use_rslora"] is rank_stabilized
    # LoraAdapter.load reads the same ranks and scalings.
    adapter = lorank.LoraAdapter.load(tmp_path)
    assert adapter.ranks == ranks(model)
    for name, module in adapter.modules.items():
        assert module.scaling == pytest.approx(scalings(model)[name], rel=1e-15)


def test_one_rank_for_all_needs_no_patterns() -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, lora_alpha=6, target_modules=LLAMA))
    resize_lora(model, dict.fromkeys(ranks(model), 8))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.rank_pattern, config.alpha_pattern) == (8, 12, {}, {})


def test_module_whose_name_ends_another_keeps_its_own_rank(tmp_path: Path) -> None:
    class Nested(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj = torch.nn.Linear(4, 4)
            self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner["proj"](self.proj(x))

    base, x = Nested(), torch.randn(3, 4)
    model = trained(base, LoraConfig(r=4, target_modules=["proj"]))
    resize_lora(model, {"proj": 2, "inner.proj": 3})
    assert ranks(model) == {"proj": 2, "inner.proj": 3}
    again = saved_and_loaded(model, base, tmp_path)
    assert ranks(again) == ranks(model)
    torch.testing.assert_close(outputs(again, x), outputs(model, x))


def test_mixtral_stacks_keep_their_rank_beside_resized_modules(tmp_path: Path) -> None:
    base = tiny_models.mixtral()
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
    )
    model = trained(base, config)
    before = outputs(model)
    resize_lora(model, {"layers.0.self_attn.q_proj": 12, "layers.1.self_attn.q_proj": 12})
    torch.testing.assert_close(outputs(model), before)
    again = saved_and_loaded(model, base, tmp_path)
    torch.testing.assert_close(outputs(again), outputs(model))
    with pytest.raises(
        NotImplementedError, match=r"'model.layers.0.mlp.experts.down_proj' is a stack of experts"
    ):
        resize_lora(model, {"0.mlp.experts.down_proj": 2})


def test_injected_adapters_are_resized() -> None:
    bare = inject_adapter_in_model(LoraConfig(r=4, target_modules=["query"]), tiny_models.bert())
    changes = resize_lora(bare, {"encoder.layer.0.attention.self.query": 2})
    assert [c.new_rank for c in changes.values()] == [2]
    assert list(bare.peft_config["default"].rank_pattern.values()) == [2, 4]


def test_new_rows_follow_the_initialisation_of_peft_and_the_seed() -> None:
    def grown(seed: int, names: list[str], rank: int = 200) -> dict[str, torch.Tensor]:
        model = mixed()
        resize_lora(model, dict.fromkeys(names, rank), seed=seed)
        return {name: factors(layer)[0].detach() for name, layer in layers(model).items()}

    first, again, other = grown(1, MIXED), grown(1, MIXED[::-1]), grown(2, MIXED)
    assert all(torch.equal(first[name], again[name]) for name in MIXED)
    assert not any(torch.equal(first[name], other[name]) for name in MIXED[1:])
    for name, fan_in in (("kernel", 12), ("first", 7), ("last", 5)):
        rows = first[name][4:]
        assert rows.abs().max() <= fan_in**-0.5
        assert rows.std() == pytest.approx((3 * fan_in) ** -0.5, rel=0.1)
    assert not first["table"][4:].any()
    # Ranks that are appended in two calls with one seed must not be copies of each other.
    model = mixed()
    for rank in (5, 6):
        resize_lora(model, {"first": rank})
    rows = factors(layers(model)["first"])[0][4:]
    assert not torch.equal(rows[0], rows[1])


def test_new_columns_are_zero_and_given_directions_become_rows() -> None:
    model = mixed()
    directions = {
        "first": np.arange(21.0).reshape(3, 7),
        "table": torch.ones(2, 20),
        "kernel": np.ones((1, 12)),
    }
    resize_lora(model, {"first": 6, "table": 6, "kernel": 5}, directions=directions)
    for name, rows in directions.items():
        a, b = factors(layers(model)[name])
        np.testing.assert_array_equal(a[4:].detach().flatten(1), np.asarray(rows)[: len(a) - 4])
        assert not b[:, 4:].any()
    for bad in (np.ones((1, 7)), np.ones((2, 6)), np.ones(7)):
        with pytest.raises(ValueError, match="'first' needs an array of 2 or more rows of 7"):
            resize_lora(model, {"first": 8}, directions={"first": bad})
    with pytest.raises(lorank.NumericalError, match="'first': NaN"):
        resize_lora(model, {"first": 8}, directions={"first": np.full((2, 7), np.nan)})
    assert ranks(model)["first"] == 6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_factors_keep_dtype_and_requires_grad(dtype: torch.dtype) -> None:
    model = mixed().to(dtype)
    layer = layers(model)["first"]
    layer.lora_A["default"].weight.requires_grad = False
    before = updates_of(model)["first"]
    objects = factors(layer)
    changes = resize_lora(model, {"first": 2, "last": 6})
    assert all(new is old for new, old in zip(factors(layer), objects, strict=True))
    assert [p.requires_grad for p in objects] == [False, True]
    assert all(p.dtype == dtype for other in layers(model).values() for p in factors(other))
    precision = 8 * torch.finfo(dtype).eps
    np.testing.assert_allclose(
        updates_of(model)["first"], truncated(before, 2), atol=precision * np.linalg.norm(before)
    )
    assert changes["first"].dropped.dtype == np.float64


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32))
def test_resizing_is_exact_for_any_shape_and_rank_deficiency(
    out: int, fan_in: int, old: int, new: int, seed: int
) -> None:
    """Include more ranks than dimensions, zero factors and equal rows; kept ranks stay trainable."""
    rng = np.random.default_rng(seed)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(fan_in, out).double()), LoraConfig(r=old, target_modules=["0"])
    )
    a, b = factors(layers(model)["0"])
    a.data = torch.from_numpy(rng.standard_normal((old, fan_in)) * rng.choice([0, 1, 1e-4, 1e4], (old, 1)))
    b.data = torch.from_numpy(rng.standard_normal((out, old)) * rng.choice([0, 1, 1e-3], (1, old)))
    if seed % 3 == 0:
        b.data.zero_()
    before = updates_of(model)["0"]
    change = resize_lora(model, {"0": new})["0"]
    after = updates_of(model)["0"]
    size = np.linalg.norm(before) + 1e-300
    np.testing.assert_allclose(after, truncated(before, new), atol=1e-12 * size)
    assert change.error == pytest.approx(np.linalg.norm(after - before), abs=1e-12 * size)
    if new != old and a.data.any() and len(change.dropped) == 0:
        # Every rank is trainable: a row of A and its column of B are not both zero.
        alive = (a.data.abs().sum(1) > 0) | (b.data.abs().sum(0) > 0)
        assert alive[old:].all() if new > old else alive.any()


def test_four_bit_layers_are_resized() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4")).to("cpu")
    model = trained(base, LoraConfig(r=4, target_modules=["0"]))
    x = torch.randn(3, 64)
    before, update = outputs(model, x), updates_of(model)["0"]
    resize_lora(model, {"0": 6})
    torch.testing.assert_close(outputs(model, x), before, rtol=0, atol=1e-6)
    resize_lora(model, {"0": 2})
    np.testing.assert_allclose(updates_of(model)["0"], truncated(update, 2), atol=1e-6)
    model(x).sum().backward()


def test_temporary_scaling_survives_resizing() -> None:
    model = mixed()
    layer = layers(model)["first"]
    layer.set_scale("default", 0.5)
    resize_lora(model, {"first": 2})
    assert layer.scaling["default"] == 0.75
    assert layer.lora_alpha["default"] == 3
    layer.unscale_layer()
    assert layer.scaling["default"] == 1.5


def test_other_adapters_stay_unchanged() -> None:
    model = mixed()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["first"]))
    other = copy.deepcopy(layers(model)["first"].lora_A["other"].state_dict())
    resize_lora(model, {"first": 2})
    assert layers(model)["first"].r == {"default": 2, "other": 3}
    assert torch.equal(layers(model)["first"].lora_A["other"].weight, other["weight"])
    assert model.peft_config["other"].rank_pattern == {}
    resize_lora(model, {"first": 5}, adapter_name="other")
    assert layers(model)["first"].r == {"default": 2, "other": 5}
    assert model.peft_config["other"].r == 5


def test_names_of_checkpoints_and_of_peft_are_accepted() -> None:
    model = trained(tiny_models.bert(), LoraConfig(r=4, target_modules=["query"]))
    changes = resize_lora(
        model,
        {
            "bert.encoder.layer.0.attention.self.query": 2,
            "base_model.model.encoder.layer.1.attention.self.query": np.int64(4),
        },
    )
    assert {name.split(".")[2]: (c.old_rank, c.new_rank) for name, c in changes.items()} == {
        "0": (4, 2),
        "1": (4, 4),
    }
