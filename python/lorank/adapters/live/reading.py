"""Reads adapters of live models from PEFT's layers, without copies of tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from lorank._core import FormatError
from lorank._internal import extras
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import peft_reading
from lorank.adapters.live import tensors as live_tensors
from lorank.adapters.live.layers import AdaptedLayer, LiveModel
from lorank.adapters.tensors import ArrayTensors

# Variants of LoRA whose update follows from the factors, some with settings or magnitudes. The last two
# differ from LoRA only in training.
_KNOWN_VARIANTS = ("Dora", "ALora", "MiCA", "Velora", "Monteclora")


def from_model(model: Any, adapter_name: str) -> AdapterContent:
    """Read an adapter from a live model's tensors; see `LoraAdapter.from_model`."""
    extras.require("peft", "peft", "for live models")
    live = LiveModel.of(model)
    layers = live.layers(adapter_name)
    if adapter_name not in live.adapters:
        raise ValueError(
            f"no adapter {adapter_name!r} in the model, only {', '.join(live.adapters)}"
            if live.adapters
            else f"no adapter {adapter_name!r}: the model has no adapters"
        )
    config = settings(live, adapter_name, layers)
    if not layers and config.get("peft_type", "LORA") in ("LORA", "ADALORA"):
        raise ValueError(f"adapter {adapter_name!r} adapts no module of {type(live.base).__name__}")
    for layer in layers.values():
        check(layer)
    tensors = ArrayTensors(live_tensors.of(live, adapter_name, layers, config), f"adapter {adapter_name!r}")
    parameters = {layer.path: layer.name for layer in layers.values() if layer.is_stack}
    try:
        adapter = peft_reading.read(tensors, config, layers=peft_reading.Layers(_Scales(layers), parameters))
    except FormatError as error:
        # The fault lies in the model, not in a file.
        raise ValueError(str(error)) from None
    modules = {name: _with_kernel(module, layers[name]) for name, module in adapter.modules.items()}
    return _noted(replace(adapter, modules=modules), layers)


def settings(live: LiveModel, adapter_name: str, layers: Mapping[str, AdaptedLayer]) -> dict[str, Any]:
    """Return an adapter's settings as JSON values; from its layers if the model keeps no config."""
    if (config := live.configs.get(adapter_name)) is not None:
        content: dict[str, Any] = plain(config.to_dict() if hasattr(config, "to_dict") else dict(config))
        return content
    return {
        "peft_type": "ADALORA" if any(layer.is_adalora for layer in layers.values()) else "LORA",
        "target_modules": [name for name, layer in layers.items() if not layer.is_stack],
        "target_parameters": [name for name, layer in layers.items() if layer.is_stack] or None,
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "lora_bias": any(layer.bias is not None for layer in layers.values()),
    }


def plain(value: Any) -> Any:
    """Return settings as JSON values: PEFT keeps lists of names as sets, and options as enumerations."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def check(layer: AdaptedLayer) -> None:
    """Refuse a layer whose update is not the product of its factors, or whose factors cannot be read.

    Raises
    ------
    ValueError
        If the layer is a variant with another update, or its factors are sharded or have no values.
    """
    variant = variant_of(layer)
    if variant and not variant.startswith(_KNOWN_VARIANTS):
        raise ValueError(
            f"module {layer.name!r} is a {variant.removesuffix('Variant')}, whose update is not a product of "
            "two factors: only LoRA (and AdaLoRA) can be read"
        )
    for factor in layer.factors:
        if hasattr(factor, "ds_id") or type(factor.data).__name__ == "DTensor":
            raise ValueError(
                f"module {layer.name!r}: its factors are sharded: save the adapter from the training process "
                "and load it from its folder"
            )
        if factor.is_meta:
            raise ValueError(
                f"module {layer.name!r}: its factors are on the meta device and have no values: load the "
                "adapter's weights first"
            )


def variant_of(layer: AdaptedLayer) -> str:
    """Return the class of PEFT's variant of LoRA, or an empty string."""
    variant = getattr(layer.layer, "lora_variant", {}).get(layer.adapter)
    return "" if variant is None else type(variant).__name__


@dataclass(frozen=True, slots=True)
class _Scales:
    """The ranks and scalings that live layers apply, with changes by methods such as `scale_layer`."""

    layers: Mapping[str, AdaptedLayer]

    def rank_and_scaling(self, name: str) -> tuple[int, float]:
        """Return the rank and the scaling of a module."""
        layer = self.layers[name]
        if layer.is_adalora:
            # AdaLoRA divides by its own count of ranks.
            return layer.rank, layer.scaling / (float(layer.layer.ranknum[layer.adapter]) + 1e-5)
        return layer.rank, layer.scaling


def _with_kernel(module: Any, layer: AdaptedLayer) -> Any:
    """Return a module with the kernel's shape, which AdaLoRA's factors do not have."""
    kernel = getattr(layer.layer.get_base_layer(), "kernel_size", None)
    if not layer.is_adalora or kernel is None:
        return module
    tail = (module.shape[1] // math.prod(kernel), *kernel)
    return replace(module, kind="conv", a_tail=tail, b_tail=(1,) * len(kernel))


def _noted(adapter: AdapterContent, layers: Mapping[str, AdaptedLayer]) -> AdapterContent:
    scaled = sum(
        not math.isclose(layer.nominal_scaling, layer.scaling, rel_tol=1e-6)
        for layer in layers.values()
        if not layer.is_adalora
    )
    if not scaled:
        return adapter
    note = f"modules scaled by hand: {scaled}; lorank keeps the scaling that the live layers apply"
    return replace(adapter, notes=[*adapter.notes, note])
