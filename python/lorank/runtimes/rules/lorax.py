"""The rules of LoRAX, and of Text Generation Inference, which uses its loader."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lorank.adapters.module import LoraModule
from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_settings,
    by_settings_or_stabilized,
    every_token,
    leaves_out,
    no_replication,
    not_plain,
    original_base,
)

# Lower ranks are padded to this rank, and the true rank is lost after the first type of modules.
_LEAST_RANK = 8


def _scale(a: Found, module: LoraModule) -> float:
    # LoRAX does not recognise the names of AdaLoRA's factors. PEFT 0.4, which it pins, has no rsLoRA.
    return 0.0 if a.adalora else by_settings(a, module)


def _tgi_scale(a: Found, module: LoraModule) -> float:
    return 0.0 if a.adalora else by_settings_or_stabilized(a, module)


def _refuses(a: Found) -> str:
    ranks = sorted({module.rank for module in a.modules})
    if len(ranks) > 1:
        return f"stacks layers, which therefore need one rank: ranks go from {ranks[0]} to {ranks[-1]}"
    if a.dora:
        return "DoRA is not supported"
    return not_plain(a) or no_replication(a)


def _loses(a: Found) -> Iterable[str]:
    if a.adalora:
        yield "adapts no module, because it does not recognise the names of AdaLoRA's tensors"
        return
    if missing := a.incomplete_types():
        yield f"drops {missing[0]} in all layers, because some layers have no adapter for it"
    yield from leaves_out([*a.others, *a.lora_biases])
    yield from every_token(a)
    yield from original_base(a)


def _remark(a: Found) -> str:
    counts = {len(numbers) for kinds in a.blocks().values() for numbers in kinds.values()}
    remarks = [f"only if the model has no more than {max(counts)} blocks"] if counts else []
    if a.rank < _LEAST_RANK:
        remarks.append(
            f"on GPUs it pads ranks to {_LEAST_RANK}, and divides alpha by {_LEAST_RANK} in all but the "
            "first type of modules"
        )
    return "; ".join(remarks)


LORAX = Runtime("LoRAX", "May 2026", _scale, _refuses, _loses, _remark)

TGI = replace(LORAX, name="Text Generation Inference", version="3.3.7", scale=_tgi_scale)
