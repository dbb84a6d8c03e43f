"""Live PEFT models: reading, compressing and inserting their adapters; SVDs of products."""

from __future__ import annotations

import copy
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, loaded, norm, saved, trained
from tests.support.outputs import outputs

IDS = torch.arange(8)[None]


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_live_adapter_is_compressed_and_inserted(name: str) -> None:
    base = getattr(tiny_models, name)()
    config = lorank.allocate(base, "uniform", r_max=6).to_lora_config(base, lora_alpha=9)
    model = trained(base, config)
    before = outputs(model, IDS)
    adapter = lorank.LoraAdapter.from_model(model)
    lorank.compress(adapter, rank_ratio=1.0, progress=False).into_model(model)
    torch.testing.assert_close(outputs(model, IDS), before, rtol=1e-4, atol=1e-5)
    small = lorank.compress(adapter, avg_rank=2, progress=False)
    small.into_model(model)
    assert not model.training
    again = lorank.LoraAdapter.from_model(model)
    assert {n: r for n, r in again.ranks.items() if r} == {n: r for n, r in small.ranks.items() if r}
    kept = {n: x for n, x in dense(small).items() if n in again.modules}
    assert distance(dense(again), kept) <= 1e-6 * norm(kept)
    merged = model.merge_and_unload()
    expected = copy.deepcopy(base)
    parameters = dict(expected.named_parameters())
    for module, update in dense(small).items():
        parameter = parameters.get(f"{module}.weight", parameters.get(module))
        assert parameter is not None
        parameter.data += torch.from_numpy(update.T if name == "gpt2" else update).float()
    torch.testing.assert_close(outputs(merged, IDS), outputs(expected, IDS), rtol=1e-4, atol=1e-5)


def test_one_of_several_adapters_is_read_and_replaced() -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    other = lorank.LoraAdapter.from_model(model, "other")
    assert all(name.endswith("v_proj") for name in other.modules)
    default = lorank.LoraAdapter.from_model(model)
    before = outputs(model, IDS)
    lorank.compress(default, avg_rank=1, progress=False).into_model(model, "small")
    assert set(model.peft_config) == {"default", "other", "small"}
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(outputs(model, IDS), before)
    with pytest.raises(ValueError, match=r"no adapter 'none' in the model, only default, other, small"):
        lorank.LoraAdapter.from_model(model, "none")
    with pytest.raises(ValueError, match="the model has no adapters"):
        lorank.LoraAdapter.from_model(tiny_models.llama())


def test_training_works_after_insertion() -> None:
    model = trained(tiny_models.llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.train()
    lorank.compress(lorank.LoraAdapter.from_model(model), avg_rank=2, progress=False).into_model(model)
    assert model.training
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32))
def test_svd_of_a_product_equals_the_dense_svd(out: int, fan_in: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    B, A = rng.standard_normal((out, rank)), rng.standard_normal((rank, fan_in))
    U, s, Vt = lorank.product_svd(B, A)
    k = len(s)
    assert U.shape == (out, k)
    assert Vt.shape == (k, fan_in)
    expected = np.linalg.svd(B @ A, compute_uv=False)
    np.testing.assert_allclose(s, expected[:k], atol=1e-12 * expected[0])
    assert np.all(expected[k:] <= 1e-12 * expected[0])
    np.testing.assert_allclose((U * s) @ Vt, B @ A, atol=1e-12 * expected[0])
    np.testing.assert_allclose(U.T @ U, np.eye(k), atol=1e-8)


def test_product_svd_of_extreme_and_deficient_factors() -> None:
    rng = np.random.default_rng(0)
    B, A = rng.standard_normal((9, 3)), rng.standard_normal((3, 7))
    for size in (1e-30, 1e30):
        np.testing.assert_allclose(lorank.product_svd(B * size, A / size).s, lorank.product_svd(B, A).s)
    assert len(lorank.product_svd(np.zeros((9, 3)), A).s) == 0
    deficient = np.stack([B[:, 0], B[:, 0], B[:, 1]], axis=1)
    assert len(lorank.product_svd(deficient, A).s) == 2
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        b, a = B.astype(dtype), A.astype(dtype)
        expected = np.linalg.svd(b.astype(float) @ a.astype(float), compute_uv=False)[:3]
        np.testing.assert_allclose(lorank.product_svd(b, a).s, expected, rtol=1e-12)
    np.testing.assert_allclose(
        lorank.product_svd(torch.from_numpy(B), torch.from_numpy(A)).s, lorank.product_svd(B, A).s
    )
    with pytest.raises(lorank.NumericalError, match="NaN"):
        lorank.product_svd(B * np.nan, A)
    with pytest.raises(ValueError, match="9x3 and 4x7 do not make"):
        lorank.product_svd(B, rng.standard_normal((4, 7)))


def test_sets_in_settings_are_saved(tmp_path: Path) -> None:
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], exclude_modules=["layers.1.self_attn.q_proj"]
    )
    adapter = lorank.LoraAdapter.from_model(trained(tiny_models.llama(), config))
    adapter.save(tmp_path / "a")
    again = lorank.LoraAdapter.load(tmp_path / "a")
    assert again.ranks == adapter.ranks
    assert set(adapter.ranks) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_scaled_by_hand_keep_their_scale(name: str, tmp_path: Path) -> None:
    base = getattr(tiny_models, name)()
    config = lorank.allocate(base, "uniform", r_max=6).to_lora_config(base, lora_alpha=9)
    model = trained(base, config)
    plain = lorank.LoraAdapter.from_model(model)
    assert not any("scaled by hand" in note for note in plain.notes)
    layers = [layer for layer in model.modules() if hasattr(layer, "scale_layer")]
    layers[0].scale_layer(2.0)
    adapter = lorank.LoraAdapter.from_model(model)
    assert any("modules scaled by hand: 1;" in note for note in adapter.notes)
    ratios = {n: adapter.modules[n].scaling / plain.modules[n].scaling for n in plain.modules}
    assert sorted(ratios.values()) == pytest.approx([1.0] * (len(ratios) - 1) + [2.0])
    lorank.compress(adapter, rank_ratio=1.0, progress=False).save(tmp_path / "a")
    torch.testing.assert_close(
        outputs(loaded(base, tmp_path / "a"), IDS), outputs(model, IDS), rtol=1e-4, atol=1e-5
    )


def test_adalora_layers_keep_their_scale() -> None:
    config = AdaLoraConfig(target_modules=["q_proj"], init_r=4, total_step=10, lora_alpha=5)
    model = get_peft_model(tiny_models.llama(), config)
    adapter = lorank.LoraAdapter.from_model(model)
    assert {m.scaling for m in adapter.modules.values()} == {5 / (4 + 1e-5)}
    assert not any("scaled by hand" in note for note in adapter.notes)


@pytest.mark.parametrize("inference", [True, False])
def test_insertion_keeps_requires_grad(inference: bool, tmp_path: Path) -> None:
    saved(trained(tiny_models.llama(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])), tmp_path / "a")
    model = PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "a", is_trainable=not inference)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(before.values()) == (not inference)
    lorank.compress(lorank.LoraAdapter.from_model(model), rank_ratio=1.0, progress=False).into_model(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert model.peft_config["default"].inference_mode == inference


def test_model_without_peft_raises_with_its_class() -> None:
    adapter = lorank.LoraAdapter.from_model(
        trained(tiny_models.llama(), LoraConfig(target_modules=["q_proj"]))
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM is not a PEFT model"):
        lorank.compress(adapter, avg_rank=2, progress=False).into_model(tiny_models.llama())
