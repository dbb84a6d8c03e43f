"""The rules of LMDeploy."""

from __future__ import annotations

from collections.abc import Iterable

from lorank.runtimes.found import Found
from lorank.runtimes.rules.runtime import (
    Runtime,
    by_settings,
    every_token,
    first_of,
    no_lora_biases,
    no_others,
    no_replication,
    not_plain,
    original_base,
)


def _refuses(a: Found) -> str:
    if a.adalora:
        return "does not recognise the names of AdaLoRA's tensors (lora_E)"
    if isinstance(a.config.get("target_modules"), str):
        return "needs target_modules as a list, but they are a regular expression"
    if a.dora:
        return "DoRA is not supported"
    if mixed := a.of_another_rank():
        return f"{len(mixed)} modules have another rank than r = {a.rank:g}, such as {mixed[0].name}"
    return first_of(not_plain(a), no_replication(a), no_lora_biases(a), no_others(a))


def _loses(a: Found) -> Iterable[str]:
    if missing := a.incomplete_types():
        yield f"reads uninitialised memory for {missing[0]} in layers without an adapter"
    yield from every_token(a)
    yield from original_base(a)


LMDEPLOY = Runtime("LMDeploy", "0.18", by_settings, _refuses, _loses, unknown="refuses")
