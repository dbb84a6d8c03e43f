"""An adapter as a runtime finds it: its tensors and settings, and how far they agree."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorank import naming
from lorank.adapters.adapter import LoraAdapter
from lorank.adapters.module import LoraModule
from lorank.adapters.peft_format import PREFIX
from lorank.adapters.peft_settings import DEFAULT_ALPHA, DEFAULT_RANK, Settings, checked_kind

_NUMBERED = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<block>\d+)\.(?P<kind>.+)")


BASE_COPY = ".base_layer.weight"


@dataclass(frozen=True)
class Found:
    """What the rules of runtimes look at.

    Attributes
    ----------
    adapter
        With the ranks of the tensors, whatever the settings say.
    config
        The settings as they are written.
    """

    adapter: LoraAdapter
    config: Mapping[str, Any]

    @property
    def modules(self) -> list[LoraModule]:
        """The adapted modules."""
        return self.adapter.adapted

    @property
    def rank(self) -> float:
        """The settings' one rank."""
        return float(self.config.get("r", DEFAULT_RANK))

    @property
    def alpha(self) -> float:
        """The settings' one alpha."""
        return float(self.config.get("lora_alpha", DEFAULT_ALPHA))

    @property
    def rank_stabilized(self) -> bool:
        """Whether alpha is divided by the root of the rank."""
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        """Whether magnitudes go with the factors."""
        return bool(self.config.get("use_dora"))

    @property
    def adalora(self) -> bool:
        """Whether the file has AdaLoRA's names and its third factor."""
        return checked_kind(self.adapter.label, self.config) == "ADALORA"

    @property
    def others(self) -> list[str]:
        """The keys of trained tensors that are neither factors nor magnitudes nor biases of factors."""
        known = ("lora_magnitude_vector", BASE_COPY)
        return [key for key in self.adapter.carried if not any(part in key for part in known)]

    @property
    def base_copies(self) -> list[str]:
        """The keys of base weights, which PEFT saves beside the factors of embeddings and heads."""
        return [key for key in self.adapter.carried if BASE_COPY in key]

    @property
    def lora_biases(self) -> list[str]:
        """The keys of the biases that `lora_bias` adds."""
        return [f"{PREFIX}{m.name}.{ending}" for m in self.modules for ending in m.carried]

    def of_another_rank(self) -> list[LoraModule]:
        """Modules whose tensors have another rank than the settings' one."""
        return [module for module in self.modules if module.rank != self.rank]

    def misfits(self) -> list[tuple[LoraModule, int]]:
        """Modules whose tensors have another rank than the settings give them, and that rank."""
        if self.adalora:
            return []
        table = Settings(self.adapter.label, self.config)
        ranks = [(module, table.of(module.name)[0]) for module in self.modules]
        return [(module, rank) for module, rank in ranks if module.rank != rank]

    def of_kinds(self, *kinds: str) -> list[LoraModule]:
        """Modules of these kinds."""
        return [module for module in self.modules if module.kind in kinds]

    @cached_property
    def unselected(self) -> list[str]:
        """Names of modules that have tensors, but that the settings' targets leave out."""
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if targets is None or targets == naming.ALL_LINEAR:
            return []
        selects, excludes = naming.matcher(targets), naming.matcher(excluded or [])
        names = [module.name for module in self.modules if module.kind != "expert"]
        return [name for name in names if not selects(name) or excludes(name)]

    def incomplete_attention(self) -> str | None:
        """An attention layer with some of its query, key and value projections adapted, if there is one."""
        by_parent: dict[str, set[str]] = defaultdict(set)
        for module in self.modules:
            parent, _, last = module.name.rpartition(".")
            if last in ("q_proj", "k_proj", "v_proj"):
                by_parent[parent].add(last)
        return next((parent for parent, found in by_parent.items() if len(found) < 3), None)

    def blocks(self) -> dict[str, dict[str, set[int]]]:
        """The numbers of the blocks that are adapted, by the stack they are in and the type of module."""
        found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for module in self.modules:
            if numbered := _NUMBERED.fullmatch(module.name):
                found[numbered["stack"]][numbered["kind"]].add(int(numbered["block"]))
        return found

    def incomplete_types(self) -> list[str]:
        """Module types that some blocks of the model are known to adapt and others not.

        How many blocks the model has is not known, but that there are those up to the last adapted one.
        """
        missing = []
        for kinds in self.blocks().values():
            every = set(range(max(max(numbers) for numbers in kinds.values()) + 1))
            missing += [kind for kind, numbers in kinds.items() if numbers != every]
        chosen = self.config.get("layers_to_transform") is not None
        return missing or [kind for kinds in self.blocks().values() for kind in kinds if chosen]
