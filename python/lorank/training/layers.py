"""The LoRA layers of a live PEFT model, and checks that their ranks can change."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorank.adapters.live.layers import AdaptedLayer, LiveModel
from lorank.modules import naming


def lora_layers(model: Any, adapter_name: str) -> dict[str, AdaptedLayer]:
    """Return the layers of an adapter, by name in the base model.

    Raises
    ------
    TypeError
        If the model is not a module.
    ValueError
        If the model has no adapter of that name, or is wrapped.
    NotImplementedError
        If the adapter is not a LoRA adapter, or the model is sharded.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a PEFT model, not {type(model).__name__}")
    _check_wrapping(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        if not configs:
            raise ValueError(f"no adapter {adapter_name!r}: the model has no adapters")
        raise ValueError(f"no adapter {adapter_name!r} in the model, only {', '.join(configs)}")
    kind = str(getattr(configs[adapter_name].peft_type, "value", configs[adapter_name].peft_type))
    if kind != "LORA":
        raise NotImplementedError(
            f"adapter {adapter_name!r} is {kind}: ranks can change in LoRA adapters only"
        )
    return LiveModel.of(model).layers(adapter_name)


def _check_wrapping(model: Any) -> None:
    """Raise for a model within a parallel wrapper, or with sharded parts."""
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: pass model.module")
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise NotImplementedError(
                f"{path or 'the model'} is wrapped in {kind}, which depends on the shapes of parameters: "
                "ranks cannot be changed under it"
            )


def by_layer(values: Mapping[str, Any], layers: Mapping[str, AdaptedLayer], argument: str) -> dict[str, Any]:
    """Map the names of layers to the values that a user gave.

    Parameters
    ----------
    values
        A value for each name, dotted suffix of a name, or name with a prefix such as PEFT's.
    layers
        The layers by name.
    argument
        Name of the argument, for error messages.

    Raises
    ------
    TypeError
        If `values` is not a mapping.
    ValueError
        If a name matches no layer or several, or two names match one layer.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a mapping from module names, not {values!r}")
    resolved: dict[str, Any] = {}
    for name, value in values.items():
        found = [name] if name in layers else [live for live in layers if naming.is_suffix(name, live)]
        # Names in a checkpoint may have a prefix, such as PEFT's.
        found = found or [suffix for suffix in naming.suffixes(name) if suffix in layers][:1]
        if len(found) != 1:
            what = (
                f"matches several adapted modules ({', '.join(found[:3])})"
                if found
                else "matches no adapted module"
            )
            raise ValueError(f"{argument}: {name!r} {what}")
        if found[0] in resolved:
            raise ValueError(f"{argument}: two names match the module {found[0]!r}")
        resolved[found[0]] = value
    return resolved


def check_layer(adapted: AdaptedLayer) -> None:
    """Check that the update of a layer is the product of two complete factors.

    Raises
    ------
    ValueError
        If the adapter is merged, or its factors have no values.
    NotImplementedError
        If the layer is of a kind that cannot be resized.
    """
    name, layer, adapter = adapted.name, adapted.layer, adapted.adapter
    if adapter in layer.merged_adapters:
        raise ValueError(f"module {name!r}: adapter {adapter!r} is merged into the weight: unmerge it first")
    if hasattr(layer, "parameter_name"):
        raise NotImplementedError(f"module {name!r} is a stack of experts (target_parameters): not supported")
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise NotImplementedError(f"module {name!r} is a {variant}, not plain LoRA: not supported")
    base = layer.get_base_layer()
    if getattr(base, "groups", 1) != 1:
        raise NotImplementedError(f"module {name!r} is a convolution in {base.groups} groups: not supported")
    if isinstance(base, torch.nn.MultiheadAttention) or ".base_layer." in name:
        raise NotImplementedError(
            f"module {name!r} belongs to a torch.nn.MultiheadAttention, where PEFT uses one rank for all "
            "projections: not supported"
        )
    if getattr(base, "_hf_device_mesh", None) is not None:
        raise NotImplementedError(
            f"module {name!r} is split over devices by tensor parallelism: not supported"
        )
    if not adapted.is_embedding:
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            if not isinstance(factor, (torch.nn.Linear, torch.nn.modules.conv._ConvNd)):
                raise NotImplementedError(f"module {name!r}: its factors are {type(factor).__name__} layers")
    for factor in adapted.factors:
        _check_storage(name, factor)


def _check_storage(module: str, factor: Any) -> None:
    """Raise for a factor whose values are sharded, on the meta device, or not in a plain tensor."""
    is_sharded = hasattr(factor, "ds_id") or hasattr(factor, "_fsdp_flattened") or not factor.numel()
    if type(factor.data) is not torch.Tensor or is_sharded:
        raise NotImplementedError(
            f"module {module!r}: a factor is sharded or not a plain tensor ({type(factor).__name__} of shape "
            f"{tuple(factor.shape)}): ranks cannot be changed under FSDP, DeepSpeed ZeRO-3 or tensor "
            "parallelism"
        )
    if factor.is_meta:
        raise ValueError(f"module {module!r}: its factors are on the meta device: load the adapter first")


def check_ties(changed: Sequence[str], layers: Mapping[str, AdaptedLayer]) -> None:
    """Raise NotImplementedError if a changed layer shares a factor with another (`ensure_weight_tying`)."""
    users: dict[int, list[str]] = defaultdict(list)
    for layer in layers.values():
        for storage in {factor.untyped_storage().data_ptr() for factor in layer.factors}:
            users[storage].append(layer.name)
    tied = {name: shared for shared in users.values() if len(shared) > 1 for name in shared}
    for name in changed:
        if name in tied:
            raise NotImplementedError(
                f"modules {' and '.join(tied[name])} share their factors: not supported"
            )


def check_trained(adapted: AdaptedLayer) -> None:
    """Raise ValueError if no gradient reaches the factors of a layer."""
    if adapted.adapter not in adapted.layer.active_adapters:
        active = ", ".join(adapted.layer.active_adapters) or "none"
        raise ValueError(
            f"adapter {adapted.adapter!r} is not active ({active} is): call "
            f"model.set_adapter({adapted.adapter!r}) first"
        )
    if adapted.layer.disable_adapters:
        raise ValueError("the adapters are disabled: call model.enable_adapter_layers() first")
    if not any(factor.requires_grad for factor in adapted.factors):
        raise ValueError(
            f"module {adapted.name!r}: adapter {adapted.adapter!r} is not trained (requires_grad is "
            "False): load it with is_trainable=True, or build it without inference_mode"
        )
