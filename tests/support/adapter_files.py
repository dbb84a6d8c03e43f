"""Adapters of tiny models on disk with values like trained ones, and their dense updates."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file

import lorank


def trained(model: Any, config: Any, seed: int = 0) -> Any:
    """Return a PEFT model with random factors whose singular values decay as those of trained ones."""
    peft_model = get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            rank = parameter.shape[0] if "_A" in name else parameter.shape[1] if parameter.ndim > 1 else 1
            decay = torch.logspace(0, -1.5, rank)
            along = decay[:, None] if "_A" in name else decay[None]
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            flat = noise.reshape(parameter.shape[0], -1)
            if "_B" in name and parameter.ndim > 1:
                flat = noise.reshape(parameter.shape[0], rank)
            parameter.data = (flat * along if parameter.ndim > 1 else flat).reshape(parameter.shape)
    return peft_model.eval()


def saved(peft_model: Any, folder: Path) -> Path:
    peft_model.save_pretrained(folder)
    return folder


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Edit the tensors of an adapter; return its folder."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    return folder


def configured(folder: Path, **settings: Any) -> Path:
    """Change settings of an adapter; return its folder."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def loaded(model: Any, folder: Path) -> Any:
    return PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()


def dense(adapter: lorank.LoraAdapter) -> dict[str, np.ndarray[Any, Any]]:
    """Return every update in float64, ``(out, in)`` or ``(copies, out, in)``."""
    return {
        name: module.scaling * (module.B.astype(np.float64) @ module.A.astype(np.float64))
        if module.rank
        else np.zeros(module.shape if module.copies == 1 else (module.copies, *module.shape))
        for name, module in adapter.modules.items()
    }


def distance(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Return the Frobenius norm of the difference of all updates."""
    assert set(a) == set(b)
    return float(np.sqrt(sum(np.square(a[name] - b[name]).sum() for name in a)))


def norm(a: Mapping[str, Any]) -> float:
    return float(np.sqrt(sum(np.square(x).sum() for x in a.values())))
