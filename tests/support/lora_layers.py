"""LoRA layers of live PEFT models: their factors, ranks, scalings and updates."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Array = npt.NDArray[Any]


def layers(model: Any) -> dict[str, Any]:
    """Return the layers with an adapter named "default", by module name."""
    modules = model.get_base_model().named_modules()
    return {name: module for name, module in modules if hasattr(module, "lora_A") and "default" in module.r}


def factors(layer: Any) -> tuple[Any, Any]:
    """Return A and B, rank first and rank second."""
    if "default" in layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def updates_of(model: Any) -> dict[str, Array]:
    """Return every update in float64, computed from the factors."""
    return {
        name: layer.scaling["default"]
        * (b.detach().double().flatten(1) @ a.detach().double().flatten(1)).cpu().numpy()
        for name, layer in layers(model).items()
        for a, b in [factors(layer)]
    }


def scalings(model: Any) -> dict[str, float]:
    return {name: layer.scaling["default"] for name, layer in layers(model).items()}


def ranks(model: Any) -> dict[str, int]:
    """Return the rank of every module, after checking that all places that hold the rank agree."""
    result = {}
    for name, layer in layers(model).items():
        a, b = factors(layer)
        assert layer.r["default"] == a.shape[0] == b.shape[1]
        if "default" not in layer.lora_embedding_A:
            down, up = layer.lora_A["default"], layer.lora_B["default"]
            is_linear = hasattr(down, "out_features")
            sizes = ("out_features", "in_features") if is_linear else ("out_channels", "in_channels")
            assert getattr(down, sizes[0]) == getattr(up, sizes[1]) == a.shape[0]
        divisor = a.shape[0] ** 0.5 if layer.use_rslora["default"] else a.shape[0]
        assert layer.lora_alpha["default"] / divisor == pytest.approx(layer.scaling["default"], rel=1e-15)
        result[name] = a.shape[0]
    return result


def truncated(update: Array, rank: int) -> Array:
    """Return the best approximation of an update at a rank."""
    U, s, Vt = np.linalg.svd(update, full_matrices=False)
    return (U[:, :rank] * s[:rank]) @ Vt[:rank]
