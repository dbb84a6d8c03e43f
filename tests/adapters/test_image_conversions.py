"""Conversions between PEFT, kohya, diffusers and ComfyUI, and the readers of PEFT and diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorank
from tests.support.adapter_files import dense
from tests.support.image_files import RNG
from tests.support.layouts import assert_same_bits, llama_adapter


class Blocks(torch.nn.Module):
    """A model with the names of an image transformer, of which underscores are part."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer_blocks = torch.nn.ModuleList(
            torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 24), "to_out": torch.nn.Linear(24, 16)})
            for _ in range(2)
        )


NAMES = [f"transformer_blocks.{i}.{name}" for i in range(2) for name in ("to_q", "to_out")]


def image_adapter(
    path: Path, prefix: str = "transformer.", infix: str = "", alpha: float | None = 3.0
) -> Path:
    tensors = {}
    for name in NAMES:
        out, fan_in = (24, 16) if name.endswith("to_q") else (16, 24)
        tensors[f"{prefix}{name}.lora_B{infix}.weight"] = RNG.standard_normal((out, 4)).astype(np.float32)
        tensors[f"{prefix}{name}.lora_A{infix}.weight"] = RNG.standard_normal((4, fan_in)).astype(np.float32)
        if alpha is not None:
            tensors[f"{prefix}{name}.alpha"] = np.array(alpha, np.float32)
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "", "pipe.dit."])
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_round_trip_keeps_every_bit(to: Any, prefix: str, tmp_path: Path) -> None:
    file = image_adapter(tmp_path / "a.safetensors", prefix, ".default" if not prefix else "")
    model = Blocks()
    first = lorank.convert(file, "peft", base=model)
    assert list(first.modules) == sorted(NAMES)
    lorank.convert(file, to, base=model).save(tmp_path / "b.safetensors", "exact")
    again = lorank.convert(tmp_path / "b.safetensors", "peft", base=model)
    assert_same_bits(first, again)
    again.save(tmp_path / "c", "exact")
    assert_same_bits(first, lorank.LoraAdapter.load(tmp_path / "c"))
    lorank.convert(tmp_path / "c", to, base=model).save(tmp_path / "d.safetensors", "exact")
    assert load_file(tmp_path / "d.safetensors").keys() == load_file(tmp_path / "b.safetensors").keys()


def test_keys_are_those_of_the_programs(tmp_path: Path) -> None:
    file = image_adapter(tmp_path / "a.safetensors")
    keys = {}
    for to in ("kohya", "diffusers", "comfyui"):
        lorank.convert(file, to).save(tmp_path / f"{to}.safetensors", "exact")  # type: ignore[arg-type]
        keys[to] = set(load_file(tmp_path / f"{to}.safetensors"))
    assert "lora_unet_transformer_blocks_0_to_q.lora_down.weight" in keys["kohya"]
    assert "lora_unet_transformer_blocks_0_to_q.alpha" in keys["kohya"]
    assert "transformer.transformer_blocks.1.to_out.lora_B.weight" in keys["diffusers"]
    assert not any(key.endswith(".alpha") for key in keys["diffusers"])
    assert "diffusion_model.transformer_blocks.1.to_out.lora_A.weight" in keys["comfyui"]
    with safe_open(tmp_path / "diffusers.safetensors", "np") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 3)


def test_peft_reads_the_factors_and_scales(tmp_path: Path) -> None:
    from peft import PeftModel

    file = image_adapter(tmp_path / "a.safetensors")
    lorank.convert(file, "peft").save(tmp_path / "b", "exact")
    updates = dense(lorank.LoraAdapter.load(file))
    model = PeftModel.from_pretrained(Blocks(), tmp_path / "b")
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            expected = updates[f"transformer.{name}"]
            np.testing.assert_allclose(
                layer.get_delta_weight("default").detach().numpy(), expected, rtol=1e-5, atol=1e-6
            )


def test_diffusers_reads_its_layout(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    model = FluxTransformer2DModel(
        **sizes, in_channels=4, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4)
    )
    name, rng = "transformer_blocks.0.attn.to_q", np.random.default_rng(0)
    stem = f"lora_unet_{name.replace('.', '_')}"
    b, a = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 4), (4, 16)))
    tensors = {
        f"{stem}.lora_up.weight": b,
        f"{stem}.lora_down.weight": a,
        f"{stem}.alpha": np.array(2.0, np.float32),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lorank.convert(tmp_path / "a.safetensors", "diffusers", base=model).save(
        tmp_path / "b.safetensors", "exact"
    )
    state, metadata = FluxLoraLoaderMixin.lora_state_dict(
        str(tmp_path / "b.safetensors"), return_lora_metadata=True, use_safetensors=True
    )[:2]
    if not metadata or not isinstance(metadata, dict):
        state, *_, metadata = FluxLoraLoaderMixin.lora_state_dict(
            str(tmp_path / "b.safetensors"), return_alphas=True, return_lora_metadata=True
        )
    FluxLoraLoaderMixin.load_lora_into_transformer(state, None, model, metadata=metadata)
    layer = model.get_submodule(name)
    delta = layer.get_delta_weight(layer.active_adapters[0]).detach().numpy()
    np.testing.assert_allclose(delta, 0.5 * b @ a, rtol=1e-5, atol=1e-6)


def test_biases_of_distillations_become_those_of_b(tmp_path: Path) -> None:
    file = image_adapter(tmp_path / "a.safetensors", "diffusion_model.", alpha=None)
    tensors = load_file(file)
    bias = RNG.standard_normal(24).astype(np.float32)
    save_file({**tensors, f"diffusion_model.{NAMES[0]}.diff_b": bias}, file)
    lorank.convert(file, "peft").save(tmp_path / "b", "exact")
    written = load_file(tmp_path / "b" / "adapter_model.safetensors")
    np.testing.assert_array_equal(written[f"base_model.model.{NAMES[0]}.lora_B.bias"], bias)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["lora_bias"] is True
    lorank.convert(file, "kohya").save(tmp_path / "c.safetensors", "exact")
    flat = f"lora_unet_{NAMES[0].replace('.', '_')}"
    np.testing.assert_array_equal(load_file(tmp_path / "c.safetensors")[f"{flat}.diff_b"], bias)
    save_file({**tensors, "diffusion_model.norm.diff": bias}, file)
    with pytest.raises(ValueError, match=r"'diffusion_model.norm.diff': is a full difference, which PEFT"):
        lorank.convert(file, "peft")


def test_names_that_cannot_be_spelled_raise(tmp_path: Path) -> None:
    flat = tmp_path / "flat.safetensors"
    lorank.convert(image_adapter(tmp_path / "a.safetensors"), "kohya").save(flat, "exact")
    for to in ("peft", "diffusers", "comfyui"):
        with pytest.raises(ValueError, match=r"underscores for dots: name the base model"):
            lorank.convert(flat, to)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no module, or several"):
        lorank.convert(flat, "peft", base=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="is no module of"):
        lorank.convert(tmp_path / "a.safetensors", "peft", base=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    two = {
        f"{p}.a.lora_{x}.weight": np.ones((2, 2), np.float32)
        for p in ("transformer", "text_encoder")
        for x in "AB"
    }
    save_file(two, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"adapts several models \(text_encoder, transformer\)"):
        lorank.convert(tmp_path / "two.safetensors", "peft")
    embedded = llama_adapter(tmp_path / "b", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="not embedding layers"):
        lorank.convert(embedded, "kohya")
