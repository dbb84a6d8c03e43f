"""The LoRA layers of a live model: a PeftModel, or a model with injected layers, wrapped or not."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorank.modules.live_modules import around, is_module
from lorank.peft_format.names import BASE_LAYER, innermost
from lorank.peft_format.scaling import alpha_of, divisor

# Wrappers that hold slices instead of whole parameters.
_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """The part of one adapter in a LoRA layer of a live model.

    Attributes
    ----------
    name
        Name of the module, or of the stacked parameter, in the base model.
    layer
        PEFT's layer.
    adapter
        The adapter's name.
    path
        Path of the factors in PEFT's files: the name, or the path of a wrapper around the module.
    """

    name: str
    layer: Any
    adapter: str
    path: str = ""

    @property
    def rank(self) -> int:
        """Rank of the layer."""
        return int(self.layer.r[self.adapter])

    @property
    def is_embedding(self) -> bool:
        """True if the factors are bare parameters, ``(r, vocabulary)`` and ``(width, r)``."""
        return self.adapter in self.layer.lora_embedding_A

    @property
    def is_adalora(self) -> bool:
        """True if the update is ``B E A`` with bare parameters, as in AdaLoRA."""
        return self.adapter in getattr(self.layer, "lora_E", {})

    @property
    def is_stack(self) -> bool:
        """True if the layer adapts a parameter of a module, such as a stack of experts."""
        return hasattr(self.layer, "parameter_name")

    @property
    def copies(self) -> int:
        """Number of updates that share the rank: the experts of a stack, else 1."""
        return int(self.layer.num_experts) if self.is_stack else 1

    @property
    def factors(self) -> tuple[Any, Any]:
        """The parameters A and B: ``(r, in, ...)`` and ``(out, r, ...)``."""
        if self.is_embedding:
            return self.layer.lora_embedding_A[self.adapter], self.layer.lora_embedding_B[self.adapter]
        a, b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        return (a, b) if self.is_adalora else (a.weight, b.weight)

    @property
    def bias(self) -> Any:
        """The parameter that `lora_bias` adds to the outputs, or None."""
        if self.is_embedding or self.is_adalora:
            return None
        return getattr(self.layer.lora_B[self.adapter], "bias", None)

    @property
    def magnitude(self) -> Any:
        """The magnitudes of DoRA, or None."""
        magnitudes = self.layer.lora_magnitude_vector
        return magnitudes[self.adapter].weight if self.adapter in magnitudes else None

    @property
    def is_rank_stabilized(self) -> bool:
        """True if PEFT divides alpha by the root of the rank."""
        return bool(getattr(self.layer, "use_rslora", {}).get(self.adapter, False))

    @property
    def alpha(self) -> float:
        """Alpha of the layer."""
        return float(self.layer.lora_alpha[self.adapter])

    @property
    def nominal_scaling(self) -> float:
        """Scaling that rank and alpha give, as in the layer after saving and loading."""
        nominal = self.alpha / divisor(self.rank, self.is_rank_stabilized)
        # A quotient of floats may differ from the exact scaling by rounding.
        return self.scaling if math.isclose(nominal, self.scaling, rel_tol=1e-12) else nominal

    @property
    def scaling(self) -> float:
        """Scaling that the layer applies now; PEFT can change it temporarily."""
        return float(self.layer.scaling[self.adapter])

    def set_rank(self, rank: int) -> None:
        """Set the rank of PEFT's layer; the scaling stays."""
        alpha = alpha_of(self.nominal_scaling, rank, self.is_rank_stabilized)
        self.layer.r[self.adapter] = rank
        self.layer.lora_alpha[self.adapter] = alpha
        if self.is_embedding:
            return
        a, b = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
        if hasattr(a, "out_features"):
            a.out_features = b.in_features = rank * self.copies
        else:
            a.out_channels = b.in_channels = rank

    def set_scaling(self, scaling: float) -> None:
        """Set the layer's scaling, and the alpha that belongs to it."""
        self.layer.scaling[self.adapter] = scaling
        self.layer.lora_alpha[self.adapter] = alpha_of(scaling, self.rank, self.is_rank_stabilized)


@dataclass(frozen=True)
class LiveModel:
    """A model with adapters in it, wrapped or not.

    Attributes
    ----------
    wrappers
        The model and the models inside it, outermost first; the last is the base model.
    """

    wrappers: list[Any]

    @classmethod
    def of(cls, model: Any) -> LiveModel:
        """Find the base model inside its wrappers.

        Raises
        ------
        TypeError
            If the model is not a module.
        ValueError
            If the model's parameters are sharded.
        """
        if not is_module(model):
            raise TypeError(
                f"a live model is a torch.nn.Module, not an object of type {type(model).__name__}"
            )
        found = cls(around(model))
        for path, module in found.modules.items():
            if type(module).__name__ in _SHARDED:
                raise ValueError(
                    f"{path or 'the model'} is wrapped in {type(module).__name__}, which holds slices of "
                    "parameters: save the adapter from the training process, and load it from its folder"
                )
        return found

    @property
    def base(self) -> Any:
        """The base model, with PEFT's layers in it."""
        return self.wrappers[-1]

    @property
    def tuner(self) -> Any:
        """PEFT's tuner around the base model, or None where layers were injected."""
        return next((wrapper for wrapper in self.wrappers if _is(wrapper, "BaseTuner")), None)

    @property
    def configs(self) -> dict[str, Any]:
        """PEFT's configs by the names of adapters; empty if the model keeps none."""
        found = [getattr(wrapper, "peft_config", None) for wrapper in self.wrappers]
        return next((configs for configs in found if isinstance(configs, dict)), {})

    @cached_property
    def modules(self) -> dict[str, Any]:
        """All modules of the base model and PEFT's layers by path, without the parts of these layers."""
        return dict(_walk(self.base, "", set()))

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters."""
        layers = [module for module in self.modules.values() if is_lora_layer(module)]
        return list(dict.fromkeys([*self.configs, *(name for layer in layers for name in layer.r)]))

    def layers(self, adapter: str) -> dict[str, AdaptedLayer]:
        """Return the layers that an adapter adapts, by name in the base model."""
        found = [
            AdaptedLayer(base_name(path, module), module, adapter, path)
            for path, module in self.modules.items()
            if is_lora_layer(module) and adapter in module.r
        ]
        return {layer.name: layer for layer in found}


def _walk(module: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    module = around(module)[-1]
    if id(module) in seen:
        return
    seen.add(id(module))
    yield path, module
    if is_training_wrapper(module):
        return
    is_layer = _is(module, "BaseTunerLayer")
    for name, child in module._modules.items():
        if child is not None and (not is_layer or name == BASE_LAYER):
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def is_lora_layer(module: Any) -> bool:
    """Return True if a module is a LoRA or AdaLoRA layer of PEFT."""
    return _is(module, "LoraLayer")


def is_training_wrapper(module: Any) -> bool:
    """Return True if a module keeps a trained copy of another module (`modules_to_save`) or of tokens."""
    return _is(module, "AuxiliaryTrainingWrapper")


def _is(module: Any, name: str) -> bool:
    """Return True if a module is an instance of PEFT's class of a name."""
    return any(base.__name__ == name and base.__module__.startswith("peft.") for base in type(module).__mro__)


def base_name(path: str, layer: Any) -> str:
    """Return a layer's name in the base model.

    PEFT's wrappers of several parameters of one module are nested, each the base layer of the next.
    """
    parameter = getattr(layer, "parameter_name", None)
    path = innermost(path)
    return path if parameter is None else f"{path}.{parameter}"
