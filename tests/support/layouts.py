"""Tiny adapters in every layout, and comparisons of their updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from peft import LoraConfig

import lorank
from tests.support import tiny_models
from tests.support.adapter_files import saved, trained

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"


def base_folder(model: Any, folder: Path) -> Path:
    """Write the configuration of a model; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    return folder


def llama_adapter(folder: Path, **settings: Any) -> Path:
    """Write an adapter of a tiny Llama, of rank 6 and alpha 9."""
    config = LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": LINEAR, **settings})
    return saved(trained(tiny_models.llama(), config), folder)


def expert_adapter(model: Any, folder: Path, **settings: Any) -> Path:
    """Write an adapter of stacks of experts and of attention."""
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": [GATE_UP, DOWN],
    }
    return saved(trained(model, LoraConfig(**{**config, **settings})), folder)


def assert_same_bits(first: lorank.LoraAdapter, second: lorank.LoraAdapter) -> None:
    """Check that two adapters have the same modules with the same factors and scalings, bit for bit."""
    assert list(first.modules) == list(second.modules)
    for name, module in first.modules.items():
        other = second.modules[name]
        assert (module.kind, module.shape, module.rank, module.copies) == (
            other.kind,
            other.shape,
            other.rank,
            other.copies,
        ), name
        assert module.scaling == other.scaling, name
        np.testing.assert_array_equal(module.B, other.B)
        np.testing.assert_array_equal(module.A, other.A)
