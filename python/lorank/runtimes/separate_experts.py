"""Experts that are modules of their own, `experts.N.gate_proj`, as transformers 4 had them.

transformers 5 holds the experts of a block in stacks, gate and up in one. What is loaded into such a model
has to fit in one stack: one rank for all experts, gate and up together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorank.adapters.module import LoraModule

_NAME = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<kind>\w+)")

GATES = ("gate_proj", "w1")
UPS = ("up_proj", "w3")
_FUSED = dict(zip(GATES, UPS, strict=True)) | dict(zip(UPS, GATES, strict=True))


@dataclass(frozen=True, slots=True)
class SeparateExperts:
    """The experts of every block, by the container that they lie in and the type of module.

    Attributes
    ----------
    by_stack
        Container -> type -> expert's number -> module.
    """

    by_stack: Mapping[str, Mapping[str, Mapping[int, LoraModule]]]

    @classmethod
    def of(cls, modules: Iterable[LoraModule]) -> SeparateExperts:
        """Collect the experts among modules."""
        found: dict[str, dict[str, dict[int, LoraModule]]] = defaultdict(lambda: defaultdict(dict))
        for module in modules:
            if name := _NAME.fullmatch(module.name):
                found[name["stack"]][name["kind"]][int(name["expert"])] = module
        return cls(found)

    def __bool__(self) -> bool:
        return bool(self.by_stack)

    @property
    def modules(self) -> list[LoraModule]:
        """All experts' modules."""
        return [m for kinds in self.by_stack.values() for experts in kinds.values() for m in experts.values()]

    def unequal(self) -> str:
        """Name the first container whose experts have several ranks; empty if there is none."""
        for stack, kinds in self.by_stack.items():
            for kind, experts in kinds.items():
                ranks = sorted({module.rank for module in experts.values()})
                if len(ranks) > 1:
                    return f"the experts' {kind} of {stack} have ranks from {ranks[0]} to {ranks[-1]}"
        return ""

    def without_partner(self) -> str:
        """Name the first container that adapts one of gate and up without the other; empty if none does."""
        for stack, kinds in self.by_stack.items():
            for kind in kinds:
                if kind in _FUSED and _FUSED[kind] not in kinds:
                    return f"{stack} adapts {kind} without {_FUSED[kind]}"
        return ""

    def missing(self) -> str:
        """Name the first expert that a container leaves out, as far as the others show; empty if none."""
        for stack, kinds in self.by_stack.items():
            count = 1 + max(max(experts) for experts in kinds.values())
            for kind, experts in kinds.items():
                if absent := set(range(count)) - set(experts):
                    return f"{stack}.{min(absent)}.{kind} has no adapter, other experts have"
        return ""
