"""DoRA magnitudes and biases of `lora_bias` are kept for modules without rank."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.numpy import load_file, save_file

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import dense, loaded, saved, trained
from tests.support.outputs import outputs
from tests.support.peft_cases import PROFILES

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


def by_hand(peft_model: Any, small: lorank.LoraAdapter) -> Any:
    """Return the base model with truncated updates and the magnitudes or biases of the trained model."""
    model = copy.deepcopy(tiny_models.llama())
    modules, layers = dict(model.named_modules()), dict(peft_model.base_model.model.named_modules())
    for name, update in dense(small).items():
        weight, layer = modules[name].weight, layers[name]
        weight.data += torch.from_numpy(update).float()
        if layer.lora_magnitude_vector:
            magnitude = layer.lora_magnitude_vector["default"].weight.detach()
            weight.data *= (magnitude / weight.data.norm(dim=1))[:, None]
        elif layer.lora_bias["default"]:
            bias = layer.lora_B["default"].bias.detach() * layer.scaling["default"]
            modules[name].bias = torch.nn.Parameter(bias)
    return model


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("variant", ["use_dora", "lora_bias"])
def test_modules_without_rank_keep_magnitudes_and_biases(variant: str, profile: Any, tmp_path: Path) -> None:
    settings = {"r": 6, "lora_alpha": 9, "target_modules": LINEAR, "alpha_pattern": {"q_proj": 40}}
    config = LoraConfig(**settings, **{variant: True})
    peft_model = trained(tiny_models.llama(), config)
    for name, parameter in peft_model.named_parameters():
        if "magnitude" in name:
            parameter.data *= torch.linspace(0.5, 2, len(parameter))
    adapter = lorank.LoraAdapter.load(saved(peft_model, tmp_path / "a"))
    small = lorank.compress(adapter, avg_rank=1, progress=False)
    assert list(small.ranks.values()).count(0) > 1, "the hard case: modules without any rank"
    small.save(tmp_path / "b", profile)
    got = outputs(loaded(tiny_models.llama(), tmp_path / "b"))
    torch.testing.assert_close(got, outputs(by_hand(peft_model, small)), rtol=1e-4, atol=1e-5)
    assert "The adapter also holds saved modules" in (tmp_path / "b" / "README.md").read_text()
    again = lorank.LoraAdapter.load(tmp_path / "b")
    assert again.ranks == small.ranks
    assert again.certificate == small.certificate
    again.save(tmp_path / "c", "tensor-rank")
    torch.testing.assert_close(
        outputs(loaded(tiny_models.llama(), tmp_path / "c")), got, rtol=1e-4, atol=1e-5
    )


def test_image_adapters_keep_their_magnitudes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {}
    for name, size in (("strong", 1.0), ("weak", 1e-3)):
        tensors |= {
            f"lora_unet_{name}.lora_up.weight": size * rng.standard_normal((8, 2)).astype(np.float32),
            f"lora_unet_{name}.lora_down.weight": rng.standard_normal((2, 6)).astype(np.float32),
            f"lora_unet_{name}.dora_scale": rng.standard_normal((8, 1)).astype(np.float32),
        }
    save_file(tensors, tmp_path / "a.safetensors")
    small = lorank.compress(tmp_path / "a.safetensors", avg_rank=1, progress=False)
    assert small.ranks == {"lora_unet_strong": 2, "lora_unet_weak": 0}
    small.save(tmp_path / "b.safetensors")
    written = load_file(tmp_path / "b.safetensors")
    assert not written["lora_unet_weak.lora_up.weight"].any()
    assert written["lora_unet_weak.lora_down.weight"].shape == (1, 6)
    assert np.array_equal(written["lora_unet_weak.dora_scale"], tensors["lora_unet_weak.dora_scale"])
    assert lorank.LoraAdapter.load(tmp_path / "b.safetensors").ranks == small.ranks
