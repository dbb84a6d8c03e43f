"""Experts whose factors are tensors of three dimensions, the number of the expert first.

Megatron writes ``experts.down_proj.lora_A (E, r, in)`` and ``lora_B (E, out, r)``. Adapters with shared outer
factors hold the factor on the side of the hidden size once for all experts: ``experts.w1.lora_A (1, r, in)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from lorank._core import FormatError
from lorank.adapters.content import AdapterContent
from lorank.adapters.formats import expert_stacks
from lorank.adapters.formats.derived_factors import Array, Arrays
from lorank.adapters.formats.key_wrappers import Renamed
from lorank.adapters.formats.stored_arrays import ArrayFactors
from lorank.adapters.module import LoraModule
from lorank.adapters.tensors import Tensors
from lorank.peft_format.names import PREFIX
from lorank.peft_format.settings import Settings

_KEY = re.compile(r"(?P<path>.*\bexperts\.(?P<projection>\w+))\.lora_(?P<factor>[AB])(?:\.weight)?")


@dataclass(frozen=True, slots=True)
class ExpertTensors:
    """The factors of experts in a file, and all other tensors.

    Attributes
    ----------
    keys
        The keys of B and A by the name of the stack.
    others
        The other tensors of the file.
    """

    tensors: Tensors
    keys: Mapping[str, Mapping[str, str]]
    others: Tensors

    @classmethod
    def of(cls, tensors: Tensors) -> ExpertTensors:
        """Sort the tensors of a file."""
        keys: dict[str, dict[str, str]] = {}
        for key, shape in tensors.shapes().items():
            match = _KEY.fullmatch(key)
            if match and len(shape) == 3 and not match["projection"].isdigit():
                keys.setdefault(match["path"].removeprefix(PREFIX), {})[match["factor"]] = key
        if not keys:
            return cls(tensors, {}, tensors)
        taken = {key for parts in keys.values() for key in parts.values()}
        return cls(
            tensors, keys, Renamed(tensors, {key: key for key in tensors.shapes() if key not in taken})
        )

    def added_to(self, adapter: AdapterContent, config: Mapping[str, Any]) -> AdapterContent:
        """Return an adapter with the stacks of experts, in the layout of PEFT.

        Raises
        ------
        FormatError
            If factors do not fit each other or the settings.
        """
        settings = Settings(self.tensors.label, config)
        stacks = {name: self._module(name, parts, settings) for name, parts in self.keys.items()}
        note = f"{len(stacks)} stacks of experts have tensors of three dimensions"
        whole = replace(adapter, modules={**adapter.modules, **stacks}, notes=[*adapter.notes, note])
        try:
            return expert_stacks.stacked(whole)
        except ValueError as error:
            raise FormatError(str(error)) from error

    def _module(self, name: str, parts: Mapping[str, str], settings: Settings) -> LoraModule:
        def fail(reason: str) -> NoReturn:
            raise FormatError(f"{self.tensors.label}: module {name!r}: {reason}")

        for factor in "AB":
            if factor not in parts:
                fail(f"has no lora_{factor}")
        shapes = self.tensors.shapes()
        a, b = shapes[parts["A"]], shapes[parts["B"]]
        copies = max(a[0], b[0])
        if a[0] not in (1, copies) or b[0] not in (1, copies) or a[1] != b[2] or 0 in (*a, *b):
            fail(f"factors of shapes {list(b)} and {list(a)} do not fit each other")
        rank, scaling = settings.rank_and_scaling(name)
        if rank != a[1]:
            fail(f"has rank {a[1]}, but the settings state {rank}")

        def arrange(b: Array, a: Array) -> Arrays:
            return [(b[e % len(b)], a[e % len(a)]) for e in range(copies)]

        factors = ArrayFactors(self.tensors, parts["B"], parts["A"], arrange)
        dtype = self.tensors.dtype(parts["B"])
        return LoraModule(name, "expert", (b[1], a[2]), rank, scaling, dtype, factors, copies)
