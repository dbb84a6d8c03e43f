"""Experts that are separate modules, `experts.N.gate_proj`, as in transformers 4.

transformers 5 stacks the experts of a block, with gate and up in one parameter. An adapter for such a model
needs one rank for all experts of a stack, and adapts gate and up together.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lorank.adapters.module import LoraModule

_NAME = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d{1,18})\.(?P<kind>\w+)")

GATES = ("gate_proj", "w1")
UPS = ("up_proj", "w3")
_FUSED = dict(zip(GATES, UPS, strict=True)) | dict(zip(UPS, GATES, strict=True))


@dataclass(frozen=True, slots=True)
class SeparateExperts:
    """The experts of every block that are separate modules.

    Attributes
    ----------
    by_stack
        The module by the name of the container, the type of module and the number of the expert.
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
        """The modules of all experts."""
        return [m for kinds in self.by_stack.values() for experts in kinds.values() for m in experts.values()]

    def unequal(self) -> str:
        """Return a message about the first container whose experts differ in rank; empty if there is none."""
        for stack, kinds in self.by_stack.items():
            for kind, experts in kinds.items():
                ranks = sorted({module.rank for module in experts.values()})
                if len(ranks) > 1:
                    return f"{kind} of the experts in {stack} has ranks from {ranks[0]} to {ranks[-1]}"
        return ""

    def without_partner(self) -> str:
        """Return a message about the first container with gate or up alone; empty if there is none."""
        for stack, kinds in self.by_stack.items():
            for kind in kinds:
                if kind in _FUSED and _FUSED[kind] not in kinds:
                    return f"{stack} adapts {kind} without {_FUSED[kind]}"
        return ""

    def missing(self) -> str:
        """Return a message about the first expert that lacks an adapter; empty if there is none."""
        for stack, kinds in self.by_stack.items():
            count = 1 + max(max(experts) for experts in kinds.values())
            for kind, experts in kinds.items():
                if len(experts) != count:
                    absent = next(number for number in range(count) if number not in experts)
                    return f"{stack}.{absent}.{kind} has no adapter, but other experts have one"
        return ""
