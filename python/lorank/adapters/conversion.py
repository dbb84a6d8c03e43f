"""Converts adapters from one layout of files to another, without loss at full rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from lorank.adapters.content import Adapter, Format
from lorank.adapters.formats import earlier_peft, expert_stacks, gguf_files, image_conversion, mlx, torchtune
from lorank.adapters.formats.base_weights import BaseWeights

Layout = Literal[
    "peft",
    "peft-0.18",
    "per-expert",
    "mlx",
    "torchtune",
    "gguf",
    "kohya",
    "diffusers",
    "comfyui",
]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

_OF_IMAGES = ("kohya", "diffusers", "comfyui")


def convert(adapter: Adapter, to: str, base: BaseWeights | None = None) -> Adapter:
    """Return an adapter that is written in another layout; see `lorank.convert`."""
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {', '.join(map(repr, LAYOUTS))}, not {to!r}")
    if to in _OF_IMAGES:
        return _written_as(image_conversion.to_image(adapter, to, base), "kohya")
    adapter = _as_peft(adapter, base)
    if to == "per-expert":
        name = str(base.config.get("model_type", "")) if base is not None else ""
        return _written_as(expert_stacks.separated(adapter, name), "peft")
    if expert_stacks.has_separate_experts(adapter):
        count = base.num_experts if base is not None else None
        adapter = expert_stacks.stacked(adapter, count)
    if to == "peft-0.18":
        return _written_as(earlier_peft.convertible(adapter), "peft-0.18")
    if to == "mlx":
        return _written_as(mlx.convertible(adapter), "mlx")
    if to == "torchtune":
        return _written_as(torchtune.convertible(adapter, base), "torchtune")
    if to == "gguf":
        return _written_as(gguf_files.convertible(adapter, base), "gguf")
    return _written_as(adapter, "peft")


def _as_peft(adapter: Adapter, base: BaseWeights | None) -> Adapter:
    if adapter.format == "kohya":
        return image_conversion.to_peft(adapter, base)
    if adapter.format != "peft":
        raise ValueError(f"{adapter.label}: was converted to {adapter.format} already: convert its source")
    return adapter


def _written_as(adapter: Adapter, name: Format) -> Adapter:
    return replace(adapter, format=name)
