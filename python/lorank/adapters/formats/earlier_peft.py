"""The layout of PEFT before 0.19, in which factors of experts have inputs and outputs swapped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from lorank.adapters.content import Adapter, AdapterContent, Format, Profile
from lorank.adapters.formats.derived_factors import changed
from lorank.adapters.formats.peft import PeftFormat
from lorank.adapters.module import LoraModule

VERSION = "0.18.1"
"""The last release of PEFT with this layout."""


class _EarlierPeft(PeftFormat):
    """Folders of PEFT 0.18."""

    name: ClassVar[Format] = "peft-0.18"
    holds_settings = False

    def settings(self, adapter: AdapterContent, profile: Profile) -> dict[str, Any]:
        return {**super().settings(adapter, profile), "peft_version": VERSION}


EARLIER_PEFT = _EarlierPeft()


def convertible(adapter: Adapter) -> Adapter:
    """Return an adapter whose stacks have inputs and outputs swapped.

    Stacks of models that declare them to be stored (in, out) have the same factors in all releases.
    """
    if _is_declared(adapter):
        return adapter
    return replace(adapter, modules={name: _swapped(module) for name, module in adapter.modules.items()})


def _is_declared(adapter: AdapterContent) -> bool:
    model = f"{adapter.base_model} {adapter.config.get('auto_mapping')}".lower().replace("-", "_")
    return "gpt_oss" in model or "gptoss" in model


def _swapped(module: LoraModule) -> LoraModule:
    if module.kind != "expert" or module.copies == 1:
        return module
    factors = changed(module.factors, lambda b, a: (a.T, b.T))
    return replace(module, shape=(module.shape[1], module.shape[0]), factors=factors)
