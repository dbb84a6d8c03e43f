"""Adapters compressed, written in every profile, and loaded by PEFT itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.numpy import load_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, distance, edited, loaded, norm, saved, trained
from tests.support.outputs import TOKENS, outputs
from tests.support.peft_cases import CASES, IMAGE, PROFILES, case


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", CASES)
def test_full_rank_compression_keeps_outputs(name: str, profile: Any, tmp_path: Path) -> None:
    model, config = case(name)
    peft_model = trained(model, config)
    folder = saved(peft_model, tmp_path / "before")
    adapter = lorank.LoraAdapter.load(folder)
    assert adapter.num_parameters == sum(
        p.numel()
        for n, p in peft_model.named_parameters()
        if "lora_" in n and "magnitude" not in n and "lora_B.default.bias" not in n
    )
    whole = lorank.compress(adapter, rank_ratio=1.0, progress=False)
    assert distance(dense(adapter), dense(whole)) <= 1e-6 * norm(dense(adapter))
    assert whole.certificate is not None
    assert whole.certificate.error <= 1e-12 * whole.certificate.norm
    whole.save(tmp_path / "after", profile)
    inputs = IMAGE if name == "conv" else TOKENS
    expected, got = outputs(peft_model, inputs), outputs(loaded(model, tmp_path / "after"), inputs)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("dora", "lora_bias")])
def test_compressed_model_differs_by_the_certified_error(name: str, profile: Any, tmp_path: Path) -> None:
    model, config = case(name)
    folder = saved(trained(model, config), tmp_path / "before")
    adapter = lorank.LoraAdapter.load(folder)
    small = lorank.compress(adapter, rank_ratio=0.4, progress=False)
    assert sum(small.ranks.values()) == int(0.4 * sum(adapter.ranks.values()) + 0.5)
    before, after, certificate = dense(adapter), dense(small), small.certificate
    assert certificate is not None
    assert certificate.norm == pytest.approx(norm(before), rel=4e-7)
    assert certificate.error == pytest.approx(distance(before, after), abs=1e-6 * norm(before))
    for entry in certificate.modules:
        difference = before[entry.name] - after[entry.name]
        assert entry.error == pytest.approx(np.sqrt(np.square(difference).sum()), abs=1e-6 * norm(before))
        spectral = np.linalg.norm(difference, 2, axis=(-2, -1)).max()
        assert entry.spectral_error == pytest.approx(spectral, abs=1e-6 * norm(before))
    small.save(tmp_path / "after", profile)
    reread = lorank.LoraAdapter.load(tmp_path / "after")
    assert distance({n: after[n] for n in reread.modules}, dense(reread)) <= 1e-6 * norm(before)
    # The live model equals the base weights plus the dense truncated update.
    peft_model = loaded(model, tmp_path / "after")
    merged = peft_model.merge_and_unload()
    target = dict(model.named_parameters())
    for parameter_name, parameter in merged.named_parameters():
        module = parameter_name.removesuffix(".weight")
        change = (parameter - target[parameter_name]).detach().double().numpy()
        if module in after:
            delta = after[module]
            modules = dict(model.named_modules())
            kind = type(modules[module]).__name__ if module in modules else ""
            flipped = kind in ("Conv1D", "Embedding") or (not kind and name == "gpt_oss")
            delta = np.swapaxes(delta, -1, -2) if flipped else delta
            scale = max(float(parameter.abs().max()), 1.0)
            np.testing.assert_allclose(change, delta.reshape(change.shape), atol=3e-6 * scale)
        elif "classifier" not in module:
            assert not change.any(), module


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_rounding_error_is_stated_separately(dtype: Any, tmp_path: Path) -> None:
    for name in ("llama", "mixtral"):
        model, config = case(name)
        adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / name))
        small = lorank.compress(adapter, avg_rank=3, progress=False)
        for profile in PROFILES:
            folder = tmp_path / f"{name}-{profile}-{dtype}"
            small.save(folder, profile, dtype)
            reread = lorank.LoraAdapter.load(folder)
            assert {module.dtype for module in reread.modules.values()} == {dtype}
            report = json.loads((folder / "lorank.json").read_text())
            assert small.certificate is not None
            assert report["error"] == pytest.approx(small.certificate.error, rel=1e-12)
            after = {n: x for n, x in dense(small).items() if n in reread.modules}
            added = distance(after, dense(reread))
            if dtype == "float64":
                assert report["rounding_error"] is None
            else:
                assert report["rounding_error"] == pytest.approx(added, rel=1e-5)
                assert added > 0


def test_bfloat16_adapters_stay_bfloat16(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(trained(model, config).to(torch.bfloat16), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    lorank.compress(adapter, avg_rank=2, progress=False).save(tmp_path / "b")
    assert {m.dtype for m in lorank.LoraAdapter.load(tmp_path / "b").modules.values()} == {"bfloat16"}


@pytest.mark.parametrize("name", ["llama", "mixtral", "conv"])
def test_elastic_parent_is_cut_without_a_decomposition(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, config = case(name)
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    children = lorank.family(adapter, [1, 2, 4], progress=False)
    for profile in PROFILES:
        lorank.elastic(adapter, progress=False).save(tmp_path / profile, profile)
    from lorank import _core

    def refuse(updates: Any, *_: Any) -> None:
        assert not updates, "an elastic parent needs no decomposition"

    monkeypatch.setattr(_core, "decompose", refuse)
    for profile in PROFILES:
        for rank, child in children.items():
            cut = lorank.LoraAdapter.load(tmp_path / profile, avg_rank=rank)
            assert cut.ranks == child.ranks
            assert distance(dense(cut), dense(child)) <= 2e-6 * norm(dense(child))
            assert cut.certificate is not None
            assert child.certificate is not None
            assert cut.certificate.error == pytest.approx(child.certificate.error, rel=1e-5)


def test_only_the_portable_profile_pads_to_one_rank(tmp_path: Path) -> None:
    model, config = case("patterns")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    small = lorank.compress(adapter, avg_rank=1, progress=False)
    assert 0 in small.ranks.values(), "the hard case: a module without any rank"
    largest = max(small.ranks.values())
    for profile in PROFILES:
        small.save(tmp_path / profile, profile)
        settings = json.loads((tmp_path / profile / "adapter_config.json").read_text())
        assert (settings["use_rslora"], settings["bias"], settings["init_lora_weights"]) == (
            False,
            "none",
            True,
        )
        assert isinstance(settings["target_modules"], list)
        assert settings["r"] == settings["lora_alpha"] == largest
        shapes = {
            key: x.shape for key, x in load_file(tmp_path / profile / "adapter_model.safetensors").items()
        }
        ranks = {key.split(".lora_A")[0]: shape[0] for key, shape in shapes.items() if ".lora_A." in key}
        if profile == "portable":
            assert settings["rank_pattern"] == settings["alpha_pattern"] == {}
            assert len(ranks) == len(small.modules)
            assert set(ranks.values()) == {largest}
        else:
            assert len(ranks) == len(small.adapted)
            assert sorted(ranks.values()) == sorted(r for r in small.ranks.values() if r)
            expected = settings["rank_pattern"] if profile == "compact" else {}
            assert settings["alpha_pattern"] == expected


def test_adalora_becomes_plain_lora(tmp_path: Path) -> None:
    model = tiny_models.llama()
    config = AdaLoraConfig(target_modules=["q_proj", "up_proj"], init_r=6, total_step=10, lora_alpha=5)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = saved(peft_model.eval(), tmp_path / "a")
    adapter = lorank.LoraAdapter.load(folder)
    assert any("AdaLoRA" in note for note in adapter.notes)
    lorank.compress(adapter, rank_ratio=1.0, progress=False).save(tmp_path / "b")
    torch.testing.assert_close(
        outputs(loaded(model, tmp_path / "b")), outputs(peft_model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_tiny_and_huge_factors_are_balanced(size: float, tmp_path: Path) -> None:
    model, config = case("llama")
    plain = saved(trained(model, config), tmp_path / "a")
    before = dense(lorank.LoraAdapter.load(plain))

    def resize(tensors: dict[str, Any]) -> None:
        for key in tensors:
            factor = size if "lora_A" in key else 1 / size
            tensors[key] = (tensors[key] * np.float64(factor)).astype(np.float32)

    folder = edited(saved(trained(model, config), tmp_path / "b"), resize)
    whole = lorank.compress(lorank.LoraAdapter.load(folder), rank_ratio=1.0, progress=False)
    assert distance(before, dense(whole)) <= 1e-6 * norm(before)
    for module in whole.modules.values():
        assert np.abs(module.A).max() < 100 * np.abs(module.B).max() < 1e4 * np.abs(module.A).max()


def test_untrained_adapters_lose_all_rank(tmp_path: Path) -> None:
    model, config = case("llama")
    folder = saved(get_peft_model(copy.deepcopy(model), config), tmp_path / "a")
    small = lorank.compress(lorank.LoraAdapter.load(folder), rank_ratio=0.5, progress=False)
    assert small.num_parameters == 0
    assert small.certificate is not None
    assert (small.certificate.error, small.certificate.retained_energy) == (0.0, 1.0)
    with pytest.raises(ValueError, match="every update is zero: the adapter is untrained"):
        small.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()
    assert any("ranks were zero before" in note for note in small.notes)


def test_singular_values_equal_those_of_the_update(tmp_path: Path) -> None:
    model, config = case("patterns")
    adapter = lorank.LoraAdapter.load(saved(trained(model, config), tmp_path / "a"))
    for name, update in dense(adapter).items():
        module = adapter.modules[name]
        expected = np.linalg.svd(update, compute_uv=False)[: module.rank]
        np.testing.assert_allclose(module.singular_values, expected, atol=1e-6 * expected[0])
