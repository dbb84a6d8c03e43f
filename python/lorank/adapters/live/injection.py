"""Adds layers of an adapter to a live model, or removes them; the rest of the model does not change."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.peft import PEFT
from lorank.adapters.live.config import target_modules
from lorank.adapters.live.layers import AdaptedLayer, LiveModel, is_lora_layer, is_training_wrapper
from lorank.adapters.live.reading import plain

# Settings of PEFT that act on the complete model: off where layers are added to a model that has the adapter.
_TURNED_OFF = {
    "bias": "none",
    "modules_to_save": None,
    "trainable_token_indices": None,
    "layer_replication": None,
    "target_parameters": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "ensure_weight_tying": False,
    "init_lora_weights": True,
}


def add_adapter(live: LiveModel, adapter: AdapterContent, name: str) -> LiveModel:
    """Add the layers of a new, inactive adapter.

    Raises
    ------
    ValueError
        If PEFT cannot combine the adapter with those that the model has.
    """
    import peft

    content = PEFT.settings(adapter, "compact")
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig) if field.init}
    known = {key: value for key, value in content.items() if key in fields - {"peft_type", "runtime_config"}}
    config = peft.LoraConfig(**{**known, "inference_mode": False})
    replication, config.layer_replication = config.layer_replication, None
    if replication and not any(_replicates(other, replication) for other in live.configs.values()):
        raise ValueError(
            f"the adapter replicates layers ({replication}), which would change the model for its other "
            "adapters: save the adapter and load it into the base model with peft.PeftModel.from_pretrained"
        )
    # PEFT nests wrappers of parameters, so all adapters must have the same `target_parameters`.
    found = [getattr(other, "target_parameters", None) for other in live.configs.values()]
    alike = [targets for targets in found if targets]
    if config.target_parameters and alike:
        config.target_parameters = copy.copy(alike[0])
    _inject(live, name, config)
    config.layer_replication = replication
    return LiveModel(live.wrappers)


def add_layers(live: LiveModel, name: str, modules: Sequence[str]) -> LiveModel:
    """Extend an adapter of the model to further modules."""
    config = live.configs.get(name)
    if config is None:
        raise ValueError(
            f"the model keeps no config of adapter {name!r}, which does not adapt {modules[0]!r}: insert "
            "the adapter under a new name"
        )
    partial = copy.deepcopy(config)
    for key, value in {**_TURNED_OFF, **target_modules(modules, live.modules)}.items():
        setattr(partial, key, value)
    if live.tuner is not None:
        try:
            live.tuner.peft_config[name] = partial
            live.tuner.inject_adapter(live.tuner.model, name)
        finally:
            live.tuner.peft_config[name] = config
    else:
        try:
            _inject(live, name, partial)
        finally:
            live.base.peft_config[name] = config
    return LiveModel(live.wrappers)


def remove_adapter(live: LiveModel, name: str) -> None:
    """Remove a whole adapter, with its saved modules and its config."""
    from peft.tuners.tuners_utils import delete_adapter

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        delete_adapter(live.base, name, "lora_")
    live.configs.pop(name, None)


def delete_layers(layers: Sequence[AdaptedLayer]) -> None:
    """Remove an adapter from layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for layer in layers:
            layer.layer.delete_adapter(layer.adapter)


def _inject(live: LiveModel, name: str, config: Any) -> None:
    import peft

    around = next((w for w in live.wrappers if isinstance(w, (peft.PeftModel, peft.PeftMixedModel))), None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if around is not None:
                around.add_adapter(name, config)
            elif live.tuner is not None:
                live.tuner.peft_config[name] = config
                live.tuner.inject_adapter(live.tuner.model, name)
            else:
                peft.inject_adapter_in_model(config, live.base, name)
        except Exception:
            live.configs.pop(name, None)
            raise


def _replicates(config: Any, replication: Any) -> bool:
    wanted = json.dumps(plain(replication))
    return json.dumps(plain(getattr(config, "layer_replication", None))) == wanted


@contextmanager
def kept_state(live: LiveModel, name: str) -> Iterator[None]:
    """Restore a model's active adapters, modes and trainable parameters when the block ends.

    New layers and parameters take the state of the others. The parameters of an adapter that is new to the
    model are not trained until PEFT activates the adapter.
    """
    was_there = name in live.adapters
    learns = {id(parameter): parameter.requires_grad for parameter in live.base.parameters()}
    states = {
        id(module): (copy.copy(module._active_adapter), module._disable_adapters, module.training)
        for module in live.base.modules()
        if hasattr(module, "_active_adapter")
    }
    tuner = live.tuner
    active = None if tuner is None else copy.copy(tuner.active_adapter)
    first = next((m for m in live.modules.values() if is_lora_layer(m)), None)
    names = list(first.active_adapters) if first is not None else []
    disabled = bool(first is not None and first._disable_adapters)
    try:
        yield
    finally:
        for module in list(live.base.modules()):
            if hasattr(module, "_active_adapter"):
                new = (_active(module, names), disabled, _mode(module))
                module._active_adapter, module._disable_adapters, mode = states.get(id(module), new)
                _set_mode(module, mode)
        if tuner is not None:
            tuner.active_adapter = active
        for parameter in live.base.parameters():
            if (flag := learns.get(id(parameter))) is not None:
                parameter.requires_grad_(flag)
            elif not was_there:
                parameter.requires_grad_(False)


def _active(module: Any, names: Sequence[str]) -> list[str]:
    """Return the names of the active adapters of a new layer.

    A LoRA layer may list adapters that it does not have, other layers may not.
    """
    if is_lora_layer(module):
        return list(names)
    known = module._adapters if is_training_wrapper(module) else module._all_available_adapter_names()
    return [name for name in names if name in known]


def _mode(module: Any) -> bool:
    inner = module.original_module if is_training_wrapper(module) else module.get_base_layer()
    return bool(inner.training)


def _set_mode(module: Any, mode: bool) -> None:
    """Set the mode of a layer and of its own parts, not of the base layer."""
    module.training = mode
    for name, child in module._modules.items():
        if name.startswith("lora_") and child is not None:
            child.train(mode)
