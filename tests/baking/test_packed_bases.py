"""Quantized base models: untouched codes are copied, and adapted ones are refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lorank
from lorank.baking.plain_models import PLAIN_MODELS
from tests.baking.merged_models import baked_beside, saved_pair
from tests.support import tiny_models

PACKED = "model.layers.0.mlp.up_proj"


def packed_base(folder: Path) -> Path:
    """Replace one weight by codes and scales of fp8 blocks."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{PACKED}.weight"] = tensors[f"{PACKED}.weight"].to(torch.float8_e4m3fn)
    tensors[f"{PACKED}.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, file, {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_untouched_codes_are_copied(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), LoraConfig(r=4, target_modules=["q_proj"]), tmp_path)
    baked = baked_beside(packed_base(base), adapter)
    old, new = load_file(base / "model.safetensors"), load_file(baked.path / "model.safetensors")
    assert len(baked.updated) == 2
    for name, value in old.items():
        same = torch.equal(value.view(torch.uint8), new[name].view(torch.uint8))
        assert same == (name not in baked.updated)
    assert (baked.path / "config.json").read_text() == (base / "config.json").read_text()
    assert lorank.verify(base, adapter, baked.path, progress=False).status == "holds"


def test_adapted_codes_are_refused(tmp_path: Path) -> None:
    base, adapter, _ = saved_pair(tiny_models.llama(), LoraConfig(r=4, target_modules=["up_proj"]), tmp_path)
    with pytest.raises(lorank.FormatError, match=r"up_proj.*packed"):
        baked_beside(packed_base(base), adapter)
    assert not (tmp_path / "baked").exists()


@pytest.mark.parametrize("model_type", sorted(PLAIN_MODELS))
def test_plain_models_are_loaded_without_conversions(model_type: str) -> None:
    from transformers import conversion_mapping, core_model_loading

    rules = conversion_mapping.get_checkpoint_conversion_mapping(model_type) or []
    assert not [rule for rule in rules if isinstance(rule, core_model_loading.WeightConverter)]
