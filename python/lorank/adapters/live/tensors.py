"""The tensors of a live adapter by their keys in PEFT's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lorank.adapters.live.layers import AdaptedLayer, LiveModel, is_lora_layer, is_training_wrapper
from lorank.modules import naming
from lorank.peft_format import names
from lorank.peft_format.names import BASE_LAYER, BIAS, INSIDE, MAGNITUDE, PREFIX

# Ends of the names of embeddings and heads that PEFT stores whole if they are adapted.
_TABLES = ("embed_tokens", "lm_head")

Tensors = dict[str, Any]


def of(
    live: LiveModel, adapter: str, layers: Mapping[str, AdaptedLayer], config: Mapping[str, Any]
) -> Tensors:
    """Return an adapter's own tensors, and the tensors of the base model that PEFT stores with it."""
    own: Tensors = {}
    for layer in layers.values():
        own |= _of_layer(layer)
    own |= saved_modules(live, adapter)
    found = [*_biases(live, str(config.get("bias"))), *_tables(live, config)]
    own |= {f"{PREFIX}{path}": tensor for path, tensor in found}
    return {key: tensor.detach() for key, tensor in own.items()}


def _of_layer(layer: AdaptedLayer) -> Tensors:
    a, b = (factor.detach() for factor in layer.factors)
    if layer.is_adalora:
        values = layer.layer.lora_E[layer.adapter].detach()
        kept = values[:, 0] != 0  # A mask sets the values of removed ranks to zero.
        keys: tuple[str, ...] = names.adalora_keys(layer.path)
        found = dict(zip(keys, (b[:, kept], a[kept], values[kept]), strict=True))
    else:
        keys = names.factor_keys(layer.path, is_embedding=layer.is_embedding)
        found = dict(zip(keys, (b, a), strict=True))
    if layer.bias is not None:
        found[names.layer_key(layer.path, BIAS)] = layer.bias.detach()
    if layer.magnitude is not None:
        found[names.layer_key(layer.path, MAGNITUDE)] = layer.magnitude.detach()
    return found


def saved_modules(live: LiveModel, adapter: str) -> Tensors:
    """Return the trained copies of modules and tokens (`modules_to_save`, `trainable_token_indices`)."""
    found: Tensors = {}
    for path, module in live.modules.items():
        if is_training_wrapper(module) and adapter in module._adapters:
            state = module.state_dict(keep_vars=True)
            for key, stored in module.adapter_state_dict_load_map(adapter).items():
                found[f"{PREFIX}{path}.{key}"] = state[stored]
    return found


def base_tensors(live: LiveModel) -> Tensors:
    """Return the parameters of the base model by path, except parameters of training wrappers."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in live.modules.items()
        if not is_training_wrapper(module) and not is_lora_layer(module)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _biases(live: LiveModel, which: str) -> Iterable[tuple[str, Any]]:
    """Yield the base model's biases that are trained with the adapter (`bias`)."""
    if which not in ("all", "lora_only"):
        return
    for path, tensor in base_tensors(live).items():
        module, _, name = path.rpartition(".")
        if name == "bias" and (which == "all" or module.endswith(BASE_LAYER)):
            yield path, tensor


def _tables(live: LiveModel, config: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the tensors of embeddings and heads that PEFT stores whole: adapted or resized ones."""
    tables = _input_and_output(live.base)
    is_adapted = _adapts_tables(live, config)
    if not tables or not (is_adapted or _was_resized(live.base, config)):
        return
    for path, module in live.modules.items():
        if any(module is table for table in tables) and (is_lora_layer(module) or not is_adapted):
            inner = f"{path}{INSIDE}" if is_lora_layer(module) else path
            yield from (
                (f"{inner}.{name}", parameter)
                for name, parameter in live.modules[inner]._parameters.items()
                if parameter is not None
            )


def _input_and_output(model: Any) -> list[Any]:
    if not hasattr(model, "get_input_embeddings"):
        return []
    try:
        found = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):
        return []
    return [module for module in found if module is not None and not is_training_wrapper(module)]


def _adapts_tables(live: LiveModel, config: Mapping[str, Any]) -> bool:
    if config.get("trainable_token_indices") is not None:
        return False
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        selects = naming.matcher(targets, "the settings' target_modules")
        return any(selects(path) for path in live.modules if path.rpartition(".")[2] in _TABLES)
    return any(name in targets for name in _TABLES)


def _was_resized(model: Any, config: Mapping[str, Any]) -> bool:
    """Return True if the stored base model has another vocabulary size."""
    name, own = config.get("base_model_name_or_path"), getattr(model, "config", None)
    size, load = getattr(own, "vocab_size", None), getattr(type(own), "from_pretrained", None)
    if not name or not size or load is None:
        return False
    try:
        stored = load(name, local_files_only=True)
    except (OSError, ValueError):
        return False
    return bool(getattr(stored, "vocab_size", size) != size)
