"""Quantized linear layers of bitsandbytes: the class of each kind and its options."""

from __future__ import annotations

from typing import Any

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "8bit": ("Linear8bitLt", {"has_fp16_weights": False}),
    "fp4": ("Linear4bit", {"quant_type": "fp4"}),
    "nf4": ("Linear4bit", {"quant_type": "nf4"}),
    "nf4-plain-statistics": ("Linear4bit", {"quant_type": "nf4", "compress_statistics": False}),
}
