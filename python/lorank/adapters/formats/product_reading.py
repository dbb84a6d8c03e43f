"""Reads adapters of LoHa and LoKr, from PEFT's folders and from files of LyCORIS, as LoRA."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lorank._core import FormatError
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.base import AsStored
from lorank.adapters.formats.base_weights import BaseWeights
from lorank.adapters.formats.product_factors import LOHA, LOKR, ProductFactors, size_of
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Tensors
from lorank.modules import naming
from lorank.peft_format.names import PREFIX
from lorank.peft_format.settings import Settings
from lorank.peft_format.validation import kind_of

_KEY = re.compile(rf"(?P<path>.+)\.(?P<part>{'|'.join((*LOHA, *LOKR))})(?:\.weight)?")
_LOOKS_LIKE_CONVOLUTION = re.compile(
    r"(^|[._])(conv[^.]*|down_?samplers?[^.]*|up_?samplers?[^.]*)", re.IGNORECASE
)

KINDS = {"LOHA": LOHA, "LOKR": LOKR}


def parts_of(keys: Any) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return the keys of every module's tensors by their parts, and all other keys."""
    found: dict[str, dict[str, str]] = {}
    others = []
    for key in keys:
        if match := _KEY.fullmatch(key):
            found.setdefault(match["path"].removeprefix(PREFIX), {})[match["part"]] = key
        else:
            others.append(key)
    return found, others


def module_of(
    tensors: Tensors, name: str, keys: Mapping[str, str], scaling: Callable[[int | None], float]
) -> LoraModule:
    """Return the module of a product.

    Parameters
    ----------
    tensors, name, keys
        The tensors of the file, the module's name, and the keys of its tensors by their parts.
    scaling
        A function that returns the scaling, given the rank of the stored factors.

    Raises
    ------
    FormatError
        If tensors do not fit each other.
    """
    factors = ProductFactors(tensors, name, keys)
    size = size_of(factors)
    is_conv = len(size.kernel) > 0
    a_tail = (size.inputs // math.prod(size.kernel), *size.kernel) if is_conv else ()
    return LoraModule(
        name,
        "conv" if is_conv else "linear",
        (size.outputs, size.inputs),
        size.rank,
        scaling(size.divisor),
        tensors.dtype(next(iter(keys.values()))),
        factors,
        a_tail=a_tail or (size.inputs,),
        b_tail=(1,) * len(size.kernel),
    )


def read_peft(tensors: Tensors, config: Mapping[str, Any]) -> AsStored:
    """Read a LoHa or LoKr adapter of PEFT as LoRA.

    Raises
    ------
    FormatError
        If tensors and settings do not fit each other.
    """
    kind = kind_of(config)
    found, others = parts_of(tensors.shapes())
    if others:
        raise FormatError(f"{tensors.label}: tensor {others[0]!r}: is no tensor of {kind}")
    if not found:
        raise FormatError(f"{tensors.label}: holds no tensors of {kind}, the settings' peft_type")
    settings = Settings(tensors.label, {**config, "lora_alpha": config.get("alpha", 8)})
    modules = {}
    for name in sorted(found, key=naming.natural_key):
        rank, scaling = settings.rank_and_scaling(name)
        for part, key in found[name].items():
            if part not in KINDS[kind]:
                raise FormatError(f"{tensors.label}: tensor {key!r}: is no tensor of {kind}")
        modules[name] = module_of(tensors, name, found[name], partial(_constant, scaling))
        divisor = size_of(ProductFactors(tensors, name, found[name])).divisor
        if divisor is not None and divisor != rank:
            raise FormatError(
                f"{tensors.label}: module {name!r}: has rank {divisor}, but the settings state {rank}"
            )
    content = {
        "peft_type": "LORA",
        "target_modules": list(modules),
        **{key: config.get(key) for key in ("base_model_name_or_path", "task_type", "auto_mapping")},
    }
    adapter = AdapterContent(modules, content, notes=[note(kind, len(modules))], label=tensors.label)
    return AsStored(
        replace(adapter, notes=[*adapter.notes, *_unknown_kernels(adapter)]),
        tensors,
        files="other",
        with_base=lambda base: with_kernels(adapter, base),
    )


def _constant(scaling: float, rank: int | None) -> float:
    del rank
    return scaling


def note(kind: str, count: int) -> str:
    """Return the note on modules that were read as LoRA."""
    name = {"LOHA": "LoHa", "LOKR": "LoKr"}.get(kind, kind)
    return (
        f"{count} modules of {name} were read as LoRA, exactly: the rank is the product of both sides' ranks"
    )


def with_kernels(adapter: AdapterContent, base: BaseWeights) -> AdapterContent:
    """Return an adapter whose convolutions have the kernel shapes of the base model."""
    modules = {}
    for name, module in adapter.modules.items():
        kernel = base.kernel(name, module.shape[1]) if module.kind == "linear" else None
        if kernel is not None:
            module = replace(module, kind="conv", a_tail=kernel, b_tail=(1,) * (len(kernel) - 1))
        modules[name] = module
    return replace(adapter, modules=modules)


def _unknown_kernels(adapter: AdapterContent) -> list[str]:
    """Return a note on modules whose names are those of convolutions, but whose kernels are unknown."""
    names = [
        m.name
        for m in adapter.modules.values()
        if m.kind == "linear" and _LOOKS_LIKE_CONVOLUTION.search(m.name)
    ]
    if not names:
        return []
    return [
        f"{len(names)} modules may be convolutions, whose kernels the file does not hold; the first is "
        f"{names[0]}: name the base model (lorank convert --base MODEL)"
    ]
