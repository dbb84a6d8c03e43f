"""The rules of ExLlamaV3."""

from __future__ import annotations

from collections.abc import Iterable

from lorank.adapters.module import LoraModule
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_settings_or_stabilized,
    every_token,
    leaves_out,
    original_base,
)


def _is_skipped(a: Found, module: LoraModule) -> bool:
    return a.adalora or module.kind != "linear"


def _scale(a: Found, module: LoraModule) -> float:
    return 0.0 if _is_skipped(a, module) else by_settings_or_stabilized(a, module)


def _refuses(a: Found) -> str:
    if a.config.get("fan_in_fan_out"):
        return "fan_in_fan_out is not supported"
    return f"mistakes the bias {a.lora_biases[0]} for a factor" if a.lora_biases else ""


def _loses(a: Found) -> Iterable[str]:
    skipped = [module.name for module in a.modules if _is_skipped(a, module)]
    yield from leaves_out([*skipped, *a.others])
    if a.dora:
        yield "leaves out DoRA's magnitudes"
    if a.replicated:
        yield "leaves out the layers that layer_replication adds"
    yield from every_token(a)
    yield from original_base(a)


EXLLAMAV3 = Runtime("ExLlamaV3", "1.6", _scale, _refuses, _loses, by_suffix=True, needs_prefix=False)
