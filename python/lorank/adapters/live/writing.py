"""Puts adapters into live models: changes layers in place, and PEFT's config with them."""

from __future__ import annotations

import json
from typing import Any

from lorank._internal import extras
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.registry import format_of
from lorank.adapters.live.config import write_config, write_targets
from lorank.adapters.live.injection import add_adapter, add_layers, delete_layers, kept_state, remove_adapter
from lorank.adapters.live.layers import LiveModel
from lorank.adapters.live.plan import OTHER_NAME, planned
from lorank.adapters.live.reading import check, plain, settings, variant_of
from lorank.adapters.profiles import nothing_left
from lorank.peft_format.initialization import changes_the_base
from lorank.peft_format.name_matching import KnownNames
from lorank.peft_format.names import INSIDE

# Settings that decide the computation or number of layers: existing layers cannot change them.
_STRUCTURE = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "trainable_token_indices",
)


def into_model(adapter: AdapterContent, model: Any, adapter_name: str) -> None:
    """Replace or add an adapter; see `LoraAdapter.into_model`."""
    extras.require("peft", "peft", "for live models")
    live = LiveModel.of(model)
    if not live.adapters:
        raise TypeError(
            f"{type(model).__name__} is not a PEFT model: save the adapter and load it with "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    if not format_of(adapter).holds_settings:
        raise ValueError("an image adapter has no PEFT settings: it cannot be inserted into a PEFT model")
    if reason := nothing_left(adapter):
        raise ValueError(reason)
    if any(type(wrapper).__name__ == "DistributedDataParallel" for wrapper in live.wrappers):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which depends on the shapes of "
            "parameters: insert the adapter before the model is wrapped"
        )
    is_new = adapter_name not in live.adapters
    if not is_new:
        _check_structure(live, adapter, adapter_name)
    with kept_state(live, adapter_name):
        if not is_new:
            _replace(live, adapter, adapter_name)
            return
        live = add_adapter(live, adapter, adapter_name)
        try:
            _replace(live, adapter, adapter_name)
        except Exception:
            remove_adapter(live, adapter_name)
            raise


def _check_structure(live: LiveModel, adapter: AdapterContent, name: str) -> None:
    """Refuse an adapter that existing layers of the model cannot hold."""
    layers = live.layers(name)
    for layer in layers.values():
        if layer.is_adalora:
            raise ValueError(
                f"adapter {name!r} of the model is AdaLoRA, whose layers do not hold plain LoRA: save the "
                "adapter and load it into the base model with peft.PeftModel.from_pretrained(model, folder)"
            )
        if name in layer.layer.merged_adapters:
            raise ValueError(f"adapter {name!r} is merged into module {layer.name!r}: unmerge it first")
        check(layer)
        if variant_of(layer).startswith("Monteclora"):
            raise ValueError(
                f"module {layer.name!r} belongs to MonteCLoRA, which samples at its first rank: {OTHER_NAME}"
            )
    config = settings(live, name, layers)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ValueError(f"adapter {name!r} of the model is {kind}, not LoRA: {OTHER_NAME}")
    if init := changes_the_base(config):
        raise ValueError(
            f"adapter {name!r} of the model was initialised by {init!r}, which changes the base model: save "
            "the adapter and load it into the original model"
        )
    for key in _STRUCTURE:
        ours, theirs = (json.dumps(plain(c.get(key)) or None) for c in (adapter.config, config))
        if ours != theirs:
            raise ValueError(
                f"adapter {name!r} of the model has {key}={theirs}, but the new adapter has {key}={ours}: "
                f"{OTHER_NAME}"
            )


def _replace(live: LiveModel, adapter: AdapterContent, name: str) -> None:
    """Set the values of a live adapter to another adapter's, and add the layers that it lacks."""
    missing = _missing(live, adapter, name)
    if missing:
        live = add_layers(live, name, missing)
    layers = live.layers(name)
    try:
        plan = planned(live, adapter, name)
    except Exception:
        delete_layers([layer for layer in layers.values() if layer.name in missing])
        raise
    plan.apply()
    delete_layers(plan.dropped)
    if (config := live.configs.get(name)) is None:
        return
    left = live.layers(name)
    write_config(config, left.values())
    if missing or plan.dropped:
        write_targets(config, left.values(), _base_names(live))
    if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
        # PEFT would run other initialisations on loading, only to replace their result.
        config.init_lora_weights = True
    if any(key.endswith(".bias") for key in adapter.carried):
        config.bias = adapter.config.get("bias") or config.bias


def _base_names(live: LiveModel) -> list[str]:
    return [path for path in live.modules if INSIDE not in path]


def _missing(live: LiveModel, adapter: AdapterContent, name: str) -> list[str]:
    """Return the modules of the base model that the new adapter adapts and the live one does not."""
    layers, modules = KnownNames(live.layers(name)), KnownNames(live.modules)
    missing = []
    for module in adapter.adapted:
        if layers.only(module.name) is not None:
            continue
        found = None if module.kind == "expert" else modules.only(module.name)
        if found is None:
            raise ValueError(
                f"{module.name!r} fits no module that adapter {name!r} of the model could adapt: the adapter "
                "belongs to another model, or to a version of the model's code with other module names"
            )
        missing.append(found)
    return missing
