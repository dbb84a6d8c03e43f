"""The LoRA layers of a live PEFT model, and which of them can change their rank."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch.nn.parallel import DataParallel, DistributedDataParallel

from lorank import naming
from lorank.training.peft_config import alpha_of, divisor


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A LoRA layer of a live model, as one adapter sees it.

    Attributes
    ----------
    name
        The module's name in the base model; of stacked experts the parameter's.
    layer
        PEFT's layer.
    adapter
        The adapter's name.
    """

    name: str
    layer: Any
    adapter: str

    @property
    def rank(self) -> int:
        """The rank."""
        return int(self.layer.r[self.adapter])

    @property
    def is_embedding(self) -> bool:
        """Whether the factors are bare parameters, ``(r, vocabulary)`` and ``(width, r)``."""
        return self.adapter in self.layer.lora_embedding_A

    @property
    def factors(self) -> tuple[Any, Any]:
        """The parameters A and B: ``(r, in, ...)`` and ``(out, r, ...)``."""
        if self.is_embedding:
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        return self.layer.lora_A[self.adapter].weight, self.layer.lora_B[self.adapter].weight

    @property
    def is_rank_stabilized(self) -> bool:
        """Whether PEFT divides alpha by the root of the rank."""
        return bool(self.layer.use_rslora.get(self.adapter, False))

    @property
    def alpha(self) -> float:
        """The alpha."""
        return float(self.layer.lora_alpha[self.adapter])

    @property
    def nominal_scaling(self) -> float:
        """The scaling that rank and alpha give: what a saved adapter will be loaded with."""
        nominal = self.alpha / divisor(self.rank, self.is_rank_stabilized)
        # Not every scaling is a quotient of floats: what is meant is in force, unless PEFT changed it.
        return self.scaling if math.isclose(nominal, self.scaling, rel_tol=1e-12) else nominal

    @property
    def scaling(self) -> float:
        """The scaling in force; PEFT can change it for a while."""
        return float(self.layer.scaling[self.adapter])

    def set_rank(self, rank: int) -> None:
        """Tell PEFT's layer its rank; the scaling stays."""
        alpha = alpha_of(self.nominal_scaling, rank, self.is_rank_stabilized)
        self.layer.r[self.adapter] = rank
        self.layer.lora_alpha[self.adapter] = alpha
        if self.is_embedding:
            return
        a, b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        if isinstance(a, torch.nn.Linear):
            a.out_features = b.in_features = rank
        else:
            a.out_channels = b.in_channels = rank

    def set_scaling(self, scaling: float) -> None:
        """Give the layer another scaling, and the alpha that belongs to it."""
        self.layer.scaling[self.adapter] = scaling
        self.layer.lora_alpha[self.adapter] = alpha_of(scaling, self.rank, self.is_rank_stabilized)


def lora_layers(model: Any, adapter_name: str) -> dict[str, AdaptedLayer]:
    """The layers that an adapter adapts, by name in the base model.

    Raises
    ------
    TypeError
        If the model is no module.
    ValueError
        If the model has no such adapter, or is wrapped.
    NotImplementedError
        If the adapter is no LoRA, or the model is sharded.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a PEFT model, not {type(model).__name__}")
    _check_wrapping(model)
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"no adapter {adapter_name!r} in the model: it has {', '.join(configs) or 'none'}")
    kind = str(getattr(configs[adapter_name].peft_type, "value", configs[adapter_name].peft_type))
    if kind != "LORA":
        raise NotImplementedError(f"adapter {adapter_name!r} is {kind}: only LoRA has ranks to change")
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = [
        AdaptedLayer(_base_name(path, module), module, adapter_name)
        for path, module in base.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r
    ]
    return {layer.name: layer for layer in found}


def _check_wrapping(model: Any) -> None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: pass model.module")
    for path, module in model.named_modules():
        kind = type(module).__name__
        if kind in ("FullyShardedDataParallel", "DeepSpeedEngine"):
            raise NotImplementedError(
                f"{path or 'the model'} is wrapped in {kind}, which remembers shapes: ranks cannot be "
                "changed under it"
            )


def _base_name(path: str, module: Any) -> str:
    """PEFT's wrappers of several parameters of one module are nested, each the base layer of the next."""
    parameter = getattr(module, "parameter_name", None)
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    return path if parameter is None else f"{path}.{parameter}"


def by_layer(values: Mapping[str, Any], layers: Mapping[str, AdaptedLayer], argument: str) -> dict[str, Any]:
    """The values by the layers' own names.

    Raises
    ------
    TypeError
        If they are no mapping.
    ValueError
        If a name fits no layer or several, or two names fit the same.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{argument} must be a mapping by module, not {values!r}")
    resolved: dict[str, Any] = {}
    for name, value in values.items():
        found = [name] if name in layers else [live for live in layers if naming.is_suffix(name, live)]
        # Names of a checkpoint can be longer than those of the model, by PEFT's prefix for one.
        found = found or [suffix for suffix in naming.suffixes(name) if suffix in layers][:1]
        if len(found) != 1:
            what = (
                f"fits several adapted modules ({', '.join(found[:3])})" if found else "is no adapted module"
            )
            raise ValueError(f"{argument}: {name!r} {what}")
        if found[0] in resolved:
            raise ValueError(f"{argument}: two names fit the module {found[0]!r}")
        resolved[found[0]] = value
    return resolved


def check_layer(adapted: AdaptedLayer) -> None:
    """Refuse a layer whose factors are not all there is, or not all here."""
    name, layer, adapter = adapted.name, adapted.layer, adapted.adapter
    if adapter in layer.merged_adapters:
        raise ValueError(f"module {name!r}: adapter {adapter!r} is merged into the weight: unmerge it first")
    if hasattr(layer, "parameter_name"):
        raise NotImplementedError(f"module {name!r} is a stack of experts (target_parameters): not supported")
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        raise NotImplementedError(f"module {name!r} is no plain LoRA but a {variant}: not supported")
    base = layer.get_base_layer()
    if getattr(base, "groups", 1) != 1:
        raise NotImplementedError(f"module {name!r} is a convolution in {base.groups} groups: not supported")
    if isinstance(base, torch.nn.MultiheadAttention) or ".base_layer." in name:
        raise NotImplementedError(
            f"module {name!r} belongs to a torch.nn.MultiheadAttention, in which PEFT has one rank for all: "
            "not supported"
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
    is_sharded = hasattr(factor, "ds_id") or hasattr(factor, "_fsdp_flattened") or not factor.numel()
    if type(factor.data) is not torch.Tensor or is_sharded:
        raise NotImplementedError(
            f"module {module!r}: a factor is sharded or no plain tensor ({type(factor).__name__} of shape "
            f"{tuple(factor.shape)}): ranks cannot be changed under FSDP, DeepSpeed ZeRO-3 or tensor "
            "parallelism"
        )
    if factor.is_meta:
        raise ValueError(f"module {module!r}: its factors are on the meta device: load the adapter first")


def check_ties(changed: Sequence[str], layers: Mapping[str, AdaptedLayer]) -> None:
    """Refuse factors that another layer uses as well (`ensure_weight_tying`)."""
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
