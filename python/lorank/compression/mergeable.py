"""Checks that adapters can be summed: they belong to one base model and use the same names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from lorank.adapters.content import AdapterContent
from lorank.adapters.module import LoraModule
from lorank.modules import naming

_ONE_EXPERT = re.compile(r"(?P<container>.*\bexperts)\.\d+\..+")


def check_one_model(adapters: Sequence[AdapterContent], *, force: bool) -> None:
    """Refuse adapters that belong to different models.

    Parameters
    ----------
    adapters
        The adapters to add up.
    force
        True to accept base models of different names, and adapters without a module in common.

    Raises
    ------
    ValueError
        If one adapter names single experts and another names their stack; without `force`, if base models
        have different names, or an adapter shares no module with the others.
    """
    _check_experts(adapters)
    if force:
        return
    bases = {adapter.base_model: adapter.label for adapter in reversed(adapters) if adapter.base_model}
    if len(bases) > 1:
        named = "; ".join(f"{base} of {label}" for base, label in reversed(bases.items()))
        raise ValueError(
            f"the adapters' base models have different names ({named}): a sum needs one base model. If "
            "the names mean the same model, force=True merges the adapters"
        )
    for adapter in adapters:
        names = {module.name for other in adapters if other is not adapter for module in other.adapted}
        own = [module.name for module in adapter.adapted]
        if own and names and names.isdisjoint(own):
            raise ValueError(
                f"{adapter.label} shares no module with the other adapters: it adapts {own[0]!r}, but "
                f"they adapt {min(names)!r}. If all of them were trained on one model, force=True merges them"
            )


def ties_tables(adapters: Sequence[AdapterContent]) -> bool:
    """Return True if a sum ties its output head to the embedding (`ensure_weight_tying`).

    Raises
    ------
    ValueError
        If some of the adapters that adapt the head or the embedding tie them, and others do not.
    """
    tied = [adapter for adapter in adapters if adapter.config.get("ensure_weight_tying")]
    for other in adapters:
        name = next((m.name for m in other.adapted if _is_table(m)), None)
        if tied and name is not None and not other.config.get("ensure_weight_tying"):
            raise ValueError(
                f"{tied[0].label} ties the output head to the embedding (ensure_weight_tying), but "
                f"{other.label} adapts {name!r} separately: a sum cannot do both"
            )
    return bool(tied)


def _is_table(module: LoraModule) -> bool:
    return module.kind == "embedding" or naming.is_output_head(module.name)


def _check_experts(adapters: Sequence[AdapterContent]) -> None:
    """Refuse a mix of single experts (transformers 4) and stacks of experts (transformers 5)."""
    stacks = {
        module.name.rpartition(".")[0]: adapter
        for adapter in reversed(adapters)
        for module in adapter.modules.values()
        if module.kind == "expert"
    }
    for adapter in adapters:
        for name in adapter.modules:
            match = _ONE_EXPERT.fullmatch(name)
            if match and (other := stacks.get(match["container"])) is not None:
                raise ValueError(
                    f"{adapter.label} adapts experts one by one ({name!r}), as transformers 4 names them, "
                    f"but {other.label} adapts their stack ({match['container']!r}), as transformers 5 does: "
                    "load the first with PEFT under transformers 5, and save it again from there"
                )
