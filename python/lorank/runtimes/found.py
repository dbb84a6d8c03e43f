"""The properties of an adapter's files that decide how runtimes load them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorank.adapters.content import AdapterContent
from lorank.adapters.formats.base import AsStored
from lorank.adapters.formats.expert_layout import Parameter
from lorank.adapters.formats.image_keys import alpha_key
from lorank.adapters.formats.registry import format_of
from lorank.adapters.module import LoraModule
from lorank.modules import naming
from lorank.peft_format.fields import DEFAULT_ALPHA, DEFAULT_RANK
from lorank.peft_format.initialization import changes_the_base
from lorank.peft_format.names import BASE_WEIGHT, MAGNITUDE, holder, layer_key, layer_path
from lorank.peft_format.settings import Settings
from lorank.peft_format.validation import checked_kind
from lorank.runtimes.base_model import BaseModel
from lorank.runtimes.separate_experts import SeparateExperts

_NUMBERED = re.compile(r"(?P<stack>(?:.*?\.)?)(?P<block>\d{1,18})\.(?P<kind>.+)")


def _is_table(module: LoraModule) -> bool:
    """Return True if a module maps tokens to vectors or back."""
    return module.kind == "embedding" or naming.is_output_head(module.name)


@dataclass(frozen=True)
class Found:
    """The properties of an adapter that the rules of runtimes depend on.

    Attributes
    ----------
    stored
        The adapter with the ranks of the file's tensors, and its differences from the file, such as keys.
    base
        The base model; None if none was given.
    """

    stored: AsStored
    base: BaseModel | None = None

    @property
    def adapter(self) -> AdapterContent:
        """The adapter, with the ranks of its tensors even if the settings state others."""
        return self.stored.adapter

    @property
    def config(self) -> Mapping[str, Any]:
        """The settings as they are written; empty for image adapters."""
        return self.adapter.config

    @property
    def modules(self) -> list[LoraModule]:
        """The adapted modules."""
        return self.adapter.adapted

    @property
    def rank(self) -> float:
        """The global rank in the settings."""
        return float(self.config.get("r", DEFAULT_RANK))

    @property
    def alpha(self) -> float:
        """The global alpha in the settings."""
        return float(self.config.get("lora_alpha", DEFAULT_ALPHA))

    @property
    def largest_rank(self) -> int:
        """The largest rank of a tensor, with padding."""
        return max((module.rank for module in self.modules), default=0)

    @property
    def rank_stabilized(self) -> bool:
        """True if alpha is divided by the square root of the rank [RSLORA]."""
        return bool(self.config.get("use_rslora"))

    @property
    def dora(self) -> bool:
        """True if the adapter has magnitudes in addition to factors [DORA]."""
        return bool(self.config.get("use_dora"))

    @property
    def alora(self) -> bool:
        """True if the update applies only after its invocation tokens."""
        return bool(self.config.get("alora_invocation_tokens"))

    @property
    def replicated(self) -> bool:
        """True if the base model's layers are repeated before they are adapted."""
        return bool(self.config.get("layer_replication"))

    @cached_property
    def adalora(self) -> bool:
        """True if the file has the names and the third factor of AdaLoRA."""
        return checked_kind(self.adapter.label, self.config, changed_base=True) == "ADALORA"

    @property
    def base_change(self) -> str | None:
        """The initialisation that changed the base model; None if the model is unchanged."""
        return changes_the_base(self.config)

    @property
    def tied(self) -> bool:
        """True if the settings require one update for the embedding and the head."""
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def shares_tables(self) -> bool | None:
        """True if embedding and head are tied by the settings or in the base model; None if unknown."""
        if self.tied or self.base is None:
            return True if self.tied else None
        return bool(self.base.facts.ties)

    @property
    def swapped(self) -> tuple[Parameter, ...]:
        """Stacks of experts whose factors have the layout of PEFT before 0.19."""
        return self.stored.swapped

    @cached_property
    def alphas(self) -> dict[str, float]:
        """Alphas in an image adapter's file by module name; modules without one are absent."""
        tensors, keys = self.stored.tensors, self.stored.tensors.shapes()
        named = {module.name: alpha_key(module.name) for module in self.modules}
        return {name: tensors.number(key) for name, key in named.items() if key in keys}

    @property
    def others(self) -> list[str]:
        """The keys of trained tensors that are neither factors nor magnitudes nor biases of factors."""
        known = (MAGNITUDE, BASE_WEIGHT)
        return [key for key in self.adapter.carried if not any(part in key for part in known)]

    @property
    def base_copies(self) -> list[str]:
        """The keys of base weights, which PEFT saves with the factors of embeddings and heads."""
        return [key for key in self.adapter.carried if BASE_WEIGHT in key]

    @property
    def lora_biases(self) -> list[str]:
        """The keys of the biases that `lora_bias` adds."""
        return [layer_key(m.name, ending) for m in self.modules for ending in m.carried]

    @property
    def stacks(self) -> list[LoraModule]:
        """Modules whose parameter holds several experts in one tensor."""
        return [module for module in self.modules if module.copies > 1]

    @cached_property
    def separate_experts(self) -> SeparateExperts:
        """Experts that are separate modules, as in transformers 4."""
        return SeparateExperts.of(self.modules)

    def of_another_rank(self) -> list[LoraModule]:
        """Return the modules whose tensors have another rank than the global one."""
        return [module for module in self.modules if module.rank != self.rank]

    @cached_property
    def settings(self) -> Settings:
        """The settings, with PEFT's lookup of patterns."""
        return Settings(self.adapter.label, self.config)

    @cached_property
    def misfits(self) -> list[tuple[LoraModule, int]]:
        """Modules whose tensors have another rank than in the settings, with the rank in the settings."""
        if self.adalora:
            return []
        ranks = [(module, self.settings.rank_and_scaling(holder(module.name))[0]) for module in self.modules]
        return [(module, rank) for module, rank in ranks if module.rank != rank]

    def of_kinds(self, *kinds: str) -> list[LoraModule]:
        """Return the modules of these kinds."""
        return [module for module in self.modules if module.kind in kinds]

    @cached_property
    def wrapped(self) -> dict[str, str]:
        """Map a module's name to one of its keys, for modules whose keys contain a wrapper's name."""
        owners: dict[str, str] = {}
        for clean, key in self.stored.stored_as.items():
            owners.setdefault(layer_path(clean), key)
        names = {m.name: m.name.rpartition(".")[0] if m.kind == "expert" else m.name for m in self.modules}
        return {name: owners[path] for name, path in names.items() if path in owners}

    @cached_property
    def unprefixed(self) -> set[str]:
        """Names of modules whose keys lack the prefix that PEFT writes."""
        prefix = format_of(self.adapter).key_prefix
        owners = {layer_path(key) for key in self.stored.tensors.shapes() if not key.startswith(prefix)}
        return {m.name for m in self.modules if m.name in owners or m.name.rpartition(".")[0] in owners}

    @cached_property
    def unselected(self) -> list[str]:
        """Names of modules that have tensors although the targets in the settings leave them out."""
        targets, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        # If tables are tied and PEFT adapts one of them, it adapts all.
        names = [m.name for m in self.modules if m.kind != "expert" and not (self.tied and _is_table(m))]
        if targets is None:
            # Without target_modules, PEFT adapts only the parameters.
            return names if self.config.get("target_parameters") else []
        if targets == naming.ALL_LINEAR:
            return []
        label = f"{self.adapter.label}: the settings'"
        selects = naming.matcher(targets, f"{label} target_modules")
        excludes = naming.matcher(excluded or [], f"{label} exclude_modules")
        return [name for name in names if not selects(holder(name)) or excludes(holder(name))]

    def unequal_tables(self) -> tuple[LoraModule, LoraModule] | None:
        """Return an embedding and a head of different ranks that the settings tie; None if there are none."""
        if not self.tied:
            return None
        tables: dict[tuple[int, ...], list[LoraModule]] = defaultdict(list)
        for module in self.modules:
            if _is_table(module):
                tables[tuple(sorted(module.shape))].append(module)
        for first, *others in tables.values():
            for other in others:
                if other.rank != first.rank:
                    return first, other
        return None

    def blocks(self) -> dict[str, dict[str, set[int]]]:
        """Return the numbers of the adapted blocks: ``{stack of blocks: {type of module: numbers}}``."""
        found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        for module in self.modules:
            if numbered := _NUMBERED.fullmatch(module.name):
                found[numbered["stack"]][numbered["kind"]].add(int(numbered["block"]))
        return found

    def incomplete_types(self) -> list[str]:
        """Return the types of modules that are adapted in some blocks and not in others.

        The number of blocks in the model is unknown; the blocks up to the last adapted one are counted.
        """
        missing = []
        for kinds in self.blocks().values():
            count = max(max(numbers) for numbers in kinds.values()) + 1
            missing += [kind for kind, numbers in kinds.items() if len(numbers) != count]
        chosen = self.config.get("layers_to_transform") is not None
        return missing or [kind for kinds in self.blocks().values() for kind in kinds if chosen]
