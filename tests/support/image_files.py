"""Files of image adapters: two modules in every style of keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

RNG = np.random.default_rng(0)
STYLES = {
    "kohya": ("lora_unet_down_0_attn1_{}.lora_{}.weight", ("up", "down")),
    "diffusers": ("unet.down_blocks.0.attn1.{}.lora.{}.weight", ("up", "down")),
    "processor": ("unet.down_blocks.0.processor.{}_lora.{}.weight", ("up", "down")),
    "linear_layer": ("text_encoder.layers.0.{}.lora_linear_layer.{}.weight", ("up", "down")),
    "peft_keys": ("transformer.blocks.0.{}.lora_{}.weight", ("B", "A")),
}


def factors(out: int, rank: int, fan_in: int) -> tuple[Any, Any]:
    decay = np.geomspace(1, 0.05, rank)
    return RNG.standard_normal((out, rank)) * decay, RNG.standard_normal((rank, fan_in))


def write_image_adapter(path: Path, style: str, alpha: float | None = 3.0) -> dict[str, Any]:
    """Write a file with two modules; return their dense updates."""
    template, (up, down) = STYLES[style]
    tensors, updates = {}, {}
    for name, (out, rank, fan_in) in {"to_q": (24, 6, 16), "to_k": (12, 4, 16)}.items():
        b, a = (x.astype(np.float32) for x in factors(out, rank, fan_in))
        tensors |= {template.format(name, up): b, template.format(name, down): a}
        module = template.format(name, up).rpartition(".lora_")[0]
        module = module or template.format(name, up).split("_lora.")[0].split(".lora.")[0]
        if alpha is not None:
            tensors[f"{module}.alpha"] = np.array(alpha, dtype=np.float32)
        updates[module] = (alpha if alpha is not None else rank) / rank * (b.astype(np.float64) @ a)
    save_file(tensors, path, metadata={"ss_base_model_version": "sdxl", "ss_network_dim": "6"})
    return updates
