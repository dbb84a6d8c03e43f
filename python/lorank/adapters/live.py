"""Adapters of live PEFT models, out and in again."""

from __future__ import annotations

import tempfile
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
    config = configs[adapter_name].to_dict()
    config["peft_type"] = str(getattr(config["peft_type"], "value", config["peft_type"]))
    config["task_type"] = getattr(config.get("task_type"), "value", config.get("task_type"))
    if isinstance(config.get("target_modules"), set):
        config["target_modules"] = sorted(config["target_modules"])
    return peft_format.read(ArrayTensors(state, f"adapter {adapter_name!r}"), config)


# The name of an adapter while it replaces another.
_STAND_IN = "lorank_stand_in"


def into_model(adapter: LoraAdapter, peft_model: Any, adapter_name: str) -> None:
    """Replace or add an adapter; see `LoraAdapter.into_model`."""
    peft = extras.require("peft", "peft", "for live models")
    if adapter.format != "peft":
        raise ValueError("an image adapter has no PEFT settings: it cannot be put into a PEFT model")
    active = list(peft_model.active_adapters)
    # PEFT's own reader does the matching of names, so the adapter takes the way over a file.
    with tempfile.TemporaryDirectory() as folder:
        adapter.save(Path(folder), overwrite=True)
        config = peft.LoraConfig.from_pretrained(folder)
        config.inference_mode = False
        trainable = peft_model.training
        if adapter_name in peft_model.peft_config:
            # PEFT cannot delete its only adapter where modules are saved with it: another stands in.
            peft_model.load_adapter(folder, _STAND_IN, is_trainable=True)
            peft_model.base_model.set_adapter(_STAND_IN)
            peft_model.delete_adapter(adapter_name)
            peft_model.load_adapter(folder, adapter_name, is_trainable=True)
            peft_model.base_model.set_adapter(adapter_name)
            peft_model.delete_adapter(_STAND_IN)
        else:
            peft_model.load_adapter(folder, adapter_name, is_trainable=True)
        peft_model.train(trainable)
    if active:
        peft_model.base_model.set_adapter(active if adapter_name in active else [*active])
