"""The rules of TensorRT-LLM."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lorank.adapters.module import LoraModule
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    every_token,
    first_of,
    leaves_out,
    no_lora_biases,
    no_others,
    no_replication,
    original_base,
)

# Names of modules in blocks, whose factors are read; parts of other names, which are ignored.
_IN_A_BLOCK = re.compile(r".+\.\d+\.\w+(?:\.\w+){1,3}")
_ENDS_OF_MODELS = ("lm_head", "embed_tokens")

# Modules that TensorRT-LLM can name.
_KNOWN = {
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
    "w1", "w2", "w3", "gate",
}  # fmt: skip


def _scale(a: Found, module: LoraModule) -> float:
    if not _IN_A_BLOCK.fullmatch(module.name):
        return 0.0
    return a.alpha / (math.sqrt(module.rank) if a.rank_stabilized else module.rank)


def _refuses(a: Found) -> str:
    if a.adalora:
        return "does not recognise the names of AdaLoRA's tensors (lora_E)"
    if other := a.of_kinds("conv", "expert"):
        return f"{other[0].name} is not a plain linear layer ({other[0].kind})"
    outside = [m.name for m in a.modules if not _IN_A_BLOCK.fullmatch(m.name) and not _at_an_end(m.name)]
    if outside:
        return f"{outside[0]} is not in a numbered block"
    inside = [m.name for m in a.modules if not _at_an_end(m.name)]
    if unknown := [name for name in inside if name.rpartition(".")[2] not in _KNOWN]:
        return f"has no name for {unknown[0]}"
    if unequal := a.separate_experts.unequal():
        return f"needs one rank for all experts of a block: {unequal}"
    return first_of(no_replication(a), no_lora_biases(a), no_others(a, but=_at_an_end))


def _loses(a: Found) -> Iterable[str]:
    passed_over = [m.name for m in a.modules if not _IN_A_BLOCK.fullmatch(m.name)]
    yield from leaves_out([*passed_over, *a.others])
    if a.dora:
        yield "mistakes DoRA's magnitudes for normalised ones, and ignores them without --dora_plugin"
    yield from every_token(a)
    yield from original_base(a)


def _at_an_end(key: str) -> bool:
    return any(end in key for end in _ENDS_OF_MODELS)


TENSORRT_LLM = Runtime(
    "TensorRT-LLM",
    "November 2026",
    _scale,
    _refuses,
    _loses,
    profiles=("portable", "tensor-rank"),
    unknown="refuses",
    needs_prefix=False,
)
