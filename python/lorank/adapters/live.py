"""Adapters of live PEFT models, out and in again."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

from lorank import extras
from lorank.adapters import peft_format
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.tensors import ArrayTensors


def from_model(peft_model: Any, adapter_name: str) -> LoraAdapter:
    """An adapter over a live model's tensors; see `LoraAdapter.from_model`."""
    peft = extras.require("peft", "peft", "for live models")
    configs = getattr(peft_model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"no adapter {adapter_name!r} in the model: it has {', '.join(configs) or 'none'}")
    state = peft.get_peft_model_state_dict(peft_model, adapter_name=adapter_name)
    config = _plain(configs[adapter_name].to_dict())
    adapter = peft_format.read(ArrayTensors(state, f"adapter {adapter_name!r}"), config)
    return _as_scaled(adapter, _scalings(peft_model, adapter_name))


def _plain(value: Any) -> Any:
    """Settings as values that JSON knows: PEFT keeps lists of names as sets, and words as enumerations."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _scalings(peft_model: Any, adapter_name: str) -> dict[str, float]:
    """The scale that every layer applies, by the name of its module or stacked parameter."""
    found = {}
    for name, layer in peft_model.base_model.model.named_modules():
        scaling = getattr(layer, "scaling", None)
        if not isinstance(scaling, dict) or adapter_name not in scaling:
            continue
        while name.endswith(".base_layer"):
            name = name.removesuffix(".base_layer")
        parameter = getattr(layer, "parameter_name", None)
        value = float(scaling[adapter_name])
        if hasattr(layer, "ranknum"):
            value /= float(layer.ranknum[adapter_name]) + 1e-5
        found[f"{name}.{parameter}" if parameter else name] = value
    return found


def _as_scaled(adapter: LoraAdapter, scalings: dict[str, float]) -> LoraAdapter:
    """The adapter with the scales of the live layers, which `scale_layer` and its like have changed."""
    changed = {
        name: replace(module, scaling=scalings[name])
        for name, module in adapter.modules.items()
        if name in scalings and not math.isclose(scalings[name], module.scaling, rel_tol=1e-6)
    }
    if not changed:
        return adapter
    note = f"{len(changed)} modules were scaled by hand: what the live layers apply was taken"
    return replace(adapter, modules={**adapter.modules, **changed}, notes=[*adapter.notes, note])


# The name of an adapter while it replaces another.
_STAND_IN = "lorank_stand_in"


def into_model(adapter: LoraAdapter, peft_model: Any, adapter_name: str) -> None:
    """Replace or add an adapter; see `LoraAdapter.into_model`."""
    peft = extras.require("peft", "peft", "for live models")
    if not isinstance(peft_model, peft.PeftModel):
        raise TypeError(
            f"{type(peft_model).__name__} is no PEFT model: save the adapter and load it with "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    if adapter.format != "peft":
        raise ValueError("an image adapter has no PEFT settings: it cannot be put into a PEFT model")
    active = list(peft_model.active_adapters)
    learns = {name: parameter.requires_grad for name, parameter in peft_model.named_parameters()}
    in_training = peft_model.training
    # PEFT's own reader does the matching of names, so the adapter takes the way over a file.
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder), overwrite=True)
        if adapter_name in peft_model.peft_config:
            trainable = not peft_model.peft_config[adapter_name].inference_mode
            # PEFT cannot delete its only adapter where modules are saved with it: another stands in.
            peft_model.load_adapter(folder, _STAND_IN, is_trainable=trainable)
            peft_model.base_model.set_adapter(_STAND_IN)
            peft_model.delete_adapter(adapter_name)
            peft_model.load_adapter(folder, adapter_name, is_trainable=trainable)
            peft_model.base_model.set_adapter(adapter_name)
            peft_model.delete_adapter(_STAND_IN)
        else:
            peft_model.load_adapter(folder, adapter_name, is_trainable=True)
    peft_model.train(in_training)
    if active:
        peft_model.base_model.set_adapter(active)
    # Activating an adapter makes all of it trainable: what was frozen is frozen again.
    for name, parameter in peft_model.named_parameters():
        if name in learns:
            parameter.requires_grad_(learns[name])
